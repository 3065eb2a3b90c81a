"""Signals, kills and leftovers: a destination is whole or absent, and nothing stays beside it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from biote import cli
from biote.files import LOCK, check_destination, new_folder

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals and locks")

WORKS = """
import sys, time
from pathlib import Path
from biote import cli
from biote.files import new_folder

def work():
    with new_folder(Path(sys.argv[1])) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "x").write_text("1")
        print("working", flush=True)
        time.sleep(60)

cli.run(work)
"""


def start(destination: Path, code: str = WORKS) -> subprocess.Popen:
    """A process that has begun to write `destination` and goes on doing so."""
    command = [sys.executable, "-c", code, str(destination)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "working\n"
    return child


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("name", "times"), [("SIGTERM", 3), ("SIGHUP", 1), ("SIGINT", 1)])
def test_a_signal_leaves_nothing_behind(tmp_path, name, times):
    child = start(tmp_path / "new" / "out")
    for _ in range(times):  # as `timeout` and impatient people send it
        child.send_signal(getattr(signal, name))
    assert child.communicate() == ("", f"error: stopped by {name}\n")
    assert child.returncode == 128 + getattr(signal, name)
    assert names_in(tmp_path) == []


def test_a_second_signal_does_not_stop_the_cleaning_up(capsys):
    cleaned = []

    def work():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            cleaned.append(True)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        cli.run(work)
    assert (stopped.value.code, capsys.readouterr().err) == (143, "error: stopped by SIGTERM\n")
    assert cleaned == [True]
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_ignored_signal_stays_ignored(tmp_path):
    """As under nohup."""
    child = start(tmp_path / "out", "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + WORKS)
    child.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert child.poll() is None
    child.terminate()
    assert child.communicate()[1] == "error: stopped by SIGTERM\n"


def test_what_a_killed_run_left_goes_with_the_next(tmp_path):
    child = start(tmp_path / "out")
    child.kill()
    child.communicate()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.partial-")
    assert names_in(left) == [LOCK, "new"]
    with new_folder(tmp_path / "other"):
        pass
    assert names_in(tmp_path) == [left.name, "other"]  # another destination's
    with new_folder(tmp_path / "out"):
        pass
    assert names_in(tmp_path) == ["other", "out"]


@pytest.mark.parametrize("left", [[], [LOCK], [LOCK, "new"]])
def test_leftovers_of_every_stage_go_even_where_the_destination_exists(tmp_path, left):
    (tmp_path / "[out]*").mkdir()
    place = tmp_path / ".[out]*.partial-0123"
    place.mkdir()
    if LOCK in left:
        (place / LOCK).touch()
    if "new" in left:
        (place / "new" / "sub").mkdir(parents=True)
    with pytest.raises(FileExistsError):
        check_destination(tmp_path / "[out]*")
    assert names_in(tmp_path) == ["[out]*"]


def test_a_folder_that_is_not_ours_stays(tmp_path):
    (tmp_path / ".out.partial-mine" / "precious").mkdir(parents=True)
    (tmp_path / ".out.partial-file").touch()
    check_destination(tmp_path / "out")
    assert names_in(tmp_path) == [".out.partial-file", ".out.partial-mine"]


def test_a_run_leaves_the_work_of_one_that_lives(tmp_path):
    child = start(tmp_path / "out")
    with new_folder(tmp_path / "out"):
        assert len(names_in(tmp_path)) == 2
    assert len(names_in(tmp_path)) == 2
    child.terminate()
    child.communicate()
    assert names_in(tmp_path) == ["out"]


def test_the_command_is_stopped_at_work(tmp_path, tiny_original):
    """`biote convert` itself, the signal sent as soon as its folder is there."""
    shutil.copytree(tiny_original, tmp_path / "source")
    slow = (
        "import time, sys; from biote import cli, convert; save = convert.save_tokenizer\n"
        "convert.save_tokenizer = lambda *given: (save(*given), time.sleep(60)); cli.main()"
    )
    arguments = ["convert", str(tmp_path / "source"), str(tmp_path / "out"), "--to", "te"]
    child = subprocess.Popen([sys.executable, "-c", slow, *arguments], stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob(".out.partial-*/new/config.json")):
        time.sleep(0.01)
        assert child.poll() is None
    child.terminate()
    assert child.communicate()[1] == "error: stopped by SIGTERM\n"
    assert child.returncode == 143
    assert names_in(tmp_path) == ["source"]
