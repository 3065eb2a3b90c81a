"""Every folder in our layout carries its code: AutoModel loads it in a process without biote and ports."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, Trainer, TrainingArguments

from biote.convert import convert_folder
from biote.files import read_json
from biote.port import ModelPort, installed_ports

BLOCKED = ["biote", *(port.package for port in installed_ports().values())]
ELSEWHERE = """
import json, sys
sys.modules.update(dict.fromkeys({blocked!r}))
import torch, transformers
from safetensors.torch import load_file, save_file
transformers.logging.set_verbosity_error()
def run(folder):
    model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True, engine="torch").eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        save_file({{"output": model(**load_file({inputs!r}))[0]}}, folder + ".output")
    return model
for folder, auto in {folders!r}:
    config = (model := run(folder)).config  # its auto_map as of a model from the Hub
    config.auto_map = {{key: "someone/repository--" + name for key, name in config.auto_map.items()}}
    model.save_pretrained(folder + "-again")
    run(folder + "-again")
"""


def run_elsewhere(folders: list[tuple[str, str]], inputs: Path, scratch: Path) -> None:
    """Load each folder by its Auto class and its own code, keep its output beside it, and again after saving it."""
    code = ELSEWHERE.format(blocked=BLOCKED, folders=folders, inputs=str(inputs))
    environment = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch / "modules"), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=scratch, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def golden_of(port: ModelPort, root: Path) -> Path:
    return root / "models" / port.name / "tests" / "golden"


def test_every_folder_that_is_written_loads_elsewhere(port, root, tmp_path):
    """From convert, from a model of from_original, a Trainer's checkpoint, an export saved where the port is known."""
    golden = golden_of(port, root)
    batch = port.example_batch()
    save_file(batch, tmp_path / "inputs")
    convert_folder(golden, tmp_path / "converted", "te")
    model = port.classes["AutoModelForMaskedLM"].from_original(str(golden), engine="torch").eval()
    model.save_pretrained(tmp_path / "saved")
    model.base_model.save_pretrained(tmp_path / "bare")
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    Trainer(model, arguments).save_model(str(tmp_path / "checkpoint"))
    shutil.copytree(tmp_path / "converted", tmp_path / "hub")
    for code in (tmp_path / "hub").glob("*.py"):  # as an export, whose code need not be ours of today
        code.write_text(code.read_text() + "\n")
    known = AutoModelForMaskedLM.from_pretrained(tmp_path / "hub", trust_remote_code=True, engine="torch")
    assert type(known) is type(model), "where the port is imported, its own class serves"
    known.save_pretrained(tmp_path / "known")
    names = ["converted", "saved", "checkpoint", "known"]
    folders = [(str(tmp_path / name), "AutoModelForMaskedLM") for name in names]
    run_elsewhere([*folders, (str(tmp_path / "bare"), "AutoModel")], tmp_path / "inputs", tmp_path)
    with torch.no_grad():
        expected, states = model(**batch).logits, model.base_model(**batch).last_hidden_state
    config = read_json(tmp_path / "converted" / "config.json")
    assert set(config["auto_map"]) == {"AutoConfig", *port.classes}
    for name in [*names, "bare"]:
        for folder in (tmp_path / name, tmp_path / f"{name}-again"):
            assert read_json(folder / "config.json")["auto_map"] == config["auto_map"]
            found = load_file(f"{folder}.output")["output"]
            torch.testing.assert_close(found, states if name == "bare" else expected)


def test_code_is_in_place_before_an_upload(port, tmp_path, monkeypatch):
    """save_pretrained(push_to_hub=True) uploads what appeared while it ran."""
    uploaded: list[set[str]] = []
    hub = SimpleNamespace(create_repo=lambda repo_id, **_: SimpleNamespace(repo_id=repo_id))
    card = SimpleNamespace(save=lambda path: None)
    monkeypatch.setattr(transformers.modeling_utils, "create_and_tag_model_card", lambda *_, **__: card)
    for module, cls in (
        (transformers.modeling_utils, transformers.PreTrainedModel),
        (transformers.configuration_utils, transformers.PreTrainedConfig),
    ):
        monkeypatch.setattr(module, "hf_api", lambda: hub)
        monkeypatch.setattr(
            cls, "_upload_modified_files",
            lambda self, folder, repo, before, **_: uploaded.append(set(os.listdir(folder)) - set(before)),
        )  # fmt: skip
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = port.config_class(**shape, vocab_size=40, engine="torch")
    port.classes["AutoModel"](config).save_pretrained(tmp_path / "model", push_to_hub=True, repo_id="me/model")
    config.save_pretrained(str(tmp_path / "config"), push_to_hub=True, repo_id="me/config")
    assert len(uploaded) == 2
    assert all({"config.json", "encoder.py", f"{port.name}_te.py"} <= names for names in uploaded)


def test_a_class_of_the_users_own_keeps_what_transformers_does(port, tmp_path):
    own = type("OwnConfig", (port.config_class,), {"__module__": __name__})
    own(engine="torch").save_pretrained(tmp_path / "plain")
    assert os.listdir(tmp_path / "plain") == ["config.json"]
    own.register_for_auto_class()
    own(engine="torch").save_pretrained(tmp_path / "registered")
    assert sorted(os.listdir(tmp_path / "registered")) == ["config.json", Path(__file__).name]
    found = read_json(tmp_path / "registered" / "config.json")["auto_map"]
    assert found == {"AutoConfig": f"{Path(__file__).stem}.OwnConfig"}
