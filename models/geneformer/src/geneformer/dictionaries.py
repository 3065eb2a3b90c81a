"""The tokenizer's two dictionaries, token id and median by Ensembl id: read, checked, and kept beside a checkpoint."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .special_tokens import SPECIAL_TOKENS, special_tokens

TOKEN_IDS, MEDIANS = "token_dictionary.json", "gene_median_dictionary.json"  # their files beside a checkpoint
PICKLE = b"\x80"  # what pickles begin with, since their second protocol


def read_dictionary(dictionary: Mapping[str, Any] | Path | str) -> Mapping[str, Any]:
    """A dictionary, or what a JSON file holds; ValueError for a pickle, which is never loaded, or no JSON object."""
    if isinstance(dictionary, Mapping):
        return dictionary
    path = Path(dictionary)
    content = path.read_bytes()
    if path.suffix in (".pkl", ".pickle") or content.startswith(PICKLE):
        code = (
            f"import json, pickle; text = json.dumps(pickle.load(open('{path}', 'rb')), default=lambda x: x.item()); "
            f"open('{path.stem}.read.json', 'w').write(text)"
        )
        raise ValueError(
            f'{path} is a pickle, which can run any code, and is not read. If you trust it: python -c "{code}"'
        )
    try:
        found = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object of values by gene")
    return found


def dictionaries_in(folder: Path) -> tuple[Path, Path]:
    """The files of token ids and of medians beside a checkpoint; FileNotFoundError that says how they get there."""
    files = folder / TOKEN_IDS, folder / MEDIANS
    lacking = [file.name for file in files if not file.is_file()]
    if lacking:
        raise FileNotFoundError(
            f"{folder} lacks {' and '.join(lacking)}, the dictionaries that turn cells into tokens. Make them JSON "
            "(the original has pickles, which are not loaded) and put them there with GeneformerTokenizer(TOKEN_IDS, "
            f"MEDIANS, VERSION).save_pretrained({str(folder)!r}), or into the folder that is converted, and they go "
            "with it"
        )
    return files


def version_of(token_ids: Mapping[str, int], where: Path) -> str:
    """V1 or V2, as the special tokens of a dictionary tell; ValueError if they are neither's."""
    special = {token: number for token, number in token_ids.items() if token.startswith("<")}
    version = next((version for version in SPECIAL_TOKENS if special_tokens(version) == special), None)
    if version is None:
        known = ", ".join(f"{version} {special_tokens(version)}" for version in SPECIAL_TOKENS)
        raise ValueError(f"{where} has the special tokens {special}, which are no version's: {known}")
    return version
