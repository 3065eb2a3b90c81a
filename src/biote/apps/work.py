"""Work that survives being killed: chunks of a job's result in a folder beside it, till all are there.

Each chunk is a parquet file, flushed to the disk and then given its name, so that what has the name is whole. Who
works at a chunk holds a lock on it, which ends with the process: any number of processes share a folder, and what a
dead one left is taken up by another.
"""

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..files import flush, lock_file, read_json

PLAN = "_plan.json"  # readers of parquet folders pass names with "_" or "." by
WRITTEN = "_written"
NOTE = b"biote"  # key of a parquet file's metadata


class Work:
    """The folder of one run.

    plan: what decides the numbers; a run that goes on must have the same, and takes over the rest, `defaults`, from
    the one that began. place: where it runs; `moved` tells if it is another. ValueError if the folder is another's.
    """

    def __init__(self, folder: Path, plan: dict[str, Any], defaults: dict[str, Any], place: dict[str, Any]):
        self.folder, self.plan, self.place = folder, {**defaults, **plan}, place
        self.moved: list[str] = []  # in which respects this is another place than where the run began
        folder.mkdir(exist_ok=True)
        with self._locked("plan"):
            if (folder / PLAN).exists():
                self._take_up(read_json(folder / PLAN), plan)
            elif others := sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(".")):
                raise ValueError(f"{folder} is no unfinished run: it holds {others[0]}; rename or remove it")
            else:
                self._save()

    def _take_up(self, state: dict[str, Any], plan: dict[str, Any]) -> None:
        before, there = state["plan"], state["place"]
        refuse_other_plan(self.folder, before, plan)
        self.moved = [f"{key} {there.get(key)}, now {new}" for key, new in self.place.items() if there.get(key) != new]
        self.plan, self.place = before, there

    def _save(self) -> None:
        state = {"plan": self.plan, "place": self.place}
        self._write(PLAN, (json.dumps(state, indent=2) + "\n").encode())

    def shards(self) -> list[Path]:
        """The chunks that are there, in order."""
        return sorted(self.folder.glob("[0-9]*.parquet"), key=lambda shard: int(shard.stem))

    def mark_written(self) -> None:
        """Note that the output is about to appear: a run that finds both knows whose it is."""
        self._write(WRITTEN, b"")

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06}.parquet"

    def is_done(self, number: int, digest: str) -> bool:
        """Whether a chunk is there; ValueError if it was made of another input."""
        if not self.path(number).exists():
            return False
        refuse_other_input(self.folder, number, pq.read_schema(self.path(number)), digest)
        return True

    @contextmanager
    def claim(self, number: int, wait: bool) -> Iterator[bool]:
        """Whether a chunk is ours to do for the block: not if another process is at it, unless we wait for that."""
        name = f"{number:06}"
        with self._locked(name, wait) as ours:
            yield ours and not self.path(number).exists()
        if ours:
            with suppress(OSError):
                (self.folder / f".{name}.lock").unlink()

    def write(self, number: int, table: pa.Table, digest: str) -> None:
        """Keep a chunk's result: after this, it is there whatever happens."""
        self._write(self.path(number).name, shard(table, self.plan, digest))

    def _write(self, name: str, content: Any) -> None:
        partial = self.folder / f".{name}.{secrets.token_hex(4)}"
        try:
            partial.write_bytes(content)
            flush(partial)
            partial.rename(self.folder / name)
            flush(self.folder)
        except BaseException as error:
            partial.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.filename is None:  # a write says not where there is no room
                raise OSError(error.errno, error.strerror, str(self.folder / name)) from error
            raise

    @contextmanager
    def _locked(self, name: str, wait: bool = True) -> Iterator[bool]:
        with lock_file(self.folder / f".{name}.lock", wait) as ours:
            yield ours

    def sweep(self) -> None:
        """Remove what dead processes left, and the locks: only chunks and plan stay."""
        for entry in self.folder.iterdir():
            if entry.name.startswith("."):
                entry.unlink(missing_ok=True)


def refuse_other_plan(folder: Any, before: dict[str, Any], now: dict[str, Any]) -> None:
    """ValueError if a run that began with other options is to go on."""
    differing = [f"{key} was {before.get(key)}, now {new}" for key, new in now.items() if before.get(key) != new]
    if differing:
        raise ValueError(
            f"{folder} holds an unfinished run with other options ({'; '.join(differing)}): "
            "give the same, or remove the folder to begin anew"
        )


def refuse_other_input(folder: Any, number: int, schema: pa.Schema, digest: str) -> None:
    """ValueError if a finished chunk was made of another input."""
    if json.loads(schema.metadata[NOTE])["input"] != digest:
        raise ValueError(
            f"{folder} holds an unfinished run over another input: its chunk {number} differs; "
            "remove the folder to begin anew"
        )


def shard(table: pa.Table, plan: dict[str, Any], digest: str) -> pa.Buffer:
    """A chunk's result as a parquet file, which says by what and of what it was made."""
    sink = pa.BufferOutputStream()
    noted = table.replace_schema_metadata({NOTE: json.dumps({**plan, "input": digest})})
    pq.write_table(noted, sink, compression="none", use_dictionary=False, write_statistics=False)
    return sink.getvalue()
