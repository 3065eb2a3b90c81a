"""Contacts within proteins: how likely each pair of residues is to touch, by models that have a head for it.

Shapes: L residues of one protein.
"""

import sys
import zipfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..convert import locate, read_identity
from ..data.sequences import Cleaner, Record, read_records
from ..files import check_destination, new_file, new_folder
from ..loading import load
from ..port import ModelPort, installed_ports
from .embed import encoder_of, special_ids, tokenize, tokenizer_of
from .plotting import require_matplotlib
from .progress import progress

IDS = "ids"  # the array of an .npz that says which others there are
LONGEST_NAME = 255  # bytes of a file's, on most file systems


def contacts(model: Any, sequences: Sequence[str], *, tokenizer: Any = None) -> list[np.ndarray]:
    """Probabilities of contact [L, L] of each sequence, float32, or float64 from a model in float64.

    model: of a port whose models have `predict_contacts`, in eval mode, as `biote.load` gives it. tokenizer: None is
    the port's own. Sequences are read as `biote contacts` reads them: see `Cleaner`. ValueError for a model without
    contacts, and naming the first sequence that cannot be read.
    """
    if isinstance(sequences, str):
        raise ValueError("one string was given: give a list of sequences")
    tokenizer = tokenizer or tokenizer_of(model)
    clean, predict = Cleaner(tokenizer), predictor(model, tokenizer)
    records = [clean(Record(f"sequence {number}", text)) for number, text in enumerate(sequences)]
    return [predict(record) for record in records]


def predictor(model: Any, tokenizer: Any) -> Callable[[Record], np.ndarray]:
    """What predicts the contacts of a clean record; ValueError for a model that has none."""
    encoder = encoder_of(model)
    if not hasattr(encoder, "predict_contacts"):
        raise ValueError(_no_contacts(type(model).__name__))
    before, after = special_ids(tokenizer)
    most = encoder.max_positions

    @torch.inference_mode()
    def predict(record: Record) -> np.ndarray:
        row = np.concatenate((before, *tokenize(tokenizer, [record.sequence]), after)).astype(np.int64)
        if most is not None and len(row) > most:
            raise ValueError(f"{record.id} has {len(row):,} tokens, more than the {most:,} that the model takes")
        try:
            found = encoder.predict_contacts(torch.from_numpy(row)[None].to(encoder.device))[0]
        except torch.OutOfMemoryError:
            found = None
        if found is None:
            raise RuntimeError(
                f"{encoder.device} has not the memory for {record.id}, of {len(record.sequence):,} residues"
            )
        return found.cpu().numpy()

    return predict


def contacts_file(
    source: str,
    fasta: Path,
    output: Path,
    *,
    plot: bool = False,
    engine: str = "auto",
    dtype: str | None = None,
    device: str | None = None,
    port_name: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
) -> str:
    """Write the contacts of each protein in a file to `output`, an .npz: see docs/contacts.md. Returns what was done.

    plot: also a picture of each, ID.png, in a folder beside `output` that is called like it, without ".npz". source,
    engine and so on: as of `biote.load`. One protein is in the device's memory at a time. Nothing is written unless
    all is. FileNotFoundError, FileExistsError, ValueError, or RuntimeError where the device has not the memory.
    """
    if output.suffix != ".npz":
        raise ValueError(f"the name of the output, {output}, must end with .npz")
    check_destination(output)
    pictures = output.with_suffix("")
    if plot:
        require_matplotlib("pictures (--plot) need")
        check_destination(pictures)
    records = list(read_records(fasta))
    _check_ids([record.id for record in records], plot)
    folder = locate(source, revision, subfolder)
    _check_port(read_identity(folder, port_name)[0])
    model, tokenizer = load(folder, "embedding", engine=engine, dtype=dtype, device=device, port_name=port_name)
    clean = Cleaner(tokenizer)
    records = [clean(record) for record in records]
    residues = sum(len(record.sequence) for record in records)
    predict = predictor(model, tokenizer)
    with ExitStack() as stack:
        partial = stack.enter_context(new_file(output))
        drawn = stack.enter_context(new_folder(pictures)) if plot else None
        told = stack.enter_context(progress("contacts", residues, shown=sys.stderr.isatty()))
        with zipfile.ZipFile(partial, "w") as archive:
            _add(archive, IDS, np.array([record.id for record in records]))
            for record in records:
                found = predict(record).astype(np.float32)
                _add(archive, record.id, found)
                if drawn is not None:
                    contact_map(drawn / _picture_of(record.id), found, record.id)
                told(len(record.sequence))
    proteins = f"{len(records):,} protein{'' if len(records) == 1 else 's'} of {residues:,} residues"
    how = f"{str(model.dtype).removeprefix('torch.')} on {model.device} ({model.base_model.engine} engine)"
    return "; ".join([proteins, how, *([clean.report()] if clean.counts else [])])


def contact_map(path: Path, probabilities: np.ndarray, title: str) -> None:
    """A PNG of contact probabilities [L, L], from white, 0, to black, 1. Residues count from 1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 5.6), layout="constrained", dpi=150)
    axes = figure.subplots()
    edge = len(probabilities) + 0.5
    image = axes.imshow(
        probabilities, cmap="Greys", vmin=0, vmax=1, extent=(0.5, edge, edge, 0.5), interpolation="nearest"
    )
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.set_xlabel("residue")
    axes.set_ylabel("residue")
    figure.colorbar(image, ax=axes, label="probability of contact")
    figure.savefig(path, format="png")


def _add(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    """As np.savez does, which wants all arrays at once."""
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)


def _picture_of(name: str) -> str:
    return f"{name.replace('/', '_')}.png"


def _check_ids(ids: Sequence[str], plot: bool) -> None:
    """ValueError for ids that cannot name an array each, or with --plot a picture each."""
    for name in ids:
        if not name.isprintable() or (plot and len(_picture_of(name).encode()) > LONGEST_NAME):
            raise ValueError(f"the id {name!r} is too long for the name of a picture, or holds what cannot be printed")
    _refuse_equal((name.removesuffix(".npy"), name) for name in [IDS, *ids])  # np.load takes ".npy" off
    if plot:
        _refuse_equal((_picture_of(name).lower(), name) for name in ids)  # some file systems know no capitals


def _refuse_equal(named: Iterable[tuple[str, str]]) -> None:
    seen: dict[str, str] = {}
    for key, name in named:
        if key in seen:
            first = seen[key]
            how = "stands twice" if first == name else f"would be written under the same name as {first!r}"
            why = f"; {IDS!r} is the list of them" if first == IDS else ""
            raise ValueError(f"the id {name!r} {how}{why}: every protein needs an id of its own")
        seen[key] = name


def _check_port(port: ModelPort) -> None:
    if not hasattr(port.classes.get("AutoModel"), "predict_contacts"):
        raise ValueError(_no_contacts(port.title))


def _no_contacts(name: str) -> str:
    able = [p.title for p in installed_ports().values() if hasattr(p.classes.get("AutoModel"), "predict_contacts")]
    return f"{name} predicts no contacts; of the ports installed, these do: {', '.join(able) or 'none'}"
