"""Both engines on a GPU against the original in float64: one row a size, engine and dtype.

Inputs are the example proteins, or for a model without a tokenizer of text, random genes: see `inputs_of`.
Each row has our error beside the original's own at that dtype (fp8: bf16), as relative L2 over real tokens.
The model is exported and loaded from the export, as a user would. Shapes are the published ones, weights random.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import HERE, provenance, random_original, tagged, write_result
from transformers import AutoModelForMaskedLM, AutoTokenizer, logging

sys.path.append(str(HERE.parent / "examples"))
from demo import PROTEINS, SEED, read_fasta

from biote.export import export
from biote.runtime.engine import why_not_te
from biote.runtime.precision import FP8_RECIPES
from biote.runtime.verify import DTYPES, NOISE_FACTOR, outputs_of, relative_l2

CELLS = (2048, 1300, 600, 90)  # genes of each random cell
FP8_BOUND = 0.2  # relative L2; three bits of mantissa in every product
PACKAGES = ("torch", "transformers", "biote", "transformer_engine")


def rows(tag: str, dtypes: list[str], folder: Path) -> Iterator[dict[str, Any]]:
    """Export a random original of the tag's shape, then compare every engine and dtype with it."""
    original = random_original(tag, folder / "original", SEED)
    load = tagged(tag)[0].formats["hf"].load
    assert load is not None
    export(str(original), folder / "exported")
    inputs = inputs_of(tag, folder / "exported")
    reference = _run(load(original, "AutoModelForMaskedLM", torch.float64), inputs)
    in_bf16 = _run(load(original, "AutoModelForMaskedLM", torch.bfloat16), inputs)
    yield from _fp8_rows(tag, folder, inputs, reference, in_bf16)
    for name in dtypes:
        theirs = _run(load(original, "AutoModelForMaskedLM", DTYPES[name]), inputs)
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


def inputs_of(tag: str, exported: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask, int64 [B, S] on the GPU: the example proteins, or random cells."""
    port, checkpoint = tagged(tag)
    if port.build_tokenizer is None:
        generator = torch.Generator().manual_seed(SEED)
        genes = range(4, checkpoint.shape["vocab_size"])
        cells = [torch.randperm(len(genes), generator=generator)[:length] + genes.start for length in CELLS]
        batch = replace(port, example_inputs=tuple(tuple(cell.tolist()) for cell in cells)).example_batch()
    else:
        proteins = list(read_fasta(PROTEINS).values())
        batch = AutoTokenizer.from_pretrained(exported)(proteins, padding=True, return_tensors="pt")
    return batch["input_ids"].cuda(), batch["attention_mask"].cuda()


def _fp8_rows(
    tag: str, folder: Path, inputs: tuple[torch.Tensor, torch.Tensor], reference: dict, theirs: dict
) -> Iterator[dict[str, Any]]:
    """Every fp8 recipe: error of the logits, and how far the masked-LM loss moves, beside the original's in bf16."""
    for recipe in FP8_RECIPES:
        model = AutoModelForMaskedLM.from_pretrained(
            folder / "exported", trust_remote_code=True, engine="te", dtype=torch.bfloat16,
            layer_precision="fp8", fp8_recipe=recipe,
        ).eval()  # fmt: skip
        ours = _run(model, inputs)
        for quantity, value in ours.items():
            error, floor = (relative_l2(x, reference[quantity]) for x in (value, theirs[quantity]))
            yield {
                "model": tag, "engine": "te", "dtype": f"fp8 {recipe}", "quantity": quantity, "error": error,
                "error_of_original": floor, "ratio": error / floor, "passed": error <= FP8_BOUND,
                "loss_difference": _loss(ours, inputs) - _loss(reference, inputs),
                "loss_difference_of_original": _loss(theirs, inputs) - _loss(reference, inputs),
            }  # fmt: skip


def _loss(outputs: dict[str, torch.Tensor], inputs: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Cross-entropy of the logits against the tokens themselves, over real tokens."""
    ids, mask = (x.cpu() for x in inputs)
    return float(torch.nn.functional.cross_entropy(outputs["logits"][mask.bool()], ids[mask.bool()]))


def _run(model: Any, inputs: tuple[torch.Tensor, torch.Tensor]) -> dict[str, torch.Tensor]:
    return outputs_of(model.cuda(), *inputs, contacts=False)


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = ["| model | engine | dtype | quantity | our error | original's error | ratio | loss moved by (original) |"]
    lines.append("|---" * 8 + "|")
    for row in results:
        names = [row[key] for key in ("model", "engine", "dtype", "quantity")]
        errors = [f"{row[key]:.2e}" for key in ("error", "error_of_original")]
        verdict = f"{row['ratio']:.2f}" + ("" if row["passed"] else " (over)")
        moved = ""
        if "loss_difference" in row:
            moved = f"{row['loss_difference']:+.1e} ({row['loss_difference_of_original']:+.1e})"
        lines.append("| " + " | ".join([*names, *errors, verdict, moved]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--models",
        nargs="+",
        default=["esm2_t6_8M_UR50D", "esm2_t33_650M_UR50D", "AMPLIFY_120M", "Geneformer-V2-316M"],
    )
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--output", type=Path, required=True, help="folder for the .json and the .md")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.backends.cuda.matmul.allow_tf32 = False
    why_not_te()  # imports TransformerEngine first: after torch has loaded its own cuDNN, a second copy may clash
    results = []
    for tag in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            results += list(rows(tag, arguments.dtypes, Path(folder)))
    device = torch.cuda.get_device_name()
    file = arguments.output / f"{device.lower().replace(' ', '-')}.json"
    earlier = json.loads(file.read_text()) if file.is_file() else {"runs": [], "rows": []}
    run = {**provenance(PACKAGES), "device": device, "models": arguments.models}
    record = {  # other models' rows stay
        "noise_factor": NOISE_FACTOR,
        "runs": [old for old in earlier["runs"] if not set(old["models"]) <= set(arguments.models)] + [run],
        "rows": [row for row in earlier["rows"] if row["model"] not in arguments.models] + results,
    }
    write_result(file, record)
    file.with_suffix(".md").write_text(table(record["rows"]), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
