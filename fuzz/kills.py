"""Kills conversions and exports at random moments: the destination is whole or absent, and nothing stays beside it.

`python fuzz/kills.py --runs 200 --exports 10 --seed 0`. Most run in children of this process, all imports done, so
that the moments fall into the work; one in ten is a fresh `python -m biote.cli`.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from common import ROOT, Content, Record, content, run, shard, start, wait
from safetensors.torch import load_file, save_file
from torch import zeros

from biote import cli, export  # noqa: F401 (imported once, before the children)
from biote.convert import convert_folder  # noqa: F401

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
VOCABULARY_ROWS = 100_000  # some megabytes to write


class Command:
    """One command, what it makes undisturbed, and how long that takes."""

    def __init__(self, arguments: list[str], place: Path):
        self.place, self.destination = place, place / "out"
        self.arguments = [arguments[0], arguments[1], str(self.destination), *arguments[2:]]
        self.logs = place / "logs"
        self.logs.mkdir(parents=True)
        ended = run(self.arguments, self.logs)
        assert ended.status == 0, ended.error
        self.seconds = ended.seconds
        self.right: Content = content(self.destination)
        shutil.rmtree(self.destination)

    def beside(self) -> list[str]:
        """What is there besides the destination."""
        return sorted(path.name for path in self.place.iterdir() if path.name not in ("logs", "out"))

    def differing(self) -> list[str]:
        """Files of the destination that an undisturbed run does not make, or makes otherwise."""
        found = content(self.destination)
        return sorted(name for name in found | self.right if found.get(name) != self.right.get(name))

    def kill(self, number: signal.Signals, delay: float) -> int:
        """Start it, kill it after `delay` seconds, and give its exit status."""
        begun = time.monotonic()
        child = start(self.arguments, self.logs)
        timer = threading.Timer(delay, os.kill, (child, number))
        timer.start()
        time.sleep(delay)
        timer.join()
        return wait(child, begun, self.logs).status

    def kill_fresh(self, number: signal.Signals, delay: float) -> int:
        """The same with a process of its own, which needs seconds for its imports."""
        command = [sys.executable, "-m", "biote.cli", *self.arguments]
        with (self.logs / "out").open("w") as out, (self.logs / "error").open("w") as error:
            child = subprocess.Popen(command, stdout=out, stderr=error)
        try:
            return child.wait(delay)
        except subprocess.TimeoutExpired:
            child.send_signal(number)
            return child.wait()

    def complaints(self, number: signal.Signals, status: int, fresh: bool) -> list[str]:
        """What a killed run left that it should not; then what a next run does."""
        wrong = []
        there = self.destination.exists()
        error = (self.logs / "error").read_text()
        if there:
            wrong += [f"{name} is not as without a kill" for name in self.differing()]
        if number != signal.SIGKILL and self.beside():
            wrong.append(f"left {self.beside()}")
        stopped = (128 + number, f"error: stopped by {number.name}\n")
        killed = (-number, "")  # before or after the work, when nobody listens
        done = (0, "")
        if number == signal.SIGKILL or fresh:
            if status not in (0, -number, 128 + number):
                wrong.append(f"exit status {status}")
        elif (status, error) not in (stopped, killed, done):
            wrong.append(f"exit status {status}: {error[-300:]}")
        if status == 0 and not there:
            wrong.append("exit status 0 without a destination")
        again = run(self.arguments, self.logs)
        if again.status != (1 if there else 0) or (there and "exists already" not in again.error):
            wrong.append(f"the next run: exit status {again.status}: {again.error[-300:]}")
        wrong += [f"the next run: {name} is not as without a kill" for name in self.differing()]
        if self.beside():
            wrong.append(f"the next run left {self.beside()}")
        return wrong


def checkpoint(folder: Path) -> Path:
    """The small original in shards, with embeddings of some megabytes."""
    golden = shutil.copytree(ROOT / "models" / "geneformer" / "tests" / "golden", folder / "small")
    state, config = load_file(golden / "model.safetensors"), json.loads((golden / "config.json").read_text())
    rows = config["vocab_size"]
    config["vocab_size"] = VOCABULARY_ROWS
    for key, tensor in state.items():
        if tensor.shape[:1] == (rows,):
            grown = zeros(VOCABULARY_ROWS, *tensor.shape[1:], dtype=tensor.dtype)
            grown[:rows] = tensor
            state[key] = grown
    save_file(state, golden / "model.safetensors", {"format": "pt"})
    (golden / "config.json").write_text(json.dumps(config))
    (golden / "golden_values.safetensors").unlink()
    shard(golden, folder / "source")
    return folder / "source"


def main() -> int:
    """Kill as often as asked and print what should not be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=30, help="conversions")
    parser.add_argument("--exports", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for fuzz.json and fuzz.md")
    options = parser.parse_args()
    draw, begun, record = random.Random(options.seed), time.monotonic(), Record("kills", options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        small = ROOT / "models" / "esm2" / "tests" / "golden"
        works = [(["convert", str(checkpoint(Path(scratch))), "--to", "te"], options.runs)]
        works.append((["export", str(small)], options.exports))
        for place, (arguments, runs) in enumerate(works):
            command = Command(arguments, Path(scratch) / str(place)) if runs else None
            for _ in range(runs):
                number, fresh = draw.choice(SIGNALS), draw.random() < 0.1 and arguments[0] == "convert"
                delay = draw.uniform(3, 7) if fresh else draw.uniform(0.005, 1.1 * command.seconds)
                status = (command.kill_fresh if fresh else command.kill)(number, delay)
                wrong = command.complaints(number, status, fresh)
                record.runs += 1
                record.count(f"{arguments[0]} {'done' if status == 0 else 'stopped by ' + number.name}")
                if wrong:
                    record.found(command=arguments[0], signal=number.name, delay=delay, fresh=fresh, wrong=wrong)
                shutil.rmtree(command.destination, ignore_errors=True)
    return record.close(begun, options.output)


if __name__ == "__main__":
    sys.exit(main())
