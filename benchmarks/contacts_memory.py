"""Memory and time of `predict_contacts` for one protein, beside the forward pass and beside keeping all maps.

Of the model of a published shape with random weights, on the GPU; memory is the peak above the weights.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import RESULTS, provenance, tagged, write_result

REPEATS = 5


def main(
    tag: Annotated[str, typer.Option(help="whose shape")] = "esm2_t33_650M_UR50D",
    residues: Annotated[int, typer.Option()] = 1000,
    output: Annotated[Path, typer.Option()] = RESULTS / "contacts_memory.json",
) -> None:
    """Measure both engines and dtypes, and write the result."""
    port, checkpoint = tagged(tag)
    ids = torch.randint(4, 24, (1, residues + 2), generator=torch.Generator().manual_seed(0)).cuda()
    ids[:, 0], ids[:, -1] = 0, 2
    rows: list[dict[str, Any]] = []
    for engine in ("te", "torch"):
        for dtype in (torch.bfloat16, torch.float32):
            torch.manual_seed(0)
            config = port.config_class(engine=engine, **checkpoint.shape)
            model: Any = port.classes["AutoModelForMaskedLM"](config).cuda().to(dtype).eval()
            ways: dict[str, Callable[[], Any]] = {
                "forward": lambda model=model: model(ids),
                "contacts": lambda model=model: model.predict_contacts(ids),
                "all maps": lambda model=model: model(ids, output_attentions=True).attentions,
            }
            for name, way in ways.items():
                rows.append({"engine": engine, "dtype": str(dtype), "what": name, **measured(way)})
                print(rows[-1], flush=True)
            del model, ways, way
            torch.cuda.empty_cache()
    write_result(
        output,
        {**provenance(("biote", "torch", "transformers")), "gpu": torch.cuda.get_device_name(), "tag": tag,
         "residues": residues, "rows": rows},
    )  # fmt: skip


@torch.inference_mode()
def measured(way: Callable[[], Any]) -> dict[str, float]:
    way()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, times = torch.cuda.memory_allocated(), []
    for _ in range(REPEATS):
        start = time.perf_counter()
        way()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() - before
    return {"megabytes_above_weights": round(peak / 1e6, 1), "milliseconds": round(statistics.median(times) * 1e3, 2)}


if __name__ == "__main__":
    typer.run(main)
