r"""Fine-tuning to tell the kinds of cells apart, with transformers' Trainer: an .h5ad file -> a classifier.

Without --cells the cells are made up: two kinds, each with a few genes that it expresses more. Without --source the
model is tiny and has RANDOM weights to begin with. With a real checkpoint, its dictionaries beside it as JSON
(see models/geneformer/README.md), and cells of your own:

    python examples/geneformer_classify.py --source build/te --cells CELLS.h5ad --label cell_type --output build/kinds

The output holds a checkpoint and its dictionaries (OUTPUT/model), and the cells if they are made up (cells.h5ad).
"""

import json
from pathlib import Path
from typing import Annotated

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
import typer
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from biote.cli import run
from biote.files import new_folder
from biote_geneformer import GeneformerTEConfig, GeneformerTEForSequenceClassification, GeneformerTokenizer

SEED = 2025
GENES, MARKERS = 60, 6  # of the made-up cells: all, and those that a kind expresses more
app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


def made_up_cells(number: int) -> anndata.AnnData:
    """Raw counts; kind a expresses the first MARKERS genes five times as much as kind b, and b the next ones."""
    generator = np.random.default_rng(SEED)
    kinds = generator.integers(0, 2, number)
    rates = np.ones((number, GENES))
    for kind in (0, 1):
        rates[kinds == kind, kind * MARKERS : (kind + 1) * MARKERS] = 5
    obs = pd.DataFrame({"kind": np.array(["a", "b"])[kinds]}, index=[f"cell{n}" for n in range(number)])
    var = pd.DataFrame(index=[f"ENSG{n:011}" for n in range(GENES)])
    return anndata.AnnData(generator.poisson(rates).astype(np.float32), obs, var)


def made_up_tokenizer() -> GeneformerTokenizer:
    """Token ids and medians for the made-up cells."""
    genes = [f"ENSG{n:011}" for n in range(GENES)]
    token_ids = {token: n for n, token in enumerate(["<pad>", "<mask>", "<cls>", "<eos>", *genes])}
    return GeneformerTokenizer(token_ids, dict.fromkeys(genes, 1.0))


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="a folder that does not exist yet")],
    cells: Annotated[Path | None, typer.Option(help="an .h5ad file of raw counts; default: made up")] = None,
    label: Annotated[str, typer.Option(help="the column of obs with the kind of each cell")] = "kind",
    source: Annotated[str | None, typer.Option(help="tag, Hub id or folder of a checkpoint")] = None,
    layer: Annotated[str | None, typer.Option(help='where the counts are, if not in X: a layer, or "raw/X"')] = None,
    id_column: Annotated[str | None, typer.Option(help="the column of var with the Ensembl ids")] = None,
    epochs: int = 5,
    batch_size: int = 8,
    learning_rate: float | None = None,
) -> None:
    """Train on four fifths of the cells, and say how many of the others are told right."""
    with new_folder(output) as folder:
        if cells is None:
            cells = folder / "cells.h5ad"
            made_up_cells(200).write_h5ad(cells)
        tokenizer = GeneformerTokenizer.from_pretrained(source) if source else made_up_tokenizer()
        tokenizer.encode_file(cells, folder / "cells.parquet", {"kind": label}, layer, id_column=id_column)
        rows = [row for row in pq.read_table(folder / "cells.parquet").to_pylist() if row["kind"] is not None]
        kinds = sorted({str(row["kind"]) for row in rows})
        if len(kinds) < 2 or len(rows) < 10:
            raise ValueError(f"obs[{label!r}] has {len(kinds)} kinds in {len(rows)} cells: too few to learn from")
        rows = [{"input_ids": row["input_ids"], "label": kinds.index(str(row["kind"]))} for row in rows]
        order = np.random.default_rng(SEED).permutation(len(rows))
        held_out = len(rows) // 5
        test, train = ([rows[n] for n in part] for part in (order[:held_out], order[held_out:]))

        torch.manual_seed(SEED)
        names = {"id2label": dict(enumerate(kinds)), "label2id": {kind: n for n, kind in enumerate(kinds)}}
        if source:
            model = GeneformerTEForSequenceClassification.from_original(source, num_labels=len(kinds), **names)
        else:
            shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
            config = GeneformerTEConfig(**shape, vocab_size=len(tokenizer), max_position_embeddings=128, **names)
            model = GeneformerTEForSequenceClassification(config)
        arguments = TrainingArguments(
            folder / "training", num_train_epochs=epochs, per_device_train_batch_size=batch_size, seed=SEED,
            learning_rate=learning_rate or (5e-5 if source else 3e-3), save_strategy="no", report_to=[],
            dataloader_pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=train, data_collator=DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()
        found = trainer.predict(test)
        right = int((found.predictions.argmax(1) == found.label_ids).sum())
        trainer.save_model(folder / "model")  # and the dictionaries with it
        (folder / "result.json").write_text(json.dumps({"right": right, "of": len(test), "kinds": kinds}) + "\n")
    print(f"{right} of {len(test)} cells that were held out are told right; wrote {output / 'model'}")


if __name__ == "__main__":
    run(app)
