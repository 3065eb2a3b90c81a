"""The tokenizer of a converted folder: the port's own, held against the one that came with the source."""

from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from .files import read_json
from .mapping import some_of


def tokenizer_like(
    build: Callable[[], PreTrainedTokenizerBase], source: Path, vocab_size: int, max_positions: int | None
) -> PreTrainedTokenizerBase:
    """The port's tokenizer, with the tokens that the source's has past the port's.

    max_positions: the longest input of the model, special tokens included; None where there is no limit.
    ValueError where a token has another id in the source, or none, or one that the model has no embedding for.
    """
    tokenizer = build()
    if max_positions is not None:
        tokenizer.model_max_length = max_positions
    ours, theirs = tokenizer.get_vocab(), _vocabulary(source)
    if theirs is None:
        return tokenizer
    moved = [
        f"{token} is {theirs.get(token)} instead of {ours[token]}"
        for token in ours
        if theirs.get(token) != ours[token]
    ]
    more = sorted((number, token) for token, number in theirs.items() if token not in ours)
    odd = [
        f"{token} is {number}"
        for place, (number, token) in enumerate(more, len(ours))
        if not place == number < vocab_size
    ]
    if moved or odd:
        raise ValueError(
            f"the tokenizer of {source} is not this model's, so that the same text would mean other tokens: "
            f"{some_of(moved + odd)}; if its files are there by mistake, remove them"
        )
    added = _added_tokens(source)
    tokenizer.add_tokens([added.get(token, AddedToken(token, normalized=False)) for _, token in more])
    return tokenizer


def _vocabulary(folder: Path) -> dict[str, int] | None:
    """Ids by token, added tokens included, of the tokenizer files in a folder; None if there are none."""
    if (folder / "tokenizer.json").is_file():
        return _fast(folder).get_vocab(with_added_tokens=True)
    if not (folder / "vocab.txt").is_file():
        return None
    tokens = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    found = {token.strip(): number for number, token in enumerate(tokens)}
    for name, token in _declared(folder).items():
        found.setdefault(token.content, int(name))
    return found


def _added_tokens(folder: Path) -> dict[str, AddedToken]:
    fast = (folder / "tokenizer.json").is_file()
    tokens = _fast(folder).get_added_tokens_decoder().values() if fast else _declared(folder).values()
    return {token.content: token for token in tokens}


def _fast(folder: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises no other kind
        raise ValueError(f"{folder / 'tokenizer.json'} is no tokenizer: {error}") from error


def _declared(folder: Path) -> dict[str, AddedToken]:
    """Tokens by id, as tokenizer_config.json and added_tokens.json declare them."""
    found = {}
    if (folder / "added_tokens.json").is_file():
        found = {str(number): AddedToken(token) for token, number in read_json(folder / "added_tokens.json").items()}
    if (folder / "tokenizer_config.json").is_file():
        declared = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
        found |= {number: AddedToken(**fields) for number, fields in declared.items()}
    return found
