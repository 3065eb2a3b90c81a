"""Cells -> a padded batch, and the little else that `transformers`' collators and Trainer ask of a tokenizer.

DataCollatorWithPadding (cells), DataCollatorForTokenClassification (genes) and DataCollatorForLanguageModeling
(masked genes) take a GeneformerTokenizer where they want a tokenizer. Shapes: B cells, S padded length.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchEncoding

from .special_tokens import special_tokens


class Padding:
    """The part of GeneformerTokenizer that collators use."""

    version: str
    token_ids: dict[str, int]
    padding_side, pad_token, mask_token = "right", "<pad>", "<mask>"
    pad_token_id, mask_token_id = 0, 1  # of V1 and V2

    def __len__(self) -> int:
        """How many token ids there are."""
        return len(self.token_ids)

    def convert_tokens_to_ids(self, token: str) -> int:
        """The id of one token, special or an Ensembl id as the dictionary spells it; KeyError without it."""
        return self.token_ids[token]

    def get_special_tokens_mask(self, ids: Sequence[int], already_has_special_tokens: bool = True) -> list[int]:
        """1 for a special token, 0 for a gene, of ids that `encode` made."""
        if not already_has_special_tokens:
            raise ValueError("cells have their special tokens already: already_has_special_tokens=True")
        first_gene = len(special_tokens(self.version))
        return [int(number < first_gene) for number in ids]

    def pad(
        self,
        encoded_inputs: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str = "pt",
    ) -> BatchEncoding:
        """Rows with input_ids -> input_ids and attention_mask, int64 [B, S], padded on the right.

        encoded_inputs: a list of rows, or a column by each name, as `table.to_pylist()` and `to_pydict()` give them.
        Of other columns a tensor is made (labels, one for a cell; fractions in float32); `length` is left out: the
        mask says it.
        padding: True or "longest"; "max_length" pads to `max_length`. Nothing is cut: ValueError for a longer cell.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors={return_tensors!r}: only 'pt' is made")
        rows = _rows(encoded_inputs)
        cells = [np.asarray(row["input_ids"]) for row in rows]
        for number, cell in enumerate(cells):
            if cell.ndim != 1 or cell.dtype.kind not in "iu":
                raise ValueError(f"input_ids of row {number} are no list of token ids")
        width = max(map(len, cells))
        if padding == "max_length":
            if max_length is None or width > max_length:
                raise ValueError(f"max_length={max_length}, but there is a cell of {width} tokens")
            width = max_length
        elif padding not in (True, "longest"):
            raise ValueError(f"padding={padding!r} is unknown; choose True, 'longest' or 'max_length'")
        width += -width % (pad_to_multiple_of or 1)
        ids = torch.full((len(cells), width), self.pad_token_id)
        mask = torch.zeros_like(ids)
        for number, cell in enumerate(cells):
            ids[number, : len(cell)] = torch.from_numpy(cell.astype(np.int64))
            mask[number, : len(cell)] = 1
        others = [name for name in rows[0] if name not in ("input_ids", "attention_mask", "length")]
        tensors = {name: _tensor(name, [row[name] for row in rows]) for name in others}
        return BatchEncoding({"input_ids": ids, "attention_mask": mask, **tensors})


def _rows(given: Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]]) -> list[Mapping[str, Any]]:
    if isinstance(given, Mapping | BatchEncoding):
        rows: list[Mapping[str, Any]] = [
            dict(zip(given, values, strict=True)) for values in zip(*given.values(), strict=True)
        ]
    else:
        rows = list(given)
    if not rows:
        raise ValueError("there is no row to pad")
    names = set(rows[0])
    if "input_ids" not in names or any(set(row) != names for row in rows):
        raise ValueError(f"every row needs input_ids and the same columns; the first has {', '.join(sorted(names))}")
    return rows


def _tensor(name: str, values: list[Any]) -> torch.Tensor:
    try:
        array = np.array(values)
        return torch.from_numpy(array.astype(np.float32) if array.dtype == np.float64 else array)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"no tensor can be made of the column {name}, as of {values[0]!r}: leave it out, or number it (a label "
            "for each gene is what DataCollatorForTokenClassification pads)"
        ) from error
