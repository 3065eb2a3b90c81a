"""`biote embed`: every kind of output as users read it, runs that are killed, shared, and what goes wrong."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import biote as biote_package
from biote.apps import embed_files, work, workers
from biote.apps.embed import Wanted
from biote.apps.embed_job import Job
from biote.port import port_named
from biote.testing.contract import randomize

IDS = ["sp|P1|A/B", "b", "b", "é", "long", "e"]
TEXTS = ["MKTAYIAKQR", "W", "GSHMLEDPQ", "ACDEFGHIKLMNPQRSTVWY", "MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQA", "GSHMLEDPQ"]
UNIQUE = [f"p{number}" for number in range(len(TEXTS))]
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ESM-2, every parameter random, as it is saved."""
    path = tmp_path_factory.mktemp("tiny") / "tiny-esm2"
    port = port_named("esm2")
    randomize(port.classes["AutoModel"](port.config_class(engine="torch", **SHAPE)), 0).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Any]:
    """By column: what `biote.embed` gives for TEXTS."""
    model, _ = biote_package.load(folder)
    pools = biote_package.embed(model, TEXTS, pools=["mean", "max", "std", "cls"], layers=[-1, 0])
    return {**pools, **biote_package.embed(model, TEXTS, per_residue=True, layers=[-1, 0])}


def fasta(path: Path, ids: list[str] = UNIQUE, texts: list[str] = TEXTS) -> Path:
    path.write_text("".join(f">{name} x\n{text}\n" for name, text in zip(ids, texts, strict=True)), encoding="utf-8")
    return path


def near(found: Any, expected: Any, dtype: str = "float32") -> None:
    assert all(array.dtype == dtype for array in found)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 2e-3, "atol": 2e-3}
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, **tolerance)


def names_in(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


# Outputs


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_parquet(biote, tmp_path, folder, expected, dtype):
    source, output = fasta(tmp_path / "x.fa", IDS), tmp_path / "out.parquet"
    assert biote("embed", folder, source, output, "--stored", dtype, "--batch-tokens", 1)[:2] == (
        0,
        f"wrote {output}\n",
    )
    frame = pd.read_parquet(output)  # several chunks: 64 residues each
    assert list(frame) == ["id", "length", "embedding"]
    assert list(frame["id"]) == IDS  # as in the input, one of them twice
    assert list(frame["length"]) == [len(text) for text in TEXTS]
    near(frame["embedding"], expected["mean_2"], dtype)
    table = pq.read_table(output)
    assert table.schema.field("embedding").type == pa.list_(pa.from_numpy_dtype(dtype), 32)
    about = json.loads(table.schema.metadata[b"biote"])
    options = {key: about[key] for key in ("model", "device", "engine", "precision", "stored", "pools", "layers")}
    assert options == {
        "model": "tiny-esm2", "device": "cpu", "engine": "torch", "precision": "float32", "stored": dtype,
        "pools": ["mean"], "layers": [-1],
    }  # fmt: skip
    assert about["biote"] == biote_package.__version__
    assert names_in(tmp_path) == ["out.parquet", "x.fa"]


def test_several_columns(biote, tmp_path, folder, expected):
    source, output = fasta(tmp_path / "x.fa"), tmp_path / "out.parquet"
    done = biote("embed", folder, source, output, "--pool", "std", "--pool", "max,cls", "--layers", "-1", "0")
    assert done[0] == 0
    frame = pd.read_parquet(output)
    assert list(frame)[2:] == ["std_2", "max_2", "cls_2", "std_0", "max_0", "cls_0"]
    for name in list(frame)[2:]:
        near(frame[name], expected[name])


@pytest.mark.parametrize("options", [["--layers", "0", "-1"], ["--layers", "0", "--layers", "-1"], ["--layers=0,-1"]])
def test_ways_to_say_layers(biote, tmp_path, folder, expected, options):
    assert biote("embed", *options, "--batch-tokens", 50, folder, fasta(tmp_path / "x.fa"), tmp_path / "o.npz")[0] == 0
    with np.load(tmp_path / "o.npz") as found:
        assert set(found.files) == {"ids", "lengths", "about", "mean_0", "mean_2"}
        near(found["mean_0"], expected["mean_0"])


@pytest.mark.parametrize("layers", [["-1"], ["-1", "0"]])
def test_per_residue(biote, tmp_path, folder, expected, layers):
    source, columns = fasta(tmp_path / "x.fa"), ["embedding"] if len(layers) == 1 else ["residues_2", "residues_0"]
    references = [expected[name] for name in ("residues_2", "residues_0")]
    options = ("--per-residue", "--layers", *layers, "--batch-tokens", 1)
    for name in ("o.parquet", "o.h5", "o.npz"):
        assert biote("embed", folder, source, tmp_path / name, *options)[0] == 0
    table = pq.read_table(tmp_path / "o.parquet")
    with h5py.File(tmp_path / "o.h5") as file, np.load(tmp_path / "o.npz") as arrays:
        assert arrays["ids"].tolist() == UNIQUE
        assert arrays["lengths"].tolist() == [len(text) for text in TEXTS]
        for name, reference in zip(columns, references, strict=False):
            near([np.stack(rows) for rows in table[name].to_pandas()], reference)
            group = file[name] if len(columns) > 1 else file
            near([group[key][:] for key in UNIQUE], reference)
            flat = arrays["embeddings" if len(columns) == 1 else name]
            near(np.split(flat, np.cumsum(arrays["lengths"])[:-1]), reference)


def test_hdf5(biote, tmp_path, folder, expected):
    source, output = fasta(tmp_path / "x.fa", ["sp|P1|A/B", *UNIQUE[1:]]), tmp_path / "out.h5"
    assert biote("embed", folder, source, output, "--stored", "float16")[0] == 0
    with h5py.File(output) as file:
        assert file.attrs["model_name"] == "tiny-esm2"
        assert json.loads(file.attrs["biote"])["stored"] == "float16"
        assert set(file) == {"sp|P1|A_B", *UNIQUE[1:]}
        assert file["sp|P1|A_B"].attrs["original_id"] == "sp|P1|A/B"
        assert "original_id" not in file["p1"].attrs
        near([file[name][:] for name in ["sp|P1|A_B", *UNIQUE[1:]]], expected["mean_2"], "float16")


def test_npz(biote, tmp_path, folder, expected):
    assert biote("embed", folder, fasta(tmp_path / "x.fa", IDS), tmp_path / "o.npz", "--batch-tokens", 1)[0] == 0
    with np.load(tmp_path / "o.npz", allow_pickle=False) as found:
        assert found["ids"].tolist() == IDS
        near(found["embeddings"], expected["mean_2"])
        assert json.loads(str(found["about"]))["model"] == "tiny-esm2"


def test_a_folder_of_shards(biote, tmp_path, folder, expected):
    source = fasta(tmp_path / "x.fa", IDS)
    assert biote("embed", folder, source, f"{tmp_path}/new/out/", "--batch-tokens", 1)[0] == 0
    assert names_in(tmp_path / "new") == ["out"]
    shards = [name for name in names_in(tmp_path / "new" / "out") if name.endswith(".parquet")]
    assert shards == [f"{number:06}.parquet" for number in range(len(shards))]
    assert len(shards) > 1
    assert not [name for name in names_in(tmp_path / "new" / "out") if name.startswith(".")]
    for frame in (pd.read_parquet(tmp_path / "new" / "out"), pq.read_table(tmp_path / "new" / "out").to_pandas()):
        assert list(frame["id"]) == IDS
        near(frame["embedding"], expected["mean_2"])


def cells_in(folder: Path) -> tuple[Any, Any, pd.DataFrame]:
    """A tiny Geneformer with its dictionaries, in folder/tiny; its tokenizer; the obs of folder/in.h5ad."""
    anndata = pytest.importorskip("anndata")
    from biote_geneformer import GeneformerTokenizer

    names = ["<pad>", "<mask>", "<cls>", "<eos>", *(f"ENSG{number:011}" for number in range(44))]
    medians = {name: 0.5 + number % 7 / 3 for number, name in enumerate(names)}
    port = port_named("geneformer")
    config = port.config_class(engine="torch", vocab_size=48, max_position_embeddings=64, **SHAPE)
    model = randomize(port.classes["AutoModel"](config), 0).eval()
    model.save_pretrained(folder / "tiny")
    tokenizer = GeneformerTokenizer({name: at for at, name in enumerate(names)}, medians, "V2")
    tokenizer.save_pretrained(folder / "tiny")
    counts = np.random.default_rng(0).poisson(1.0, (7, 20)).astype(np.float32)
    counts[:, 1] += 1
    counts[2] = 0
    obs = pd.DataFrame({"kind": list("abcabca")}, index=[f"c{number}" for number in range(7)])
    anndata.AnnData(counts, obs, pd.DataFrame(index=names[4:24])).write_h5ad(folder / "in.h5ad")
    return model, tokenizer, obs


@pytest.mark.filterwarnings("ignore:.*cells:UserWarning")
def test_cells(biote, tmp_path):
    """obsm in the order of obs, NaN for a cell with nothing to read; the rest of the file's obs as it was."""
    model, tokenizer, obs = cells_in(tmp_path)
    import anndata

    options = ("--pool", "mean,cls", "--layers", "0", "-1", "--batch-tokens", 1)
    done = biote("embed", tmp_path / "tiny", tmp_path / "in.h5ad", tmp_path / "out.h5ad", *options)
    assert done[0] == 0, done[2]
    found = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert list(found.obs_names) == list(obs.index)
    assert list(found.obs["kind"]) == list(obs["kind"])
    assert set(found.obsm) == {"X_mean_0", "X_cls_0", "X_mean_2", "X_cls_2"}
    assert json.loads(found.uns["biote"])["port"] == "geneformer"
    assert np.isnan(found.obsm["X_mean_2"][2]).all()
    cells = tokenizer.encode(anndata.read_h5ad(tmp_path / "in.h5ad"), ["obs_names"]).to_pydict()
    for name, ids in zip(cells["obs_names"], cells["input_ids"], strict=True):
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        for layer in (0, 2):
            place = list(obs.index).index(name)
            near([found.obsm[f"X_mean_{layer}"][place]], [states[layer][0, 1:-1].mean(0).numpy()])
            near([found.obsm[f"X_cls_{layer}"][place]], [states[layer][0, 0].numpy()])
    assert biote("embed", tmp_path / "tiny", tmp_path / "in.h5ad", tmp_path / "out.parquet")[0] == 0
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["id"].to_pylist() == cells["obs_names"]
    assert table["obs_index"].to_pylist() == [0, 1, 3, 4, 5, 6]
    done = biote("embed", tmp_path / "tiny", tmp_path / "in.h5ad", tmp_path / "r.h5ad", "--per-residue")
    assert (done[0], "an .h5ad has one embedding a cell" in done[2]) == (1, True)


# Inputs


def test_tables_and_stdin(biote, tmp_path, folder, expected, monkeypatch):
    frame = pd.DataFrame({"name": UNIQUE, "seq": TEXTS})
    frame.to_csv(tmp_path / "x.tsv", sep="\t", index=False)
    frame.to_parquet(tmp_path / "x.parquet")
    columns = ("--id-column", "name", "--sequence-column", "seq")
    for name in ("x.tsv", "x.parquet"):
        assert biote("embed", folder, tmp_path / name, tmp_path / f"{name}.h5", *columns)[0] == 0
    with open(fasta(tmp_path / "x.fa")) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert biote("embed", folder, "-", tmp_path / "x.fa.h5")[0] == 0
    for name in ("x.tsv", "x.parquet", "x.fa"):
        with h5py.File(tmp_path / f"{name}.h5") as file:
            near([file[key][:] for key in UNIQUE], expected["mean_2"])
    (tmp_path / "bad.fa").write_text("MKT\n")
    with open(tmp_path / "bad.fa") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        done = biote("embed", folder, "-", tmp_path / "bad.h5")
    assert done == (1, "", "error: stdin: the first line of a FASTA file begins with '>', not with 'MKT'\n")
    assert not [name for name in names_in(tmp_path) if "unfinished" in name]


@pytest.mark.parametrize(
    ("long", "ids", "lengths", "said"),
    [
        ("window", UNIQUE, [10, 1, 9, 20, 34, 9], "2 of more than 12 residues run in windows: p3, p4"),
        ("truncate", UNIQUE, [10, 1, 9, 12, 12, 9], "2 of more than 12 residues are truncated: p3, p4"),
        ("skip", ["p0", "p1", "p2", "p5"], [10, 1, 9, 9], "2 of more than 12 residues are left out: p3, p4"),
    ],
)
def test_long_sequences(biote, tmp_path, folder, long, ids, lengths, said):
    """`length` is that of what was embedded, in all outputs."""
    options = ("--per-residue", "--max-residues", 12, "--long", long)
    model, _ = biote_package.load(folder)
    kept = [text for text, name in zip(TEXTS, UNIQUE, strict=True) if name in ids]
    way = "window" if long == "skip" else long
    reference = biote_package.embed(model, kept, per_residue=True, max_residues=12, long=way)
    for name in ("o.parquet", "o.npz"):
        status, _, notes = biote("embed", folder, fasta(tmp_path / "x.fa"), tmp_path / name, *options)
        assert (status, f"note: {said}\n" in notes) == (0, True)
    frame = pd.read_parquet(tmp_path / "o.parquet")
    assert (list(frame["id"]), list(frame["length"])) == (ids, lengths)
    near([np.stack(rows) for rows in frame["embedding"]], reference)
    with np.load(tmp_path / "o.npz") as found:
        assert found["lengths"].tolist() == lengths
        near(np.split(found["embeddings"], np.cumsum(lengths)[:-1]), reference)


def test_what_was_changed_is_said(biote, tmp_path, folder):
    source = fasta(tmp_path / "x.fa", ["a", "b"], ["mkt-a*", "MJ"])
    status, _, notes = biote("embed", folder, source, tmp_path / "o.parquet", "--batch-tokens", 99)
    assert (status, notes) == (
        0,
        "tiny-esm2: torch engine, float32, on cpu, batches of 99 tokens\n"
        f"note: {source}: 4 small letters read as capitals, 1 gaps left out, 1 stops (*) at the end left out, "
        "1 residues that the model does not know read as X\n",
    )


# Errors


@pytest.mark.parametrize(
    ("text", "arguments", "said"),
    [
        ("", ["o.parquet"], "x.fa: there is no sequence in it"),
        (">a\nM1\n", ["o.parquet"], "x.fa: a has '1' at position 2, which is no residue"),
        (">a\nMK\n>b\n", ["o.parquet"], "x.fa: b has no residues"),
        (">a\nMK\n>a\nMK\n", ["o.h5"], "a cannot be a name in .*o.h5: another has it.* write .parquet"),
        (">a/b\nMK\n>a_b\nMK\n", ["o.hdf5"], "a_b cannot be a name in .*o.hdf5: another has it"),
        (">.\nMK\n", ["o.h5"], "[.] cannot be a name in"),
        (">a\0b\nMK\n", ["o.h5"], "cannot be a name in"),
        (">a\nMK\n", ["o.txt"], "o.txt should end in one of .parquet, .h5, .hdf5, .npz, .h5ad, or in / for a folder"),
        (">a\nMK\n", ["o"], "o should end in one of"),
        (">a\nMK\n", ["o.h5ad"], "an .h5ad is for cells; sequences go into .parquet, .h5 or .npz"),
        (">a\nMK\n", ["o.npz", "--pool", "median"], "unknown pool 'median'; choose from mean, max, cls, std"),
        (">a\nMK\n", ["o.npz", "--per-residue", "--pool", "max"], "no pools can be asked for"),
        (">a\nMK\n", ["o.npz", "--layers", "last"], "--layers takes whole numbers, not 'last'"),
        (">a\nMK\n", ["o.npz", "--layers", "3"], "layer 3 is not one of the model's hidden states, 0 to 2"),
        (">a\nMK\n", ["o.npz", "--stored", "int8"], "stored='int8' is unknown; choose one of float32, float16"),
        (">a\nMK\n", ["o.npz", "--dtype", "int8"], "unknown dtype 'int8'"),
        (">a\nMK\n", ["o.npz", "--devices", "7"], "there is no device '7': give numbers of GPUs"),
        (
            ">a\nMKT\n",
            ["o.npz", "--max-residues", "2", "--long", "error"],
            "a has 3 residues, more than the 2 that run",
        ),
        (">a\nMKT\n", ["o.npz", "--max-residues", "2", "--long", "skip"], "x.fa has nothing to embed: all is longer"),
        (">a\nMKT\n", ["o.npz", "--long", "cut"], "long='cut' is unknown"),
        (">a\nMK\n", ["x.fa/o.npz"], "x.fa is not a folder"),
    ],
)
def test_one_line_errors(biote, tmp_path, folder, text, arguments, said):
    """And nothing stays behind."""
    (tmp_path / "x.fa").write_text(text)
    status, out, err = biote("embed", folder, tmp_path / "x.fa", tmp_path / arguments[0], *arguments[1:])
    assert (status, out) == (1, "")
    assert re.search(said, err), err
    assert err.splitlines()[-1].startswith("error: ")
    assert len([line for line in err.splitlines() if not line.startswith("note: ")]) == 1
    assert names_in(tmp_path) == ["x.fa"]


def test_other_errors(biote, tmp_path, folder, root):
    source = fasta(tmp_path / "x.fa")
    cells = root / "models" / "geneformer" / "tests" / "golden"
    for arguments, said in [
        ((folder, tmp_path / "y.fa", tmp_path / "o.npz"), "y.fa is no file"),
        ((folder, tmp_path, tmp_path / "o.npz"), "is no file"),
        ((tmp_path / "nowhere", source, tmp_path / "o.npz"), "is neither a folder, nor a known tag, nor a Hub id"),
        ((cells, source, tmp_path / "o.npz"), "reads the cells of an .h5ad file, not"),
    ]:
        status, out, err = biote("embed", *arguments)
        assert (status, out, said in err, err.count("\n")) == (1, "", True, 1), err
    assert names_in(tmp_path) == ["x.fa"]


def test_an_output_that_exists_is_left_alone(biote, tmp_path, folder):
    source = fasta(tmp_path / "x.fa")
    for name in ("o.parquet", "o.npz"):
        (tmp_path / name).write_text("precious")
        status, _, err = biote("embed", folder, source, tmp_path / name)
        assert (status, err) == (1, f"error: {tmp_path / name} exists already; remove it or choose another output\n")
        assert (tmp_path / name).read_text() == "precious"
    (tmp_path / "dir" / "x").mkdir(parents=True)
    assert "exists already" in biote("embed", folder, source, f"{tmp_path}/dir/")[2]
    (tmp_path / "p.npz.unfinished" / "mine").mkdir(parents=True)
    assert (
        "p.npz.unfinished is no unfinished run: it holds mine" in biote("embed", folder, source, tmp_path / "p.npz")[2]
    )
    assert names_in(tmp_path) == ["dir", "o.npz", "o.parquet", "p.npz.unfinished", "x.fa"]


def test_numbers_that_cannot_be_stored(biote, tmp_path, folder):
    model, _ = biote_package.load(folder)
    with torch.no_grad():
        model.final_norm.weight.fill_(1e6)
    model.save_pretrained(tmp_path / "large")
    source = fasta(tmp_path / "x.fa")
    done = biote("embed", tmp_path / "large", source, tmp_path / "o.npz", "--stored", "float16")
    assert "error: float16 cannot hold what the model gives for p0: store float32\n" in done[2]
    with torch.no_grad():
        model.final_norm.weight.fill_(torch.nan)
    model.save_pretrained(tmp_path / "nan")
    done = biote("embed", tmp_path / "nan", source, tmp_path / "o.npz")
    assert (done[0], names_in(tmp_path)) == (1, ["large", "nan", "x.fa"])


# Runs that are stopped. They stop where `stop` says, as by an error, and leave what a kill leaves.


class Stopped(BaseException):
    pass


def job_of(folder: Path, source: Path, output: Path | str, **options: Any) -> Job:
    return Job(str(folder), source, str(output), **{"batch_tokens": 1, **options})


def stop_after(monkeypatch: pytest.MonkeyPatch, chunks: int) -> None:
    """Chunks are written, and then no more."""
    real, written = work.Work.write, []

    def write(self: Any, *arguments: Any) -> None:
        if len(written) == chunks:
            raise Stopped
        real(self, *arguments)
        written.append(1)

    monkeypatch.setattr(work.Work, "write", write)


@pytest.fixture
def unfinished(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Job:
    """A run that had done one of its chunks."""
    job = job_of(folder, fasta(tmp_path / "x.fa"), tmp_path / "out.parquet")
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        with pytest.raises(Stopped):
            embed_files.embed_file(job)
    assert "000000.parquet" in names_in(tmp_path / "out.parquet.unfinished")
    capsys.readouterr()
    return job


def test_what_is_done_is_not_done_again(biote, unfinished, tmp_path, folder, expected, monkeypatch):
    written = []
    real = work.Work.write
    monkeypatch.setattr(
        work.Work, "write", lambda self, number, *rest: (written.append(number), real(self, number, *rest))
    )
    assert biote("embed", folder, tmp_path / "x.fa", tmp_path / "out.parquet")[0] == 0  # the budget is the first run's
    assert written
    assert 0 not in written
    near(pd.read_parquet(tmp_path / "out.parquet")["embedding"], expected["mean_2"])
    assert names_in(tmp_path) == ["out.parquet", "x.fa"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--pool", "max"], "pools was ['mean'], now ['max']"),
        (["--layers", "0"], "layers was [-1], now [0]"),
        (["--stored", "float16"], "stored was float32, now float16"),
        (["--dtype", "float64"], "precision was float32, now float64; weights was [0-9a-f]{16}, now [0-9a-f]{16}"),
        (["--batch-tokens", "64"], "batch_tokens was 1, now 64"),
        (["--max-residues", "12"], "max_residues was None, now 12"),
        (["--per-residue"], "per_residue was False, now True"),
    ],
)
def test_other_options(biote, unfinished, tmp_path, folder, options, said):
    before = names_in(tmp_path / "out.parquet.unfinished")
    status, _, err = biote("embed", folder, tmp_path / "x.fa", tmp_path / "out.parquet", *options)
    assert (status, err.count("\n")) == (1, 1)
    said = said.replace("[", r"\[") if "{" not in said else said
    assert re.search(
        rf"holds an unfinished run with other options \({said}\): give the same, or remove the folder", err
    )
    assert names_in(tmp_path / "out.parquet.unfinished") == before


def test_other_weights(biote, unfinished, tmp_path, folder):
    """Known by what they are, not by their files' times: a copy goes on, one with other numbers does not."""
    shutil.copytree(folder, tmp_path / "tiny-esm2", copy_function=shutil.copyfile)
    model, _ = biote_package.load(folder)
    with torch.no_grad():
        words = model.get_input_embeddings().weight
        words[[4, 5]] = words[[5, 4]]
    model.save_pretrained(tmp_path / "other")
    shutil.copyfile(folder / "config.json", tmp_path / "other" / "config.json")
    assert (
        "other options (weights was"
        in biote("embed", tmp_path / "other", tmp_path / "x.fa", tmp_path / "out.parquet")[2]
    )
    assert biote("embed", tmp_path / "tiny-esm2", tmp_path / "x.fa", tmp_path / "out.parquet")[0] == 0


@pytest.mark.parametrize(
    ("ids", "texts", "said"),
    [
        (["q", *UNIQUE[1:]], TEXTS, "over another input: its chunk 0 differs"),
        (UNIQUE, ["MKTAYIAKQK", *TEXTS[1:]], "over another input: its chunk 0 differs"),
        (UNIQUE[::-1], TEXTS[::-1], "over another input: its chunk 0 differs"),
    ],
)
def test_another_input(biote, unfinished, tmp_path, folder, ids, texts, said):
    fasta(tmp_path / "x.fa", ids, texts)
    status, _, err = biote("embed", folder, tmp_path / "x.fa", tmp_path / "out.parquet")
    assert (status, said in err) == (1, True)
    assert "000000.parquet" in names_in(tmp_path / "out.parquet.unfinished")


def test_an_input_that_was_cut_between_chunks(biote, tmp_path, folder, monkeypatch):
    source = fasta(tmp_path / "x.fa")
    with monkeypatch.context() as patched:
        patched.setattr(embed_files, "assemble", lambda *arguments: _raise(Stopped()))
        with pytest.raises(Stopped):
            embed_files.embed_file(job_of(folder, source, tmp_path / "o.npz"))
    first = len(pq.read_table(tmp_path / "o.npz.unfinished" / "000000.parquet"))
    fasta(source, UNIQUE[:first], TEXTS[:first])
    status, _, err = biote("embed", folder, source, tmp_path / "o.npz")
    assert (status, "holds chunks past the end of the input" in err) == (1, True)


def test_an_output_made_by_another_meanwhile(biote, unfinished, tmp_path, folder):
    (tmp_path / "out.parquet").write_text("precious")
    assert "exists already" in biote("embed", folder, tmp_path / "x.fa", tmp_path / "out.parquet")[2]
    assert "000000.parquet" in names_in(tmp_path / "out.parquet.unfinished")


def test_killed_after_the_output_appeared(biote, tmp_path, folder, monkeypatch):
    source, output = fasta(tmp_path / "x.fa"), tmp_path / "o.parquet"
    with monkeypatch.context() as patched:
        patched.setattr(embed_files, "remove_folder", lambda *arguments: _raise(Stopped()))
        with pytest.raises(Stopped):
            embed_files.embed_file(job_of(folder, source, output))
    before = output.read_bytes()
    assert biote("embed", folder, source, output)[:2] == (0, f"wrote {output}\n")
    assert (output.read_bytes(), names_in(tmp_path)) == (before, ["o.parquet", "x.fa"])


def test_a_latecomer_leaves_nothing(tmp_path, folder, monkeypatch):
    """A process of torchrun that has loaded its model when the first is done."""
    job = job_of(folder, fasta(tmp_path / "x.fa"), tmp_path / "o.parquet")
    real = embed_files.Session

    def session(*arguments: Any) -> Any:
        monkeypatch.setattr(embed_files, "Session", real)
        loaded = real(*arguments)
        embed_files.embed_file(job)
        return loaded

    monkeypatch.setattr(embed_files, "Session", session)
    embed_files.embed_file(job, rank=1)
    assert names_in(tmp_path) == ["o.parquet", "x.fa"]


@pytest.mark.parametrize("name", ["o.parquet", "o/"])
def test_the_same_command_given_twice(tmp_path, folder, monkeypatch, name):
    """They share the work, and the slower one finds the output there."""
    job, real = job_of(folder, fasta(tmp_path / "x.fa"), f"{tmp_path}/{name}"), embed_files._Run._pass

    def both(self: Any, told: Any, only: Any) -> Any:
        if only is not None:
            monkeypatch.setattr(embed_files._Run, "_pass", real)
            embed_files.embed_file(job)
        return real(self, told, only)

    monkeypatch.setattr(embed_files._Run, "_pass", both)
    embed_files.embed_file(job)
    assert names_in(tmp_path) == [name.rstrip("/"), "x.fa"]


@pytest.mark.parametrize("name", ["o.parquet", "o.h5", "o.npz", "o/"])
@pytest.mark.parametrize("shards", [0, 1, 99])
def test_a_full_disk(biote, tmp_path, folder, monkeypatch, name, shards):
    """At the first chunk nothing stays, later what is done; once there is room it goes on."""
    source, count = fasta(tmp_path / "x.fa"), []
    arguments = ("embed", folder, source, f"{tmp_path}/{name}", "--batch-tokens", 1)
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patched:
        if shards == 99 and name == "o/":  # the output itself
            real_rename = Path.rename
            patched.setattr(Path, "rename", lambda self, to: _raise(full) if to.name == "o" else real_rename(self, to))
        elif shards == 99:
            patched.setattr(embed_files, "assemble", lambda *arguments: _raise(full))
        else:
            real_write = Path.write_bytes

            def write(self: Path, content: Any) -> int:
                if ".parquet" in self.name:
                    if len(count) == shards:
                        raise full
                    count.append(1)
                return real_write(self, content)

            patched.setattr(Path, "write_bytes", write)
        status, out, err = biote(*arguments)
    assert (status, out) == (1, "")
    assert "No space left on device" in err.splitlines()[-1]
    assert ("the same command goes on from there" in err) == (shards > 0)
    assert len(names_in(tmp_path)) == (1 if shards == 0 else 2)
    assert biote(*arguments)[0] == 0
    assert len(names_in(tmp_path)) == 2


def _raise(error: BaseException) -> None:
    raise error


def test_a_disk_without_locks(biote, tmp_path, folder, expected, monkeypatch):
    def flock(*arguments: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    assert biote("embed", folder, fasta(tmp_path / "x.fa"), tmp_path / "o.parquet", "--batch-tokens", 1)[0] == 0
    near(pd.read_parquet(tmp_path / "o.parquet")["embedding"], expected["mean_2"])


# Processes. One interpreter has imported everything and forks those that are killed, so that each starts at once.

ZYGOTE = """
import json, os, resource, signal, sys, time
from biote import cli
from biote.apps import embed_files, workers  # and torch
from biote.apps.embed import embed
import numpy, pyarrow.parquet, h5py

errors = sys.argv[1]

def start(arguments, largest):
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        sys.argv = ["biote", *arguments]
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        cli.main()
    return child

for line in sys.stdin:
    arguments, seconds, largest = json.loads(line)
    began = time.monotonic()
    child = start(arguments, largest)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    print(json.dumps([os.waitstatus_to_exitcode(status), time.monotonic() - began, usage.ru_maxrss]), flush=True)
"""


class Zygote:
    def __init__(self, errors: Path) -> None:
        self.errors = errors  # what the last process said
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", ZYGOTE, errors],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def embed(self, *arguments: object, kill_after: float | None = None, largest: int = -1) -> tuple[int, float, int]:
        """Exit status (negative: the signal), seconds, most memory in KiB. largest: bytes that a file can have."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([["embed", *map(str, arguments)], kill_after, largest]) + "\n")
        self.process.stdin.flush()
        return tuple(json.loads(self.process.stdout.readline()))


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    made = Zygote(tmp_path_factory.mktemp("zygote") / "errors")
    yield made
    made.process.communicate()


LETTERS = "ACDEFGHIKLMNPQRSTVWY"


def proteins(path: Path, count: int, longest: int, seed: int = 0) -> Path:
    chance = random.Random(seed)
    texts = ["".join(chance.choices(LETTERS, k=chance.randint(1, longest))) for _ in range(count)]
    return fasta(path, [f"p{number}" for number in range(count)], texts)


def content_of(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else [file for file in sorted(path.iterdir()) if file.suffix == ".parquet"]
    return {file.name.replace(path.name, ""): file.read_bytes() for file in files}


@pytest.mark.parametrize(
    ("ending", "options"),
    [
        (".parquet", ["--pool", "mean,max"]),
        (".h5", ["--per-residue"]),
        (".npz", ["--layers", "-1", "1"]),
        ("/", ["--max-residues", "40"]),
    ],
)
def test_killed_at_any_moment(tmp_path, folder, zygote, ending, options):
    """The same command goes on, and the result is that of an uninterrupted run, byte for byte."""
    source, chance = proteins(tmp_path / "x.fa", 120, 90), random.Random(ending)
    common = [folder, source]
    whole, parts = f"{tmp_path}/whole{ending}", f"{tmp_path}/parts{ending}"
    status, seconds, _ = zygote.embed(*common, whole, *options, "--batch-tokens", 4)
    assert status == 0
    killed = 0
    while not Path(parts).exists() or Path(f"{parts.rstrip('/')}.unfinished").exists():
        kill_after = seconds * chance.uniform(0.2, 1.0 if killed else 0.6) if killed < 8 else None
        status = zygote.embed(*common, parts, *options, "--batch-tokens", 4, kill_after=kill_after)[0]
        assert status in (0, -signal.SIGKILL)
        killed += status != 0
    assert killed
    assert content_of(Path(parts)) == content_of(Path(whole))
    assert [name for name in names_in(tmp_path) if name != "x.fa"] == sorted([Path(whole).name, Path(parts).name])


def test_cells_on_a_full_disk(tmp_path, zygote):
    cells_in(tmp_path)
    arguments = (tmp_path / "tiny", tmp_path / "in.h5ad", tmp_path / "out.h5ad", "--batch-tokens", 1)
    assert zygote.embed(*arguments, largest=8_000)[0] == 1
    said = zygote.errors.read_text().splitlines()
    assert re.match(rf"error: {tmp_path / 'out.h5ad'} cannot be written: .*File too large", said[-1]), said
    assert not [line for line in said if "Traceback" in line]
    assert names_in(tmp_path) == ["in.h5ad", "out.h5ad.unfinished", "tiny"]
    assert zygote.embed(*arguments)[0] == 0


@pytest.mark.parametrize("ending", [".parquet", ".h5", ".npz"])
def test_an_output_that_grows_too_large(tmp_path, folder, zygote, ending):
    """As on a full disk: by the system's own means, in whatever library writes at that moment."""
    source, output = proteins(tmp_path / "x.fa", 120, 90), tmp_path / f"out{ending}"
    arguments = (folder, source, output, "--per-residue", "--batch-tokens", 4)
    assert zygote.embed(*arguments, largest=100_000)[0] == 1
    said = zygote.errors.read_text().splitlines()
    assert said[1].startswith("note: what is done stays in")
    assert re.match(rf"error: {output} cannot be written: .*File too large", said[2]), said
    assert len(said) == 3
    assert names_in(tmp_path) == [f"out{ending}.unfinished", "x.fa"]
    assert zygote.embed(*arguments)[0] == 0
    assert names_in(tmp_path) == [f"out{ending}", "x.fa"]


def test_a_chunk_is_one_process_at_a_time(tmp_path):
    first, second = (work.Work(tmp_path / "w", {"a": 1}, {}, {}) for _ in range(2))
    with first.claim(0, wait=False) as ours:
        assert ours
        with second.claim(0, wait=False) as theirs, second.claim(1, wait=False) as another:
            assert (theirs, another) == (False, True)
        first.write(0, pa.table({"id": ["a"]}), "digest")
    with second.claim(0, wait=True) as theirs:
        assert not theirs  # it is done
    assert second.is_done(0, "digest")
    assert not [name for name in names_in(tmp_path / "w") if name.startswith(".0")]


def test_torchrun(biote, tmp_path, folder, expected, monkeypatch):
    """Its processes by their environment: the second does what it finds, the first writes the output."""
    source, output = fasta(tmp_path / "x.fa"), tmp_path / "o.parquet"
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        status, out, err = biote("embed", folder, source, output, "--batch-tokens", 1)
        first = rank == "0"
        assert (status, out, err.count("\n")) == (0, f"wrote {output}\n" if first else "", int(first)), err
        assert output.exists() == first
    near(pd.read_parquet(output)["embedding"], expected["mean_2"])
    assert "stdin cannot be shared by several processes" in biote("embed", folder, "-", tmp_path / "p.npz")[2]


@pytest.mark.parametrize("options", [{}, {"long": "truncate"}, {"long": "skip"}, {"long": "window"}])
def test_progress_is_told_of_each_residue_once(tmp_path, folder, monkeypatch, options):
    """By a fresh run, and by one that goes on where another stopped, whose residues count as done before."""
    told: list[tuple[int, bool]] = []

    @contextmanager
    def progress(what: str, total: int, **rest: Any) -> Any:
        told.clear()
        yield lambda count, already=False: told.append((count, already))
        assert sum(count for count, _ in told) == total

    monkeypatch.setattr(embed_files, "progress", progress)
    wanted = Wanted(max_residues=12, **options)
    source = proteins(tmp_path / "x.fa", 30, 20)
    embed_files.embed_file(job_of(folder, source, tmp_path / "a.parquet", wanted=wanted))
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        with pytest.raises(Stopped):
            embed_files.embed_file(job_of(folder, source, tmp_path / "b.parquet", wanted=wanted))
    embed_files.embed_file(job_of(folder, source, tmp_path / "b.parquet", wanted=wanted))
    assert [already for _, already in told][:2] == [True, False]


def test_processes_share(biote, tmp_path, folder, monkeypatch, zygote):
    """Two give what one gives, byte for byte; so do they when one is killed amid its work."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the zygote's: another number of threads sums in another order
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    source = proteins(tmp_path / "x.fa", 500, 60)
    assert zygote.embed(folder, source, tmp_path / "one.npz", "--batch-tokens", 4)[0] == 0
    expected = (tmp_path / "one.npz").read_bytes()
    others, real = [], workers._start
    monkeypatch.setattr(workers, "_start", lambda *arguments: others.append(real(*arguments)) or others[-1])
    real_write, waited = work.Work.write, []
    their_chunks: list[bool] = []

    def write(self: Any, number: int, *rest: Any) -> None:
        """Ours: wait at the third till the other process has work in hand."""
        if number >= 2 and not waited:
            waited.append(1)
            end = time.monotonic() + 120
            while time.monotonic() < end and others[0].poll() is None:
                locks = {path.name for path in self.folder.glob(".0*.lock")}
                if len(locks) > 2:
                    their_chunks.append(True)
                    break
                time.sleep(0.01)
            if kill:
                others[0].kill()
        real_write(self, number, *rest)

    monkeypatch.setattr(work.Work, "write", write)
    for kill in (False, True):
        waited.clear()
        others.clear()
        name = tmp_path / f"two{kill}.npz"
        status, out, err = biote("embed", folder, source, name, "--batch-tokens", 4, "--devices", "cpu,cpu")
        said = [line for line in err.splitlines() if not line.startswith("embedding: ")]  # how far it is, if slow
        assert (status, out, len(said)) == (0, f"wrote {name}\n", 1), err
        assert name.read_bytes() == expected
    torch.set_num_threads(threads)
    assert their_chunks == [True, True]
    assert names_in(tmp_path) == ["one.npz", "twoFalse.npz", "twoTrue.npz", "x.fa"]


def test_memory_does_not_grow_with_the_input(tmp_path, zygote):
    """Measured: 493 MB for 10^5, 490 MB for 3 * 10^5; with all items in a list it fails."""
    port = port_named("esm2")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    port.classes["AutoModel"](port.config_class(engine="torch", **shape)).save_pretrained(tmp_path / "tiny")
    peaks = {}
    for count in (30_000, 200_000):
        source = tmp_path / f"{count}.fa"
        source.write_text("".join(f">p{number}\nMKTA\n" for number in range(count)))
        status, _, peaks[count] = zygote.embed(
            tmp_path / "tiny", source, tmp_path / f"{count}.parquet", "--batch-tokens", 1024
        )
        assert status == 0
        assert pq.read_metadata(tmp_path / f"{count}.parquet").num_rows == count
    assert peaks[200_000] - peaks[30_000] < 16_000, peaks  # KiB
