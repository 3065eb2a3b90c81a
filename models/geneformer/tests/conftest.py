"""The tiny Geneformer on which the contract is checked, and the folder of committed golden values."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import BertConfig, PreTrainedModel

from biote.testing.contract import Case, randomize
from biote_geneformer.convert import HF_CLASSES, PORT

PAD, MASK, CLS, EOS, LABELS = 0, 1, 2, 3, 3
LENGTHS = (19, 7, 12, 3)


def make_original(auto: str, seed: int, **options: object) -> PreTrainedModel:
    tiny = {
        "vocab_size": 48, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96,
        "hidden_act": "relu", "layer_norm_eps": 1e-12, "pad_token_id": PAD, "max_position_embeddings": 32,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": LABELS,
    }  # fmt: skip
    config = BertConfig(**{**tiny, **options})
    config._attn_implementation = "eager"  # the one that returns attention maps
    kwargs = {"add_pooling_layer": False} if auto == "AutoModel" else {}
    return randomize(getattr(transformers, HF_CLASSES[auto])(config, **kwargs), seed).double()


def make_batch(auto: str, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows, width = len(LENGTHS), max(LENGTHS)
    mask = (torch.arange(width) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(4, 48, (rows, width), generator=generator)
    ids[torch.rand(ids.shape, generator=generator) < 0.2] = MASK
    ids[:, 0] = CLS
    ids[range(rows), [length - 1 for length in LENGTHS]] = EOS
    ids[mask == 0] = PAD
    labels = torch.randint(0, LABELS, (rows, width), generator=generator)
    labels[(mask == 0) | (torch.rand(ids.shape, generator=generator) < 0.5)] = -100
    if auto == "AutoModelForSequenceClassification":
        labels = torch.randint(0, LABELS, (rows,), generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.fixture(scope="session")
def case() -> Case:
    return Case(PORT, make_original, make_batch)


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    return Path(__file__).parent / "golden"
