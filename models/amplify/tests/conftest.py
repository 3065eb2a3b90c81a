"""The tiny AMPLIFY on which the contract is checked, and the folder of committed golden values."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from biote.testing.contract import Case, randomize
from biote_amplify import AMPLIFY, AMPLIFYConfig
from biote_amplify.convert import PORT

PAD, MASK, BOS, EOS = 0, 2, 3, 4
LENGTHS = (19, 7, 12, 3)
TINY = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 90, "max_length": 64,
}  # fmt: skip


def make_original(auto: str, seed: int, **options: object) -> PreTrainedModel:
    return randomize(AMPLIFY(AMPLIFYConfig(**{**TINY, **options})), seed).double()


def make_batch(auto: str, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows, width = len(LENGTHS), max(LENGTHS)
    mask = (torch.arange(width) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(5, 27, (rows, width), generator=generator)
    ids[torch.rand(ids.shape, generator=generator) < 0.2] = MASK
    ids[:, 0] = BOS
    ids[range(rows), [length - 1 for length in LENGTHS]] = EOS
    ids[mask == 0] = PAD
    labels = torch.randint(0, 27, (rows, width), generator=generator)
    labels[(mask == 0) | (torch.rand(ids.shape, generator=generator) < 0.5)] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.fixture(scope="session")
def case() -> Case:
    return Case(PORT, make_original, make_batch)


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    return Path(__file__).parent / "golden"
