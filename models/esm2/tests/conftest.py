"""The tiny ESM-2 on which the contract is checked, and the folder of committed golden values."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import EsmConfig, PreTrainedModel

from biote.testing.contract import Case, randomize
from biote_esm2.convert import HF_CLASSES, PORT

CLS, PAD, EOS, MASK, LABELS = 0, 1, 2, 32, 3
LENGTHS = (19, 7, 12, 3)


def make_original(auto: str, seed: int, **options: object) -> PreTrainedModel:
    tiny = {
        "vocab_size": 33, "pad_token_id": PAD, "mask_token_id": MASK, "hidden_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "intermediate_size": 96, "position_embedding_type": "rotary", "token_dropout": True,
        "emb_layer_norm_before": False, "layer_norm_eps": 1e-5, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "num_labels": LABELS,
    }  # fmt: skip
    config = EsmConfig(**{**tiny, **options})
    config._attn_implementation = "eager"  # the one that returns attention maps
    model = randomize(getattr(transformers, HF_CLASSES[auto])(config), seed)
    frequencies = getattr(model, "esm", model).rotary_embeddings.inv_freq
    frequencies.mul_(1.1).copy_(frequencies.half())  # like the published ones: not what a formula gives
    return model.double()


def make_batch(auto: str, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows, width = len(LENGTHS), max(LENGTHS)
    mask = (torch.arange(width) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(4, 31, (rows, width), generator=generator)
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
