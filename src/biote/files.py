"""Folders that appear whole or not at all, and safetensors checkpoints read and written tensor by tensor.

safetensors' own save_file wants a whole shard in memory; the writer here holds one tensor, and follows the format's
specification: an 8-byte little-endian header length, a JSON header, then the tensors' bytes back to back.
"""

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAPPED_BYTES = 2**25  # of a source, kept in memory at most before it is opened anew, which takes milliseconds
WRITE_BYTES = 2**20  # one write of a whole tensor takes Linux's page cache up to five times as long
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder beside `path` that becomes `path` when the block ends well and is removed when it does not."""
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists already; remove it or choose another output folder")
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.absolute().parent))
    try:
        partial.chmod(0o755)
        yield partial
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; FileNotFoundError or ValueError with the path in it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


class CheckpointReader:
    """The tensors of a folder with model.safetensors, or shards and their index. Holds headers, not tensors."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.file_of_key: dict[str, Path] = {}
        self.specs: dict[str, Tensor] = {}  # meta tensors
        self.handles: dict[Path, Any] = {}
        self.read_bytes = 0
        indexed = self._index()
        for file in dict.fromkeys(indexed.values()) if indexed else [folder / WEIGHTS]:
            self._add(file, {key for key, at in indexed.items() if at == file})

    def _index(self) -> dict[str, Path]:
        if (self.folder / WEIGHTS).is_file():
            return {}  # as transformers has it: an index beside it is left over from an earlier save
        if not (self.folder / INDEX).is_file():
            raise FileNotFoundError(self._no_weights())
        weight_map = read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{self.folder / INDEX} has no weight_map")
        outside = sorted({str(name) for name in weight_map.values() if Path(str(name)).name != name})
        if outside:
            raise ValueError(f"{self.folder / INDEX} points outside its folder: {', '.join(outside)}")
        return {key: self.folder / name for key, name in weight_map.items()}

    def _no_weights(self) -> str:
        pickles = sorted(path.name for pattern in PICKLES for path in self.folder.glob(pattern))
        if pickles:
            return (
                f"{self.folder} holds pickled weights only ({', '.join(pickles)}), which can run code and are never "
                "loaded; save the model with safetensors first (model.save_pretrained)"
            )
        return f"{self.folder} holds neither {WEIGHTS} nor {INDEX}"

    def _add(self, file: Path, expected: set[str]) -> None:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is named in {INDEX} but does not exist")
        handle = _open(file)
        keys = set(handle.keys())
        if expected - keys:
            raise ValueError(f"{file} lacks tensors that {INDEX} says it has: {', '.join(sorted(expected - keys))}")
        for key in handle.keys():  # noqa: SIM118 (a handle, not a dict)
            if expected and key not in expected:
                raise ValueError(f"{file} holds {key}, which {INDEX} does not list there")
            piece = handle.get_slice(key)
            if piece.get_dtype() not in DTYPES:
                raise ValueError(f"{file}: {key} has the dtype {piece.get_dtype()}, which is not supported")
            self.file_of_key[key] = file
            self.specs[key] = torch.empty(piece.get_shape(), dtype=DTYPES[piece.get_dtype()], device="meta")

    def read(self, keys: Iterable[str]) -> list[Tensor]:
        """The tensors of `keys`. They are views of their files, which are unmapped once they and we let go of them."""
        if self.read_bytes > MAPPED_BYTES:  # what has been read stays in memory until the file is opened anew
            self.handles.clear()
            self.read_bytes = 0
        found = []
        for key in keys:
            file = self.file_of_key[key]
            if file not in self.handles:
                self.handles[file] = _open(file)
            found.append(self.handles[file].get_tensor(key))
            self.read_bytes += _size(self.specs[key])
        return found


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or not a safetensors file: {error}") from error


def write_checkpoint(
    folder: Path, specs: dict[str, Tensor], tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int
) -> None:
    """Write tensors as they come, in the order of `specs` (meta tensors), to one file or to shards with an index."""
    shards = _shards(specs, max_shard_bytes)
    names = [WEIGHTS] if len(shards) == 1 else [
        f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)
    ]  # fmt: skip
    incoming = iter(tensors)
    for name, keys in zip(names, shards, strict=True):
        with open(folder / name, "wb") as file:
            file.write(_header({key: specs[key] for key in keys}))
            for key in keys:
                made, tensor = next(incoming)
                if made != key or tensor.shape != specs[key].shape or tensor.dtype != specs[key].dtype:
                    raise RuntimeError(f"tensors came out of order: {made} where {key} was due")
                data = tensor.contiguous().flatten().view(torch.uint8).numpy().data
                for start in range(0, len(data), WRITE_BYTES):
                    file.write(data[start : start + WRITE_BYTES])
    if len(shards) > 1:
        total = sum(_size(spec) for spec in specs.values())
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(specs: dict[str, Tensor], max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for key, spec in specs.items():
        if shards[-1] and filled + _size(spec) > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += _size(spec)
    return shards


def _size(spec: Tensor) -> int:
    return spec.numel() * spec.element_size()


def _header(specs: dict[str, Tensor]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for key, spec in specs.items():
        end = at + _size(spec)
        header[key] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned
    return len(text).to_bytes(8, "little") + text
