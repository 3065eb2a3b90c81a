"""What the library sentence_transformers reads of a folder: its embedding of a sequence is the mean over residues."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from .files import read_json

NO_LIMIT = 2**31 - 1  # tokens; if nothing were said, it would cut at config.max_position_embeddings
POOLS = ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


def describe(folder: Path) -> None:
    """Write the description beside a checkpoint with a tokenizer: modules.json, and what each module is.

    The tokens that the tokenizer sets around a sequence weigh 0, all others 1, and the mean is over what has weight.
    The modules are the library's own, under names that all its versions know. Sequences longer than the tokenizer
    says that the model takes are cut, by the library.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    around = tokenizer.convert_ids_to_tokens(tokenizer("")["input_ids"])
    vocabulary = tokenizer.get_vocab()
    modules: list[tuple[str, str, str, Any]] = [
        (
            "Transformer",
            "",
            "sentence_bert_config.json",
            {"max_seq_length": min(tokenizer.model_max_length, NO_LIMIT), "do_lower_case": False},
        ),
        (
            "WordWeights",
            "1_WordWeights",
            "config.json",
            {
                "vocab": sorted(vocabulary, key=vocabulary.__getitem__),
                "word_weights": dict.fromkeys(around, 0.0),
                "unknown_word_weight": 1.0,
            },
        ),
        (
            "Pooling",
            "2_Pooling",
            "config.json",
            {
                "word_embedding_dimension": read_json(folder / "config.json")["hidden_size"],
                **{f"pooling_mode_{pool}": pool == "mean_tokens" for pool in POOLS},
            },
        ),
    ]
    listed = []
    for number, (kind, place, file, config) in enumerate(modules):
        (folder / place).mkdir(exist_ok=True)
        _write(folder / place / file, config)
        of = f"sentence_transformers.models.{kind}"
        listed.append({"idx": number, "name": str(number), "path": place, "type": of})
    _write(folder / "modules.json", listed)


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
