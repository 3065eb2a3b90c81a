"""Inference through CUDA graphs: the encoder's launches are recorded once and replayed, at no cost to the host.

A graph has fixed sizes. Token count, sequence count and longest length are rounded up to a bucket, so that batches of
changing lengths replay the same graph; the surplus tokens are a sequence of their own, after the others. The memory of
all graphs is one pool, and the least recently used are dropped.
A graph is launches and addresses. Whether the modules would still launch the same is asked before each replay
(`_Snapshot`); modules that run the Python of others are not recorded at all (`_obstacle`).
Shapes: T packed tokens, B sequences, N hidden size; padded to the bucket in a graph.
"""

import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .layers import untouched
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
    """Runs an encoder's `encode(token ids [T], packing) -> [T, N]` by replaying graphs of it, or says that it cannot.

    For inference, where the current device is that of the tensors. Threads and streams take turns.
    """

    def __init__(self) -> None:
        self.graphs: OrderedDict[Bucket, _Graph] = OrderedDict()
        self.snapshot: _Snapshot | None = None  # of what all graphs were recorded over
        self.warned = False

    def __reduce__(self) -> Any:
        return GraphedEncoder, ()  # the copy of a model records graphs of its own

    def __call__(
        self, encoder: nn.Module, encode: Callable[[Tensor, Packing], Tensor], token_ids: Tensor, packing: Packing
    ) -> Tensor | None:
        """A fresh tensor [T, N] equal to what `encode` gives; None, and one warning, where no graph would equal it."""
        obstacle, bucket = _mode(), bucket_of(packing)
        with _TURN:
            states = None if obstacle else self._replay(encoder, bucket, token_ids, packing)
            if states is not None:
                return states
            obstacle = obstacle or _obstacle(encoder)
            if obstacle is None:
                return self._record(encoder, bucket, encode, token_ids, packing).replay(token_ids, packing)
            if not self.warned:
                self.warned = True
                warnings.warn(f"{type(encoder).__name__} runs without CUDA graphs: {obstacle}", stacklevel=2)
            return None

    def _replay(self, encoder: nn.Module, bucket: Bucket, token_ids: Tensor, packing: Packing) -> Tensor | None:
        """None if there is no such graph. Drops all graphs if what they were recorded over has changed."""
        states, seen = None, self.snapshot
        holds = seen is not None and seen.tensors_hold()
        if holds and bucket in self.graphs:
            self.graphs.move_to_end(bucket)
            states = self.graphs[bucket].replay(token_ids, packing)
        if seen is not None and holds and seen.modules_hold(encoder):  # asked while the GPU is at work
            return states
        self.graphs.clear()
        self.snapshot = None
        return None

    def _record(self, encoder: nn.Module, bucket: Bucket, *inputs: Any) -> "_Graph":
        while len(self.graphs) >= MAX_GRAPHS:
            self.graphs.popitem(last=False)
        others = list(self.graphs.values())
        pool = others[0].graph.pool() if others else None  # a pool ends with the last graph in it
        with torch.inference_mode(False), torch.no_grad():  # buffers that any later mode may fill
            graph = self.graphs[bucket] = _Graph(pool, bucket, *inputs)
        self.snapshot = _Snapshot(encoder)  # only now: the first run makes fp8 scales
        return graph


def _mode() -> str | None:
    """What the caller has switched on that a graph knows nothing of."""
    if torch.is_autocast_enabled("cuda"):
        return "torch.autocast is on"
    if torch.are_deterministic_algorithms_enabled():
        return "torch.use_deterministic_algorithms is on"
    return None


def _obstacle(encoder: nn.Module) -> str | None:
    """Which module runs Python that a graph would leave out, or that may change its mind unseen: peft's adapters do.

    Known are the modules of torch and of the packages that the encoder's own classes come from.
    """
    if _has_any_global_hook():
        return "a global module hook is registered"
    known = {cls.__module__.rpartition(".")[0] for cls in type(encoder).__mro__} - {""}
    for name, module in encoder.named_modules():
        kind = type(module)
        if module is encoder:
            continue
        if kind.__module__.rpartition(".")[0] not in known or not untouched(module, kind):
            return f"{name} ({kind.__module__}.{kind.__name__}) is wrapped, replaced or hooked"
        if module.training:
            return f"{name} is in training mode"
    return None


class _Snapshot:
    """What decides the launches of an encoder of known modules: its tensors, and all else.

    It holds neither the encoder, whose end is to be its graphs' too, nor a tensor, which is to be free once replaced.
    """

    def __init__(self, encoder: nn.Module):
        self.encoder = weakref.ref(encoder)
        modules = [module for module in encoder.modules() if module is not encoder]
        everyone: list[Any] = [encoder, *modules]
        self.tables = [table for m in everyone for table in (m._parameters, m._buffers) if table]
        self.inner: dict[type, list[str]] = {}  # of tensors that wrap others, as TE's quantised weights do
        for tensor in chain.from_iterable(map(dict.values, self.tables)):
            if hasattr(tensor, "__tensor_flatten__"):
                self.inner[type(tensor)] = tensor.__tensor_flatten__()[0]
        self.modules, self.attributes = modules, [vars(module) for module in modules]
        self.hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self.parts = [m._modules for m in everyone if m._modules]
        self.parts += [m.quantizers for m in everyone if hasattr(m, "quantizers")]  # TE's, where fp8 scales lie
        plain = [own for m, own in zip(modules, self.attributes, strict=True) if not isinstance(m, nn.Linear)]
        self.settings = [(own, tuple(name for name in own if not name.startswith("_"))) for own in plain]
        self.addresses, self.rest = self._addresses(), self._rest(encoder)

    def tensors_hold(self) -> bool:
        """Whether a replay would find the tensors where they lay. All that the GPU waits for: few steps of Python."""
        return self._addresses() == self.addresses

    def modules_hold(self, encoder: nn.Module) -> bool:
        """Whether the encoder, which had no hook, is otherwise as it was."""
        if self.encoder() is not encoder or _has_any_global_hook() or any(self.hooks):
            return False
        return self._rest(encoder) == self.rest

    def _tensors(self) -> list[Tensor]:
        tensors: Iterable[Tensor | None] = chain.from_iterable(map(dict.values, self.tables))
        if self.inner:
            tensors = chain.from_iterable(map(self._inner, tensors))
        return [tensor for tensor in tensors if tensor is not None]

    def _inner(self, tensor: Tensor | None) -> list[Tensor | None]:
        names = self.inner.get(type(tensor))
        return [tensor] if names is None else [getattr(tensor, name) for name in names]

    def _addresses(self) -> list[int]:
        return [*map(Tensor.data_ptr, self._tensors())]

    def _rest(self, encoder: Any) -> tuple[list, ...]:
        matmul, tensors = torch.backends.cuda.matmul, self._tensors()
        return (
            [encoder.ops, encoder.precision_runs, matmul.allow_bf16_reduced_precision_reduction],
            [*map(Tensor.size, tensors), *map(Tensor.stride, tensors)],  # a view may lie where the whole lay
            [*map(type, self.modules)],  # a parametrised module is of another class
            [*map(len, self.attributes)],  # an instance's own `forward` is one more
            [*chain.from_iterable(map(dict.values, self.parts))],
            [own.get(name) for own, names in self.settings for name in names],
        )


_TURN = threading.Lock()  # torch records one graph at a time in a process
_LANES: dict[torch.device, "_Lane"] = {}


class _Lane:
    """Where one GPU records. Its graphs share the workspaces of that stream, so each is replayed after the other.

    One for all models: a stream keeps its workspaces as long as the process lives.
    """

    def __init__(self, device: torch.device):
        self.warm_up, self.record = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self.done = torch.cuda.Event()  # the last replay, on whatever stream


def _lane(device: torch.device) -> _Lane:
    if device not in _LANES:
        _LANES[device] = _Lane(device)
    return _LANES[device]


class _Graph:
    def __init__(self, pool: Any, bucket: Bucket, encode: Callable, token_ids: Tensor, packing: Packing):
        device = token_ids.device
        self.lane = lane = _lane(device)
        lane.warm_up.wait_stream(torch.cuda.current_stream())
        lane.warm_up.wait_event(lane.done)
        with torch.cuda.stream(lane.warm_up):  # where its memory is taken up again, too, when it is free
            self.token_ids = torch.zeros(bucket.tokens, dtype=token_ids.dtype, device=device)
            positions = torch.zeros(bucket.tokens, dtype=packing.positions.dtype, device=device)
            bounds = torch.zeros(bucket.sequences + 1, dtype=torch.int32, device=device)
            self.packing = Packing(bounds, bucket.longest, positions, (1, bucket.tokens), None)
            self._fill(token_ids, packing)
            for _ in range(WARM_UPS):
                encode(self.token_ids, self._inputs())
        torch.cuda.current_stream().wait_stream(lane.warm_up)
        self.graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(self.graph, pool=pool, stream=lane.record, capture_error_mode="thread_local")
        with torch.cuda.stream(lane.record), recording:  # the outer one leaves the stream even if recording fails
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
        stream, done = torch.cuda.current_stream(), self.lane.done
        stream.wait_event(done)
        self._fill(token_ids, packing)
        self.graph.replay()
        output = self.output[: len(token_ids)].clone()
        done.record(stream)
        return output
