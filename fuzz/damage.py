"""Damages checkpoint folders at random and converts them: the result is right, or there is one clear error line.

`python fuzz/damage.py --runs 1000 --seed 0`; `--case N` repeats one case by the number that a finding has.
"""

import argparse
import json
import os
import random
import shutil
import struct
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from common import ROOT, Content, Ended, Record, content, run, shard

from biote.convert import convert_folder  # noqa: F401 (imported once, before the children)
from biote.files import INDEX, WEIGHTS
from biote.port import installed_ports

LINE, SLOW = 1500, 5.0  # characters of an error, seconds of a run
ODD_NAMES = [
    "../x.safetensors", "/etc/passwd", "", ".", "..", "a/b.safetensors", "x\0y", "x" * 300, "\x1b[31mred\x1b[0m",
    "two\nlines", "\u202egnp", "é" * 50, "config.json", "model.safetensors", " ", "-rf", "\ud800",
]  # fmt: skip
VALUES = [
    None, True, False, -1, 0, 1, 1.5, 2**31, 10**20, 10**400, 1e308, float("nan"), float("inf"), "", "x" * 10_000,
    "\x1b[31mred\x1b[0m\x1b]0;title\x07", "\u202egnp", "\ud800", "two\nlines", [], [[[[[]]]]], {}, {"a": {"b": []}},
    [None], ["\x1b[2J"], list(range(20_000)), {"0": None}, {"x": 1, "y": 1},
]  # fmt: skip
Damage = Callable[[random.Random, Path], str]


def config_value(draw: random.Random, folder: Path) -> str:
    """Another value for a field, none, or a field nobody knows."""
    config = json.loads((folder / "config.json").read_text())
    key = draw.choice([*config, *config, *config, "unknown", *ODD_NAMES[-9:]])
    value = draw.choice([*VALUES, str(config.get(key)), [config.get(key)], "DELETED"])
    config[key] = value
    if value == "DELETED":
        del config[key]
        value = None  # as a null: what a result may have instead is nothing
    (folder / "config.json").write_text(json.dumps(config))
    return f"config.json: {key!r} is {repr(value)[:80]}"


def json_text(draw: random.Random, folder: Path) -> str:
    """config.json or the index as no JSON, or as JSON of another kind."""
    file = draw.choice([file for file in (folder / "config.json", folder / INDEX) if file.exists()])
    text = file.read_bytes()
    at = draw.randrange(len(text))
    made = {
        "cut": text[:at],
        "flipped": text[:at] + bytes([text[at] ^ 1 << draw.randrange(8)]) + text[at + 1 :],
        "doubled": text + text,
        "deep": b"[" * 100_000,
        "deep object": b'{"a":' * 100_000,
        "list": b"[1, 2]",
        "null": b"null",
        "utf-16": text.decode().encode("utf-16"),
        "marked": b"\xef\xbb\xbf" + text,
        "zeros": bytes(len(text)),
        "digits": b'{"model_type": ' + b"9" * 10_000 + b"}",
    }
    how = draw.choice(sorted(made))
    file.write_bytes(made[how])
    return f"{file.name}: {how} at {at}"


def weights(draw: random.Random, folder: Path) -> Path:
    """One of the weights files."""
    return draw.choice(sorted(folder.glob("*.safetensors")))


def weight_bytes(draw: random.Random, folder: Path) -> str:
    """Bytes of a weights file flipped, cut off, added."""
    file = weights(draw, folder)
    data = bytearray(file.read_bytes())
    header = 8 + struct.unpack("<Q", data[:8])[0]
    how = draw.choice(["length", "header", "header", "cut", "added", "huge length", "zeros"])
    at = {"length": draw.randrange(8), "header": draw.randrange(8, header)}.get(how, draw.randrange(len(data)))
    if how in ("length", "header"):
        data[at] ^= 1 << draw.randrange(8)
    elif how == "cut":
        del data[at:]
    elif how == "added":
        data += draw.randbytes(at % 100 + 1)
    elif how == "huge length":
        data[:8] = struct.pack(
            "<Q", draw.choice([2**63 - 1, 2**64 - 1, 10**8 + 1, 2**31, len(data), len(data) - 8, 0])
        )
    else:
        data[:header] = bytes(header)
    file.write_bytes(data)
    return f"{file.name}: {how} at {at}"


def weight_header(draw: random.Random, folder: Path) -> str:
    """A header that is JSON and says something else."""
    file = weights(draw, folder)
    data = file.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:end])
    key = draw.choice([key for key in header if key != "__metadata__"])
    entry = header[key]
    begin, stop = entry["data_offsets"]
    field, value = draw.choice([
        ("dtype", draw.choice(["F32", "I32", "F16", "F8_E4M3", "F4", "X", "", None, 5, "BOOL", "C64"])),
        ("shape", draw.choice([[], [0], [1], [2**63], [2**64, 0], [-1], [0, 2**40, 2**40], None, "x", [1.5],
                               entry["shape"][::-1], [*entry["shape"], 1], [1] * 1000 + entry["shape"]])),
        ("data_offsets", draw.choice([[begin, stop + 4], [begin + 4, stop], [0, stop - begin], [stop, begin], [-4, 0],
                                      [2**63, 2**64], [begin], None, [begin, stop, stop], [0, 2**63]])),
        ("name", draw.choice([*ODD_NAMES, "x" * 100_000, key.upper(), key + "é", "a.b.c", "__metadata__"])),
        ("removed", None), ("unknown field", 1), ("metadata", draw.choice([{"a": 1}, [], "x", {"\x1b": "\x1b"}])),
    ])  # fmt: skip
    if field == "name":
        header = {(value if name == key else name): spec for name, spec in header.items()}
    elif field == "removed":
        del header[key]
    elif field == "metadata":
        header["__metadata__"] = value
    else:
        entry[field] = value
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[end:])
    return f"{file.name}: {key}: {field} is {repr(value)[:80]}"


def weight_value(draw: random.Random, folder: Path) -> str:
    """One flipped bit among the tensors, which nobody can tell from a weight unless it makes a NaN."""
    file = weights(draw, folder)
    data = bytearray(file.read_bytes())
    at = draw.randrange(8 + struct.unpack("<Q", data[:8])[0], len(data))
    data[at] ^= 1 << draw.randrange(8)
    file.write_bytes(data)
    return f"{file.name}: a bit of a value at {at}"


def index(draw: random.Random, folder: Path) -> str:
    """An index that names other files, lacks keys or has more."""
    file = folder / INDEX
    if not file.exists():
        file.write_text(json.dumps({"weight_map": {"x": draw.choice(ODD_NAMES)}}))
        return f"{INDEX} beside {WEIGHTS}"
    found = json.loads(file.read_text())
    key = draw.choice(sorted(found["weight_map"]))
    value = draw.choice([*ODD_NAMES, *VALUES])
    how = draw.choice(["name", "name", "key", "removed", "weight_map", "metadata"])
    if how == "name":
        found["weight_map"][key] = value
    elif how == "key":
        found["weight_map"][draw.choice([*ODD_NAMES, "x" * 100_000])] = found["weight_map"][key]
    elif how == "removed":
        del found["weight_map"][key]
    else:
        found[how] = value
    file.write_text(json.dumps(found))
    return f"{INDEX}: {key}: {how} {repr(value)[:80]}"


def entries(draw: random.Random, folder: Path) -> str:
    """Files that are missing, in the way, or none: folders, links, pipes, pickles, tokenizers of something else."""
    file = draw.choice(sorted(folder.iterdir()))
    how = draw.choice(
        ["missing", "folder", "link", "pipe", "loop", "pickle", "odd name", "empty", "tokenizer", "vocab"]
    )
    if how in ("missing", "folder", "link", "pipe", "loop"):
        file.unlink()
    name = draw.choice([name for name in ODD_NAMES if name and "/" not in name and "\0" not in name and len(name) < 250
                        and name not in (".", "..", "\ud800")])  # fmt: skip
    {
        "missing": lambda: None,
        "folder": file.mkdir,
        "link": lambda: file.symlink_to(folder / "nowhere"),
        "pipe": lambda: os.mkfifo(file),
        "loop": lambda: file.symlink_to(file),
        "pickle": lambda: (folder / "pytorch_model.bin").write_bytes(draw.randbytes(99)),
        "odd name": lambda: shutil.copy(file, folder / f"{name}.safetensors"),
        "empty": lambda: file.write_bytes(b""),
        "tokenizer": lambda: (folder / "tokenizer.json").write_bytes(draw.choice([b"", b"{}", b"\xff", b"[" * 9999])),
        "vocab": lambda: (folder / "vocab.txt").write_bytes(draw.choice([b"", b"a\nb\n", b"\xff\xfe", b"\x1b[31m\n"])),
    }[how]()
    return f"{file.name}: {how} {name!r}"


DAMAGES: list[Damage] = [
    config_value, config_value, json_text, weight_bytes, weight_header, weight_header, weight_value, index, entries
]  # fmt: skip


def complaints(ended: Ended, damages: list[str], found: Content | None, right: Content, left: list[str]) -> list[str]:
    """What is wrong with an outcome; nothing, if the result is right or the error one clear line.

    found: files of the destination, None if it is not there. right: those without damage. left: strange files beside.
    """
    wrong = [f"{name} is left beside the destination" for name in left]
    if ended.seconds > SLOW:
        wrong.append(f"took {ended.seconds:.1f} s")
    if ended.status == 0:
        return wrong + (["no destination"] if found is None else differences(damages, found, right))
    if found is not None:
        wrong.append("a destination after an error")
    if ended.status != 1:
        wrong.append(f"exit status {ended.status}")
    if not ended.error.startswith("error: ") or ended.error.count("\n") != 1 or not ended.error.endswith("\n"):
        wrong.append("not one line `error: ...`")
    if len(ended.error) > LINE:
        wrong.append(f"an error of {len(ended.error)} characters")
    strange = {
        character
        for character in ended.error
        if character != "\n" and unicodedata.category(character) in ("Cc", "Cf", "Cs")
    }
    if strange:
        wrong.append(f"control characters in the error: {strange}")
    return wrong


def differences(damages: list[str], found: Content, right: Content) -> list[str]:
    """Of a result from the right one; a flipped bit of a value and a field of config.json may be carried over."""
    wrong = [f"{name} is there in one result only" for name in found.keys() ^ right.keys()]
    flips = sum(": a bit of a value at " in damage for damage in damages)
    for name in found.keys() & right.keys():
        if name == "config.json":
            wrong += config_differences(damages, json.loads(found[name]), json.loads(right[name]))
        elif len(found[name]) != len(right[name]):
            wrong.append(f"{name} has another length")
        elif found[name] != right[name]:
            differing = sum(a != b for a, b in zip(found[name], right[name], strict=True))
            if differing > 2 * flips or not name.endswith(".safetensors"):  # a cast may move a bit to the next byte
                wrong.append(f"{name} differs in {differing} bytes")
    return wrong


def config_differences(damages: list[str], found: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """Fields that have neither the right value nor one that was put there."""
    wrong = []
    for key in sorted(found.keys() | right.keys()):
        value, good = found.get(key), right.get(key)
        carried = any(damage.endswith(f" is {repr(value)[:80]}") for damage in damages)
        if not carried and json.dumps(value) != json.dumps(good):
            wrong.append(f"config.json has {key} {repr(value)[:80]} where {repr(good)[:80]} is right")
    return wrong


class Sources:
    """Every port's small original in both layouts, in one file and in shards, with what each converts to."""

    def __init__(self, folder: Path):
        self.cases: list[tuple[str, Path, str, Content]] = []
        for name in installed_ports():
            golden = ROOT / "models" / name / "tests" / "golden"
            original = Path(shutil.copytree(golden, folder / f"{name} hf", ignore=shutil.ignore_patterns("golden*")))
            ours = folder / f"{name} te"
            self._convert(original, ours, "te", folder)
            for source, to in ((original, "te"), (ours, "hf")):
                sharded = folder / f"{source.name} sharded"
                shard(source, sharded)
                for variant in (source, sharded):
                    self._add(variant, to, folder)

    def _convert(self, source: Path, destination: Path, to: str, folder: Path) -> None:
        ended = run(["convert", str(source), str(destination), "--to", to], folder)
        assert ended.status == 0, ended.error

    def _add(self, source: Path, to: str, folder: Path) -> None:
        destination = folder / "right"
        self._convert(source, destination, to, folder)
        self.cases.append((source.name, source, to, content(destination)))
        shutil.rmtree(destination)


def try_case(number: int, sources: Sources, folder: Path, record: Record) -> None:
    """One case: its number says the checkpoint and the damages."""
    draw = random.Random(number)
    name, source, to, right = draw.choice(sources.cases)
    place = folder / "case"
    (place / "logs").mkdir(parents=True)
    damaged = place / "source"
    shutil.copytree(source, damaged)
    damages = [draw.choice(DAMAGES)]
    if draw.random() < 0.2:
        damages.append(config_value)
    said: list[str] = []
    for damage in damages:
        with suppress(ValueError, LookupError, OSError, struct.error, AttributeError, TypeError, RecursionError):
            said.append(damage(draw, damaged))  # unless the one before left nothing to damage
    destination = place / "out"
    ended = run(["convert", str(damaged), str(destination), "--to", to], place / "logs")
    found = content(destination) if destination.exists() else None
    left = [path.name for path in place.iterdir() if path.name not in ("logs", "source", "out")]
    wrong = complaints(ended, said, found, right, left)
    record.runs += 1
    record.count("refused" if ended.status else "the same result" if found == right else "the damage carried over")
    if wrong:
        error = ended.error.replace(str(place), "").replace(str(ROOT), "")
        error = error if len(error) < 600 else f"{error[:300]} ... {error[-300:]}"
        record.found(case=number, source=name, damage=said, wrong=wrong, error=error)
    shutil.rmtree(place)


def main() -> int:
    """Run the cases and print what should not be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="cases are numbered from a million times this")
    parser.add_argument("--case", type=int, help="only this one")
    parser.add_argument("--output", type=Path, help="folder for fuzz.json and fuzz.md")
    options = parser.parse_args()
    first = options.seed * 10**6
    cases = range(first, first + options.runs) if options.case is None else [options.case]
    begun, record = time.monotonic(), Record("damage", options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        sources = Sources(Path(scratch))
        for number in cases:
            try_case(number, sources, Path(scratch), record)
    return record.close(begun, options.output)


if __name__ == "__main__":
    sys.exit(main())
