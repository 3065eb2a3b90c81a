"""`biote score`: files in, files out; what is wrong is one line, and nothing is left of it."""

import csv
import io
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import biote as package
from biote.apps import score_files
from biote.apps.score import AMINO_ACIDS, Scoring, score
from biote.apps.variants import read_variant
from biote.data.sequences import Record

SEQUENCE = "MKTAYIAKQRQISFVKSHFSRQ"
FASTA = f">p1 the wild type\n{SEQUENCE[:10].lower()}\n{SEQUENCE[10:]}*\n"
TWO = f"{FASTA}>p2\nGSHMLE\n"
VARIANTS = 'mutant,DMS_score,"a, b"\nA4V,1.50,"x ""y"""\nK2R:A4G,-2e-3,\nM1M,,z\n'


@pytest.fixture
def files(tmp_path: Path, root: Path) -> dict[str, Path]:
    written = {"p.fasta": FASTA, "two.fasta": TWO, "v.csv": VARIANTS}
    for name, text in written.items():
        (tmp_path / name).write_text(text)
    goldens = {name: root / "models" / name / "tests" / "golden" for name in ("esm2", "amplify", "geneformer")}
    return {**{name: tmp_path / name for name in written}, **goldens, "out": tmp_path / "out.csv"}


def expected(folder: Path, variants: list[str], scoring: Scoring, sequence: str = SEQUENCE) -> np.ndarray:
    model, tokenizer = package.load(folder, "masked-lm", device="cpu", dtype="float64")
    return score(model, tokenizer, [Record("", sequence)], [read_variant(v, 0, sequence) for v in variants], scoring)


def rows_of(path: Path) -> list[list[str]]:
    return list(csv.reader(io.StringIO(path.read_text())))


def test_a_csv_with_one_column_more(biote, files):
    status, out, err = biote(
        "score", files["esm2"], files["p.fasta"], files["v.csv"], files["out"], "--dtype", "float64"
    )
    assert (status, err) == (0, "")
    assert out.startswith("3 variants of 1 protein; masked-marginals; float64 on ")
    assert "10 small letters read as capitals, 1 stops" in out
    rows, before = rows_of(files["out"]), rows_of(files["v.csv"])
    assert [row[:-1] for row in rows] == before
    assert rows[0][-1] == "golden_masked-marginals"
    values = [float(row[-1]) for row in rows[1:]]
    np.testing.assert_allclose(values, expected(files["esm2"], ["A4V", "K2R:A4G", "M1M"], Scoring()), rtol=1e-9)
    assert values[2] == 0


@pytest.mark.parametrize("text", ["\ufeff" + VARIANTS, VARIANTS.replace("\n", "\r\n"), VARIANTS + "\n\n"])
def test_how_a_csv_is_written_does_not_matter(biote, files, text):
    files["v.csv"].write_bytes(text.encode())
    assert biote("score", files["esm2"], files["p.fasta"], files["v.csv"], files["out"])[0] == 0
    assert [row[:-1] for row in rows_of(files["out"])] == list(csv.reader(io.StringIO(VARIANTS)))


def test_columns_and_offset_as_asked(biote, files):
    files["v.csv"].write_text("mutant,change\nignored,A103V\n")
    done = biote(
        "score", files["esm2"], files["p.fasta"], files["v.csv"], files["out"], "--offset", 100, "--mutation-column",
        "change", "--score-column", "mine", "--method", "wt-marginals", "--dtype", "float64",
    )  # fmt: skip
    assert done[0] == 0
    assert rows_of(files["out"])[0] == ["mutant", "change", "mine"]
    found = float(rows_of(files["out"])[1][2])
    assert found == pytest.approx(expected(files["esm2"], ["A4V"], Scoring("wt-marginals"))[0])


def test_an_ensemble_is_the_mean(biote, files, tmp_path):
    (tmp_path / "second").symlink_to(files["amplify"])
    done = biote(
        "score", files["esm2"], files["p.fasta"], files["v.csv"], files["out"], "--model", tmp_path / "second",
        "--multi", "joint", "--dtype", "float64",
    )  # fmt: skip
    assert done[0] == 0, done[2]
    rows = rows_of(files["out"])
    names = ["golden_masked-marginals-joint", "second_masked-marginals-joint", "ensemble_masked-marginals-joint"]
    assert rows[0][3:] == names
    first, second, mean = np.array([row[3:] for row in rows[1:]], dtype=float).T
    scoring = Scoring(multi="joint")
    for found, model in ((first, "esm2"), (second, "amplify")):
        np.testing.assert_allclose(found, expected(files[model], ["A4V", "K2R:A4G", "M1M"], scoring), rtol=1e-9)
    np.testing.assert_allclose(mean, (first + second) / 2, rtol=1e-12)


def test_several_proteins(biote, files):
    files["v.csv"].write_text("protein,mutant\np2,S2A\np1,A4V\n")
    arguments = ("score", files["esm2"], files["two.fasta"], files["v.csv"], files["out"], "--dtype", "float64")
    status, _, err = biote(*arguments)
    assert (status, err) == (1, "error: there are 2 proteins: --id-column says which one a variant is of\n")
    assert biote(*arguments, "--id-column", "protein")[0] == 0
    found = [float(row[-1]) for row in rows_of(files["out"])[1:]]
    second = expected(files["esm2"], ["S2A"], Scoring(), "GSHMLE")
    np.testing.assert_allclose(found, [*second, *expected(files["esm2"], ["A4V"], Scoring())], rtol=1e-9)


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_a_scan_is_every_substitution(biote, files, tmp_path, ending):
    out = tmp_path / f"scan{ending}"
    options = ("--scan", "--plot", "--offset", 5, "--dtype", "float64")
    status, printed, err = biote("score", files["esm2"], files["p.fasta"], out, *options)
    assert (status, err) == (0, "")
    assert printed.startswith("22 residues of 1 protein; ")
    columns = ["id", "position", "wild_type", *AMINO_ACIDS]
    if ending == ".csv":
        header, *rows = rows_of(out)
    else:
        table = pq.read_table(out)
        header, rows = table.column_names, [list(row.values()) for row in table.to_pylist()]
    assert header == columns
    assert [(row[0], int(row[1]), row[2]) for row in rows] == [("p1", 5 + n, a) for n, a in enumerate(SEQUENCE)]
    variants = [f"{wild}{place}{mutant}" for place, wild in enumerate(SEQUENCE, 1) for mutant in AMINO_ACIDS]
    found = np.array([row[3:] for row in rows], dtype=float)
    np.testing.assert_allclose(found.ravel(), expected(files["esm2"], variants, Scoring()), rtol=1e-9, atol=1e-12)
    assert out.with_suffix(".png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_residues_that_a_model_does_not_know_have_no_scores(biote, files, tmp_path, ending):
    files["p.fasta"].write_text(">p\nMKUTA\n")
    out = tmp_path / f"scan{ending}"
    status, printed, _ = biote("score", files["amplify"], files["p.fasta"], out, "--scan", "--plot")
    assert status == 0
    assert "1 residue without scores" in printed
    rows = rows_of(out)[1:] if ending == ".csv" else [list(row.values()) for row in pq.read_table(out).to_pylist()]
    assert [any(value in ("", None) for value in row[3:]) for row in rows] == [False, False, True, False, False]
    assert all(value in ("", None) for value in rows[2][3:])


def test_long_proteins_are_told(biote, files):
    arguments = ("score", files["esm2"], files["p.fasta"], files["v.csv"], files["out"], "--window-tokens", 16)
    status, out, _ = biote(*arguments)
    assert status == 0
    assert "1 protein of more than 16 tokens in optimal windows" in out


BAD_TABLES = {
    "mutant\nA4V\nS4V\nS5V\n": "v.csv, line 3: S4V says S, but residue 4 of the protein is A (and 1 more such lines)",
    "mutant\nA4V:K30R\n": "v.csv, line 2: K30R is outside the protein, whose residues are 1 to 22",
    "mutant\nA4J\n": "v.csv, line 2: golden does not know the residue J",
    "mutant\nA4V:A4G\n": "v.csv, line 2: A4V:A4G has residue 4 twice",
    'mutant\n"A4V\n': "v.csv is no CSV file",
    "variant\nA4V\n": "v.csv has no column 'mutant'; it has variant",
    "mutant,golden_masked-marginals\nA4V,1\n": "is there already: choose another --score-column",
    "mutant,x\nA4V,1,2\n": "v.csv is no CSV file: line 2 has 3 fields, the header 2",
    "mutant\n": "v.csv has no variants",
    "": "v.csv has no variants",
}


@pytest.mark.parametrize("text", BAD_TABLES)
def test_bad_variants_are_one_line_and_no_model_is_loaded(biote, files, monkeypatch, text):
    files["v.csv"].write_text(text)
    monkeypatch.setattr(score_files, "load", None)
    status, out, err = biote("score", files["esm2"], files["p.fasta"], files["v.csv"], files["out"])
    assert (status, out) == (1, "")
    assert BAD_TABLES[text] in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not files["out"].exists()


BAD_CALLS = {
    "no output": (("esm2", "p.fasta", "v.csv"), "OUTPUT is missing"),
    "scan with variants": (("esm2", "p.fasta", "v.csv", "out", "--scan"), "--scan takes no VARIANTS"),
    "scan of a column": (("esm2", "p.fasta", "out", "--scan", "--id-column", "x"), "--id-column is of VARIANTS"),
    "plot without scan": (("esm2", "p.fasta", "v.csv", "out", "--plot"), "add --scan"),
    "plot of two": (("esm2", "two.fasta", "out", "--scan", "--plot"), "a heat map (--plot) is of one"),
    "no FASTA": (("esm2", "missing.fasta", "v.csv", "out"), "No such file"),
    "no variants": (("esm2", "p.fasta", "missing.csv", "out"), "missing.csv does not exist"),
    "output exists": (("esm2", "p.fasta", "v.csv", "v.csv"), "v.csv exists already"),
    "kind of output": (("esm2", "p.fasta", "v.csv", "out.parquet"), "must end with .csv"),
    "no folder": (("esm2", "p.fasta", "v.csv", "nowhere/out.csv"), "there is no folder"),
    "twice": (("esm2", "p.fasta", "v.csv", "out", "--model", "esm2"), "a model is asked for twice"),
    "no text": (("geneformer", "p.fasta", "v.csv", "out"), "Geneformer reads no sequences"),
    "method": (("esm2", "p.fasta", "v.csv", "out", "--method", "x"), "unknown method 'x'"),
    "no such model": (("esm2_t6_8M", "p.fasta", "v.csv", "out"), "esm2_t6_8M is neither a folder nor a known tag"),
    "no positions": (("amplify", "p.fasta", "v.csv", "out", "--window-tokens", "99999"), "has positions for"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_what_does_not_go_together_is_one_line(biote, files, tmp_path, monkeypatch, name):
    arguments, message = BAD_CALLS[name]
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    status, _, err = biote("score", *(files.get(argument, argument) for argument in arguments))
    assert status == 1
    assert message in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_without_matplotlib(biote, files, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, err = biote("score", files["esm2"], files["p.fasta"], files["out"], "--scan", "--plot")
    assert (status, err) == (1, "error: a heat map needs matplotlib: pip install 'biote[plot]'\n")


@pytest.mark.parametrize("when", ["score", "_write_csv"])
def test_an_interrupted_run_leaves_nothing(biote, files, tmp_path, monkeypatch, when):
    def stop(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(score_files, when, stop)
    status, _, err = biote("score", files["esm2"], files["p.fasta"], files["v.csv"], files["out"])
    assert (status, err) == (143, "error: stopped by SIGTERM\n")
    assert sorted(tmp_path.rglob("*")) == before


def test_scores_that_are_no_numbers(biote, files, monkeypatch):
    monkeypatch.setattr("biote.apps.score._marginals", lambda *arguments: np.array([np.nan]))
    status, _, err = biote("score", files["esm2"], files["p.fasta"], files["v.csv"], files["out"])
    assert status == 1
    assert "are not finite: choose another dtype" in err


def test_the_page_runs(root, files):
    """The example in Python of docs/score.md, with the tiny model in place of the published one."""
    page = (root / "docs" / "score.md").read_text()
    code = page.partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("esm2_t33_650M_UR50D", str(files["esm2"])), names)
    np.testing.assert_allclose(names["scores"], expected(files["esm2"], ["A4V", "K2R:A4G"], Scoring()), atol=1e-4)
