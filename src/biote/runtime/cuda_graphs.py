"""Inference through CUDA graphs: the encoder's launches are recorded once and replayed, at no cost to the host.

A graph has fixed sizes. Token count, sequence count and longest length are rounded up to a bucket, so that batches of
changing lengths replay the same graph; the surplus tokens are a sequence of their own, after the others. The memory of
all graphs is one pool, and the least recently used are dropped.
Shapes: T packed tokens, B sequences, N hidden size; padded to the bucket in a graph.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .packing import Packing

MAX_GRAPHS = 16
MAX_TOKENS = 16384  # beyond, the GPU is what takes the time, and rounding up to a bucket would cost more than the host
WARM_UPS = 3  # runs before recording: libraries choose kernels, fp8 scales settle


@dataclass(frozen=True)
class Bucket:
    """The fixed sizes of one graph."""

    tokens: int
    sequences: int
    longest: int


def bucket_of(packing: Packing) -> Bucket:
    """Tokens rounded up by about a sixteenth at most, or to 64; sequences and longest length to powers of two."""
    tokens = len(packing.positions)
    step = max(64, 1 << max(tokens.bit_length() - 5, 0))
    sequences = len(packing.cu_seqlens)  # one more than the batch has
    return Bucket(-(-tokens // step) * step, _power_of_two(sequences), max(_power_of_two(packing.max_seqlen), step))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


class GraphedEncoder:
    """Runs `encode(token ids [T], packing) -> [T, N]` by replaying graphs of it. For inference on one GPU.

    A graph holds the addresses of the weights: `graphs.clear()` after whatever replaces them, or a layer.
    """

    def __init__(self) -> None:
        self.graphs: OrderedDict[Bucket, _Graph] = OrderedDict()

    def __reduce__(self) -> Any:
        return GraphedEncoder, ()  # the copy of a model records graphs of its own

    def __call__(self, encode: Callable[[Tensor, Packing], Tensor], token_ids: Tensor, packing: Packing) -> Tensor:
        """A fresh tensor [T, N], equal to what `encode` gives."""
        bucket = bucket_of(packing)
        graph = self.graphs.pop(bucket, None)
        if graph is None:
            while len(self.graphs) >= MAX_GRAPHS:
                self.graphs.popitem(last=False)
            others = list(self.graphs.values())
            pool = others[0].graph.pool() if others else None  # a pool ends with the last graph in it
            with torch.inference_mode(False), torch.no_grad():  # buffers that any later mode may fill
                graph = _Graph(encode, bucket, token_ids, packing, pool)
        self.graphs[bucket] = graph
        return graph.replay(token_ids, packing)


class _Graph:
    def __init__(self, encode: Callable, bucket: Bucket, token_ids: Tensor, packing: Packing, pool: Any):
        device = token_ids.device
        self.token_ids = torch.zeros(bucket.tokens, dtype=token_ids.dtype, device=device)
        positions = torch.zeros(bucket.tokens, dtype=packing.positions.dtype, device=device)
        bounds = torch.zeros(bucket.sequences + 1, dtype=torch.int32, device=device)
        self.packing = Packing(bounds, bucket.longest, positions, (1, bucket.tokens), None)
        self._fill(token_ids, packing)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                encode(self.token_ids, self._inputs())
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.output = encode(self.token_ids, self._inputs())

    def _inputs(self) -> Packing:
        """A new Packing over the same buffers: what it caches belongs to one run."""
        return Packing(
            self.packing.cu_seqlens, self.packing.max_seqlen, self.packing.positions, self.packing.shape, None
        )

    def _fill(self, token_ids: Tensor, packing: Packing) -> None:
        tokens, bounds = len(token_ids), packing.cu_seqlens
        self.token_ids[:tokens].copy_(token_ids)
        self.token_ids[tokens:].zero_()
        self.packing.positions[:tokens].copy_(packing.positions)
        self.packing.positions[tokens:].zero_()
        self.packing.cu_seqlens[: len(bounds)].copy_(bounds)
        self.packing.cu_seqlens[len(bounds) :].fill_(len(self.token_ids))  # the surplus, then sequences of no token

    def replay(self, token_ids: Tensor, packing: Packing) -> Tensor:
        self._fill(token_ids, packing)
        self.graph.replay()
        return self.output[: len(token_ids)].clone()
