"""The command line on good and bad input: one line, no traceback, nothing written."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from biote import __version__, cli, export
from biote.files import INDEX, WEIGHTS


@pytest.fixture
def source(tmp_path, tiny_original):
    """A copy of the tiny original that a test may damage."""
    shutil.copytree(tiny_original, tmp_path / "source", ignore=shutil.ignore_patterns("golden*"))
    return tmp_path / "source"


def damage_nan(folder):
    state = load_file(folder / WEIGHTS)
    state["lm_head.dense.weight"][3, 4] = torch.nan
    save_file(state, folder / WEIGHTS)


def damage_truncate(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def damage_pickle(folder):
    torch.save({}, folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def damage_index(folder):
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.bias": "../elsewhere.safetensors"}}))


def damage_missing(folder):
    state = load_file(folder / WEIGHTS)
    save_file({key: tensor for key, tensor in state.items() if "lm_head.dense" not in key}, folder / WEIGHTS)


def edit_config(**changes):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return damage


DAMAGES = {
    "nan": (damage_nan, "lm_head.dense.weight holds NaN"),
    "truncated": (damage_truncate, "truncated or not a safetensors file"),
    "pickle": (damage_pickle, "never loaded"),
    "index outside": (damage_index, "points outside its folder: ../elsewhere.safetensors"),
    "missing keys": (damage_missing, "2 problems: missing lm_head.dense.weight; missing lm_head.dense.bias"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "holds neither"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json does not exist"),
    "config no JSON": (lambda folder: (folder / "config.json").write_text("{"), "is not valid JSON"),
    "other model": (edit_config(model_type="llama"), "model_type 'llama' fits no port"),
    "no head named": (edit_config(architectures="EsmForMaskedLM"), "architectures is 'EsmForMaskedLM', where a list"),
    "no heads at all": (edit_config(num_attention_heads=0), "config.json of"),
    "hidden size in words": (edit_config(hidden_size="many"), "config.json of"),
    "other head": (edit_config(architectures=["EsmForProteinFolding"]), "'EsmForProteinFolding' is not supported"),
    "other ESM": (edit_config(position_embedding_type="absolute"), "position_embedding_type='absolute'"),
    "wrong shape": (edit_config(intermediate_size=48), "mis-shaped"),
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("command", ["convert", "export"])
def test_a_bad_checkpoint_is_one_line_and_nothing_is_written(biote, source, tmp_path, command, name):
    damage, message = DAMAGES[name]
    damage(source)
    status, _, error = biote(command, source, tmp_path / "out", *(["--to", "te"] if command == "convert" else []))
    assert status == 1
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "many"}, {"num_attention_heads": 0}, {"hidden_dropout_prob": "0"}, {"id2label": "x"},
        {"dtype": "x"}, {"pad_token_id": 99}, {"vocab_size": -1}, {"hidden_act": "silu"},
    ],
)  # fmt: skip
def test_a_damaged_config_of_ours_is_one_line(biote, source, tmp_path, changes):
    assert biote("convert", source, tmp_path / "te", "--to", "te")[0] == 0
    edit_config(**changes)(tmp_path / "te")
    for command in (["convert", tmp_path / "te", tmp_path / "out", "--to", "hf"], ["export", tmp_path / "te", "out"]):
        status, _, error = biote(*command)
        assert (status, error.count("\n")) == (1, 1)
        assert "config.json of" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "te"]


BAD_ARGUMENTS = {
    "unknown format": (["--to", "onnx"], "unknown format 'onnx'; esm2 has te, hf, nvidia"),
    "same format": (["--to", "hf"], "in the 'hf' format already"),
    "unknown port": (["--to", "te", "--port", "esm9"], "unknown port 'esm9'; installed: "),
    "unknown dtype": (["--to", "te", "--dtype", "int3"], "unknown dtype 'int3'"),
    "small dtype": (["--to", "te", "--dtype", "float16"], "esm.contact_head.regression.bias holds 1e+06, which torch"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments(biote, source, tmp_path, name):
    arguments, message = BAD_ARGUMENTS[name]
    state = load_file(source / WEIGHTS)
    save_file({**state, "esm.contact_head.regression.bias": torch.tensor([1e6])}, source / WEIGHTS)
    status, _, error = biote("convert", source, tmp_path / "out", *arguments)
    assert (status, error.count("\n")) == (1, 1)
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_existing_output_is_left_alone(biote, source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    for arguments in (["convert", source, tmp_path / "out", "--to", "te"], ["export", source, tmp_path / "out"]):
        status, _, error = biote(*arguments)
        assert (status, error.count("\n")) == (1, 1)
        assert "exists already" in error
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize("name", ["no/such/folder/at-all", "facebook/esm2_t6_8M_UR50D", "esm2_t6_8M_UR50D", "esm2_t7"])
def test_what_is_neither_here_nor_on_the_hub(tmp_path, name):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "empty")}
    command = [sys.executable, "-m", "biote.cli", "convert", name, str(tmp_path / "out"), "--to", "te"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert name in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_convert_there_and_back_and_between_foreign_formats(biote, source, tmp_path):
    assert biote("convert", source, tmp_path / "te", "--to", "te")[0] == 0
    assert biote("convert", tmp_path / "te", tmp_path / "back", "--to", "hf", "--max-shard-gb", "0.001")[0] == 0
    assert biote("convert", source, tmp_path / "nvidia", "--to", "nvidia", "--dtype", "bfloat16")[0] == 0
    state = load_file(tmp_path / "nvidia" / WEIGHTS)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "nvidia" / "config.json").read_text())["dtype"] == "bfloat16"
    assert not list(tmp_path.glob(".*"))


def test_a_folder_may_have_any_name_and_a_shard_a_size(biote, source, tmp_path):
    status, out, _ = biote("convert", source, tmp_path / "[bold]out[/]", "--to", "te")
    assert (status, out) == (0, f"wrote {tmp_path}/[bold]out[/]\n")
    assert biote("convert", source, tmp_path / "other", "--to", "te", "--max-shard-gb", "inf")[0] == 2


def test_list_and_env(biote):
    status, out, _ = biote("list")
    assert status == 0
    assert any("esm2_t48_15B_UR50D" in line and "facebook/esm2_t48_15B_UR50D" in line for line in out.splitlines())
    status, out, _ = biote("env")
    assert status == 0
    assert torch.__version__ in out


def test_export_writes_a_valid_card(source, tmp_path):
    export.export(str(source), tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "mit"
    assert card.data.library_name == "transformers"
    assert 'from_pretrained("YOUR_NAME/source", trust_remote_code=True)' in card.text
    assert "| torch | float64 | logits |" in card.text


def test_export_of_our_own_layout_rounded(biote, source, tmp_path):
    """Its dtype and shards are as asked for, strangers stay out, and layers its user quantised do not hinder it."""
    assert biote("convert", source, tmp_path / "te", "--to", "te")[0] == 0
    config = json.loads((tmp_path / "te" / "config.json").read_text())
    (tmp_path / "te" / "config.json").write_text(json.dumps({**config, "layer_precision": "fp8"}))
    (tmp_path / "te" / "trainer_state.json").write_text("{}")
    for file in (tmp_path / "te").glob("tokenizer*"):
        file.unlink()
    export.export(str(tmp_path / "te"), tmp_path / "out", dtype=torch.bfloat16, max_shard_bytes=50_000)
    assert "weights rounded to bfloat16" in (tmp_path / "out" / "README.md").read_text()
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {INDEX, "tokenizer.json"} <= names
    assert "trainer_state.json" not in names
    tensors = [tensor for file in (tmp_path / "out").glob("model-*") for tensor in load_file(file).values()]
    assert {tensor.dtype for tensor in tensors if tensor.dim() == 2} == {torch.bfloat16}


def test_verify_refuses_a_folder_that_is_no_export(biote, source):
    status, _, error = biote("verify", source)
    assert (status, error.count("\n")) == (1, 1)
    assert "is in the 'hf' format; golden values are checked in our own" in error


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["convert", "-h"], ["verify", "--help"]])
def test_help_is_asked_for_either_way(biote, arguments):
    status, out, _ = biote(*arguments)
    assert (status, "Usage" in out) == (0, True)


def test_the_version(biote):
    assert biote("--version")[:2] == (0, f"biote {__version__}\n")


def test_python_m_biote_reads_no_module_of_the_folder_it_is_called_in(tmp_path):
    for name in ("json", "typer", "signal"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadowed')")
    done = subprocess.run([sys.executable, "-m", "biote", "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"biote {__version__}\n", "")


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("esm2_t6_8M_UR50", "did you mean esm2_t6_8M_UR50D"),
        ("ESM2_T33_650M_UR50D", "did you mean esm2_t33_650M_UR50D"),
        ("Amplify_120M", "did you mean AMPLIFY_120M"),
        ("", "the name of the source is empty"),
    ],
)
def test_a_name_that_is_nearly_right(biote, tmp_path, source, hint):
    status, _, error = biote("convert", source, tmp_path / "out", "--to", "te")
    assert (status, error.count("\n")) == (1, 1)
    assert hint in error


def test_an_original_is_not_loaded_as_ours(port, root):
    golden = root / "models" / port.name / "tests" / "golden"
    cls = port.classes["AutoModelForMaskedLM"]
    with pytest.raises(ValueError, match=rf"holds a model of type .*loaded by {cls.__name__}\.from_original$"):
        cls.from_pretrained(golden)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            AttributeError("no\nsuch\tthing"),
            "error: no such thing (unexpected AttributeError; BIOTE_TRACEBACK=1 shows",
        ),
        (RuntimeError("bad\nException raised from x.cpp (frame #0)"), "error: bad\n"),
        (ValueError("\x1b[31mred\x07\u202e"), "error: ?[31mred??\n"),
        (ValueError("x" * 10**6), f"error: {'x' * 1196} ...\n"),
        (KeyError(), "error: KeyError (unexpected KeyError"),
    ],
)
def test_every_error_is_one_short_line(capsys, error, line):
    def command():
        raise error

    with pytest.raises(SystemExit) as stopped:
        cli.run(command)
    said = capsys.readouterr().err
    assert (stopped.value.code, said.count("\n"), said.startswith(line)) == (1, 1, True), said


def test_every_warning_is_one_short_line():
    """In a process of its own: pytest takes warnings before they are shown."""
    code = (
        "import warnings\nfrom biote.cli import run\n"
        "def command():\n"
        "    warnings.warn('2 of 7 cells\\n\\x07have', stacklevel=1)\n    warnings.warn('x' * 9999, FutureWarning)\n"
        "run(command)\nwarnings.warn('after')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said = done.stderr.splitlines()
    assert said[:2] == ["warning: 2 of 7 cells ?have", f"warning: {'x' * 1196} ..."]
    assert said[2].endswith("UserWarning: after")  # whoever calls `run` has Python's own again


def test_where_an_error_came_from_is_shown_if_asked_for(monkeypatch):
    monkeypatch.setenv("BIOTE_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: print(1 / 0))
