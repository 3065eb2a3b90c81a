"""What holds for the repository as a whole: its layout, its rules, and the commands its README shows."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from biote.port import installed_ports

ROOT = Path(__file__).parent.parent
MODELS = sorted(path.parent for path in ROOT.glob("models/*/pyproject.toml"))
FILES = [
    "Dockerfile", ".dockerignore", "pyproject.toml", "README.md", "model_readme.md", "export.py", "LICENSE",
    "src/{name}/__init__.py", "src/{name}/{name}_te.py", "src/{name}/convert.py", "src/{name}/tokenizer.py",
    "tests/conftest.py", "tests/make_golden.py", "tests/golden/golden_values.safetensors",
    "tests/test_golden_values.py", "tests/test_conversion.py", "tests/test_checkpoint.py",
]  # fmt: skip


@pytest.mark.parametrize("model", MODELS, ids=lambda path: path.name)
def test_every_model_has_the_same_files(model):
    missing = [name for name in (file.format(name=model.name) for file in FILES) if not (model / name).is_file()]
    assert not missing
    assert model.name in installed_ports()


def test_every_model_is_type_checked():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    sources = {f"models/{model.name}/src" for model in MODELS}
    assert sources <= set(settings["files"])
    assert sources <= set(settings["mypy_path"].split(":"))


def test_the_core_knows_no_model():
    names = "|".join(["esm", "amplify", "geneformer", *(model.name for model in MODELS)])
    for path in ROOT.glob("src/biote/**/*.py"):
        found = re.findall(rf"\b(?:{names})\w*", path.read_text(), flags=re.IGNORECASE)
        assert not found, f"{path}: {found}"


def test_a_model_imports_only_the_runtime_and_no_other_model():
    for model in MODELS:
        others = [other.name for other in MODELS if other != model]
        for path in model.glob("src/**/*.py"):
            imported = re.findall(r"^\s*(?:from|import)\s+([\w.]+)", path.read_text(), flags=re.M)
            assert not {name.split(".")[0] for name in imported} & set(others)
            if path.name.endswith("_te.py"):
                assert all(name.startswith("biote.runtime") for name in imported if name.startswith("biote"))


def readme_block(language: str, containing: str) -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    return next(block for block in blocks if containing in block)


def run_as_newcomer(command: list[str], text: str, folder: Path, environment: dict[str, str]) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        input=text,
        cwd=folder,
        env={**os.environ, **environment, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_readme_loads_a_model(tmp_path, hub_cache):
    code = (
        readme_block("python", "from_original")
        + "assert logits.shape == (2, 24, 33)\nassert not logits[1, 11:].any()\n"
    )
    run_as_newcomer([sys.executable, "-W", "error", "-"], code, tmp_path, hub_cache)


def test_the_readme_commands_run(tmp_path, hub_cache):
    run_as_newcomer(["bash", "-e"], readme_block("sh", "biote convert"), tmp_path, hub_cache)
    assert (tmp_path / "build" / "hub" / "README.md").is_file()


@pytest.mark.hub
def test_a_published_checkpoint_equals_the_original():
    import torch
    from transformers import EsmForMaskedLM

    from biote_esm2 import Esm2TEForMaskedLM, build_tokenizer

    name = "facebook/esm2_t6_8M_UR50D"
    ids = build_tokenizer()(["MKTAYIAKQRQISFVKSHFSRQ"], return_tensors="pt")["input_ids"]
    ours = Esm2TEForMaskedLM.from_original(name, dtype=torch.float64, engine="torch").eval()
    theirs = EsmForMaskedLM.from_pretrained(name, dtype=torch.float64).eval()
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-8)
