"""Upload of an exported folder to the Hub. A bad name and a missing token are found out before any work."""

import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import validate_repo_id

from .files import CheckpointReader, read_json


def check_push(repo_id: str) -> None:
    """What can be told without the network: ValueError for a bad name, PermissionError where there is no token."""
    validate_repo_id(repo_id)
    if get_token() is None:
        raise PermissionError(f"no token to upload to {repo_id} with: run `hf auth login` or set HF_TOKEN")


def open_repository(repo_id: str) -> str:
    """The address of a repository that we may write to, made if it is new; ConnectionError if there is none."""
    with _blaming_hub(f"the Hub has no repository {repo_id} to upload to"):
        return str(HfApi().create_repo(repo_id, exist_ok=True))


def upload(folder: Path, repo_id: str) -> None:
    """Upload a whole exported folder; ConnectionError that says how to try again."""
    again = shlex.join(["biote", "push", str(folder), repo_id])
    with _blaming_hub(f"{folder} is whole but not uploaded, try again with `{again}`"):
        HfApi().upload_folder(repo_id=repo_id, folder_path=folder)


def push(folder: Path, repo_id: str) -> str:
    """Upload a folder that `export` made and return its address; a card that names no repository will name this."""
    check_push(repo_id)
    if "auto_map" not in read_json(folder / "config.json"):
        raise ValueError(f"{folder} is not an exported folder: its config.json has no auto_map; use `biote export`")
    CheckpointReader(folder)  # raises where weights are missing or cut short
    card = folder / "README.md"
    if not card.is_file():
        raise FileNotFoundError(f"{card} does not exist: {folder} is not an exported folder; use `biote export`")
    address = open_repository(repo_id)
    text = card.read_text(encoding="utf-8")
    named = re.sub(r"\bYOUR_NAME/[\w.-]+", repo_id, text)
    if named != text:
        (folder / "README.md.new").write_text(named, encoding="utf-8")
        os.replace(folder / "README.md.new", card)
    upload(folder, repo_id)
    return address


@contextmanager
def _blaming_hub(what: str) -> Iterator[None]:
    """The client's errors (its own, the HTTP library's, the token's) have no base in common."""
    try:
        yield
    except Exception as error:
        raise ConnectionError(f"{what}: {' '.join(str(error).split())[:300] or type(error).__name__}") from error
