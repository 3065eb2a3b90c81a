"""Folders that appear whole or not at all, and checkpoints as safetensors' own reader and writer see them."""

import errno
import io
import json
import pickle
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import biote.files
from biote.convert import convert_folder
from biote.files import INDEX, WEIGHTS, CheckpointReader, new_folder, read_json, write_checkpoint
from biote.mapping import MappingError

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

    def __init__(self, path: Path, mode: str):
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
        assert partial.parent == destination.parent  # so that the last step is a rename within one file system
        assert not destination.exists()
    assert names_in(destination.parent) == ["b"]
    assert (destination / "x").read_text() == "1"
    assert destination.stat().st_mode & 0o777 == 0o755


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


@pytest.mark.parametrize("text", ["", "{", '{"a": }', "\xff", "[1, 2]", "3", "null"])
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


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from biote.files import new_folder, write_checkpoint

def tensors():
    yield "a", torch.ones(1 << 20)
    os.kill(os.getpid(), signal.SIGKILL)

specs = {key: torch.empty(1 << 20, device="meta") for key in "ab"}
with new_folder(Path(sys.argv[1])) as partial:
    write_checkpoint(partial, specs, tensors(), 1 << 30)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_killed_in_mid_write_leaves_no_destination(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")], check=False)
    assert done.returncode == -9
    (partial,) = tmp_path.iterdir()  # what was being written when it died
    assert partial.name.startswith(".out.partial-")
    assert (partial / WEIGHTS).stat().st_size >= 1 << 22
