"""Converting a 650M checkpoint against copying it: seconds and peak memory, each run in a fresh process.

`cp` and the conversion take turns, with the source in the page cache and nothing left to flush from the run before.
Both start a few seconds after that: memory just freed is cheap to take again at once, and less so once a virtual
machine has handed it back to its host, which would favour `cp`, as it needs no time for imports.
"""

import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from common import RESULTS, provenance, write_result
from rich.console import Console
from rich.progress import track
from rich.table import Table

LAYERS, HIDDEN, HEADS, FFN, VOCABULARY, POSITIONS = 33, 1280, 20, 5120, 33, 1026
SHARD_BYTES = 10**9  # of the sharded variant
MEGABYTE = 10**6
SETTLE_SECONDS = 4
TARGET_RATIO, TARGET_PEAK_MB = 0.5, 600
IMPORTS = "import biote_esm2, sys, time; from pathlib import Path; from biote.convert import convert_folder"
CONVERT = (
    f"{IMPORTS}; start = time.perf_counter(); convert_folder(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]); "
    "print(time.perf_counter() - start)"
)
MEMORY_NOTE = (
    "ru_maxrss of the converting process: the interpreter, the shared libraries' touched pages (torch's alone are "
    "most of it), the tensors being converted, and the pages of the memory-mapped source file that are mapped at one "
    "time. imports_only is the same for a process that imports what the other does and ends."
)


def shapes() -> dict[str, tuple[int, ...]]:
    """The published fp32 keys of EsmForMaskedLM and their shapes."""

    def both(name: str, rows: int, *columns: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (rows, *columns), f"{name}.bias": (rows,)}

    made: dict[str, tuple[int, ...]] = {"esm.embeddings.word_embeddings.weight": (VOCABULARY, HIDDEN)}
    for i in range(LAYERS):
        layer = f"esm.encoder.layer.{i}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            made |= both(f"{layer}.attention.{part}", HIDDEN, HIDDEN)
        made |= both(f"{layer}.attention.LayerNorm", HIDDEN) | both(f"{layer}.LayerNorm", HIDDEN)
        made |= both(f"{layer}.intermediate.dense", FFN, HIDDEN) | both(f"{layer}.output.dense", HIDDEN, FFN)
        made[f"{layer}.attention.self.rotary_embeddings.inv_freq"] = (HIDDEN // HEADS // 2,)
    made |= both("esm.encoder.emb_layer_norm_after", HIDDEN)
    made |= both("esm.contact_head.regression", 1, LAYERS * HEADS)
    made |= both("lm_head.dense", HIDDEN, HIDDEN) | both("lm_head.layer_norm", HIDDEN)
    return {**made, "lm_head.bias": (VOCABULARY,)}


def make_checkpoints(one_file: Path, sharded: Path) -> None:
    """Random values under the published names, as one file and as shards."""
    import torch
    from huggingface_hub import save_torch_state_dict
    from transformers import EsmConfig

    torch.manual_seed(0)
    frequencies = 1.0 / (10000.0 ** (torch.arange(0, HIDDEN // HEADS, 2) / (HIDDEN // HEADS)))
    frequencies = frequencies.half().float()  # as published
    state = {
        key: frequencies.clone() if key.endswith("inv_freq") else torch.randn(shape) for key, shape in shapes().items()
    }
    state["esm.embeddings.position_ids"] = torch.arange(POSITIONS)[None]
    config = EsmConfig(
        architectures=["EsmForMaskedLM"], vocab_size=VOCABULARY, num_hidden_layers=LAYERS, hidden_size=HIDDEN,
        num_attention_heads=HEADS, intermediate_size=FFN, mask_token_id=32, pad_token_id=1, layer_norm_eps=1e-5,
        max_position_embeddings=POSITIONS, position_embedding_type="rotary", token_dropout=True,
        emb_layer_norm_before=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    for folder, shard_bytes in ((one_file, 10**11), (sharded, SHARD_BYTES)):
        config.save_pretrained(folder)
        save_torch_state_dict(state, folder, max_shard_size=shard_bytes)


def check_round_trip(original: Path, back: Path) -> None:
    """AssertionError unless hf -> te -> hf gave back every parameter, bit for bit."""
    import torch
    from safetensors import safe_open

    with safe_open(original / "model.safetensors", "pt") as a, safe_open(back / "model.safetensors", "pt") as b:
        lost = set(a.keys()) ^ set(b.keys())
        assert lost <= {"esm.embeddings.position_ids"}, f"keys differ: {sorted(lost)}"
        differing = [key for key in b.keys() if not torch.equal(a.get_tensor(key), b.get_tensor(key))]  # noqa: SIM118
    assert not differing, f"the round trip changed {differing}"


def in_another_process(function: Any, *arguments: Any) -> None:
    """This process stays small: what a parent holds would count in its children's peak memory."""
    child = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    child.start()
    child.join()
    if child.exitcode:
        raise SystemExit(f"{function.__name__} failed")


def run(command: list[str]) -> dict[str, float]:
    """Run a command: wall-clock seconds, peak resident memory, and the number it printed, if any."""
    os.sync()
    time.sleep(SETTLE_SECONDS)
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    printed = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{command[0]} failed")
    kilobytes = usage.ru_maxrss / 1024 if sys.platform == "darwin" else usage.ru_maxrss
    return {"seconds": seconds, "peak_mb": kilobytes * 1024 / MEGABYTE, "inside": float(printed or 0)}


def fill_page_cache(folder: Path) -> None:
    for file in folder.iterdir():
        with file.open("rb") as opened:
            while opened.read(16 * MEGABYTE):
                pass


def measure(name: str, source: Path, to: str, scratch: Path, repeats: int) -> dict[str, Any]:
    """Medians of copying a folder and of converting it, in turns, after one conversion as a warm-up."""
    output = scratch / "output"
    commands = {
        "cp": ["cp", "-r", str(source), str(output)],
        "convert": [sys.executable, "-c", CONVERT, str(source), str(output), to],
    }
    fill_page_cache(source)
    runs: dict[str, list[dict[str, float]]] = {"cp": [], "convert": []}
    for repeat in track(range(-1, repeats), name, transient=True, console=Console(stderr=True)):
        for side, command in commands.items():
            measured = run(command)
            shutil.rmtree(output)
            if repeat >= 0:
                runs[side].append(measured)
    seconds = {side: statistics.median(one["seconds"] for one in ones) for side, ones in runs.items()}
    inside = statistics.median(one["inside"] for one in runs["convert"])
    return {
        "name": name,
        "bytes": sum(file.stat().st_size for file in source.glob("*.safetensors")),
        "files": len(list(source.glob("*.safetensors"))),
        "median_seconds": {**seconds, "convert_folder_without_imports": inside},
        "seconds": {side: [one["seconds"] for one in ones] for side, ones in runs.items()},
        "speed_relative_to_cp": {
            "whole process": seconds["cp"] / seconds["convert"], "convert_folder alone": seconds["cp"] / inside
        },
        "peak_resident_mb": max(one["peak_mb"] for one in runs["convert"]),
    }  # fmt: skip


def show(results: list[dict[str, Any]], imports: dict[str, float]) -> None:
    table = Table(title="Converting a 650M checkpoint against copying it")
    table.add_column("")
    for heading in ("cp, s", "conversion, s", "speed / cp", "with imports, s", "speed / cp", "peak MB"):
        table.add_column(heading, justify="right")
    for result in results:
        seconds, relative = result["median_seconds"], result["speed_relative_to_cp"]
        table.add_row(
            result["name"], f"{seconds['cp']:.2f}", f"{seconds['convert_folder_without_imports']:.2f}",
            f"{relative['convert_folder alone']:.2f}", f"{seconds['convert']:.2f}",
            f"{relative['whole process']:.2f}", f"{result['peak_resident_mb']:.0f}",
        )  # fmt: skip
    Console().print(table, f"Imports alone: {imports['seconds']:.2f} s, {imports['peak_mb']:.0f} MB")


def main(
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each side.")] = 3,
    output: Annotated[Path, typer.Option(help="Where the result is written.")] = RESULTS / "file_conversion.json",
    scratch: Annotated[Path | None, typer.Option(help="Folder with 11 GB free for temporary files.")] = None,
) -> None:
    """Compare biote's conversion of a 2.6 GB checkpoint with cp."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a time limit, too, leaves no temporary files
    facts = provenance(("torch", "transformers", "safetensors", "biote"))
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        one_file, sharded, te, back = (folder / part for part in ("one_file", "sharded", "te", "back"))
        in_another_process(make_checkpoints, one_file, sharded)
        results = [measure("hf -> te", one_file, "te", folder, repeats)]
        results.append(measure("hf in shards -> te", sharded, "te", folder, repeats))
        shutil.rmtree(sharded)
        run([sys.executable, "-c", CONVERT, str(one_file), str(te), "te"])
        results.append(measure("te -> hf", te, "hf", folder, repeats))
        run([sys.executable, "-c", CONVERT, str(te), str(back), "hf"])
        in_another_process(check_round_trip, one_file, back)
    imports = [run([sys.executable, "-c", IMPORTS]) for _ in range(repeats)]
    imports_only = {key: statistics.median(one[key] for one in imports) for key in ("seconds", "peak_mb")}
    targets = {"speed_relative_to_cp": TARGET_RATIO, "peak_resident_mb": TARGET_PEAK_MB}
    write_result(
        output,
        {
            **facts, "repeats": repeats, "settle_seconds": SETTLE_SECONDS, "targets": targets, "results": results,
            "imports_only": imports_only, "memory_note": MEMORY_NOTE,
        },
    )  # fmt: skip
    show(results, imports_only)


if __name__ == "__main__":
    typer.run(main)
