"""Which attention is faster for few tokens in inference: cuDNN's kernels or FlashAttention's. ESM-2 650M, bf16."""

import argparse
from pathlib import Path

import torch
from common import provenance, write_result
from gpu_speed import PACKAGES, Batch, measure, ours

from biote.runtime import layers_te

CASES = ("300", "1000", "2000", "4000", "10000")
SIDES = {"cuDNN": 0, "FlashAttention": 2**31}  # up to how many tokens FlashAttention is taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="the .json file")
    arguments = parser.parse_args()
    rows = []
    for case in CASES:
        batch = Batch("650M", case)
        for graphs in (True, False):
            model = ours("650M", "te", cuda_graphs=graphs).eval()
            for side, tokens in SIDES.items():
                layers_te.FEW_TOKENS = tokens
                model.model.graphed.graphs.clear()
                row = {"tokens": batch.tokens, "graph": graphs, "attention": side}
                row["ms"] = measure(lambda: model(**batch.packed).logits, False)["ms"]  # noqa: B023 (called at once)
                rows.append(row)
                print(row, flush=True)
    write_result(arguments.output, {**provenance(PACKAGES), "device": torch.cuda.get_device_name(), "rows": rows})


if __name__ == "__main__":
    main()
