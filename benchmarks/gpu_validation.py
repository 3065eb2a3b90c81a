"""Both engines on a GPU against the original in float64, on the example proteins: one row a size, engine and dtype.

Each row has our error beside the original's own at that dtype (relative L2 over real tokens). The model is exported
and loaded from the export, as a user would. Weights are random: the shapes are the published ones.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import HERE, provenance, write_result
from transformers import AutoModelForMaskedLM, AutoTokenizer, logging

sys.path.append(str(HERE.parent / "examples"))
from demo import PROTEINS, build_original, read_fasta

from biote.export import export
from biote.runtime.verify import DTYPES, NOISE_FACTOR, outputs_of, relative_l2
from esm2.convert import load_hf

PACKAGES = ("torch", "transformers", "biote", "transformer_engine")


def rows(tag: str, dtypes: list[str], folder: Path) -> Iterator[dict[str, Any]]:
    """Export a random original of the tag's shape, then compare every engine and dtype with it."""
    original = build_original(tag, folder / "original")
    export(str(original), folder / "exported")
    batch = AutoTokenizer.from_pretrained(folder / "exported")(
        list(read_fasta(PROTEINS).values()), padding=True, return_tensors="pt"
    )
    inputs = (batch["input_ids"].cuda(), batch["attention_mask"].cuda())
    reference = _run(load_hf(original, "AutoModelForMaskedLM", torch.float64), inputs)
    for name in dtypes:
        theirs = _run(load_hf(original, "AutoModelForMaskedLM", DTYPES[name]), inputs)
        for engine in ("torch", "te"):
            model = AutoModelForMaskedLM.from_pretrained(
                folder / "exported", trust_remote_code=True, engine=engine, dtype=DTYPES[name]
            )
            ours = _run(model.eval(), inputs)
            assert model.model.engine == engine
            for quantity, value in ours.items():
                error, floor = (relative_l2(x, reference[quantity]) for x in (value, theirs[quantity]))
                yield {
                    "model": tag, "engine": engine, "dtype": name, "quantity": quantity, "error": error,
                    "error_of_original": floor, "ratio": error / floor, "passed": error <= NOISE_FACTOR * floor,
                }  # fmt: skip


def _run(model: Any, inputs: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
    return outputs_of(model.cuda(), *inputs, contacts=False)


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = ["| model | engine | dtype | quantity | our error | original's error | ratio |"]
    lines.append("|---" * 7 + "|")
    for row in results:
        names = [row[key] for key in ("model", "engine", "dtype", "quantity")]
        errors = [f"{row[key]:.2e}" for key in ("error", "error_of_original")]
        verdict = f"{row['ratio']:.2f}" + ("" if row["passed"] else " (over)")
        lines.append("| " + " | ".join([*names, *errors, verdict]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["esm2_t6_8M_UR50D", "esm2_t33_650M_UR50D"])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--output", type=Path, required=True, help="folder for the .json and the .md")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.backends.cuda.matmul.allow_tf32 = False
    results = []
    for tag in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            results += list(rows(tag, arguments.dtypes, Path(folder)))
    device = torch.cuda.get_device_name()
    name = device.lower().replace(" ", "-")
    record = {**provenance(PACKAGES), "device": device, "noise_factor": NOISE_FACTOR, "rows": results}
    write_result(arguments.output / f"{name}.json", record)
    (arguments.output / f"{name}.md").write_text(table(results), encoding="utf-8")
    print(table(results))
    print(json.dumps({key: value for key, value in record.items() if key != "rows"}))


if __name__ == "__main__":
    main()
