"""Speed of masked marginals: `biote.apps.score` against plain loops over transformers' own model, random weights.

Every site of one protein is masked in turn. The loops are what people write: one masked copy at a time, or eight.
All are in one process and take turns, so that whatever else the machine does meets them alike.
Shapes: S tokens of the protein.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from common import RESULTS, provenance, random_original, write_result
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForMaskedLM

import biote
from biote.apps.score import AMINO_ACIDS, Scoring, score
from biote.apps.variants import scan_of
from biote.data.sequences import Record

TOLERANCE = {"float32": 2e-3, "bfloat16": 0.5}  # between scores of two runs that round in different places
Scores = Callable[[Record], np.ndarray]


def protein_of(length: int, seed: int) -> Record:
    places = torch.randint(len(AMINO_ACIDS), (length,), generator=torch.Generator().manual_seed(seed))
    return Record(f"random{length}", "".join(AMINO_ACIDS[place] for place in places))


def loop(original: Any, tokenizer: Any, batch: int) -> Scores:
    """Scores [L, 20] of all substitutions by a loop over masked copies, `batch` of them at a time."""
    letters = torch.tensor(tokenizer.convert_tokens_to_ids(list(AMINO_ACIDS)), device=original.device)

    @torch.inference_mode()
    def run(protein: Record) -> np.ndarray:
        ids = tokenizer(protein.sequence, return_tensors="pt")["input_ids"].to(original.device)  # [1, S]
        found = []
        sites = range(1, ids.shape[1] - 1)
        for chunk in (list(sites[at : at + batch]) for at in range(0, len(sites), batch)):
            rows = ids.repeat(len(chunk), 1)
            rows[range(len(chunk)), chunk] = tokenizer.mask_token_id
            logits = original(input_ids=rows, attention_mask=torch.ones_like(rows)).logits
            log_p = logits[range(len(chunk)), chunk].float().log_softmax(-1)
            found.append(log_p[:, letters] - log_p.gather(1, ids[0, chunk][:, None]))
        return torch.cat(found).cpu().numpy()

    return run


def ours(model: Any, tokenizer: Any) -> Scores:
    def run(protein: Record) -> np.ndarray:
        variants = list(scan_of(0, protein, AMINO_ACIDS))
        return score(model, tokenizer, [protein], variants, Scoring(window_tokens=0)).reshape(-1, len(AMINO_ACIDS))

    return run


def measure(ways: dict[str, Scores], protein: Record, repeats: int, tolerance: float) -> dict[str, Any]:
    """Median times of all ways, one after the other `repeats` times after one warm-up of each."""
    scores = {name: run(protein) for name, run in ways.items()}
    reference = scores["loop, batch 1"]
    differences = {name: float(abs(found - reference).max()) for name, found in scores.items()}
    assert max(differences.values()) < tolerance, f"{protein.id}: scores differ by {differences}"
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in track(range(repeats), protein.id, transient=True, console=Console(stderr=True)):
        for name, run in ways.items():
            start = time.perf_counter()
            run(protein)
            times[name].append(time.perf_counter() - start)
    medians = {name: median(values) for name, values in times.items()}
    length = len(protein.sequence)
    return {
        "residues": length,
        "largest_score": float(abs(reference).max()),
        "largest_difference": differences,
        "median_seconds": medians,
        "seconds": times,
        "passes_per_second": {name: length / value for name, value in medians.items()},
        "ratio": {name: value / medians["biote"] for name, value in medians.items() if name != "biote"},
    }


def show(results: list[dict[str, Any]], what: str) -> None:
    table = Table(title=f"masked marginals, passes a second ({what})")
    for heading in ("residues", *results[0]["passes_per_second"], *(f"biote / {n}" for n in results[0]["ratio"])):
        table.add_column(heading, justify="right")
    for result in results:
        speeds = (f"{value:,.1f}" for value in result["passes_per_second"].values())
        table.add_row(str(result["residues"]), *speeds, *(f"{value:.2f}" for value in result["ratio"].values()))
    Console().print(table)


def main(
    tag: Annotated[str, typer.Option(help="Whose shape the models have.")] = "esm2_t6_8M_UR50D",
    lengths: Annotated[str, typer.Option(help="Residues of the proteins.")] = "60,150,300",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    engine: Annotated[str, typer.Option(help="Of biote's model.")] = "auto",
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each way.")] = 3,
    output: Annotated[Path, typer.Option(help="Where the result is written.")] = RESULTS / "score_speed.json",
) -> None:
    """Compare biote's masked marginals with loops over transformers' model."""
    facts = provenance(("torch", "transformers", "biote"))
    if device == "cuda":
        facts["device"] = torch.cuda.get_device_name()
    with tempfile.TemporaryDirectory() as folder:
        random_original(tag, Path(folder), seed=0)
        model, tokenizer = biote.load(folder, "masked-lm", engine=engine, dtype=dtype, device=device)
        original = AutoModelForMaskedLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
    ways = {
        "biote": ours(model, tokenizer),
        "loop, batch 1": loop(original, tokenizer, 1),
        "loop, batch 8": loop(original, tokenizer, 8),
    }
    proteins = [protein_of(int(length), seed) for seed, length in enumerate(lengths.split(","))]
    results = [measure(ways, protein, repeats, TOLERANCE[dtype]) for protein in proteins]
    settings = {
        "tag": tag, "dtype": dtype, "engine": model.base_model.engine, "threads": torch.get_num_threads(),
        "original_attention": original.config._attn_implementation,
    }  # fmt: skip
    write_result(output, {**facts, "model": settings, "repeats": repeats, "results": results})
    show(results, f"{tag}, {dtype}, {device}, {model.base_model.engine} engine")


if __name__ == "__main__":
    typer.run(main)
