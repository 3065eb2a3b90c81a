"""The jobs of `biote score`: a FASTA file and a CSV of variants in, the CSV with scores out; or a whole scan."""

import csv
import gc
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ..convert import locate, read_identity
from ..data.sequences import Cleaner, Record, read_records
from ..files import check_destination, new_file
from ..loading import load
from .plotting import require_matplotlib
from .score import AMINO_ACIDS, Residues, Scoring, score, window_of
from .variants import Table, Variant, read_table, read_variants, scan_of

PANEL = 100  # residues side by side in a heat map


@dataclass(frozen=True)
class Where:
    """How models are loaded and run; as of `biote.load`. batch_tokens: None is what suits the device."""

    engine: str = "auto"
    dtype: str | None = None
    device: str | None = None
    batch_tokens: int | None = None
    show_progress: bool = False


@dataclass(frozen=True)
class Source:
    """A model asked for, known by its tokens before its weights are read, and the proteins as it reads them."""

    name: str
    folder: Path
    residues: Residues
    proteins: list[Record]


def score_file(
    models: Sequence[str],
    fasta: Path,
    variants: Path,
    output: Path,
    scoring: Scoring,
    where: Where,
    *,
    mutation_column: str = "mutant",
    id_column: str | None = None,
    offset: int = 1,
    score_column: str | None = None,
) -> str:
    """Write the CSV `variants` with a column of scores more; of several models their mean, and a column for each.

    id_column: names each variant's protein in the FASTA file; None: there is one. offset: the number of the first
    residue. score_column: None is `MODEL_METHOD`, or of several models `ensemble_METHOD`. Returns what was done, in a
    line. All variants are checked before a model runs; FileNotFoundError, FileExistsError or ValueError if one fails.
    """
    _check_output(output, (".csv",))
    table = read_table(variants)
    sources, notes = _sources(models, fasta)
    read = read_variants(table, sources[0].proteins, mutation_column, id_column, offset)
    for source in sources:
        _check_letters(source, read, table)
    columns = [f"{source.name}_{scoring.label}" for source in sources]
    if len(sources) > 1:
        columns.append(score_column or f"ensemble_{scoring.label}")
    elif score_column:
        columns = [score_column]
    repeated = [name for name, count in Counter([*table.header, *columns]).items() if count > 1 and name in columns]
    if repeated:
        raise ValueError(f"the column {repeated[0]!r} is there already: choose another --score-column")
    scores, done = _scores(sources, read, scoring, where)
    scores = scores if len(sources) == 1 else [*scores, np.mean(scores, 0)]
    texts = {name: [str(float(value)) for value in column] for name, column in zip(columns, scores, strict=True)}
    with new_file(output) as partial:
        _write_csv(partial, table.with_columns(texts))
    of = len({variant.protein for variant in read})
    what = f"{_count(len(read), 'variant')} of {_count(of, 'protein')}"
    return "; ".join([what, scoring.label, *done, *notes])


def scan_file(
    models: Sequence[str],
    fasta: Path,
    output: Path,
    scoring: Scoring,
    where: Where,
    *,
    offset: int = 1,
    plot: bool = False,
) -> str:
    """Write the scores of every single substitution, the mean over several models, as .csv or .parquet.

    A row a residue: columns id, position, wild_type, and one for each of AMINO_ACIDS; the wild type's own is 0, and
    where a model does not know the wild residue there is nothing. plot: also a heat map beside it, of one protein, as
    .png. Returns what was done, in a line.
    """
    _check_output(output, (".csv", ".parquet"))
    picture = output.with_suffix(".png")
    if plot:
        require_matplotlib("a heat map needs")
        _check_output(picture, (".png",))
    sources, notes = _sources(models, fasta)
    proteins = sources[0].proteins
    if plot and len(proteins) > 1:
        raise ValueError(f"{fasta} holds {len(proteins):,} proteins: a heat map (--plot) is of one")
    variants = [
        variant for number, protein in enumerate(proteins) for variant in scan_of(number, protein, AMINO_ACIDS)
    ]
    known = [all(not source.residues.unknown(variant) for source in sources) for variant in variants]
    asked = [variant for variant, all_know in zip(variants, known, strict=True) if all_know]
    scores, done = _scores(sources, asked, scoring, where)
    matrix = np.full((len(variants) // len(AMINO_ACIDS), len(AMINO_ACIDS)), np.nan)
    matrix.ravel()[known] = np.mean(scores, 0)
    with new_file(output) as partial:
        _write_scan(partial, proteins, matrix, offset)
        if plot:
            with new_file(picture) as drawn:
                heat_map(drawn, proteins[0].sequence, matrix, offset, f"{proteins[0].id}: {scoring.label}")
    if unknown := int(np.isnan(matrix).any(1).sum()):
        notes.append(f"{_count(unknown, 'residue')} without scores, which the model does not know")
    what = f"{_count(len(matrix), 'residue')} of {_count(len(proteins), 'protein')}"
    return "; ".join([what, scoring.label, *done, *notes])


def _check_output(output: Path, endings: Sequence[str]) -> None:
    if output.suffix not in endings:
        raise ValueError(f"the name of the output, {output}, must end with {' or '.join(endings)}")
    check_destination(output)


def _sources(models: Sequence[str], fasta: Path) -> tuple[list[Source], list[str]]:
    """The models with the proteins, and what had to be changed in these; ValueError where a model reads none."""
    names = [Path(model).absolute().name for model in models]
    if len(set(names)) < len(names):
        names = list(models)
    if len(set(names)) < len(names):
        raise ValueError(f"a model is asked for twice: {', '.join(names)}")
    records = list(read_records(fasta))
    sources, report = [], ""
    for name, model in zip(names, models, strict=True):
        folder = locate(model)
        port = read_identity(folder)[0]
        tokenizer = port.build_tokenizer() if port.build_tokenizer else None
        residues = Residues.of_port(port, tokenizer)
        clean = Cleaner(tokenizer)
        proteins = [clean(record) for record in records]
        sources.append(Source(name, folder, residues, proteins))
        report = report or clean.report()
    return sources, [report] if report else []


def _check_letters(source: Source, variants: Sequence[Variant], table: Table) -> None:
    for line, variant in zip(table.lines, variants, strict=True):
        if unknown := source.residues.unknown(variant):
            raise ValueError(f"{table.path}, line {line}: {source.name} does not know the residue {unknown}")


def _scores(
    sources: Sequence[Source], variants: Sequence[Variant], scoring: Scoring, where: Where
) -> tuple[list[np.ndarray], list[str]]:
    """Scores of each model, one in memory at a time; and in words how the last one ran."""
    found, words = [], []
    for source in sources:
        model, tokenizer = load(
            source.folder, "masked-lm", engine=where.engine, dtype=where.dtype, device=where.device
        )
        found.append(
            score(model, tokenizer, source.proteins, variants, scoring, where.batch_tokens, where.show_progress)
        )
        window = window_of(model, scoring.window_tokens)
        special = tokenizer.num_special_tokens_to_add()
        long = sum(len(protein.sequence) + special > window for protein in source.proteins) if window else 0
        words = [f"{str(model.dtype).removeprefix('torch.')} on {model.device} ({model.base_model.engine} engine)"]
        if long:
            words.append(f"{_count(long, 'protein')} of more than {window:,} tokens in {scoring.rule} windows")
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return found, words


def _write_scan(path: Path, proteins: Sequence[Record], matrix: np.ndarray, offset: int) -> None:
    header = ["id", "position", "wild_type", *AMINO_ACIDS]
    residues = [
        (protein.id, place, letter) for protein in proteins for place, letter in enumerate(protein.sequence, offset)
    ]
    if path.suffix == ".parquet":
        arrays = [*(list(column) for column in zip(*residues, strict=True)), *(
            pa.array(column, mask=np.isnan(column)) for column in matrix.T
        )]  # fmt: skip
        pq.write_table(pa.table(arrays, names=header), path)
        return
    texts = [["" if np.isnan(value) else str(float(value)) for value in row] for row in matrix]
    _write_csv(path, [header, *([*residue, *row] for residue, row in zip(residues, texts, strict=True))])


def _write_csv(path: Path, rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def heat_map(path: Path, sequence: str, matrix: np.ndarray, offset: int, title: str) -> None:
    """A PNG of scores [L, 20], a hundred residues a panel: red is likelier than the wild type, which has dots."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    panels = -(-len(matrix) // PANEL)
    figure = Figure(figsize=(16, 0.8 + 3.2 * panels), layout="constrained", dpi=100)
    figure.suptitle(title)
    most = max(float(np.nanmax(np.abs(matrix), initial=0)), 1e-12)
    colours = colormaps["RdBu_r"].with_extremes(bad="lightgrey")
    drawn = figure.subplots(panels, 1, squeeze=False)[:, 0]
    for start, axes in zip(range(0, len(matrix), PANEL), drawn, strict=True):
        part = matrix[start : start + PANEL].T  # [20, residues]
        image = axes.imshow(part, cmap=colours, vmin=-most, vmax=most, aspect="auto", interpolation="nearest")
        wild = [AMINO_ACIDS.find(letter) for letter in sequence[start : start + PANEL]]
        places = [at for at, row in enumerate(wild) if row >= 0]
        axes.plot(places, [wild[at] for at in places], "k.", markersize=3)
        axes.set_xlim(-0.5, min(len(matrix), PANEL) - 0.5)
        axes.set_yticks(range(len(AMINO_ACIDS)), list(AMINO_ACIDS), fontsize=7)
        ticks = [at for at in range(part.shape[1]) if (start + at + offset) % 10 == 0 or at == 0]
        axes.set_xticks(ticks, [str(start + at + offset) for at in ticks])
    figure.colorbar(image, ax=drawn, label="score")
    figure.savefig(path, format="png")
