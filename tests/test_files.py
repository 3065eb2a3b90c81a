"""Folders that appear whole or not at all, and checkpoints as safetensors' own reader and writer see them."""

import errno
import io
import json
import os
import pickle
import shutil
import subprocess
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import biote.files
from biote.convert import convert_folder
from biote.files import (
    INDEX,
    WEIGHTS,
    CheckpointReader,
    check_destination,
    new_folder,
    read_json,
    save_tokenizer,
    unchanged,
    write_checkpoint,
)
from biote.mapping import MappingError
from biote.port import port_named

State = dict[str, Tensor]
EVERY_DTYPE = [
    torch.bool, torch.float64, torch.uint8, torch.bfloat16, torch.int64, torch.int8, torch.float16, torch.int16,
    torch.float32, torch.int32,
]  # fmt: skip


def mixed_state() -> State:
    """All dtypes, small and large in turn, so that few tensors start at a multiple of their element's size."""
    torch.manual_seed(0)
    state = {f"x.{dtype}": (torch.rand(3, 5) * 100).to(dtype) for dtype in EVERY_DTYPE}
    state["x.torch.bool"] = torch.rand(3, 5) > 0.5
    scalar, empty = torch.tensor(7.5, dtype=torch.bfloat16), torch.empty(0, 4)
    return {
        "scalar": scalar,
        "empty": empty,
        "transposed": torch.rand(4, 3).mT,
        "strided": torch.rand(8)[::2],
        **state,
    }


def specs_of(state: State) -> State:
    return {key: tensor.to("meta") for key, tensor in state.items()}


def assert_same(left: State, right: State) -> None:
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert tensor.dtype == right[key].dtype, key
        assert torch.equal(tensor, right[key]), key


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class FullDisk(io.FileIO):
    """A file on a disk with room for three writes."""

    def __init__(self, path: Path, mode: str, buffering: int = -1):
        super().__init__(path, mode)
        self.room = 3

    def write(self, data: Any) -> int:
        self.room -= 1
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def test_new_folder_appears_when_done(tmp_path: Path) -> None:
    destination = tmp_path / "a" / "b"
    with new_folder(destination) as partial:
        (partial / "x").write_text("1")
        assert partial.parent.parent == destination.parent  # so that the last step is a rename in one file system
        assert not destination.exists()
    assert names_in(destination.parent) == ["b"]
    assert (destination / "x").read_text() == "1"


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_new_folder_leaves_what_exists(tmp_path: Path, kind: str) -> None:
    destination = tmp_path / "taken"
    if kind == "file":
        destination.write_text("mine")
    else:
        destination.mkdir()
    with pytest.raises(FileExistsError, match="taken exists already"), new_folder(destination):
        pytest.fail("the block must not run")
    assert names_in(tmp_path) == ["taken"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, StopIteration])
def test_new_folder_leaves_nothing_behind(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with new_folder(tmp_path / "out") as partial:
            (partial / "sub").mkdir()
            (partial / "sub" / "x").write_text("1")
            raise error

    with pytest.raises((error, RuntimeError)):
        fail()
    assert names_in(tmp_path) == []


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002], indirect=True)
def test_new_folder_has_the_modes_that_the_umask_says(tmp_path: Path, umask: int) -> None:
    with new_folder(tmp_path / "out") as partial:
        (partial / "sub").mkdir()
        for name, mode in (("private", 0o600), ("open", 0o777), ("sub/read-only", 0o444)):
            (partial / name).touch()
            (partial / name).chmod(mode)
        (partial / "sub").chmod(0o700)
    modes = {path.is_dir(): set() for path in (tmp_path, tmp_path / "out" / "open")}  # type: dict[bool, set[int]]
    for path in (tmp_path / "out", *(tmp_path / "out").rglob("*")):
        modes[path.is_dir()].add(path.stat().st_mode & 0o777)
    assert modes == {True: {0o777 & ~umask}, False: {0o666 & ~umask}}


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc to see what a descriptor stands for")
def test_new_folder_is_on_the_disk_before_it_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    rename = Path.rename
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    monkeypatch.setattr(Path, "rename", lambda *names: (flushed.append("rename"), rename(*names)))
    with new_folder(tmp_path / "out") as partial:
        (partial / "sub").mkdir()
        for name in ("a", "sub/b"):
            (partial / name).write_text("1")
    place = str(partial)
    assert flushed == [f"{place}/sub/b", f"{place}/sub", f"{place}/a", place, "rename", str(tmp_path)]


def cannot_be(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    return {
        "link": (tmp_path / "link", "is a link that leads nowhere"),
        "below a link": (tmp_path / "link" / "out", "link is not a folder"),
        "below a file": (tmp_path / "file" / "sub" / "out", "file is not a folder"),
        "long": (tmp_path / ("x" * 256), "File name too long"),
        "long below": (tmp_path / "new" / ("x" * 256), "File name too long"),
        "long parent": (tmp_path / ("x" * 256) / "out", "File name too long"),
        "parent": (tmp_path / "new" / "..", "exists already"),
        "in the source": (tmp_path / "source" / "sub" / "out", "inside the folder that is read"),
        "in the source by a link": (tmp_path / "other name" / "out", "inside the folder that is read"),
    }


@pytest.mark.parametrize("name", cannot_be(Path()))
def test_a_destination_that_cannot_be_is_found_out_before_any_work(tmp_path: Path, name: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    (tmp_path / "source" / "sub").mkdir(parents=True)
    (tmp_path / "other name").symlink_to(tmp_path / "source")
    before = sorted(tmp_path.rglob("*"))
    path, message = cannot_be(tmp_path)[name]
    with pytest.raises((OSError, ValueError), match=message), new_folder(path, tmp_path / "source"):
        pytest.fail("the block must not run")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["x" * 250, "ä" * 127, "[a]*?", ".hidden", "lock", "new"])
def test_any_name_that_the_disk_takes(tmp_path: Path, name: str) -> None:
    for wanted in (tmp_path / name, tmp_path / "sub" / name):
        with new_folder(wanted) as partial:
            (partial / "x").touch()
        assert names_in(wanted) == ["x"]
    assert names_in(tmp_path) == sorted([name, "sub"])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "none", disk], check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_destination_that_cannot_be_written_to(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for path in (small_disk / "out", small_disk / "new" / "out"):
        with pytest.raises(PermissionError, match="disk cannot be written to"):
            check_destination(path)


def test_a_folder_that_another_made_meanwhile_is_left_alone(tmp_path: Path) -> None:
    for name, make in (("file", Path.touch), ("folder", Path.mkdir)):
        with pytest.raises(FileExistsError, match="exists already"), new_folder(tmp_path / name):
            make(tmp_path / name)
    assert names_in(tmp_path) == ["file", "folder"]
    assert names_in(tmp_path / "folder") == []


def test_of_two_at_once_one_wins(tmp_path: Path) -> None:
    """Neither takes the other's work for a leftover, and the one who comes last is told."""
    said: list[str] = []
    started = threading.Barrier(4)

    def work(number: int) -> None:
        try:
            with new_folder(tmp_path / "deep" / "out") as partial:
                (partial / "number").write_text(str(number))
                started.wait()
                assert (partial / "number").read_text() == str(number)
            said.append(f"done {number}")
        except FileExistsError as error:
            said.append(str(error).removeprefix(str(tmp_path)))

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    (winner,) = (line for line in said if line.startswith("done"))
    assert winner == "done " + (tmp_path / "deep" / "out" / "number").read_text()
    assert [line.split(";")[0] for line in said if line != winner] == ["/deep/out exists already"] * 3
    assert names_in(tmp_path / "deep") == ["out"]


@pytest.mark.parametrize("text", ["", "{", '{"a": }', "\xff", "[1, 2]", "3", "null", "[" * 10**5, "9" * 5000])
def test_read_json_refuses(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"x\.json"):
        read_json(tmp_path / "x.json")


def test_read_json(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"x\.json does not exist"):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"é": 1}', encoding="utf-8")
    assert read_json(tmp_path / "x.json") == {"é": 1}


@pytest.mark.parametrize("sharded", [False, True])
def test_reader(tmp_path: Path, sharded: bool) -> None:
    state = {key: tensor.contiguous() for key, tensor in mixed_state().items()}
    shards = {"one.safetensors": list(state)[:4], "two.safetensors": list(state)[4:]} if sharded else {}
    for name, keys in (shards or {WEIGHTS: list(state)}).items():
        save_file({key: state[key] for key in keys}, tmp_path / name)
    if sharded:
        write_index(tmp_path, {key: name for name, keys in shards.items() for key in keys})
    reader = CheckpointReader(tmp_path)
    assert {key: (s.device.type, s.dtype, s.shape) for key, s in reader.specs.items()} == {
        key: ("meta", tensor.dtype, tensor.shape) for key, tensor in state.items()
    }
    assert_same(dict(zip(state, reader.read(state), strict=True)), state)
    assert [tensor.dtype for tensor in reader.read(["x.torch.int8", "x.torch.bool"])] == [torch.int8, torch.bool]


def test_an_index_left_over_from_an_earlier_save_is_not_read(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / WEIGHTS)
    write_index(tmp_path, {"x": "model-00001-of-00002.safetensors"})
    assert CheckpointReader(tmp_path).specs.keys() == {"x"}


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", "..", "", 5, None])
def test_index_that_points_outside(tmp_path: Path, name: Any) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for at in (tmp_path, folder / "sub"):
        save_file({"a": torch.ones(1)}, at / "x.safetensors")
    write_index(folder, {"a": str(tmp_path) + name if str(name).startswith("/") else name})
    with pytest.raises((ValueError, FileNotFoundError), match=r"points outside its folder|does not exist"):
        CheckpointReader(folder)


@pytest.mark.parametrize("weight_map", [None, {}, [], "x"])
def test_index_without_a_weight_map(tmp_path: Path, weight_map: Any) -> None:
    write_index(tmp_path, weight_map)
    with pytest.raises(ValueError, match="has no weight_map"):
        CheckpointReader(tmp_path)


def test_shards_that_do_not_match_their_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1), "b": torch.ones(2)}, tmp_path / "one.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})
    with pytest.raises(FileNotFoundError, match=r"two\.safetensors .*does not exist"):
        CheckpointReader(tmp_path)
    save_file({"d": torch.ones(1)}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"two\.safetensors lacks tensors that .*: c$"):
        CheckpointReader(tmp_path)
    save_file({"b": torch.zeros(2), "c": torch.ones(1)}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"two\.safetensors holds b, which .* does not list there"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("kept", [0, 7, 40, -1])
def test_truncated_file(tmp_path: Path, kept: int) -> None:
    save_file({"a": torch.ones(100)}, tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"{WEIGHTS} is truncated or not a safetensors file"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("content", [b"\xff" * 100, b"hello, this is text", pickle.dumps({"a": [1] * 50})])
def test_bytes_that_are_not_safetensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{WEIGHTS} is truncated or not a safetensors file"):
        CheckpointReader(tmp_path)


def test_dtype_that_is_not_supported(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"a has the dtype F8_E4M3, which is not supported"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("shape", [[0, 2**40, 2**40], [0, 2**63], [2**63, 0]])
def test_a_shape_that_no_tensor_can_have(tmp_path: Path, shape: list[int]) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    (tmp_path / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match=r"which no tensor can have|not a safetensors file"):
        CheckpointReader(tmp_path)


class Trap:
    """Creates a file where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.pth", "x.ckpt", "x.pkl", "x.pickle", WEIGHTS])
def test_pickles_are_never_loaded(tmp_path: Path, name: str) -> None:
    folder, sprung = tmp_path / "model", tmp_path / "sprung"
    folder.mkdir()
    torch.save({"a": Trap(sprung)}, folder / name)
    reason = r"not a safetensors file" if name == WEIGHTS else r"pickled weights only .* never loaded"
    with pytest.raises((FileNotFoundError, ValueError), match=reason) as caught:
        CheckpointReader(folder)
    assert name in str(caught.value)
    assert not sprung.exists()
    with open(folder / name, "rb") as file:
        torch.load(file, weights_only=False)
    assert sprung.exists()  # the trap works


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"holds neither {WEIGHTS} nor {INDEX}"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize("spare", range(8))
def test_one_file_as_safetensors_reads_it(tmp_path: Path, spare: int) -> None:
    state = {**mixed_state(), "x" * spare: torch.ones(3)}  # headers of every length modulo 8
    write_checkpoint(tmp_path, specs_of(state), iter(state.items()), 10**6)
    assert names_in(tmp_path) == [WEIGHTS]
    assert_same(load_file(tmp_path / WEIGHTS), state)
    content = (tmp_path / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    assert header.pop("__metadata__") == {"format": "pt"}
    assert len(content) == 8 + length + sum(x.nbytes for x in state.values())
    assert list(header) == list(state)


@pytest.mark.parametrize("limit", [1, 15, 16, 40, 41, 63])
def test_shards_as_transformers_reads_them(tmp_path: Path, limit: int) -> None:
    state = {name: torch.full((size,), float(size)) for name, size in zip("dabc", (4, 6, 2, 4), strict=True)}
    write_checkpoint(tmp_path, specs_of(state), iter(state.items()), limit)  # 16, 24, 8 and 16 bytes
    count = {1: 4, 15: 4, 16: 4, 40: 2, 41: 2, 63: 2}[limit]
    files = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    assert names_in(tmp_path) == sorted([*files, INDEX])
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 64
    assert sorted(set(index["weight_map"].values())) == files
    found = [load_file(tmp_path / file) for file in files]
    assert_same({key: found[files.index(file)][key] for key, file in index["weight_map"].items()}, state)
    assert sum(map(len, found)) == len(state)
    assert all(len(tensors) == 1 or sum(x.nbytes for x in tensors.values()) <= limit for tensors in found)


@pytest.mark.parametrize(
    "wrong", [("b", torch.ones(2)), ("a", torch.ones(3)), ("a", torch.ones(2).double())], ids=["key", "shape", "dtype"]
)
def test_tensors_other_than_announced(tmp_path: Path, wrong: tuple[str, Tensor]) -> None:
    with pytest.raises(RuntimeError, match="out of order"):
        write_checkpoint(tmp_path, {"a": torch.empty(2, device="meta")}, iter([wrong]), 100)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint of the original implementation."""
    from transformers import EsmConfig, EsmForMaskedLM

    config = EsmConfig(
        vocab_size=33, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, pad_token_id=1,
        mask_token_id=32, position_embedding_type="rotary", token_dropout=True, emb_layer_norm_before=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("original")
    EsmForMaskedLM(config).save_pretrained(folder)
    return folder


def test_convert_on_a_full_disk_leaves_nothing(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_folder(original, tmp_path / "fine", "te")
    assert {WEIGHTS, "config.json"} <= set(names_in(tmp_path / "fine"))
    monkeypatch.setattr(biote.files, "open", FullDisk, raising=False)
    with pytest.raises(OSError, match="No space left on device"):
        convert_folder(original, tmp_path / "full", "te")
    assert names_in(tmp_path) == ["fine"]


class BrokenTokenizer:
    def save_pretrained(self, folder: Path) -> None:
        raise Exception("No space left on device (os error 28)")


def test_a_tokenizer_on_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="the tokenizer could not be written: No space left"):
        save_tokenizer(BrokenTokenizer(), tmp_path)


def test_convert_on_a_disk_full_at_any_point(original: Path, small_disk: Path) -> None:
    """With room for 0, 1, 2, ... pages: the weights, config.json, the code and tokenizer.json are all cut off once."""
    convert_folder(original, small_disk / "whole", "te")
    needed = sum(-(-file.stat().st_size // 4096) for file in (small_disk / "whole").iterdir())
    shutil.rmtree(small_disk / "whole")
    failures = []
    for pages in range(needed + 2):
        with open(small_disk / "ballast", "wb") as ballast:
            ballast.write(bytes(4096 * (256 - pages)))
        try:
            convert_folder(original, small_disk / "out", "te")
            shutil.rmtree(small_disk / "out")
        except OSError as error:
            failures.append(str(error))
        assert names_in(small_disk) == ["ballast"]
        (small_disk / "ballast").unlink()
    assert len(failures) >= needed
    assert all("No space left on device" in failure for failure in failures)
    assert any("tokenizer" in failure for failure in failures)


def rewrite(file: Path) -> None:
    """In place, as many bytes."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    with open(file, "r+b") as opened:
        opened.write(content)


def replace(file: Path) -> None:
    copy = shutil.copy2(file, file.with_name("copy"))
    os.replace(copy, file)


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1000 if file.suffix == ".safetensors" else 10)


@pytest.mark.parametrize("change", [rewrite, replace, cut_short, Path.unlink])
@pytest.mark.parametrize("name", ["config.json", INDEX, "model-00001-of-00002.safetensors"])
@pytest.mark.parametrize("moment", [0, 1, 5, -1])
def test_a_source_that_changes_while_it_is_read(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, name: str, moment: int
) -> None:
    source = tmp_path / "source"
    state = load_file(original / WEIGHTS)
    source.mkdir()
    shutil.copy(original / "config.json", source)
    size = sum(tensor.nbytes for tensor in state.values())
    write_checkpoint(source, specs_of(state), iter(state.items()), size * 2 // 3)
    for file in source.iterdir():
        os.utime(file, (0, 0))  # some file systems tell only times that are milliseconds apart
    read = CheckpointReader.read
    calls: list[Any] = []

    def changing(self: CheckpointReader, keys: Iterable[str]) -> list[Tensor]:
        if len(calls) == moment:
            change(source / name)
        calls.append(keys)
        return read(self, keys)

    monkeypatch.setattr(CheckpointReader, "read", changing)
    if moment == -1:  # after the last tensor
        monkeypatch.setattr("biote.convert.save_tokenizer", lambda *_: change(source / name))
    with pytest.raises(RuntimeError, match=rf"{name} (changed|was cut short) while it was read"):
        convert_folder(source, tmp_path / "out", "te")
    assert names_in(tmp_path) == ["source"]
    assert len(calls) > 5 or moment >= 0 or change is cut_short


def test_a_source_that_changes_while_a_model_is_loaded(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(original, tmp_path / "source"))
    cls = port_named("esm2").classes["AutoModelForMaskedLM"]
    cls.from_original(source, engine="torch")  # type: ignore[attr-defined]
    read = CheckpointReader.read
    monkeypatch.setattr(CheckpointReader, "read", lambda *given: (rewrite(source / WEIGHTS), read(*given))[1])
    with pytest.raises(RuntimeError, match=f"{WEIGHTS} changed while it was read"):
        cls.from_original(source, engine="torch")  # type: ignore[attr-defined]


def test_what_is_not_read_may_change(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with unchanged(tmp_path):
        (tmp_path / "optimizer.pt").touch()
        (tmp_path / "trainer_state.json").touch()
    with pytest.raises(RuntimeError, match=rf"{WEIGHTS} changed while"), unchanged(tmp_path):
        (tmp_path / WEIGHTS).touch()


def test_convert_interrupted_leaves_nothing(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = CheckpointReader.read
    calls: list[Any] = []

    def interrupted(self: CheckpointReader, keys: Iterable[str]) -> list[Tensor]:
        calls.append(keys)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(self, keys)

    monkeypatch.setattr(CheckpointReader, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_folder(original, tmp_path / "out", "te")
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("to", ["te", "hf", "nvidia"])
def test_convert_refuses_mis_shaped_tensors(original: Path, tmp_path: Path, to: str) -> None:
    folder = original
    if to != "te":
        folder = tmp_path / "te"
        convert_folder(original, folder, "te")
    state = load_file(folder / WEIGHTS)
    key = next(key for key, tensor in state.items() if tuple(tensor.shape) == (12, 8))  # an up projection
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file({**state, key: torch.ones(12, 7)}, bad / WEIGHTS)
    with pytest.raises(MappingError, match="mis-shaped"):
        convert_folder(bad, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_padding_of_the_lowest_number_stays_finite_in_a_cast(
    original: Path, tmp_path: Path, dtype: torch.dtype | None
) -> None:
    convert_folder(original, tmp_path / "te", "te")
    convert_folder(tmp_path / "te", tmp_path / "nvidia", "nvidia", dtype=dtype)
    bias = load_file(tmp_path / "nvidia" / WEIGHTS)["lm_head.decoder.bias"]
    assert bias.dtype == (dtype or torch.float32)
    assert set(bias[33:].tolist()) == {torch.finfo(bias.dtype).min}
