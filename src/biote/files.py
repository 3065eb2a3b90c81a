"""Folders that appear whole or not at all, and safetensors checkpoints read and written tensor by tensor.

safetensors' own save_file wants a whole shard in memory; the writer here holds one tensor, and follows the format's
specification: an 8-byte little-endian header length, a JSON header, then the tensors' bytes back to back.
"""

import errno
import glob
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
READ = ("config.json", "*.safetensors", INDEX, "tokenizer*.json", "added_tokens.json", "vocab.txt")  # of a source
LOCK = "lock"
WRITE_BYTES = 2**20  # one write of a whole tensor takes Linux's page cache up to five times as long
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@contextmanager
def new_folder(path: Path, source: Path | None = None) -> Iterator[Path]:
    """Yield a folder that becomes `path`, flushed to the disk, when the block ends well; else nothing is left of it.

    It is made in a hidden folder beside `path`. source: the folder that is read, which `path` may not be in.
    """
    path = Path(path)
    check_destination(path, source)
    missing = [folder for folder in path.absolute().parents if not folder.exists()]
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        _refuse_existing(path)  # again: where its parent was missing, a name that is too long shows only now
        with _workplace(path) as place:
            partial = place / "new"
            partial.mkdir()
            yield partial
            _settle(partial)
            _publish(partial, path)
    except BaseException:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a name to write that becomes `path`, flushed to the disk, when the block ends well; else nothing is left.

    The folder that `path` is in must be there.
    """
    path = Path(path)
    check_destination(path)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be made: there is no folder {path.parent}")
    with _workplace(path) as place:
        yield place / path.name
        flush(place / path.name)
        _publish(place / path.name, path)


@contextmanager
def _workplace(path: Path) -> Iterator[Path]:
    """A folder beside `path` that is locked for the block and then removed."""
    place = path.absolute().parent / f"{_prefix(path)}{secrets.token_hex(4)}"
    lock = None
    try:
        lock = _hold(place)
        yield place
    finally:
        _remove(place)
        if lock is not None:
            os.close(lock)


def check_destination(path: Path, source: Path | None = None) -> None:
    """OSError or ValueError where no folder `path` can be made. What killed processes left beside it is removed."""
    parent = path.absolute().parent
    for left in parent.glob(f"{glob.escape(_prefix(path))}*"):
        _remove_if_dead(left)
    _refuse_existing(path)
    existing = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not existing.is_dir():
        raise NotADirectoryError(f"{path} cannot be made: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be made: {existing} cannot be written to")
    if source is not None and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(source)):
        raise ValueError(f"{path} is inside the folder that is read; choose an output folder outside {source}")


def _refuse_existing(path: Path) -> None:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        if path.name != "..":
            return
    reason = "is a link that leads nowhere" if path.is_symlink() and not path.exists() else "exists already"
    raise FileExistsError(f"{path} {reason}; remove it or choose another output")


def _prefix(path: Path) -> str:
    name = os.fsdecode(os.fsencode(path.name)[:100])  # a file's name may have 255 bytes
    return f".{name}.partial-"


def _hold(place: Path) -> int:
    """Make the folder `place` and lock it: till the descriptor is closed, or this process dies in whatever way."""
    while True:
        place.mkdir(0o700, exist_ok=True)
        with suppress(FileNotFoundError):  # another run took it for a dead one's, a moment ago
            lock = os.open(place / LOCK, os.O_CREAT | os.O_RDWR, 0o600)
            _flock(lock, wait=True)
            if os.path.samestat(os.fstat(lock), os.stat(place / LOCK)):
                return lock
            os.close(lock)


def _remove_if_dead(place: Path) -> None:
    try:
        lock = os.open(place / LOCK, os.O_RDWR)
    except OSError:
        with suppress(OSError):  # empty where its process was killed between two steps; one that lives makes it anew
            place.rmdir()
        return
    if _flock(lock, wait=False):
        _remove(place)
    os.close(lock)


def _flock(lock: int, wait: bool) -> bool | None:
    """Whether we hold it; None where the file system has no locks, so that nobody's work is removed there."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # as on many clusters' disks
        return None
    return True


@contextmanager
def lock_file(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock that ends with this process; yields whether it is ours. Where there are no locks, it always is."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        yield _flock(descriptor, wait) is not False
    finally:
        os.close(descriptor)


def remove_folder(path: Path, output: Path) -> None:
    """Remove a folder at once: others see all or nothing of it. output: beside it; its next run clears what stays."""
    with _workplace(output) as place:
        path.rename(place / path.name)


def _remove(place: Path) -> None:
    """The lock last: as long as anything else is there, a later run can tell that its process is dead."""
    with suppress(OSError):
        for entry in place.iterdir():
            if entry.name != LOCK:
                shutil.rmtree(entry, ignore_errors=True)
    shutil.rmtree(place, ignore_errors=True)


def _settle(folder: Path) -> None:
    """Give all files the mode that the umask says, as `folder` has it, and wait till they are on the disk."""
    mode = folder.stat().st_mode & 0o777
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            file = Path(parent, name)
            file.chmod(mode & 0o666)  # safetensors writes files for the user only; copies have the original's mode
            flush(file)
        os.chmod(parent, mode)
        flush(Path(parent))


def _publish(partial: Path, path: Path) -> None:
    _refuse_existing(path)
    try:
        partial.rename(path)
    except OSError:
        _refuse_existing(path)  # another run was a moment faster
        raise
    flush(path.absolute().parent)


def flush(path: Path) -> None:
    """Wait till a file, or what a folder lists, is on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """RuntimeError if a file of a checkpoint is another after the block, which reads it, than before."""
    before = _versions(folder)

    def check() -> None:
        after = _versions(folder)
        changed = sorted(name for name in before | after if before.get(name) != after.get(name))
        if changed:
            raise RuntimeError(f"{folder / changed[0]} changed while it was read; try again when nothing writes to it")

    try:
        yield
    except Exception:
        check()  # first, as what else is wrong may come of it
        raise
    check()


def _versions(folder: Path) -> dict[str, tuple[int, int, int]]:
    found = {}
    for pattern in READ:
        for file in folder.glob(pattern):
            with suppress(OSError):
                stat = file.stat()
                found[file.name] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; FileNotFoundError or ValueError with the path in it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


class CheckpointReader:
    """The tensors of a folder with model.safetensors, or shards and their index. Holds headers, not tensors."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.places: dict[str, tuple[Path, int]] = {}  # the file, and where in it the tensor begins
        self.specs: dict[str, Tensor] = {}  # meta tensors
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
        with _open(file) as handle, open(file, "rb") as opened:
            at = 8 + int.from_bytes(opened.read(8), "little")
            keys = handle.offset_keys()  # safetensors has checked that they follow each other without a gap
            if expected - set(keys):
                lacking = ", ".join(sorted(expected - set(keys)))
                raise ValueError(f"{file} lacks tensors that {INDEX} says it has: {lacking}")
            for key in keys:
                if expected and key not in expected:
                    raise ValueError(f"{file} holds {key}, which {INDEX} does not list there")
                self.specs[key] = _spec(file, key, handle.get_slice(key))
                self.places[key] = (file, at)
                at += _size(self.specs[key])

    def read(self, keys: Iterable[str]) -> list[Tensor]:
        """The tensors of `keys`, in memory of their own."""
        return [self._read(*self.places[key], self.specs[key]) for key in keys]

    def _read(self, file: Path, at: int, spec: Tensor) -> Tensor:
        """Read rather than map: the process would die of a mapped file that another cuts short."""
        tensor = torch.empty(_size(spec), dtype=torch.uint8)
        rest = tensor.numpy().data
        with open(file, "rb", buffering=0) as opened:
            opened.seek(at)
            while rest:
                count = opened.readinto(rest)
                if not count:
                    raise RuntimeError(f"{file} was cut short while it was read")
                rest = rest[count:]
        return tensor.view(spec.dtype).view(spec.shape)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or not a safetensors file: {error}") from error


def _spec(file: Path, key: str, piece: Any) -> Tensor:
    if piece.get_dtype() not in DTYPES:
        raise ValueError(f"{file}: {key} has the dtype {piece.get_dtype()}, which is not supported")
    try:
        return torch.empty(piece.get_shape(), dtype=DTYPES[piece.get_dtype()], device="meta")
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ValueError(f"{file}: {key} has the shape {piece.get_shape()}, which no tensor can have") from error


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """save_pretrained; OSError where that fails, for which `tokenizers` raises a bare Exception."""
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"the tokenizer could not be written: {error}") from error


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
