"""Mean embeddings of a ragged FASTA: `biote embed` beside the loops that people write over transformers' model.

loop: batches of eight in the file's order, padded. sorted: by length, at most 4,096 padded tokens a batch, as
esm-extract has it. bare: our model over the job's own batches, tokenized before, and nothing else. job: all that
`biote embed` does after loading, FASTA to parquet. All of one shape, with random weights, in the dtype given.
The sides take turns in one process; figures are medians of real residues a second.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from common import RESULTS, provenance, random_original, tagged, write_result
from rich.console import Console
from rich.table import Table

import biote
from biote.apps.embed import special_ids, tokenize
from biote.apps.embed_files import embed_file
from biote.apps.embed_job import BATCHES_A_CHUNK, Job
from biote.apps.items import Item, chunked
from biote.data.batches import default_budget, packed, token_batches
from biote.runtime.engine import why_not_te

MEDIAN_LENGTH, SIGMA, MOST_RESIDUES = 270, 0.7, 1022
RAGGED = (10, 1500)
BATCH, SORTED_TOKENS = 8, 4096
AGREE = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # relative L2 of means


def proteins(count: int, seed: int, ragged: bool) -> list[str]:
    """Random proteins: of log-normal lengths; or ragged, evenly spread in the logarithm from 10 to 1,500 residues."""
    random = np.random.default_rng(seed)
    if ragged:
        lengths = np.exp(random.uniform(*np.log(RAGGED), count)).astype(int)
    else:
        lengths = np.minimum(random.lognormal(np.log(MEDIAN_LENGTH), SIGMA, count).astype(int) + 1, MOST_RESIDUES)
    return ["".join(random.choice(list("ACDEFGHIKLMNPQRSTVWY"), length)) for length in lengths]


def write_fasta(texts: list[str], path: Path) -> None:
    path.write_text("".join(f">p{number}\n{text}\n" for number, text in enumerate(texts)), encoding="utf-8")


def plain(model: Any, tokenizer: Any, texts: list[str], batches: list[list[int]]) -> np.ndarray:
    """Padded batches through transformers' model: means over residues [B, N]."""
    found = np.empty((len(texts), model.config.hidden_size), np.float32)
    for places in batches:
        batch = tokenizer([texts[place] for place in places], padding=True, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            states = model(**batch).last_hidden_state
            mask = batch["attention_mask"].clone()
            ends = mask.sum(1) - 1
            mask[:, 0] = 0
            mask[torch.arange(len(places)), ends] = 0
            means = (states.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        found[places] = means.cpu().numpy()
    return found


def padded_batches(lengths: list[int], tokens: int) -> list[list[int]]:
    """By rising length; rows times the longest stay within `tokens`."""
    batches: list[list[int]] = [[]]
    for place in sorted(range(len(lengths)), key=lambda place: lengths[place]):
        if batches[-1] and (len(batches[-1]) + 1) * (lengths[place] + 2) > tokens:
            batches.append([])
        batches[-1].append(place)
    return batches


def bare(model: Any, tokenizer: Any, texts: list[str]) -> Callable[[], None]:
    """Our model over the batches that the job makes, which are tokenized and laid out before."""
    before, after = special_ids(tokenizer)
    rows, budget = tokenize(tokenizer, texts), default_budget(model)
    items = (Item(str(place), place, text) for place, text in enumerate(texts))
    batches = []
    for chunk in chunked(items, 8192, budget * BATCHES_A_CHUNK):
        whole = [np.concatenate((before, rows[item.place], after)) for item in chunk.items]
        batches += [[whole[p] for p in places] for places in token_batches([len(row) for row in whole], budget)]
    laid_out = [packed(batch, "cpu") for batch in batches]

    def run() -> None:
        with torch.inference_mode():
            for batch in laid_out:
                model(**{**batch, "input_ids": batch["input_ids"].to(model.device)})
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    return run


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main(
    tag: Annotated[str, typer.Option(help="whose shape")] = "esm2_t6_8M_UR50D",
    count: Annotated[int, typer.Option(help="proteins for our own sides")] = 500,
    plain_count: Annotated[int, typer.Option(help="of them, for the loops over transformers' model")] = 500,
    ragged: Annotated[bool, typer.Option(help="10 to 1,500 residues, in place of log-normal lengths")] = False,
    engines: Annotated[str, typer.Option(help="of ours, with commas")] = "torch",
    dtype: Annotated[str, typer.Option()] = "float32",
    repeats: Annotated[int, typer.Option()] = 3,
    output: Annotated[Path, typer.Option()] = RESULTS / "embed_speed.json",
) -> None:
    """Measure, print, and write the result."""
    why_not_te()  # TransformerEngine is imported first: beside cuDNN as torch has loaded it, it may fail
    device, kind = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, dtype)
    texts = proteins(count, 0, ragged)
    few = texts[:plain_count]
    port, _ = tagged(tag)
    with tempfile.TemporaryDirectory() as scratch:
        folder = random_original(tag, Path(scratch) / "original", seed=0)
        fasta = Path(scratch) / "proteins.fasta"
        write_fasta(texts, fasta)
        assert port.formats["hf"].build is not None
        import transformers

        original = transformers.AutoModel.from_pretrained(folder, dtype=kind).to(device).eval()
        _, tokenizer = biote.load(folder, "embedding", engine="torch", device="cpu")
        lengths = [len(text) for text in few]
        in_order = [list(range(at, min(at + BATCH, len(few)))) for at in range(0, len(few), BATCH)]
        by_length = padded_batches(lengths, SORTED_TOKENS)
        sides: dict[str, tuple[int, Callable[[], Any]]] = {
            "loop": (sum(lengths), lambda: plain(original, tokenizer, few, in_order)),
            "sorted": (sum(lengths), lambda: plain(original, tokenizer, few, by_length)),
        }
        expected = plain(original, tokenizer, few[:16], [list(range(16))])
        numbers, errors, loads = iter(range(10**6)), {}, {}

        def job(engine: str) -> float:
            place = Path(scratch) / f"out{next(numbers)}.parquet"
            start = time.perf_counter()
            embed_file(Job(str(folder), fasta, str(place), engine=engine, dtype=dtype))
            return time.perf_counter() - start

        for engine in engines.split(","):
            model, _ = biote.load(folder, "embedding", engine=engine, dtype=dtype)
            found = biote.embed(model, few[:16])
            errors[engine] = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
            if errors[engine] > AGREE[kind]:
                raise SystemExit(f"{engine}: means differ by {errors[engine]:.2g}")
            sides[f"bare {engine}"] = (sum(map(len, texts)), bare(model, tokenizer, texts))
            loads[engine] = statistics.median(
                seconds(lambda engine=engine: biote.load(folder, "embedding", engine=engine, dtype=dtype))
                for _ in range(3)
            )
        times: dict[str, list[float]] = {}
        for _ in range(repeats):
            for name, (_, run) in sides.items():
                times.setdefault(name, []).append(seconds(run))
            for engine in engines.split(","):
                times.setdefault(f"job {engine}", []).append(job(engine) - loads[engine])
    rates = {
        name: sides.get(name, (sum(map(len, texts)),))[0] / statistics.median(all_) for name, all_ in times.items()
    }
    table = Table("side", "residues a second", "beside the loop", "beside sorted")
    for name, rate in rates.items():
        table.add_row(name, f"{rate:,.0f}", f"{rate / rates['loop']:.2f}", f"{rate / rates['sorted']:.2f}")
    Console().print(table)
    result = {
        **provenance(("biote", "torch", "transformers")),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "threads": torch.get_num_threads(), "tag": tag, "dtype": dtype, "ragged": ragged, "proteins": count,
        "proteins_of_the_loops": plain_count, "residues": sum(map(len, texts)), "relative_error_of_means": errors,
        "seconds_to_load": loads, "seconds": times, "residues_a_second": rates,
    }  # fmt: skip
    write_result(output, result)


if __name__ == "__main__":
    sys.exit(typer.run(main))
