"""The tokenizer under transformers' collators and Trainer, which take it where they want a tokenizer."""

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

anndata = pytest.importorskip(
    "anndata", reason="the tokenizer reads AnnData; pip install -e models/geneformer brings it"
)
from biote_geneformer import (  # noqa: E402 (the tokenizer imports anndata)
    GeneformerTEConfig,
    GeneformerTEForMaskedLM,
    GeneformerTEForSequenceClassification,
    GeneformerTEForTokenClassification,
    GeneformerTokenizer,
)

GENES = [f"ENSG{number:011}" for number in range(12)]
SPECIAL = ["<pad>", "<mask>", "<cls>", "<eos>"]
IDS = {name: number for number, name in enumerate([*SPECIAL, *GENES])}
SHAPE = {
    "vocab_size": 16, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 16, "engine": "torch", "num_labels": 2,
}  # fmt: skip
ROWS = [
    {"input_ids": [2, 9, 4, 3], "length": 4, "label": 1}, {"input_ids": np.array([2, 5, 3], np.int32), "length": 3,
    "label": 0}, {"input_ids": torch.tensor([2, 7, 8, 9, 3]), "length": 5, "label": 1},
]  # fmt: skip
PADDED = [[2, 9, 4, 3, 0], [2, 5, 3, 0, 0], [2, 7, 8, 9, 3]]


@pytest.fixture
def tokenizer():
    return GeneformerTokenizer(IDS, dict.fromkeys(GENES, 1.0))


def test_rows_and_columns_are_padded_alike(tokenizer):
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    for given in (ROWS, columns):
        found = tokenizer.pad(given)
        assert {name: tensor.tolist() for name, tensor in found.items()} == {
            "input_ids": PADDED,
            "attention_mask": [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
            "label": [1, 0, 1],
        }
        assert {tensor.dtype for tensor in found.values()} == {torch.int64}
    assert tokenizer.pad(ROWS, pad_to_multiple_of=8)["input_ids"].shape == (3, 8)
    assert tokenizer.pad(ROWS, "max_length", 7)["attention_mask"].sum(1).tolist() == [4, 3, 5]
    assert tokenizer.pad([{"input_ids": [2, 3], "labels": 0.5}])["labels"].dtype == torch.float32
    assert found.to("cpu")["input_ids"].shape == (3, 5)


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ([], {}, "there is no row to pad"),
        ([{"ids": [2, 3]}], {}, "every row needs input_ids and the same columns; the first has ids"),
        ([ROWS[0], {"input_ids": [2, 3]}], {}, "the same columns; the first has input_ids, label, length"),
        ([{"input_ids": [[2, 3]]}], {}, "input_ids of row 0 are no list of token ids"),
        ([{"input_ids": [2.5, 3]}], {}, "input_ids of row 0 are no list of token ids"),
        ([{"input_ids": []}], {}, "input_ids of row 0 are no list of token ids"),
        ([{**ROWS[0], "labels": [1, 2]}, {**ROWS[1], "labels": [1]}], {}, "of the column labels, .* number it"),
        (
            [{**ROWS[0], "type": "T cell"}],
            {},
            "no tensor can be made of the column type, as of 'T cell': leave",
        ),
        (ROWS, {"padding": "max_length", "max_length": 4}, "max_length=4, but there is a cell of 5 tokens"),
        (ROWS, {"padding": "max_length"}, "max_length=None, but"),
        (ROWS, {"padding": False}, "padding=False is unknown"),
        (ROWS, {"return_tensors": "np"}, "only 'pt' is made"),
    ],
)
def test_what_cannot_be_padded_is_refused(tokenizer, given, options, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.pad(given, **options)


def test_transformers_collators(tokenizer):
    cells = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=4)(ROWS)
    assert cells["input_ids"].shape == (3, 8)
    assert cells["labels"].tolist() == [1, 0, 1]
    rows = [
        {"input_ids": row["input_ids"], "labels": [-100, *[1] * (len(row["input_ids"]) - 2), -100]} for row in ROWS
    ]
    genes = DataCollatorForTokenClassification(tokenizer)(rows)
    assert genes["labels"].tolist() == [[-100, 1, 1, -100, -100], [-100, 1, -100, -100, -100], [-100, 1, 1, 1, -100]]
    assert GeneformerTEForTokenClassification(GeneformerTEConfig(**SHAPE))(**genes).loss.isfinite()
    rows = [{"input_ids": row["input_ids"]} for row in ROWS]
    for share in (0.0, 1.0):
        masked = DataCollatorForLanguageModeling(
            tokenizer, mlm_probability=share, mask_replace_prob=1.0, random_replace_prob=0.0
        )(rows)
        gene = torch.tensor(PADDED) >= 4  # special tokens are never masked
        assert masked["input_ids"].tolist() == torch.where(gene & (share == 1), 1, torch.tensor(PADDED)).tolist()
        assert masked["labels"].tolist() == torch.where(gene & (share == 1), torch.tensor(PADDED), -100).tolist()
    assert GeneformerTEForMaskedLM(GeneformerTEConfig(**SHAPE))(**masked).loss.isfinite()
    drawn = DataCollatorForLanguageModeling(
        tokenizer, mlm_probability=1.0, mask_replace_prob=0.0, random_replace_prob=1.0, seed=0
    )(rows * 50)
    assert int(drawn["input_ids"].max()) == len(tokenizer) - 1 == 15
    with pytest.raises(ValueError, match="already_has_special_tokens=True"):
        tokenizer.get_special_tokens_mask([5], already_has_special_tokens=False)


def test_special_tokens_of_v1_are_two():
    genes = {"<pad>": 0, "<mask>": 1, **{gene: 2 + number for number, gene in enumerate(GENES)}}
    tokenizer = GeneformerTokenizer(genes, dict.fromkeys(GENES, 1.0), "V1")
    assert tokenizer.get_special_tokens_mask([0, 1, 2, 3]) == [1, 1, 0, 0]


def test_trainer_learns_the_kind_of_a_cell_and_saves_the_dictionaries(tokenizer, tmp_path):
    generator = np.random.default_rng(0)
    kinds = generator.integers(0, 2, 64)
    counts = generator.poisson(np.where(np.arange(12) < 6, 6, 1)[None] * np.ones((64, 1)))
    counts[kinds == 1] = counts[kinds == 1][:, ::-1]
    obs = pd.DataFrame({"label": kinds}, index=[f"c{number}" for number in range(64)])
    cells = anndata.AnnData(counts.astype(np.float32), obs, pd.DataFrame(index=GENES))
    rows = tokenizer.encode(cells, ["label"]).to_pylist()
    torch.manual_seed(0)
    model = GeneformerTEForSequenceClassification(GeneformerTEConfig(**SHAPE))
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=8, num_train_epochs=6, learning_rate=3e-3, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, seed=0, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=rows[:48], data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    found = trainer.predict(rows[48:])
    assert (found.predictions.argmax(1) == found.label_ids).mean() > 0.9
    trainer.save_model(tmp_path / "saved")
    assert GeneformerTokenizer.from_pretrained(tmp_path / "saved").token_ids == IDS
