"""Verification: its rules at their edges, and how it is run."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from biote.convert import convert_folder
from biote.export import export
from biote.files import WEIGHTS, read_json
from biote.runtime.verify import ATOL, FEW, FEW_FACTOR, GOLDEN_FILE, NOISE_FACTOR, RTOL, check_outputs, main

GOLDEN = {"logits": torch.tensor([3.0, -4.0], dtype=torch.float64)}


@pytest.mark.parametrize(("factor", "passed"), [(0.99, True), (1.01, False)])
def test_float64_is_judged_element_by_element(factor, passed):
    found = {"logits": GOLDEN["logits"] + torch.tensor([0.0, factor * (ATOL + 4 * RTOL)], dtype=torch.float64)}
    (check,) = check_outputs(found, GOLDEN, {}, "float64", "torch")
    assert check.passed == passed


@pytest.mark.parametrize(("numbers", "allowed"), [(FEW, NOISE_FACTOR), (FEW - 1, FEW_FACTOR)])
@pytest.mark.parametrize(("factor", "passed"), [(0.99, True), (1.01, False)])
def test_lower_dtypes_are_judged_by_the_originals_own_error(numbers, allowed, factor, passed):
    """Relative L2: the golden vector's length is 5; few numbers are allowed more."""
    golden = torch.zeros(numbers, dtype=torch.float64)
    golden[:2] = GOLDEN["logits"]
    found = golden.clone()
    found[1] += 5 * 0.02 * allowed * factor
    (check,) = check_outputs({"x": found}, {"x": golden}, {"bfloat16": {"x": 0.02}}, "bfloat16", "torch")
    assert check.passed == passed


def test_nan_never_passes():
    found = {"logits": torch.tensor([3.0, float("nan")], dtype=torch.float64)}
    checks = check_outputs(found, GOLDEN, {"float32": {"logits": 1.0}}, "float32", "torch")
    assert not [check for check in [*checks, *check_outputs(found, GOLDEN, {}, "float64", "torch")] if check.passed]


def test_a_golden_file_without_provenance_is_one_line(tmp_path, monkeypatch):
    save_file({"logits": torch.ones(1)}, tmp_path / GOLDEN_FILE)
    monkeypatch.setattr(sys, "argv", ["verify.py", str(tmp_path)])
    with pytest.raises(SystemExit, match=f"^error: {GOLDEN_FILE} lacks 'provenance'$"):
        main()


@pytest.fixture(scope="module")
def exported(tiny_original, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "hub"
    export(str(tiny_original), folder)
    return folder


@pytest.fixture
def hub(exported, tmp_path) -> Path:
    """An export that a test may change."""
    return shutil.copytree(exported, tmp_path / "hub")


STRANGER = """
import json, os, pathlib, sys
pathlib.Path({mark!r}).write_text(json.dumps(dict(os.environ)))
if "--json" in sys.argv:
    pathlib.Path(sys.argv[-1]).write_text('[{{"engine": "torch"}}]')
"""


def test_a_strangers_verifier_decides_nothing(hub, tmp_path, biote, monkeypatch):
    """Neither verify.py runs, nor what lies beside it under a standard module's name, nor the model's code."""
    mark = tmp_path / "mark"
    code = STRANGER.format(mark=str(mark))
    for name in ("verify.py", "json.py", "torch.py", "esm2_te.py", "sitecustomize.py"):
        (hub / name).write_text(code)
    monkeypatch.chdir(hub)
    status, out, _ = biote("verify", hub)
    assert (status, out.splitlines()[-1]) == (0, f"{hub} reproduces the golden values in it; its own code was not run")
    state = load_file(hub / WEIGHTS)
    state["lm_head.dense.weight"] *= 1.001
    save_file(state, hub / WEIGHTS)
    status, _, error = biote("verify", hub)
    assert (status, error) == (1, "error: the checkpoint does not reproduce the original's golden values\n")
    assert not mark.exists()


def test_a_folders_own_code_is_run_by_name_and_sees_no_token(hub, tmp_path, biote, monkeypatch):
    (hub / "verify.py").write_text(STRANGER.format(mark=str(tmp_path / "mark")))
    (hub / "json.py").write_text("raise SystemExit('shadowed')")
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "ANYTHING"):
        monkeypatch.setenv(name, "secret")
    status, out, error = biote("verify", hub, "--run-code")
    assert (status, out) == (0, f"{hub} reproduces the golden values in it, by its own code and verifier\n"), error
    seen = json.loads((tmp_path / "mark").read_text())
    assert "secret" not in seen.values()
    assert seen["HOME"] != str(Path.home())


def change_golden(hub, tensors=None, **provenance):
    path = hub / GOLDEN_FILE
    with safe_open(path, "pt") as file:
        record = {**json.loads(file.metadata()["provenance"]), **provenance}
    found = load_file(path)
    save_file(found if tensors is None else tensors(found), path, {"provenance": json.dumps(record)})


def without(name):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"auto_class": "AutoModel"}, "was made by AutoModel, but config.json names AutoModelForMaskedLM's class"),
        ({"auto_class": "AutoModelForTokenClassification"}, "but config.json names AutoModelForMaskedLM's class"),
        ({"tensors": without("logits")}, "golden_values.safetensors lacks 'logits'"),
        ({"tensors": without("contacts")}, "golden_values.safetensors lacks 'contacts'"),
        ({"noise": {}}, "golden_values.safetensors lacks 'float32'"),
    ],
)
def test_golden_values_that_would_check_less_are_refused(hub, biote, change, message):
    change_golden(hub, **change)
    status, _, error = biote("verify", hub)
    assert (status, error.count("\n")) == (1, 1)
    assert message in error


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_other_keys_than_the_models_are_refused(hub, biote, change):
    state = load_file(hub / WEIGHTS)
    state = without("lm_head.decoder.bias")(state) if change == "missing" else {**state, "x": torch.zeros(1)}
    save_file(state, hub / WEIGHTS)
    status, _, error = biote("verify", hub)
    assert (status, error.count("\n")) == (1, 1)
    assert f"1 problem: {change} " in error


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_against_the_original(tiny_original, tmp_path, biote, dtype):
    convert_folder(tiny_original, tmp_path / "te", "te", dtype=dtype, max_shard_bytes=20_000)
    status, out, _ = biote("verify", tmp_path / "te", "--against", tiny_original)
    assert (status, out) == (0, f"{tmp_path / 'te'} has {tiny_original}'s configuration and its 47 tensors\n")


def test_against_an_original_that_differs(tiny_original, tmp_path, biote):
    convert_folder(tiny_original, tmp_path / "te", "te")
    state = load_file(tmp_path / "te" / WEIGHTS)
    state["model.rotary.0.inv_freq"][-1] += 1e-7
    state["model.layers.1.mlp.fc1.bias"][0] += 1e-3
    save_file(state, tmp_path / "te" / WEIGHTS)
    config = read_json(tmp_path / "te" / "config.json")
    (tmp_path / "te" / "config.json").write_text(json.dumps({**config, "token_dropout": False}))
    status, _, error = biote("verify", tmp_path / "te", "--against", tiny_original)
    assert (status, error.count("\n")) == (1, 1)
    named = error.strip().rpartition(" differs from ")[2].partition(" in ")[2].split(", ")
    assert sorted(named) == ["model.layers.1.mlp.fc1.bias", "model.rotary.0.inv_freq", "token_dropout"]


def test_an_original_brings_no_more_than_its_weights(tiny_original, tmp_path, biote):
    """Nor a pickle that its config.json names, nor an adapter, nor kernels, nor quantisation."""
    source = shutil.copytree(tiny_original, tmp_path / "source", ignore=shutil.ignore_patterns("golden*"))
    torch.save({"x": torch.zeros(1)}, source / "adapter_model.bin")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "me/mine", "target_modules": ["query"]}
    (source / "adapter_config.json").write_text(json.dumps(adapter))
    more = {
        "transformers_weights": "adapter_model.bin", "attn_implementation": "flash_attention_3",
        "quantization_config": {"quant_method": "fp8"}, "auto_map": {"AutoModel": "code.Class"},
    }  # fmt: skip
    (source / "config.json").write_text(json.dumps({**read_json(source / "config.json"), **more}))
    status, _, error = biote("export", source, tmp_path / "hub")
    assert (status, error) == (0, "")
    assert biote("verify", tmp_path / "hub", "--against", tiny_original)[0] == 0
    assert not {"transformers_weights", "quantization_config"} & set(read_json(tmp_path / "hub" / "config.json"))
