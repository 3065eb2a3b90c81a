"""What is told of a job's progress: residues a second and time left, of this run's own work."""

import sys

import pytest

from biote.apps import progress


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The seconds that have passed, for whoever moves it."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_in_a_pipe(clock, capsys):
    with progress.progress("embedding", 10_000) as told:
        told(4_000, already=True)
        clock[0] += 10
        told(1_000)
        assert capsys.readouterr().err == ""  # not at every batch
        clock[0] += 40
        told(1_000)
        assert capsys.readouterr().err == "embedding: 6,000 of 10,000 residues, 40 residues/s, 100 s left\n"
        told(1_000)
        clock[0] += 150
        told(3_000)
        assert capsys.readouterr().err == "embedding: 10,000 of 10,000 residues, 30 residues/s, 0 s left\n"


def test_a_bar_on_a_terminal(clock, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress.progress("embedding", 1_000) as told:
        clock[0] += 2
        told(500)
    assert "embedding" in (said := capsys.readouterr().err)
    assert "50%" in said
    assert "250 residues/s" in said


def test_only_one_process_tells(clock, capsys):
    with progress.progress("embedding", 1_000, shown=False) as told:
        clock[0] += 100
        told(500)
    assert capsys.readouterr().err == ""
