"""`biote contacts` and its function: what a file holds is what the original predicts; bad input is one line."""

import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import EsmForMaskedLM

import biote as package
from biote.apps.contacts import contacts

SEQUENCES = {"sp|P1/x": "MKTAYIAKQRQISFVKSHFSRQ", "b.1": "GSHMLEQ", "c": "M"}
FASTA = ">sp|P1/x first\nMKTAYIAKQR\nqisfvkshfsrq*\n>b.1\nGSHM-LEQ\n>c\nM\n"
DTYPES = {"float64": 1e-6, "float32": 1e-5, "bfloat16": 0.02}  # how near the original in float64; files are float32


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    path = tmp_path / "p.fasta"
    path.write_text(FASTA)
    return path


@pytest.fixture(scope="module")
def expected(tiny_original) -> dict[str, np.ndarray]:
    """By the original, in float64, one protein at a time."""
    original = EsmForMaskedLM.from_pretrained(tiny_original, dtype=torch.float64, attn_implementation="eager").eval()
    tokenizer = package.load(tiny_original, device="cpu")[1]
    found = {}
    for name, sequence in SEQUENCES.items():
        rows = tokenizer([sequence], return_tensors="pt")
        with torch.no_grad():
            found[name] = original.predict_contacts(rows["input_ids"], rows["attention_mask"])[0].numpy()
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_file_holds_what_the_original_predicts(biote, tiny_original, fasta, expected, tmp_path, dtype):
    out = tmp_path / "out.npz"
    status, printed, err = biote("contacts", tiny_original, fasta, out, "--dtype", dtype, "--device", "cpu")
    assert (status, err) == (0, "")
    notes = "12 small letters read as capitals, 1 stops (*) at the end left out, 1 gaps left out"
    assert printed == f"3 proteins of 30 residues; {dtype} on cpu (torch engine); {notes}; wrote {out}\n"
    with np.load(out) as found:
        assert found.files == ["ids", *SEQUENCES]
        assert found["ids"].tolist() == list(SEQUENCES)
        for name, sequence in SEQUENCES.items():
            assert found[name].dtype == np.float32
            assert found[name].shape == (len(sequence), len(sequence))
            np.testing.assert_array_equal(found[name], found[name].T)
            np.testing.assert_allclose(found[name], expected[name], atol=DTYPES[dtype])


def test_the_function_gives_the_same(tiny_original, expected):
    for task in ("embedding", "masked-lm"):
        model, tokenizer = package.load(tiny_original, task, device="cpu", dtype="float64")
        for given in (tokenizer, None):
            found = contacts(model, list(SEQUENCES.values()), tokenizer=given)
            for one, reference in zip(found, expected.values(), strict=True):
                assert one.dtype == np.float64
                np.testing.assert_allclose(one, reference, rtol=1e-9, atol=1e-11)
    assert contacts(model, []) == []


def test_pictures_lie_in_a_folder_beside(biote, tiny_original, fasta, tmp_path):
    assert biote("contacts", tiny_original, fasta, tmp_path / "out.npz", "--plot")[0] == 0
    pictures = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in pictures] == ["b.1.png", "c.png", "sp|P1_x.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.npz", "p.fasta"]


@pytest.mark.parametrize(
    ("ids", "plot", "message"),
    {
        "twice": (["a", "b", "a"], False, "the id 'a' stands twice: every protein needs"),
        "ids": (["a", "ids"], False, "the id 'ids' stands twice; 'ids' is the list of them"),
        "npy": (["a", "a.npy"], False, "the id 'a.npy' would be written under the same name as 'a'"),
        "picture": (["a/b", "a_b"], True, "the id 'a_b' would be written under the same name as 'a/b'"),
        "capitals": (["A", "a"], True, "the id 'a' would be written under the same name as 'A'"),
        "too long": (["a" * 252], True, "is too long for the name of a picture"),
        "nul": (["a\0b"], False, "holds what cannot be printed"),
    }.values(),
)
def test_ids_that_cannot_be_kept_apart(biote, tiny_original, tmp_path, ids, plot, message):
    fasta = tmp_path / "p.fasta"
    fasta.write_text("".join(f">{name}\nMK\n" for name in ids))
    options = ["--plot"] if plot else []
    status, _, err = biote("contacts", tiny_original, fasta, tmp_path / "out.npz", *options)
    assert status == 1
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["p.fasta"]


def test_ids_that_share_a_picture_may_share_a_file(biote, tiny_original, tmp_path):
    (tmp_path / "p.fasta").write_text(">a/b\nMK\n>a_b\nGSH\n>A_b\nGSHM\n")
    assert biote("contacts", tiny_original, tmp_path / "p.fasta", tmp_path / "out.npz")[0] == 0
    with np.load(tmp_path / "out.npz") as found:
        assert [len(found[name]) for name in found["ids"]] == [2, 3, 4]


@pytest.mark.parametrize(("name", "title"), [("amplify", "AMPLIFY"), ("geneformer", "Geneformer")])
def test_models_without_contacts_say_who_has_them(biote, root, fasta, tmp_path, name, title):
    status, out, err = biote("contacts", root / "models" / name / "tests" / "golden", fasta, tmp_path / "out.npz")
    able = "predicts no contacts; of the ports installed, these do: ESM-2"
    assert (status, out, err) == (1, "", f"error: {title} {able}\n")
    if name == "amplify":
        model, _ = package.load(root / "models" / name / "tests" / "golden", device="cpu")
        with pytest.raises(ValueError, match=able):
            contacts(model, ["MK"])


def test_a_checkpoint_without_the_head(biote, tiny_original, fasta, tmp_path):
    assert biote("convert", tiny_original, tmp_path / "nvidia", "--to", "nvidia")[0] == 0
    status, _, err = biote("contacts", tmp_path / "nvidia", fasta, tmp_path / "out.npz", "--plot")
    assert (status, err.count("\n")) == (1, 1)
    assert "this checkpoint has no contact head" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nvidia", "p.fasta"]


def test_what_is_there_is_not_overwritten(biote, tiny_original, fasta, tmp_path):
    (tmp_path / "out").mkdir()
    assert "must end with .npz" in biote("contacts", tiny_original, fasta, tmp_path / "out.h5")[2]
    assert f"{tmp_path / 'out'} " in biote("contacts", tiny_original, fasta, tmp_path / "out.npz", "--plot")[2]
    assert biote("contacts", tiny_original, fasta, tmp_path / "out.npz")[0] == 0
    before = (tmp_path / "out.npz").read_bytes()
    assert f"{tmp_path / 'out.npz'} " in biote("contacts", tiny_original, fasta, tmp_path / "out.npz")[2]
    assert (tmp_path / "out.npz").read_bytes() == before


@pytest.mark.parametrize("stopped", [signal.SIGTERM, OSError("No space left on device"), torch.OutOfMemoryError()])
def test_a_run_that_stops_leaves_nothing(biote, tiny_original, fasta, tmp_path, monkeypatch, stopped):
    model_class = type(package.load(tiny_original, "embedding", device="cpu")[0])
    real = model_class.predict_contacts

    def fail(error):
        raise error

    def predict(self, tokens):
        if tokens.shape[1] == 9:  # the second protein
            signal.raise_signal(stopped) if isinstance(stopped, signal.Signals) else fail(stopped)
        return real(self, tokens)

    monkeypatch.setattr(model_class, "predict_contacts", predict)
    status, _, err = biote("contacts", tiny_original, fasta, tmp_path / "out.npz", "--plot", "--device", "cpu")
    assert status == (128 + stopped if isinstance(stopped, signal.Signals) else 1)
    assert err.count("\n") == 1
    if isinstance(stopped, torch.OutOfMemoryError):
        assert err == "error: cpu has not the memory for b.1, of 7 residues\n"
    assert [path.name for path in tmp_path.iterdir()] == ["p.fasta"]


def test_without_matplotlib_pictures_say_what_to_install(biote, tiny_original, fasta, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert biote("contacts", tiny_original, fasta, tmp_path / "a.npz")[0] == 0
    status, _, err = biote("contacts", tiny_original, fasta, tmp_path / "b.npz", "--plot")
    assert (status, err) == (1, "error: pictures (--plot) need matplotlib: pip install 'biote[plot]'\n")


def test_a_protein_longer_than_the_model_is_named(tiny_original, monkeypatch):
    model, _ = package.load(tiny_original, device="cpu")
    monkeypatch.setattr(model.base_model, "max_positions", 8)
    with pytest.raises(ValueError, match="sequence 1 has 9 tokens, more than the 8 that the model takes"):
        contacts(model, ["M", "GSHMLEQ"])
