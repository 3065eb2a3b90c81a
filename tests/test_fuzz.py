"""The drivers under fuzz/: a short run of each finds nothing, and what they look for they would find."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the drivers read /proc and fork")


@pytest.mark.slow
@pytest.mark.parametrize("driver", [["damage.py", "--runs", "60"], ["kills.py", "--runs", "6", "--exports", "0"]])
def test_a_short_run_finds_nothing(driver, tmp_path):
    (tmp_path / "out").mkdir()
    command = [sys.executable, str(ROOT / "fuzz" / driver[0]), *driver[1:], "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (record,) = json.loads((tmp_path / "out" / "fuzz.json").read_text()).values()
    assert record["runs"] == int(driver[2])
    assert sum(record["outcomes"].values()) == record["runs"]
    assert f"| {record['driver']} | 0 | {record['runs']} |" in (tmp_path / "out" / "fuzz.md").read_text()


@pytest.fixture(scope="module")
def damage():
    """fuzz/damage.py as a module."""
    sys.path.insert(0, str(ROOT / "fuzz"))
    spec = importlib.util.spec_from_file_location("fuzz_damage", ROOT / "fuzz" / "damage.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(ROOT / "fuzz"))


FINE = "error: config.json of x: no\n"
RIGHT = {"config.json": b'{"a": 1}', "model.safetensors": bytes(100)}


@pytest.mark.parametrize(
    ("status", "error", "seconds", "found", "left", "wrong"),
    [
        (1, FINE, 1.0, None, [], []),
        (0, "", 1.0, RIGHT, [], []),
        (1, FINE, 9.0, None, [], ["took 9.0 s"]),
        (-9, "", 1.0, None, [], ["exit status -9", "not one line `error: ...`"]),
        (99, "Traceback\n  ...\nKeyError: 'x'\n", 1.0, None, [], ["exit status 99", "not one line `error: ...`"]),
        (1, f"warning\n{FINE}", 1.0, None, [], ["not one line `error: ...`"]),
        (1, f"error: {'x' * 1500}\n", 1.0, None, [], ["an error of 1508 characters"]),
        (1, "error: \x1b[31m\n", 1.0, None, [], ["control characters in the error: {'\\x1b'}"]),
        (1, "error: \u202e\n", 1.0, None, [], ["control characters in the error: {'\\u202e'}"]),
        (1, FINE, 1.0, RIGHT, [], ["a destination after an error"]),
        (1, FINE, 1.0, None, [".out.partial-1"], [".out.partial-1 is left beside the destination"]),
        (0, "", 1.0, None, [], ["no destination"]),
        (0, "", 1.0, {"config.json": b'{"a": 1}'}, [], ["model.safetensors is there in one result only"]),
        (0, "", 1.0, RIGHT | {"model.safetensors": b"1" + bytes(99)}, [], ["model.safetensors differs in 1 bytes"]),
        (0, "", 1.0, RIGHT | {"config.json": b'{"a": 2}'}, [], ["config.json has a 2 where 1 is right"]),
    ],
)  # fmt: skip
def test_what_the_damage_driver_complains_of(damage, status, error, seconds, found, left, wrong):
    ended = damage.Ended(status, "", error, seconds)
    assert damage.complaints(ended, ["config.json: cut at 5"], found, RIGHT, left) == wrong


def test_what_may_be_carried_over(damage):
    carried = RIGHT | {"config.json": b'{"a": 2}', "model.safetensors": b"1" + bytes(99)}
    said = ["model.safetensors: a bit of a value at 70", "config.json: 'a' is 2"]
    assert damage.complaints(damage.Ended(0, "", "", 1.0), said, carried, RIGHT, []) == []
    assert damage.complaints(damage.Ended(0, "", "", 1.0), said[:1], carried, RIGHT, []) == [
        "config.json has a 2 where 1 is right"
    ]
