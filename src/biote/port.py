"""ModelPort: everything the tools need to know of one model. Ports are found by entry point `biote.ports`."""

from collections.abc import Callable, Collection
from collections.abc import Mapping as MappingABC
from dataclasses import dataclass, field, fields
from importlib import resources
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .mapping import Mapping

Json = dict[str, Any]
TE = "te"  # the name of our own layout among a port's formats
UNSET = ("id2label", "label2id", "problem_type", "dtype")  # null in a config.json says that nobody has set them


@dataclass(frozen=True)
class Checkpoint:
    """A published original.

    shape: fields of our configuration that differ from its defaults. facts: shown on the model card, by name.
    """

    repo_id: str
    revision: str = "main"
    subfolder: str | None = None
    shape: MappingABC[str, Any] = field(default_factory=dict)
    facts: MappingABC[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """A layout that the model's checkpoints have in the wild.

    architectures: class name in config.json, by Auto class ("AutoModelForMaskedLM", ...).
    mapping: (our config, its config.json, Auto class) -> Mapping; read_config: (its config.json, keys of its weights)
    -> our config; write_config: (our config, Auto class) -> its config.json.
    build: (config.json, Auto class) -> the original implementation, its weights yet to be loaded; load: (folder,
    Auto class, dtype) -> the same with the folder's weights, by its own means; config_class: its configuration. All
    None where there is none here.
    """

    model_type: str
    architectures: MappingABC[str, str]
    mapping: Callable[[Any, Json, str], Mapping]
    read_config: Callable[[Json, Collection[str]], PreTrainedConfig]
    write_config: Callable[[Any, str], Json]
    build: Callable[[Json, str], PreTrainedModel] | None = None
    load: Callable[[Path, str, torch.dtype], PreTrainedModel] | None = None
    config_class: type[PreTrainedConfig] | None = None


@dataclass(frozen=True)
class CellsRead:
    """What `read_cells` found: the file's cells, those it wrote, and where in each the genes are.

    before, after: special tokens around the genes of every cell. ids: the column that names the genes.
    """

    cells: int
    written: int
    before: int
    after: int
    ids: str


@dataclass(frozen=True)
class ModelPort:
    """One model: its classes by Auto class, its foreign formats, its published checkpoints, its tokenizer.

    build_tokenizer: None where the model reads no text.
    example_inputs: rows for golden values, as texts the tokenizer understands, or as token ids.
    residue_tokens: letter -> the tokens that mean this residue, whose probabilities add up, in an order common to all
        letters; None: one token, the letter.
    mask_letter: the letter whose tokens mask a residue, each in place of one at its own place in that order; None: the
        tokenizer's mask token.
    trained_tokens: the longest input of the training, special tokens included, where the model runs longer ones too.
    read_cells: (an .h5ad, the model's folder, a parquet file to make, layer=None, id_column=None) -> CellsRead; None
        where the model reads no cells. The parquet has a row for each cell with something to read, in the order of
        obs: obs_index (int64, its place in obs), id (its name in obs, a string), input_ids (list of int32), length
        (int32). layer: where the counts are, if not in X; id_column: the column of var that names the genes. Warnings
        count what is left out.
    files: the port's own files beside the weights, which go with a conversion: a check of each by its name, which
        raises ValueError.
    """

    name: str
    title: str
    package: str
    license: str
    config_class: type[PreTrainedConfig]
    classes: MappingABC[str, type[PreTrainedModel]]
    formats: MappingABC[str, Format]
    tags: MappingABC[str, Checkpoint]
    build_tokenizer: Callable[[], PreTrainedTokenizerBase] | None
    example_inputs: tuple[str, ...] | tuple[tuple[int, ...], ...]
    residue_tokens: Callable[[str], tuple[str, ...]] | None = None
    mask_letter: str | None = None
    trained_tokens: int | None = None
    read_cells: Callable[..., CellsRead] | None = None
    files: MappingABC[str, Callable[[Path], Any]] = field(default_factory=dict)

    def architectures(self, format_name: str) -> MappingABC[str, str]:
        """Class name by Auto class, for a foreign format or our own."""
        if format_name == TE:
            return {auto: cls.__name__ for auto, cls in self.classes.items()}
        return self.formats[format_name].architectures

    def model_type(self, format_name: str) -> str:
        return self.config_class.model_type if format_name == TE else self.formats[format_name].model_type

    def read_text(self, name: str) -> str:
        """A text that travels in the port's package: "LICENSE" or "model_readme.md"."""
        file = resources.files(self.package) / name
        if not file.is_file():
            raise FileNotFoundError(f"the package {self.package} lacks {name}, which an export needs")
        return file.read_text(encoding="utf-8")

    def example_batch(self) -> dict[str, Tensor]:
        """example_inputs as input_ids and attention_mask, int64 [B, S], right-padded."""
        if self.build_tokenizer is None:
            rows = [torch.tensor(row) for row in self.example_inputs]
            pad = self.config_class().pad_token_id or 0
            masks = [torch.ones_like(row) for row in rows]
            return {
                "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad),
                "attention_mask": pad_sequence(masks, batch_first=True),
            }
        batch = self.build_tokenizer()(list(self.example_inputs), padding=True, return_tensors="pt")
        return {key: batch[key] for key in ("input_ids", "attention_mask")}

    @property
    def format_names(self) -> list[str]:
        return [TE, *self.formats]


def installed_ports() -> dict[str, ModelPort]:
    """All ports installed beside biote, by name."""
    return {entry.name: entry.load() for entry in sorted(entry_points(group="biote.ports"), key=lambda e: e.name)}


def port_named(name: str) -> ModelPort:
    """The port of that name; ValueError listing those there are."""
    ports = installed_ports()
    if name not in ports:
        raise ValueError(f"unknown port {name!r}; installed: {', '.join(ports) or 'none (pip install -e models/...)'}")
    return ports[name]


def port_of(cls: type) -> ModelPort | None:
    """The port whose package defines a class, if any; the other ports are not imported."""
    package = cls.__module__.partition(".")[0]
    entries = (entry for entry in entry_points(group="biote.ports") if entry.module.partition(".")[0] == package)
    return next((entry.load() for entry in entries), None)


def find_tag(tag: str) -> tuple[ModelPort, Checkpoint] | None:
    """The port and checkpoint that a tag names, if any."""
    for port in installed_ports().values():
        if tag in port.tags:
            return port, port.tags[tag]
    return None


def identify(config: Json, port_name: str | None = None) -> tuple[ModelPort, str, str]:
    """Read a config.json: (port, format, Auto class). ValueError if it fits no port, or several and none is named."""
    ports = [port_named(port_name)] if port_name else list(installed_ports().values())
    model_type, architectures = config.get("model_type"), config.get("architectures") or [None]
    if not isinstance(architectures, list):
        raise ValueError(f"config.json: architectures is {architectures!r}, where a list of class names should be")
    architecture = architectures[0]
    known = [(port, name) for port in ports for name in port.format_names]
    fits = [(port, name) for port, name in known if port.model_type(name) == model_type]
    if not fits:
        understood = sorted({port.model_type(name) for port, name in known})
        raise ValueError(f"model_type {model_type!r} fits no port; understood: {', '.join(understood) or 'none'}")
    autos = [
        (port, name, auto)
        for port, name in fits
        for auto, class_name in port.architectures(name).items()
        if class_name == architecture
    ]
    if not autos:
        offered = [class_name for port, name in fits for class_name in port.architectures(name).values()]
        raise ValueError(f"architecture {architecture!r} is not supported; supported: {', '.join(offered)}")
    if len({port.name for port, _, _ in autos}) > 1:
        autos = _readable(autos, config)
    if len({port.name for port, _, _ in autos}) > 1:
        raise ValueError(f"model_type {model_type!r} fits {', '.join(p.name for p, _, _ in autos)}; say --port NAME")
    return autos[0]


def _readable(fits: list[tuple[ModelPort, str, str]], config: Json) -> list[tuple[ModelPort, str, str]]:
    """Of ports with the same model_type, those whose read_config takes the configuration: it refuses its siblings."""
    readable, reasons = [], []
    for port, name, auto in fits:
        try:
            port.config_class.from_dict(config) if name == TE else port.formats[name].read_config(config, ())
            readable.append((port, name, auto))
        except Exception as error:  # whatever a field of the wrong kind raises
            reasons.append(f"{port.name}: {error}")
    if not readable:
        raise ValueError(f"no port reads config.json: {'; '.join(reasons)}")
    return readable


def read_fields(theirs: Json, names: MappingABC[str, str], config_class: type[PreTrainedConfig]) -> Json:
    """Fields of our configuration that a foreign config.json holds, as `names` (theirs -> ours) has them.

    What is absent there is absent here. A null is false where ours is a switch, as Python's `if` has it; elsewhere it
    stays null where ours may be null, and is a ValueError where it may not.
    """
    kinds = {field.name: str(field.type) for field in fields(config_class)}
    found: Json = {}
    for name, ours in names.items():
        value, kind = theirs.get(name), kinds[ours]
        if name not in theirs or (value is None and ours in UNSET):
            continue
        if value is None and "None" not in kind:
            if "bool" not in kind:
                raise ValueError(f"{name} is null, which this model cannot do without")
            value = False
        found[ours] = value
    return found


def refuse_other(config: PreTrainedConfig, required: Json, what: str) -> None:
    """ValueError naming every field of our configuration that is not as `what` needs it."""
    wrong = [f"{name}={getattr(config, name)!r}" for name, value in required.items() if getattr(config, name) != value]
    if wrong:
        raise ValueError(f"{what} has no counterpart of {', '.join(wrong)}")
