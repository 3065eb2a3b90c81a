"""Conversion by a port's mapping: between models in memory, and streamed between folders of safetensors shards.

A conversion reads config.json and safetensors only; it never runs a checkpoint's own code.
"""

import json
import math
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from difflib import get_close_matches
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from .files import CheckpointReader, new_folder, read_json, save_tokenizer, unchanged, write_checkpoint
from .mapping import MappingError, Plan, Specs, refuse_nan, some_of
from .port import TE, Format, Json, ModelPort, find_tag, identify, installed_ports, port_named, port_of
from .tokenizer import tokenizer_like

FIVE_GB = 5 * 10**9
MOST_LABELS = 10_000  # that a configuration may name for a head that the file does not hold
WANTED = [
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "*.txt",
    "tokenizer*.json",
    "special_tokens*.json",
    "added_tokens.json",
]


def locate(source: str | Path, revision: str | None = None, subfolder: str | None = None) -> Path:
    """The local folder of a checkpoint named by folder, tag or Hub id; what is not here is downloaded.

    Raises FileNotFoundError or ConnectionError that say what was looked for.
    """
    path = Path(source)
    if not str(source):
        raise ValueError("the name of the source is empty")
    if not path.is_dir():
        tagged = find_tag(str(source))
        if tagged:
            checkpoint = tagged[1]
            source, revision = checkpoint.repo_id, revision or checkpoint.revision
            subfolder = subfolder or checkpoint.subfolder
        elif "/" not in str(source) and (hint := _did_you_mean(str(source))):
            raise FileNotFoundError(f"{source} is neither a folder nor a known tag{hint}")
        path = _download(str(source), revision, subfolder)
    path = path / subfolder if subfolder else path
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder")
    return path


def _did_you_mean(source: str) -> str:
    """The tags or originals like what was asked for, as the end of a message; empty if none is."""
    tags = {tag: checkpoint.repo_id for port in installed_ports().values() for tag, checkpoint in port.tags.items()}
    names = {name.lower(): name for name in (set(tags.values()) if "/" in source else tags)}
    close = [names[name] for name in get_close_matches(source.lower(), names)]
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _download(repo_id: str, revision: str | None, subfolder: str | None) -> Path:
    wanted = [*WANTED, *(name for port in installed_ports().values() for name in port.files)]
    wanted = [f"{subfolder}/{pattern}" for pattern in wanted] if subfolder else wanted
    try:
        others = None if subfolder else ["*/*"]  # a * of a pattern stands for slashes too
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=wanted, ignore_patterns=others))
    except HFValidationError as error:
        raise FileNotFoundError(f"{repo_id} is neither a folder, nor a known tag, nor a Hub id") from error
    except RepositoryNotFoundError as error:
        hint = _did_you_mean(repo_id)
        raise FileNotFoundError(f"the Hub has no repository {repo_id} that you may read{hint}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = re.sub(r"\s+", " ", str(error))[:200]
        raise ConnectionError(f"{repo_id} is not a local folder and the Hub could not be reached: {reason}") from error


def meta_model(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model of meta tensors, on the torch engine: it needs no memory and runs nowhere."""
    anywhere = {"engine": "torch", "layer_precision": "bf16", "quantized_weights": False}  # the keys are the same
    config = type(config).from_dict({**config.to_dict(), **anywhere})
    with torch.device("meta"), no_init_weights():
        return cls(config)


def state_specs(cls: type[PreTrainedModel], config: PreTrainedConfig) -> dict[str, Tensor]:
    """The keys, shapes and dtypes of a model's checkpoint as meta tensors, tied copies left out."""
    return own_state(meta_model(cls, config))


def own_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict of a model without the keys that are tied to others."""
    tied = (model._tied_weights_keys or {}) if model.config.tie_word_embeddings else {}
    return {key: tensor for key, tensor in model.state_dict().items() if key not in tied}


class Conversion:
    """One conversion between a foreign format and our layout, planned and checked: nothing has moved yet."""

    def __init__(self, port: ModelPort, source: Specs, config: Json, to: str, config_kwargs: Json, where: str):
        self.port, self.to, self.where = port, to, where
        self.source_format, self.auto = identify(config, port.name)[1:]
        if (self.source_format == TE) == (to == TE):
            raise ValueError(f"{where} is in the {self.source_format!r} format; one side of a conversion must be 'te'")
        with _blaming_config(where):
            config = _current_spelling(config, source)
        self.config, self.their_config, form = self._read_configs(source, config, config_kwargs)
        with _blaming_config(f"{where} with {config_kwargs}" if config_kwargs else where):
            _refuse_outsized(self.config, source)
            mapping = form.mapping(self.config, self.their_config, self.auto)
            model: Any = meta_model(port.classes[self.auto], self.config)
            self.max_positions: int | None = model.base_model.max_positions
            if self.max_positions is not None and not 0 < self.max_positions < 2**31:
                raise ValueError(f"a model of {self.max_positions} positions cannot be")
        self.names = source.keys()
        source, self.tied = without_copies(source, port.classes[self.auto] if to != TE else None, self.config)
        self.plan: Plan = mapping.plan(source, own_state(model), "from" if to == TE else "to", where)

    def _read_configs(self, source: Specs, config: Json, config_kwargs: Json) -> tuple[PreTrainedConfig, Json, Format]:
        port, auto = self.port, self.auto
        if self.to == TE:
            form = port.formats[self.source_format]
            known = {field.name for field in fields(port.config_class)}
            _refuse_unknown_fields(known, config_kwargs, port.config_class.__name__)
            with _blaming_config(self.where):
                fields_read = form.read_config(config, source.keys()).to_dict()
            if "num_labels" in config_kwargs:  # the source's label names no longer fit
                fields_read = {key: value for key, value in fields_read.items() if key not in ("id2label", "label2id")}
            ours = port.config_class.from_dict({**fields_read, **config_kwargs})
            ours.architectures = [port.classes[auto].__name__]
            theirs = config
        else:
            form = port.formats[self.to]
            if auto not in form.architectures:
                raise ValueError(
                    f"the {self.to!r} format of {port.name} has no counterpart of {port.classes[auto].__name__}"
                )
            with _blaming_config(self.where):
                ours = port.config_class.from_dict(config)
            written = form.write_config(ours, auto)
            _refuse_unknown_fields(set(written), config_kwargs, f"the {self.to!r} format")
            theirs = {**written, **config_kwargs, "architectures": [form.architectures[auto]]}
        return ours, theirs, form

    def write_config(self, folder: Path, dtype: torch.dtype | None) -> None:
        """The config.json of the result; in our layout also the code that it names."""
        if self.to == TE:
            self.config.dtype = dtype or self.config.dtype
            self.config.save_pretrained(folder)
        else:
            cast = {"dtype": str(dtype).removeprefix("torch.")} if dtype else {}
            text = json.dumps({**self.their_config, **cast}, indent=2, sort_keys=True)
            (folder / "config.json").write_text(text + "\n", encoding="utf-8")

    def tensors(self, read: Any, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Convert tensor by tensor; `read(keys)` gives the source's."""
        for step in self.plan.steps:
            sources = self._read(read, step.sources)
            cast = dtype if dtype and not step.rule.keep_dtype else None
            if cast and self.to != TE:  # ours are cast: padding that a foreign format has may hold what ours cannot
                sources = [_cast(key, tensor, cast) for key, tensor in zip(step.sources, sources, strict=True)]
            for key, tensor in zip(step.targets, step.apply(sources), strict=True):
                yield key, _cast(", ".join(step.sources), tensor, cast) if cast and self.to == TE else tensor

    def _read(self, read: Any, keys: tuple[str, ...]) -> list[Tensor]:
        tensors = []
        for key in keys:
            tensor, *copies = read([name for name in (key, self.tied.get(key)) if name in self.names])
            refuse_nan(key, tensor)
            if not all(torch.equal(copy, tensor) for copy in copies):
                raise ValueError(f"{self.where}: {key} and {self.tied[key]} are tied, but differ")
            tensors.append(tensor)
        return tensors

    def specs(self, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """Meta tensors of the result, in the order they come."""
        kept = {key for step in self.plan.steps if step.rule.keep_dtype for key in step.targets}
        return {
            key: spec.to(dtype) if dtype and spec.is_floating_point() and key not in kept else spec
            for key, spec in self.plan.made.items()
        }


def convert_folder(
    source: Path,
    destination: Path,
    to: str,
    *,
    port_name: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = FIVE_GB,
) -> None:
    """Convert a checkpoint folder into a new one, one tensor in memory at a time; `destination` appears whole or not.

    to: "te" or one of the port's foreign formats; between two foreign formats it goes by way of "te".
    dtype: None keeps each tensor's.
    """
    with new_folder(destination, source) as partial, unchanged(source):
        convert_into(source, partial, to, port_name=port_name, dtype=dtype, max_shard_bytes=max_shard_bytes)


def convert_into(
    source: Path,
    folder: Path,
    to: str,
    *,
    port_name: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = FIVE_GB,
) -> None:
    """As `convert_folder`, into a folder that exists."""
    port, source_format, _, config = read_identity(source, port_name)
    if to not in port.format_names:
        raise ValueError(f"unknown format {to!r}; {port.name} has {', '.join(port.format_names)}")
    if to == source_format:
        raise ValueError(f"{source} is in the {to!r} format already")
    if TE not in (to, source_format):
        (folder / "te").mkdir()
        convert_into(source, folder / "te", TE, port_name=port.name, dtype=dtype)
        convert_into(folder / "te", folder, to, port_name=port.name, max_shard_bytes=max_shard_bytes)
        shutil.rmtree(folder / "te")
        return
    reader = CheckpointReader(source)
    conversion = Conversion(port, reader.specs, config, to, {}, str(source))
    tokenizer = None
    if port.build_tokenizer is not None:
        vocab_size: Any = conversion.config.vocab_size
        tokenizer = tokenizer_like(port.build_tokenizer, source, vocab_size, conversion.max_positions)
    carried = [name for name in port.files if (source / name).is_file()]
    for name in carried:
        port.files[name](source / name)
    specs = conversion.specs(dtype)
    quiet = not sys.stderr.isatty()
    tensors = track(
        conversion.tensors(reader.read, dtype), f"converting to {to}", len(specs),
        console=Console(stderr=True), disable=quiet, transient=True,
    )  # fmt: skip
    write_checkpoint(folder, specs, tensors, max_shard_bytes)
    conversion.write_config(folder, dtype)
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)
    for name in carried:
        shutil.copyfile(source / name, folder / name)


def read_identity(folder: Path, port_name: str | None = None) -> tuple[ModelPort, str, str, Json]:
    """Port, format, Auto class and config.json of a folder; one not named is found by keys if the port is."""
    config = read_json(folder / "config.json")
    if port_name and not config.get("architectures"):
        config = with_architecture(port_named(port_name), config, CheckpointReader(folder).specs, str(folder))
    return *identify(config, port_name), config


def with_architecture(port: ModelPort, config: Json, source: Specs, where: str) -> Json:
    """A config.json that names its architecture: where it does not, the one of the port's that reads most of the keys.

    ValueError if none reads them, or several do equally.
    """
    forms = [name for name in port.format_names if port.model_type(name) == config.get("model_type")]
    if config.get("architectures") or not forms:
        return config
    dropped: dict[str, int] = {}  # keys read past, by architecture
    for form in forms:
        to = next(iter(port.formats)) if form == TE else TE
        for architecture in port.architectures(form).values():
            with suppress(ValueError):
                plan = Conversion(port, source, {**config, "architectures": [architecture]}, to, {}, where).plan
                dropped[architecture] = sum(len(step.sources) for step in plan.steps if not step.targets)
    best = [architecture for architecture, count in dropped.items() if count == min(dropped.values())]
    if len(best) != 1:
        what = some_of(best) or f"no class of {port.title}"
        raise ValueError(f"config.json of {where} names no architecture, and the keys of its weights fit {what}")
    return {**config, "architectures": best}


def convert_model(port: ModelPort, model: PreTrainedModel, to: str, config_kwargs: Json) -> PreTrainedModel:
    """Convert a model in memory to "te", or a format with an implementation; no storage is shared with `model`."""
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    state = own_state(model)
    conversion = Conversion(
        port, {k: t.to("meta") for k, t in state.items()}, config, to, config_kwargs, type(model).__name__
    )
    made = {key: tensor.clone() for key, tensor in conversion.tensors(lambda keys: [state[key] for key in keys])}
    dtype = model.dtype
    if to == TE:
        return port.classes[conversion.auto].from_pretrained(
            None, config=conversion.config, state_dict=made, dtype=dtype
        )
    build = port.formats[to].build
    if build is None:
        raise ValueError(
            f"there is no implementation of the {to!r} format of {port.name} here; convert folders instead"
        )
    with no_init_weights():
        original: Any = build(conversion.their_config, conversion.auto)
    missing, unexpected = original.load_state_dict(made, strict=False)
    missing = [key for key in missing if key not in (original._tied_weights_keys or {})]
    if missing or unexpected:
        raise MappingError(to, [f"missing {key}" for key in missing] + [f"unknown {key}" for key in unexpected])
    original.tie_weights()
    return original.to(dtype).eval()


def load_original(
    cls: type[PreTrainedModel],
    source: str | Path,
    *,
    revision: str | None,
    subfolder: str | None,
    dtype: torch.dtype | None,
    device: str | torch.device | None,
    config_kwargs: Json,
) -> PreTrainedModel:
    """Load an original checkpoint into a port's class. A head that `cls` does not have is left behind."""
    folder = locate(source, revision, subfolder)
    port = port_of(cls)
    if port is None:
        raise ValueError(f"no installed port has the class {cls.__name__}")
    model: Any
    with unchanged(folder):
        config = read_json(folder / "config.json")
        if config.get("model_type") == port.model_type(TE):
            model = cls.from_pretrained(folder, dtype=dtype or "auto", **config_kwargs)
        else:
            model = _load_foreign(cls, port, folder, config, dtype, config_kwargs)
    if device is None:
        device = "cuda" if model.base_model.engine == "te" else "cpu"
    return model.to(device)


def _current_spelling(config: Json, source: Specs) -> Json:
    """A config.json as transformers 5 spells it: `dtype`, labels by name. ValueError for values of another kind."""
    dtype, labels = config.get("dtype", config.get("torch_dtype")), config.get("num_labels")
    if dtype is not None and not isinstance(getattr(torch, str(dtype).removeprefix("torch."), None), torch.dtype):
        raise ValueError(f"dtype is {dtype!r}, which names none of torch's")
    for name, value in config.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is {value}")
        if name in ("id2label", "label2id") and not isinstance(value, dict | None):
            raise ValueError(f"{name} is {value!r}, where a table of labels should be")
    changed: Json = {} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}
    if labels is not None and config.get("id2label") is None:
        most = max((spec.shape[0] for spec in source.values() if spec.dim()), default=0)
        if type(labels) is not int or not 0 < labels <= max(most, MOST_LABELS):
            raise ValueError(f"num_labels is {labels!r}, but no tensor has more than {most} rows")
        changed |= {"id2label": {str(index): f"LABEL_{index}" for index in range(labels)}, "label2id": None}
    return {**config, **changed}


def _refuse_outsized(config: Any, source: Specs) -> None:
    """ValueError for numbers that the file's tensors do not bear out, before a mapping is expanded by them."""
    largest = max((max(spec.shape, default=0) for spec in source.values()), default=0)
    if config.num_hidden_layers > len(source):
        raise ValueError(f"num_hidden_layers is {config.num_hidden_layers}, but the file holds {len(source)} tensors")
    if config.hidden_size > largest:
        raise ValueError(f"hidden_size is {config.hidden_size}, but the largest side of a tensor is {largest}")


def without_copies(source: Specs, cls: type[PreTrainedModel] | None, config: Any) -> tuple[Specs, dict[str, str]]:
    """A source without what other programs add: TE's states, and, if it is of our `cls`, copies that are tied.

    Returns also, by key, the copy in which a tensor is found too, or only.
    """
    kept = {key: spec for key, spec in source.items() if not key.endswith("._extra_state")}
    tied: dict[str, str] = {}
    copies = cls._tied_weights_keys if cls is not None and config.tie_word_embeddings else None
    for copy, key in (copies or {}).items():
        if copy in kept:
            spec = kept.pop(copy)
            kept.setdefault(key, spec)
            tied[key] = copy
    return kept, tied


def _load_foreign(
    cls: Any, port: ModelPort, folder: Path, config: Json, dtype: torch.dtype | None, config_kwargs: Json
) -> PreTrainedModel:
    reader = CheckpointReader(folder)
    config = with_architecture(port, config, reader.specs, str(folder))
    conversion = Conversion(port, reader.specs, config, TE, config_kwargs, str(folder))
    state = dict(conversion.tensors(reader.read))
    if cls is not port.classes[conversion.auto] and conversion.auto != "AutoModel":  # whose keys have no "model."
        state = {key: tensor for key, tensor in state.items() if key.startswith("model.")}
    widest = reduce(torch.promote_types, (tensor.dtype for tensor in state.values() if tensor.dim() > 1))
    return cls.from_pretrained(None, config=conversion.config, state_dict=state, dtype=dtype or widest)


@contextmanager
def _blaming_config(where: str) -> Iterator[None]:
    """Whatever a field of the wrong kind raises, in transformers or here, is told as the config.json's fault."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"config.json of {where}: {error}") from error


def _cast(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    cast = tensor.to(dtype)
    overflown = tensor[cast.isinf() & tensor.isfinite()]
    if len(overflown):
        raise ValueError(f"{key} holds {float(overflown[0]):.3g}, which {dtype} cannot hold")
    return cast


def _refuse_unknown_fields(known: set[str], given: Json, what: str) -> None:
    unknown = sorted(set(given) - known - {"num_labels", "id2label", "label2id", "problem_type"})
    if unknown:
        raise TypeError(f"{what} has no field {', '.join(unknown)}")
