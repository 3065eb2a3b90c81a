"""How far two approximations move ESM-2's numbers from the original's: tanh GELU, and recomputed rotary frequencies.

The original computes the erf GELU and turns by the frequencies stored in its checkpoint, which are rounded to fp16.
TransformerEngine's fused GELU is the tanh one, and NVIDIA's modules recompute the frequencies in float32. Each is
switched on alone and both together, in float64, on the example proteins: what shows is the approximation only.

The weights are random, in the published shape: once as the original initialises them, and once with larger queries
and keys, since attention that is nearly uniform hardly depends on positions. Trained weights give other figures.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import HERE, RESULTS, provenance, write_result
from transformers import logging

sys.path.append(str(HERE.parent / "examples"))
from demo import PROTEINS, SEED, build_original, read_fasta

from biote.runtime.rope import inverse_frequencies
from biote.runtime.verify import outputs_of, relative_l2
from biote_esm2 import build_tokenizer, convert_hf_to_te
from biote_esm2.convert import load_hf

TAG = "esm2_t6_8M_UR50D"
PACKAGES = ("torch", "transformers", "biote")
VARIANTS = {  # GELU, whether frequencies are recomputed
    "exact": ("gelu", False),
    "tanh GELU": ("gelu_tanh", False),
    "recomputed frequencies": ("gelu", True),
    "both": ("gelu_tanh", True),
}
SHARPER = 4.0  # makes the scores that enter the softmax sixteen times larger: their standard deviation is about 2
WEIGHTS = {"as initialised": 1.0, f"queries and keys x {SHARPER:g}": SHARPER}
HEAD_DIMS = (16, 24, 32, 64, 128)  # of the published ESM-2 models
LAST_POSITION, BASE = 1022, 10000.0


def rows(device: str) -> Iterator[dict[str, Any]]:
    """Every variant against the original, for each set of weights: one row a variant."""
    batch = build_tokenizer()(list(read_fasta(PROTEINS).values()), padding=True, return_tensors="pt")
    inputs = (batch["input_ids"].to(device), batch["attention_mask"].to(device))
    for weights, factor in WEIGHTS.items():
        original = original_of(factor)
        reference = outputs_of(original.to(device), *inputs, contacts=False)
        for variant, (gelu, recompute) in VARIANTS.items():
            ours = convert_hf_to_te(original, engine="torch", hidden_act=gelu).to(device).eval()
            rotary = ours.model.rotary[0]
            if recompute:
                rotary.inv_freq.copy_(inverse_frequencies(rotary.head_dim, rotary.base))
            found = outputs_of(ours, *inputs, contacts=False)
            errors = {quantity: relative_l2(value, reference[quantity]) for quantity, value in found.items()}
            yield {"weights": weights, "variant": variant, "relative_l2": errors}


def original_of(factor: float) -> Any:
    """The original in float64, its query and key projections times `factor`."""
    with tempfile.TemporaryDirectory() as folder:
        model: Any = load_hf(build_original(TAG, Path(folder)), "AutoModelForMaskedLM", torch.float64)
    with torch.no_grad():
        for layer in model.esm.encoder.layer:
            for projection in (layer.attention.self.query, layer.attention.self.key):
                projection.weight.mul_(factor)
    return model


def angle_error(head_dim: int) -> float:
    """The largest angle, in radians, by which fp16 frequencies turn the last position otherwise than float32 ones."""
    exact = inverse_frequencies(head_dim, BASE).double()
    return float(((exact.half().double() - exact) * LAST_POSITION).abs().max())


def table(results: list[dict[str, Any]], angles: dict[int, float]) -> str:
    """The results as Markdown."""
    lines = ["| weights | variant | last hidden state | logits |", "|---" * 4 + "|"]
    for row in results:
        errors = [f"{row['relative_l2'][quantity]:.1e}" for quantity in ("last_hidden_state", "logits")]
        lines.append("| " + " | ".join([row["weights"], row["variant"], *errors]) + " |")
    lines += ["", f"| head dim | angle error at position {LAST_POSITION}, rad |", "|---" * 2 + "|"]
    lines += [f"| {head_dim} | {error:.3f} |" for head_dim, error in angles.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / "approximations.json")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    record = provenance(PACKAGES)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        record["device"] = torch.cuda.get_device_name()
    angles = {head_dim: angle_error(head_dim) for head_dim in HEAD_DIMS}
    results = list(rows(device))
    record |= {"model": TAG, "seed": SEED, "dtype": "float64", "proteins": PROTEINS.name, "rows": results}
    write_result(arguments.output, {**record, "angle_error_of_fp16_frequencies": angles, "position": LAST_POSITION})
    print(table(results, angles))


if __name__ == "__main__":
    main()
