"""`biote embed --ray`: the same work by a Ray cluster, its chunks on any path that fsspec knows.

The driver reads the input and lays its chunks out beside the output; workers of Ray Data take one after the other, and
what a dead one had is taken by another. OUTPUT is a folder of parquet files, which is complete once _SUCCESS is in it.
"""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .embed_job import Job, Session
from .items import Chunk, Item
from .progress import progress
from .work import NOTE, PLAN, refuse_other_input, refuse_other_plan, shard

SUCCESS = "_SUCCESS"  # as Hadoop and Spark mark a folder whose parts are all there
STAGED = "_input"


def embed_on_ray(job: Job, address: str, workers: int) -> None:
    """Do the job by `workers` actors, each with a GPU if the cluster has any.

    address: of a running cluster; "local" starts one on this host. MODEL and OUTPUT must mean the same on all its
    nodes; the input is read here. A run that was killed goes on where it was. ValueError, ImportError or RuntimeError
    say what was wrong.
    """
    if job.kind != "/":
        raise ValueError(f"with --ray the output is a folder of parquet files: {job.output}/")
    if str(job.input) == "-":
        raise ValueError("--ray reads no stdin: write it to a file first")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what concerns the job, we say ourselves
    try:
        import ray
    except ImportError as error:
        raise ImportError("--ray needs Ray: pip install 'biote[ray]'") from error
    place = _Place(job.output)
    place.refuse_finished()
    driver = Session(replace(job, engine="torch", dtype="float32"), "cpu")  # for what depends on no device
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    with ExitStack() as stack:
        stack.callback(ray.shutdown)
        items = driver.items(Path(stack.enter_context(TemporaryDirectory())))
        asked = {**driver.plan(), "engine": job.engine, "precision": job.dtype}
        plan = place.begin(asked, job.batch_tokens, driver.batch_tokens())
        embedder = driver.embedder(items.before, items.after, plan["batch_tokens"])
        scan = driver.scan(items, embedder)
        print("\n".join([*driver.notes(scan, embedder), f"{workers} workers"]), file=sys.stderr, flush=True)
        told = stack.enter_context(progress("embedding", scan.residues))
        missing, chunks = [], 0
        for chunk in driver.chunks(items, embedder):
            chunks += 1
            if place.is_done(chunk.number, chunk.digest):
                told(chunk.residues, already=True)
            else:
                place.stage(chunk, items.rows(chunk.items))
                missing.append(chunk.number)
        for residues in _map((job, plan, items.before, items.after), missing, workers):
            told(residues)
        place.finish(chunks)


def _map(arguments: tuple[Any, ...], missing: list[int], workers: int) -> Iterator[int]:
    """Have each missing chunk done by some worker, made of the arguments; yields the residues of each."""
    import ray

    if not missing:
        return
    there = ray.cluster_resources()
    gpus = 1 if there.get("GPU") else 0
    cpus = 1 if gpus else max(1, int(there.get("CPU", 1)) // workers)
    ray.data.DataContext.get_current().enable_progress_bars = False
    numbers = ray.data.from_items([{"number": number} for number in missing], override_num_blocks=len(missing))
    pool = ray.data.ActorPoolStrategy(size=workers)
    done = numbers.map_batches(
        _Worker, fn_constructor_args=arguments, batch_size=1, num_gpus=gpus, num_cpus=cpus, compute=pool
    )
    for row in done.iter_rows():
        yield int(row["residues"])


class _Worker:
    """An actor: a model on its device, that does chunks by number."""

    def __init__(self, job: Job, plan: dict[str, Any], before: np.ndarray, after: np.ndarray):
        self.session, self.place = Session(job), _Place(job.output)
        self.embedder = self.session.embedder(before, after, plan["batch_tokens"])
        self.about = {**self.session.place(), **self.session.plan(), "batch_tokens": plan["batch_tokens"]}

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        number = int(batch["number"][0])
        chunk, rows, digest = self.place.staged(number)
        made = self.session.make(self.embedder, chunk, rows, lambda residues: None)
        self.place.write(f"{number:06}.parquet", shard(made, self.about, digest))
        return {"residues": np.array([chunk.residues])}


class _Place:
    """The output's folder, on whatever fsspec knows: finished chunks, the plan, and chunks that wait for a worker."""

    def __init__(self, url: str):
        self.files, root = fsspec.core.url_to_fs(url)
        self.url, self.root = url, root.rstrip("/")

    def refuse_finished(self) -> None:
        """FileExistsError if the folder holds anything but a run that can go on."""
        if self.files.exists(f"{self.root}/{SUCCESS}"):
            raise FileExistsError(f"{self.url} is finished already; remove it or choose another output")
        if self.files.exists(self.root) and self.files.ls(self.root) and not self.files.exists(f"{self.root}/{PLAN}"):
            raise FileExistsError(f"{self.url} holds something else; choose another output")

    def begin(self, plan: dict[str, Any], asked: int | None, default: int) -> dict[str, Any]:
        """The plan, with the tokens of a batch as asked for, or those of the run that began, or the default."""
        if asked is not None:
            plan = {**plan, "batch_tokens": asked}
        if self.files.exists(f"{self.root}/{PLAN}"):
            before = json.loads(self.files.cat_file(f"{self.root}/{PLAN}"))
            refuse_other_plan(self.url, before, plan)
            return before
        plan = {"batch_tokens": default, **plan}
        self.write(PLAN, (json.dumps(plan, indent=2) + "\n").encode())
        return plan

    def is_done(self, number: int, digest: str) -> bool:
        """Whether a chunk is there; ValueError if it was made of another input."""
        path = f"{self.root}/{number:06}.parquet"
        if not self.files.exists(path):
            return False
        with self.files.open(path) as file:
            refuse_other_input(self.url, number, pq.read_schema(file), digest)
        return True

    def stage(self, chunk: Chunk, rows: list[np.ndarray]) -> None:
        """Lay a chunk out for the workers, its token ids made already."""
        columns = {
            "id": pa.array([item.id for item in chunk.items], pa.string()),
            "place": pa.array([item.place for item in chunk.items], pa.int64()),
            "tokens": pa.array(rows, pa.list_(pa.int32())),
        }
        self.write(f"{STAGED}/{chunk.number:06}.parquet", shard(pa.table(columns), {}, chunk.digest))

    def staged(self, number: int) -> tuple[Chunk, list[np.ndarray], str]:
        """A chunk that was laid out, its token ids, and the digest of what it was made of."""
        with self.files.open(f"{self.root}/{STAGED}/{number:06}.parquet") as file:
            waiting = pq.read_table(file)
        rows = [np.asarray(row.values) for row in waiting["tokens"]]
        named = zip(waiting["id"].to_pylist(), waiting["place"].to_pylist(), rows, strict=True)
        digest = json.loads(waiting.schema.metadata[NOTE])["input"]
        return Chunk(number, [Item(*item) for item in named]), rows, digest

    def write(self, name: str, content: Any) -> None:
        """A file that appears whole or not at all."""
        path = f"{self.root}/{name}"
        self.files.makedirs(path.rpartition("/")[0], exist_ok=True)
        with self.files.open(path, "wb", autocommit=False) as file:
            file.write(content)
        file.commit()

    def finish(self, chunks: int) -> None:
        """Mark the folder as complete, which has so many chunks."""
        there = [name for name in self.files.ls(self.root, detail=False) if name.endswith(".parquet")]
        if len(there) != chunks:
            raise RuntimeError(f"{self.url} has {len(there)} of {chunks} chunks: run the command again")
        if self.files.exists(f"{self.root}/{STAGED}"):
            self.files.rm(f"{self.root}/{STAGED}", recursive=True)
        self.write(SUCCESS, b"")
