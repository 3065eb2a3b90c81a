"""The same embeddings by a local Ray cluster, of whose two workers one is killed."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest

pytest.importorskip("ray", reason="Ray has no build for this machine")
SEQUENCES = 1200


@pytest.fixture
def fasta(tmp_path: Path) -> Path:
    drawn = random.Random(0)
    texts = ("".join(drawn.choices("ACDEFGHIKLMNPQRSTVWY", k=drawn.randint(5, 60))) for _ in range(SEQUENCES))
    file = tmp_path / "proteins.fasta"
    file.write_text("".join(f">p{number}\n{text}\n" for number, text in enumerate(texts)))
    return file


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "biote", "embed", *map(str, arguments), "--batch-tokens", "16"]


def workers() -> list[int]:
    """Process ids of Ray's actors that work."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (entry / "cmdline").read_bytes().startswith(b"ray::MapWorker"):
                found.append(int(entry.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="workers are looked for in /proc")
def test_two_workers_of_which_one_is_killed(tiny_original, fasta, tmp_path):
    output, alone = tmp_path / "shared", tmp_path / "alone"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    onto = command(tiny_original, fasta, f"file://{output}/", "--ray", "local", "--workers", 2)
    with subprocess.Popen(onto, stderr=subprocess.PIPE, text=True, env=environment) as running:
        while len(list(output.glob("[0-9]*.parquet"))) < 3 and running.poll() is None:
            time.sleep(0.05)
        killed = workers()[0]
        os.kill(killed, signal.SIGKILL)
        at_the_kill = len(list(output.glob("[0-9]*.parquet")))
        said = running.communicate(timeout=300)[1]
    assert running.returncode == 0, said
    assert at_the_kill < len(list(output.glob("[0-9]*.parquet")))
    subprocess.run(command(tiny_original, fasta, f"{alone}/"), check=True, capture_output=True, env=environment)
    ours, theirs = pq.read_table(alone), pq.read_table(output)
    assert ours.num_rows == SEQUENCES
    assert theirs.equals(ours)
    assert {path.name for path in output.glob("_*")} == {"_SUCCESS", "_plan.json"}

    again = subprocess.run(onto, capture_output=True, text=True, env=environment)
    assert again.returncode == 1
    assert again.stderr.count("\n") == 1
    assert "is finished already" in again.stderr

    (output / "_SUCCESS").unlink()  # as if it had been killed before the end
    (output / "000002.parquet").unlink()
    kept = (output / "000000.parquet").stat().st_mtime_ns
    subprocess.run(onto, check=True, capture_output=True, env=environment)
    assert pq.read_table(output).equals(ours)
    assert (output / "000000.parquet").stat().st_mtime_ns == kept


@pytest.mark.parametrize(
    ("output", "more", "message"),
    [("out.parquet", [], "is a folder of parquet files"), ("out/", ["--devices", "cpu"], "Ray chooses its own")],
)
def test_what_ray_does_not_do(biote, tiny_original, fasta, tmp_path, output, more, message):
    status, _, error = biote("embed", tiny_original, fasta, f"{tmp_path}/{output}", "--ray", "local", *more)
    assert status == 1
    assert message in error
    assert error.count("\n") == 1
