"""Several processes at one job: those that torchrun started, or one for each device asked for."""

import os
import subprocess
import sys

import torch

from .embed_files import embed_file
from .embed_job import Job


def share(job: Job, devices: str | None = None) -> bool:
    """Do the job here, or share it: with a process for each of `devices`, as "0,1"; with torchrun's others.

    Returns whether this is the process that wrote the output. ValueError for a device that there is not. What a
    process that dies leaves is done by the others.
    """
    rank, world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    names = devices.split(",") if devices else []
    places = [_device(name) for name in names]
    if (world > 1 or len(places) > 1) and str(job.input) == "-":
        raise ValueError("stdin cannot be shared by several processes: write it to a file first")
    if world > 1:
        device = places[rank % len(places)] if places else f"cuda:{rank}" if torch.cuda.is_available() else "cpu"
        number = int(os.environ.get("RANK", rank))
        embed_file(job, device, number)
        return number == 0
    others = [_start(rank, len(places)) for rank in range(1, len(places))]
    try:
        embed_file(job, places[0] if places else None)
    finally:
        for other in others:
            other.kill()  # any moment will do, and it has nothing more to say
            other.wait()
    return True


def _start(rank: int, world: int) -> "subprocess.Popen[bytes]":
    """The same command again, as torchrun would start it."""
    numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    command = [sys.executable, "-m", "biote", *sys.argv[1:]]
    nothing = subprocess.DEVNULL
    return subprocess.Popen(  # in a session of its own: a Ctrl-C is ours, who end it
        command, env={**os.environ, **numbers}, stdin=nothing, stdout=nothing, start_new_session=True
    )


def _device(name: str) -> str:
    name = name.strip()
    if name == "cpu":
        return name
    there = torch.cuda.device_count()
    if not name.isdigit() or int(name) >= there:
        raise ValueError(f"there is no device {name!r}: give numbers of GPUs, of which torch sees {there}, or cpu")
    return f"cuda:{name}"
