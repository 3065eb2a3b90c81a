"""The Hub folder: weights, code that runs without biote, tokenizer, golden values, card; verified in isolation."""

import shutil
import tempfile
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData

from .convert import FIVE_GB, convert_into, locate, read_identity
from .files import CheckpointReader, check_destination, new_folder, read_json, unchanged
from .golden import capture
from .port import TE, Json, ModelPort, find_tag
from .push import check_push, open_repository, upload
from .runtime.verify import GOLDEN_FILE
from .runtime.verify import __file__ as VERIFIER
from .sentence_transformers import describe
from .verification import verify_by_its_own_code

REQUIREMENTS = """\
torch>=2.11
transformers>=5.17,<6
safetensors
# optional, for the te engine on NVIDIA GPUs:
# transformer_engine[pytorch]>=2.20
"""


def export(
    source: str,
    destination: Path,
    *,
    port_name: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = FIVE_GB,
    push: str | None = None,
) -> str | None:
    """Make the self-contained Hub folder of an original (or already converted) checkpoint; it appears once verified.

    source: tag, Hub id or folder. push: a Hub repository to upload the folder to, whose address is returned.
    """
    check_destination(destination)
    if push is not None:
        check_push(push)
    folder = locate(source, revision, subfolder)
    port, form, _, _ = read_identity(folder, port_name)
    if form not in (TE, "hf"):
        raise ValueError(
            f"{source} is in the {form!r} format, which has no original implementation here to verify against"
        )
    card_template, licence = port.read_text("model_readme.md"), port.read_text("LICENSE")
    address = open_repository(push) if push is not None else None
    with (
        new_folder(destination, folder) as partial,
        tempfile.TemporaryDirectory(dir=partial.parent) as scratch,  # there it goes with what a killed run leaves
        unchanged(folder),
    ):
        original = folder
        if form == TE:
            original = Path(scratch) / "original"
            original.mkdir()
            convert_into(folder, original, "hf")
        convert_into(original, partial, TE, port_name=port.name, dtype=dtype, max_shard_bytes=max_shard_bytes)
        if dtype:  # golden values are those of the original with the same rounded weights
            original = Path(scratch) / "rounded"
            original.mkdir()
            convert_into(partial, original, "hf")
        if port.build_tokenizer is not None:
            describe(partial)
        shutil.copy(VERIFIER, partial / "verify.py")
        provenance = _provenance(source, revision, subfolder)
        if dtype:
            provenance["rounded_to"] = str(dtype).removeprefix("torch.")
        capture(port, original, partial / GOLDEN_FILE, provenance)
        (partial / "LICENSE").write_text(licence, encoding="utf-8")
        (partial / "requirements.txt").write_text(REQUIREMENTS, encoding="utf-8")
        checks = verify_by_its_own_code(partial)
        _write_card(port, card_template, partial, provenance, checks, push)
    if push is not None:
        upload(destination, push)
    return address


def _provenance(source: str, revision: str | None, subfolder: str | None) -> Json:
    tagged = find_tag(source)
    if Path(source).is_dir():
        source = Path(source).absolute().name
    elif tagged:
        source, pinned = tagged[1].repo_id, tagged[1]
        revision, subfolder = revision or pinned.revision, subfolder or pinned.subfolder
    return {"source": source, "subfolder": subfolder, "revision": revision}


def _write_card(
    port: ModelPort, template: str, partial: Path, provenance: Json, checks: list[Json], repo_id: str | None
) -> None:
    place = (provenance["source"], provenance["subfolder"])
    tag = next(
        (tag for tag, published in port.tags.items() if (published.repo_id, published.subfolder) == place), None
    )
    name = tag or provenance["subfolder"] or provenance["source"]
    data = ModelCardData(
        license=port.license,
        library_name="transformers",
        tags=["biology", "transformer-engine", port.name],
        base_model=provenance["source"] if tag else None,
    )
    card = ModelCard.from_template(
        data,
        template_str=template,
        title=f"{port.title} ({name}) on TransformerEngine",
        repo_id=repo_id or f"YOUR_NAME/{name}",
        provenance=provenance,
        facts=dict(port.tags[tag].facts) if tag else {},
        config=read_json(partial / "config.json"),
        parameters=_count_parameters(partial),
        checks=checks,
    )
    card.save(partial / "README.md")


def _count_parameters(folder: Path) -> int:
    return sum(spec.numel() for spec in CheckpointReader(folder).specs.values())
