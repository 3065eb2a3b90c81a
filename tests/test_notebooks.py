"""The examples that are notebooks: their scripts run, and the notebooks are those scripts."""

import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest

import biote as biote_package

pytest.importorskip("matplotlib")


def run_example(root, tmp_path, name, model):
    """What the script prints; it must draw a picture."""
    environment = {**os.environ, "MPLBACKEND": "Agg"}
    command = [sys.executable, "-W", "error", root / "examples" / f"{name}.py", "--model", model, "--output", "o.png"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")
    return done.stdout


def test_proteins_are_drawn_and_their_neighbours_counted(root, tmp_path, tiny_original):
    said = run_example(root, tmp_path, "embed_proteins", tiny_original)
    with (root / "examples" / "families.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    model, _ = biote_package.load(tiny_original, "embedding")
    vectors = biote_package.embed(model, [row["sequence"] for row in rows])
    vectors = vectors - vectors.mean(0)
    same = 0
    for place, one in enumerate(vectors):
        others = [at for at in range(len(rows)) if at != place]
        cosines = [one @ vectors[at] / np.linalg.norm(one) / np.linalg.norm(vectors[at]) for at in others]
        same += rows[place]["family"] == rows[others[int(np.argmax(cosines))]]["family"]
    assert f"26 proteins, {model.config.hidden_size} numbers each\n{same} of 26 proteins have their" in said


def test_a_scan_is_drawn_and_its_sites_ranked(root, tmp_path, tiny_original, biote):
    """As `biote score --scan` scores it."""
    said = run_example(root, tmp_path, "score_scan", tiny_original)
    fasta, output = root / "examples" / "ubiquitin.fasta", tmp_path / "scan.csv"
    assert biote("score", tiny_original, fasta, output, "--scan")[0] == 0
    with output.open(newline="") as file:
        sites = [
            (sum(map(float, list(row.values())[3:])) / 19, row["wild_type"] + row["position"])
            for row in csv.DictReader(file)
        ]
    assert "76 residues x 20 amino acids\n" in said
    ranked = sorted(sites)
    least, most = (re.search(rf"^{word} tolerated: (.*)$", said, re.M)[1] for word in ("least", "most"))
    assert least.split(", ")[0] == f"{ranked[0][1]} {ranked[0][0]:.1f}"
    assert {text.split()[1] for text in most.split(", ")[:1]} == {f"{ranked[-1][0]:.1f}"}
    names = [name for _, name in ranked]
    assert said.endswith(", ".join(f"{name} has rank {names.index(name) + 1}" for name in ("L8", "I44", "V70")) + "\n")


def test_the_notebooks_are_made_of_the_scripts(root):
    pytest.importorskip("jupytext")
    nbformat = pytest.importorskip("nbformat")
    spec = importlib.util.spec_from_file_location("make_notebooks", root / "examples" / "make_notebooks.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    assert {path.stem for path in (root / "examples").glob("*.ipynb")} == set(make.SCRIPTS)
    for name in make.SCRIPTS:
        made = make.notebook(root / "examples" / f"{name}.py")
        committed = (root / "examples" / f"{name}.ipynb").read_text(encoding="utf-8")
        assert committed == f"{made}\n", "run `make notebooks`"
        cells = json.loads(committed)["cells"]
        assert {cell["cell_type"] for cell in cells} == {"markdown", "code"}
        assert not any(cell.get("outputs") for cell in cells)
        nbformat.validate(nbformat.from_dict(json.loads(committed)))


@pytest.mark.parametrize("name", ["embed_proteins", "score_scan"])
def test_cells_run_where_there_is_no_command_line(root, tmp_path, monkeypatch, tiny_original, name, capsys):
    """As Jupyter runs them: in the notebook's folder, without a file's name."""
    plots = pytest.importorskip("matplotlib.pyplot")
    shutil.copy(root / "examples" / "families.csv", tmp_path)
    shutil.copytree(tiny_original, tmp_path / "esm2_t33_650M_UR50D")  # a folder has precedence over the tag
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    names = {}
    for cell in json.loads((root / "examples" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["figure"].get_axes()
    plots.close("all")
    assert capsys.readouterr().out.startswith("esm2_t33_650M_UR50D on ")
