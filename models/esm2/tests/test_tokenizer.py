"""Our tokenizer against transformers' own EsmTokenizer, which gives every expected value."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, EsmTokenizer, PreTrainedTokenizerBase

from biote_esm2.tokenizer import build_tokenizer

Tokenizers = tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase]
VOCABULARY = [
    "<cls>",
    "<pad>",
    "<eos>",
    "<unk>",
    "L",
    "A",
    "G",
    "V",
    "S",
    "E",
    "R",
    "T",
    "I",
    "D",
    "P",
    "K",
    "Q",
    "N",
    "F",
    "Y",
    "M",
    "H",
    "W",
    "C",
    "X",
    "B",
    "U",
    "Z",
    "O",
    ".",
    "-",
    "<null_1>",
    "<mask>",
]
OTHERS = [
    "MKTAYIAKQR",
    "lagv",
    "l",
    "J",
    "*",
    "1",
    "é",
    "中",
    "😀",
    "▁",
    "##",
    "<",
    "<<",
    "<m",
    "<mas",
    "<mask",
    "mask>",
    ">",
    "<MASK>",
    "[MASK]",
    "<null_1",
    "_1>",
    "</s>",
]
SPACES = [" ", "  ", "\t", "\r\n", "\xa0", "\u2003", "\u200b", "\ufeff", "\x1c", "\x85", "\0"]
TEXTS = st.lists(st.sampled_from([*VOCABULARY, *OTHERS, *SPACES]) | st.text(max_size=3), max_size=12).map("".join)
CASES = [
    "", " ", "MKTAYIAKQRQISFVKSHFSRQ", "mktayiak", "LAxyGV", "Lx yG", "LJ1*é中😀V", "L.A-..--", "XBUZO", "L\x1cA",
    "LA<mask>GV", "LA <mask> GV", "<mask><mask>", "x<mask>y", "<mas", "<mask", "<<mask>>", "<", "<L>", "<nuLl_1>",
    "<cls>LAGV<eos>", "L<pad>A<unk>G<null_1>V", "L<unk>x<unk>yz", " L\tA\r\nG\u2003V\xa0", "x\x1dx", "x\u200bx",
]  # fmt: skip


@pytest.fixture(scope="module")
def ours_theirs(tmp_path_factory: pytest.TempPathFactory) -> Tokenizers:
    path = tmp_path_factory.mktemp("esm") / "vocab.txt"
    path.write_text("\n".join(VOCABULARY))
    return build_tokenizer(), EsmTokenizer(str(path))


def views(tokenizer: PreTrainedTokenizerBase, text: str) -> list[Any]:
    """All that a tokenizer makes of a text: alone, in a pair, without special tokens, and back again."""
    masks = {"return_special_tokens_mask": True, "return_token_type_ids": True}
    ids = tokenizer.encode(text)
    encoded = [tokenizer(text, **masks), tokenizer(text, "LxA", **masks), tokenizer([("L", text)], **masks)]
    encoded.append(tokenizer(text, add_special_tokens=False, **masks))
    decoded = [tokenizer.decode(ids, skip_special_tokens=skip) for skip in (False, True)]
    tokens = [tokenizer.convert_ids_to_tokens(ids, skip_special_tokens=skip) for skip in (False, True)]
    special = tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
    return [ids, *map(dict, encoded), *decoded, *tokens, special, tokenizer.tokenize(text)]


@pytest.mark.parametrize("text", CASES)
def test_chosen_texts(ours_theirs: Tokenizers, text: str) -> None:
    ours, theirs = (views(tokenizer, text) for tokenizer in ours_theirs)
    assert ours == theirs


@settings(derandomize=True, deadline=None, max_examples=300)
@given(text=TEXTS)
def test_any_text(ours_theirs: Tokenizers, text: str) -> None:
    ours, theirs = (views(tokenizer, text) for tokenizer in ours_theirs)
    assert ours == theirs


def test_every_white_space(ours_theirs: Tokenizers) -> None:
    texts = [f"x{chr(code)}x" for code in range(0x3100)]  # Python's last white space is U+3000
    ours, theirs = (tokenizer(texts)["input_ids"] for tokenizer in ours_theirs)
    assert ours == theirs


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches(ours_theirs: Tokenizers, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def batches(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
        monkeypatch.setattr(tokenizer, "truncation_side", side)
        keep: dict[str, Any] = {"padding_side": side, "return_special_tokens_mask": True}
        cut = [tokenizer(CASES, padding="max_length", truncation=True, max_length=n, **keep) for n in range(2, 12)]
        pair = tokenizer("LAG", "VSERT", truncation="only_second", max_length=8, **keep)
        tensors = tokenizer(CASES, padding=True, pad_to_multiple_of=8, return_tensors="pt", **keep)
        assert tensors["input_ids"].shape == (len(CASES), 24)
        listed = {key: (value.dtype, value.tolist()) for key, value in tensors.items()}
        return [*map(dict, [*cut, pair]), listed, tokenizer.batch_decode(tensors["input_ids"])]

    ours, theirs = map(batches, ours_theirs)
    assert ours == theirs


@pytest.mark.parametrize("loaded", [False, True])
def test_attributes(ours_theirs: Tokenizers, loaded: bool, tmp_path: Path) -> None:
    ours, theirs = ours_theirs
    if loaded:
        ours.save_pretrained(tmp_path)
        ours = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
        assert [views(ours, text) for text in CASES] == [views(theirs, text) for text in CASES]
    names = [
        f"{kind}_token{end}" for kind in ["bos", "eos", "unk", "sep", "pad", "cls", "mask"] for end in ("", "_id")
    ]
    names += [
        "vocab_size",
        "all_special_ids",
        "all_special_tokens",
        "model_input_names",
        "padding_side",
        "model_max_length",
    ]
    assert {name: getattr(ours, name) for name in names} == {name: getattr(theirs, name) for name in names}
    assert (len(ours), ours.get_vocab()) == (len(theirs), theirs.get_vocab())
    assert ours.convert_tokens_to_ids([*VOCABULARY, "J"]) == theirs.convert_tokens_to_ids([*VOCABULARY, "J"])
