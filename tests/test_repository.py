"""What holds for the repository as a whole: its layout, its rules, and the commands its README shows."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

import biote
from biote.port import installed_ports

ROOT = Path(__file__).parent.parent
MODELS = sorted(path.parent for path in ROOT.glob("models/*/pyproject.toml"))
FILES = [
    "Dockerfile", ".dockerignore", "pyproject.toml", "README.md", "model_readme.md", "export.py", "LICENSE",
    "src/{name}/__init__.py", "src/{name}/{name}_te.py", "src/{name}/convert.py", "src/{name}/tokenizer.py",
    "src/{name}/py.typed", "src/{name}/LICENSE", "src/{name}/model_readme.md",
    "tests/conftest.py", "tests/make_golden.py", "tests/golden/golden_values.safetensors",
    "tests/test_golden_values.py", "tests/test_conversion.py", "tests/test_checkpoint.py",
]  # fmt: skip


@pytest.mark.parametrize("model", MODELS, ids=lambda path: path.name)
def test_every_model_has_the_same_files(model):
    missing = [name for name in (file.format(name=model.name) for file in FILES) if not (model / name).is_file()]
    assert not missing
    assert model.name in installed_ports()


def test_every_model_imports_under_a_name_of_its_own():
    """`geneformer` is also the original's package; the folder keeps the name, the import has a prefix."""
    for model in MODELS:
        settings = tomllib.loads((model / "pyproject.toml").read_text())
        name = f"biote_{model.name}"
        assert settings["tool"]["setuptools"]["package-dir"] == {name: f"src/{model.name}"}
        assert installed_ports()[model.name].package == name
        assert importlib.util.find_spec(name).origin == str(model / "src" / model.name / "__init__.py")
        assert importlib.util.find_spec(model.name) is None, "or the original's package is installed here"


def test_core_and_ports_have_one_version():
    for model in MODELS:
        project = tomllib.loads((model / "pyproject.toml").read_text())["project"]
        assert project["version"] == biote.__version__
        assert f"biote=={biote.__version__}" in project["dependencies"]
        extras = {name: [f"biote[{name}]=={biote.__version__}"] for name in ("te", "test")}
        assert project["optional-dependencies"] == extras


def test_every_model_has_the_same_dockerfile():
    """But for its name: so that the base image, and the reason for it, stand in one place for all."""
    texts = {(model / "Dockerfile").read_text().replace(model.name, "NAME") for model in MODELS}
    assert len(texts) == 1
    (text,) = texts
    assert "docker build -t NAME_test . && docker run --rm -it --gpus all NAME_test pytest -v ." in text
    (base,) = re.findall(r"^ARG BASE_IMAGE=(\S+)$", text, flags=re.M)
    assert base in (ROOT / "models" / "README.md").read_text()


def test_every_model_is_type_checked():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]
    assert {"biote", *(f"biote_{model.name}" for model in MODELS)} <= set(settings["packages"])
    assert "ignore_missing_imports" not in settings, "a port that mypy cannot find would become Any"


def test_a_wrong_type_in_a_port_fails_lint(tmp_path):
    """mypy as `make lint` runs it, with a copy of a port in the place of the port."""
    port = shutil.copytree(ROOT / "models" / "esm2" / "src" / "esm2", tmp_path / "biote_esm2")
    command = [sys.executable, "-m", "mypy", "-p", "biote_esm2"]
    environment = {**os.environ, "MYPYPATH": str(tmp_path)}
    right = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert right.returncode == 0, right.stdout + right.stderr
    with (port / "tokenizer.py").open("a") as file:
        file.write("\nwrong: int = build_tokenizer()\n")
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 1
    assert "Incompatible types in assignment" in found.stdout


def test_help_comes_at_once():
    """Within half a second, the best of a few runs; neither torch nor transformers is imported for it."""
    code = "import sys, biote.cli; print(*{'torch', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
    for command in (["-m", "biote.cli", "--help"], ["-c", "import biote"]):
        seconds = []
        for _ in range(4):
            begun = time.perf_counter()
            subprocess.run([sys.executable, *command], capture_output=True, check=True)
            seconds.append(time.perf_counter() - begun)
        assert min(seconds) < 0.5, command


def test_wheels_hold_the_packages_whole(tmp_path):
    """What the README's pip command builds of core and ports, without the checkout, imports and finds its ports."""
    source, site = tmp_path / "source", tmp_path / "site"
    skip = shutil.ignore_patterns("tests", "golden", "*.egg-info", "build", "__pycache__")
    for folder in ("src", "models"):
        shutil.copytree(ROOT / folder, source / folder, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip, verb, *packages = shlex.split(readme_block("sh", "pip install"))
    assert (pip, verb, packages) == ("pip", "install", [".", *(f"./models/{model.name}" for model in MODELS)])
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    install = [sys.executable, "-m", "pip", "install", "--quiet", *offline, "--target", str(site)]
    subprocess.run([*install, *packages], cwd=source, check=True, capture_output=True)
    for package in ("biote", *(f"biote_{model.name}" for model in MODELS)):
        assert (site / package / "py.typed").is_file()
    for model in MODELS:
        assert {"LICENSE", "model_readme.md"} <= {file.name for file in (site / f"biote_{model.name}").iterdir()}
    code = "import biote, biote.port; print(biote.__file__, *sorted(biote.port.installed_ports()))"
    found = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(site)}, cwd=tmp_path, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert found.stdout.split() == [str(site / "biote" / "__init__.py"), *sorted(model.name for model in MODELS)]


def test_the_core_knows_no_model():
    names = "|".join(["esm", "amplify", "geneformer", *(model.name for model in MODELS)])
    for path in ROOT.glob("src/biote/**/*.py"):
        found = re.findall(rf"\b(?:{names})\w*", path.read_text(), flags=re.IGNORECASE)
        assert not found, f"{path}: {found}"


def test_a_model_imports_only_the_runtime_and_no_other_model():
    for model in MODELS:
        others = [f"biote_{other.name}" for other in MODELS if other != model]
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


def test_the_readmes_first_screen(tmp_path, hub_cache):
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    run_as_newcomer(["bash", "-e"], readme_block("sh", "biote embed"), tmp_path, hub_cache)
    assert len((tmp_path / "scan.csv").read_text().splitlines()) == 77
    code = readme_block("python", "embeddings.parquet") + (
        "import numpy\nassert numpy.stack(vectors).shape == (12, 64)\n"
        "assert len(numpy.load('contacts.npz')['ids']) == 12\n"
    )
    run_as_newcomer([sys.executable, "-W", "error", "-"], code, tmp_path, hub_cache)


def test_links_of_the_pages_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("models/**/*.md")):
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            assert "://" in link or "{{" in link or (page.parent / link).exists(), f"{page}: {link}"


def test_the_readme_loads_a_model(tmp_path, hub_cache):
    code = (
        readme_block("python", "from_original")
        + "assert logits.shape == (2, 24, 33)\nassert not logits[1, 11:].any()\n"
    )
    run_as_newcomer([sys.executable, "-W", "error", "-"], code, tmp_path, hub_cache)


def test_the_readmes_lora_adapts_every_product(tmp_path, hub_cache):
    code = (
        readme_block("python", "from_original")
        + readme_block("python", "get_peft_model")
        + "names = {name.rsplit('.', 1)[1] for name, layer in model.named_modules() if hasattr(layer, 'lora_A')}\n"
        + "assert names == {'qkv', 'proj', 'fc1', 'fc2'}, names\n"
        + "model(**batch).logits.sum().backward()\n"
    )
    run_as_newcomer([sys.executable, "-W", "error", "-W", "ignore::FutureWarning", "-"], code, tmp_path, hub_cache)


def test_the_readme_commands_run(tmp_path, hub_cache):
    run_as_newcomer(["bash", "-e"], readme_block("sh", "biote convert"), tmp_path, hub_cache)
    assert (tmp_path / "build" / "hub" / "README.md").is_file()
    code = readme_block("python", "trust_remote_code") + "assert tokenizer.vocab_size == model.config.vocab_size\n"
    run_as_newcomer([sys.executable, "-W", "error", "-"], code, tmp_path, hub_cache)


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
