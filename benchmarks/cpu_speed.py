"""Speed on a CPU against transformers' own EsmForMaskedLM: fp32, 35M shape, random weights, real tokens a second.

Both models are in one process and take turns, so that whatever else the machine does meets both alike.
The original's backward pass over the padded batch takes about 21 GB of memory.
Shapes: B proteins, S padded length.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import RESULTS, provenance, write_result
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import EsmConfig, EsmForMaskedLM, PreTrainedModel

import biote_esm2

CLS, PAD, EOS, MASK = 0, 1, 2, 32
RESIDUES = (4, 24)  # ids of the twenty amino acids, half open
MASKED_SHARE = 0.15
SHAPE = {"num_hidden_layers": 12, "hidden_size": 480, "num_attention_heads": 20, "intermediate_size": 1920}
MEDIAN_LENGTH, SIGMA, MOST_RESIDUES = 270, 0.7, 1022  # as in gpu_speed.py; padding makes it almost three times larger
TOLERANCE = 1e-4  # relative L2 between two fp32 runs that sum in different orders


@dataclass
class Case:
    """One batch and what is done with it. `target` is how many times faster than the original we promise to be."""

    name: str
    batch: dict[str, Tensor]
    lengths: list[int]  # tokens of each protein
    backward: bool
    target: float


def protein_lengths(count: int, seed: int) -> list[int]:
    """Log-normal lengths, as proteins have, with <cls> and <eos> counted."""
    draws = torch.randn(count, generator=torch.Generator().manual_seed(seed)).mul(SIGMA).exp().mul(MEDIAN_LENGTH)
    return [min(int(x), MOST_RESIDUES) + 2 for x in draws]


def make_batch(lengths: list[int], seed: int) -> dict[str, Tensor]:
    """Random proteins, right-padded, a share of the residues masked and to be predicted."""
    random = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    ids = torch.randint(*RESIDUES, shape, generator=random)
    columns, ends = torch.arange(shape[1]), torch.tensor(lengths)[:, None]
    real = columns < ends
    residue = (columns > 0) & (columns < ends - 1)
    chosen = residue & (torch.rand(shape, generator=random) < MASKED_SHARE)
    labels = ids.masked_fill(~chosen, -100)
    ids = ids.masked_fill(chosen, MASK).masked_fill(columns == ends - 1, EOS).masked_fill(~real, PAD)
    ids[:, 0] = CLS
    return {"input_ids": ids, "attention_mask": real.long(), "labels": labels}


def build_models(seed: int) -> dict[str, PreTrainedModel]:
    """The original with random weights, and its port."""
    torch.manual_seed(seed)
    config = EsmConfig(
        vocab_size=33, mask_token_id=MASK, pad_token_id=PAD, position_embedding_type="rotary", token_dropout=True,
        emb_layer_norm_before=False, max_position_embeddings=1026, layer_norm_eps=1e-5, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, **SHAPE,
    )  # fmt: skip
    original = EsmForMaskedLM(config).eval()
    return {"original": original, "port": biote_esm2.convert_hf_to_te(original, engine="torch").eval()}


def forward(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def forward_backward(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach()


def check_agreement(models: dict[str, PreTrainedModel], case: Case) -> float:
    """The relative L2 difference of logits on real tokens, or of a gradient; AssertionError past the tolerance."""
    answers = []
    for model in models.values():
        if case.backward:
            forward_backward(model, case.batch)
            answers.append(model.get_input_embeddings().weight.grad.clone())
        else:
            answers.append(forward(model, case.batch)[case.batch["attention_mask"].bool()])
    error = float((answers[0] - answers[1]).norm() / answers[0].norm())
    assert error < TOLERANCE, f"{case.name}: the two models differ by {error:.1e}"
    return error


def seconds(run: Callable[[PreTrainedModel, dict[str, Tensor]], Any], model: PreTrainedModel, case: Case) -> float:
    start = time.perf_counter()
    run(model, case.batch)
    return time.perf_counter() - start


def measure(models: dict[str, PreTrainedModel], case: Case, repeats: int) -> dict[str, Any]:
    """Median times of both, one after the other `repeats` times after one warm-up of each."""
    error = check_agreement(models, case)  # and warm-up
    run = forward_backward if case.backward else forward
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in track(range(repeats), case.name, transient=True, console=Console(stderr=True)):
        for name, model in models.items():
            times[name].append(seconds(run, model, case))
    median = {name: statistics.median(values) for name, values in times.items()}
    real, padded = sum(case.lengths), len(case.lengths) * max(case.lengths)
    return {
        "name": case.name,
        "proteins": len(case.lengths),
        "tokens_of_a_protein": {
            "shortest": min(case.lengths), "median": statistics.median(case.lengths), "longest": max(case.lengths)
        },
        "real_tokens": real,
        "padded_tokens": padded,
        "relative_difference": error,
        "median_seconds": median,
        "seconds": times,
        "real_tokens_per_second": {name: real / value for name, value in median.items()},
        "ratio": median["original"] / median["port"],
        "target_ratio": case.target,
    }  # fmt: skip


def cases() -> list[Case]:
    ragged, equal = protein_lengths(32, seed=0), [256] * 8
    ragged_batch, equal_batch = make_batch(ragged, seed=1), make_batch(equal, seed=2)
    return [
        Case("ragged, forward", ragged_batch, ragged, backward=False, target=4.0),
        Case("ragged, forward + backward", ragged_batch, ragged, backward=True, target=3.5),
        Case("equal lengths, forward", equal_batch, equal, backward=False, target=1.0),
        Case("equal lengths, forward + backward", equal_batch, equal, backward=True, target=1.0),
    ]


def show(results: list[dict[str, Any]]) -> None:
    table = Table(title="fp32 on the CPU, real tokens a second")
    table.add_column("batch")
    for heading in ("real / padded tokens", "original", "port", "ratio", "target"):
        table.add_column(heading, justify="right")
    for result in results:
        speed = result["real_tokens_per_second"]
        table.add_row(
            result["name"], f"{result['real_tokens']:,} / {result['padded_tokens']:,}", f"{speed['original']:,.0f}",
            f"{speed['port']:,.0f}", f"{result['ratio']:.2f}", f"{result['target_ratio']:.1f}",
        )  # fmt: skip
    Console().print(table)


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each model on each batch.")] = 3,
    output: Annotated[Path, typer.Option(help="Where the result is written.")] = RESULTS / "cpu_speed.json",
) -> None:
    """Compare the port's torch engine with transformers' EsmForMaskedLM on this CPU."""
    facts = provenance(("torch", "transformers", "biote"))
    models = build_models(seed=0)
    attention = models["original"].config._attn_implementation
    results = [measure(models, case, repeats) for case in cases()]
    lengths = {"log_normal_median": MEDIAN_LENGTH, "log_normal_sigma": SIGMA, "most_residues": MOST_RESIDUES}
    model = {**SHAPE, "dtype": "float32", "threads": torch.get_num_threads(), "original_attention": attention}
    write_result(output, {**facts, "model": model, "ragged_lengths": lengths, "repeats": repeats, "results": results})
    show(results)


if __name__ == "__main__":
    typer.run(main)
