r"""Which genes matter to a cell? Each is deleted or over-expressed in silico, and the shift of the embedding measured.

    python examples/geneformer_perturb.py --source build/kinds/model --cells build/kinds/cells.h5ad --output shifts.csv

on what examples/geneformer_classify.py wrote, or on any checkpoint that has its dictionaries beside it, as JSON. The
table has a line for each gene, the largest shift first: its Ensembl id, in how many of the cells it could be
perturbed, and the mean of 1 - cosine similarity over these.
"""

import csv
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated

import pyarrow.parquet as pq
import typer

from biote.cli import run
from biote_geneformer import GeneformerTEModel, GeneformerTokenizer, perturbation_similarities

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def main(
    source: Annotated[str, typer.Option(help="tag, Hub id or folder of a checkpoint")],
    cells: Annotated[Path, typer.Option(help="an .h5ad file of raw counts")],
    output: Annotated[Path, typer.Option(help="a .csv file that does not exist yet")],
    kind: Annotated[str, typer.Option(help="delete or overexpress")] = "delete",
    gene: Annotated[list[str] | None, typer.Option(help="Ensembl id, may be repeated; default: the commonest")] = None,
    genes: Annotated[int, typer.Option(min=1, help="how many of the commonest genes")] = 20,
    first: Annotated[int, typer.Option(min=1, help="how many cells of the file")] = 100,
    layer: Annotated[str | None, typer.Option(help='where the counts are, if not in X: a layer, or "raw/X"')] = None,
    id_column: Annotated[str | None, typer.Option(help="the column of var with the Ensembl ids")] = None,
) -> None:
    """Perturb each gene by itself and rank the genes by the shift."""
    if output.exists():
        raise FileExistsError(f"{output} exists already; remove it or choose another name")
    tokenizer = GeneformerTokenizer.from_pretrained(source)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.encode_file(cells, Path(scratch) / "cells.parquet", (), layer, id_column=id_column)
        lists = pq.read_table(Path(scratch) / "cells.parquet")["input_ids"].slice(0, first).to_pylist()
    names = {number: name for name, number in tokenizer.genes.items()}
    commonest = Counter(names[number] for cell in lists for number in cell if number in names).most_common(genes)
    chosen = gene or [name for name, _ in commonest]
    model = GeneformerTEModel.from_original(source).eval()
    similarities = perturbation_similarities(model, tokenizer, lists, [[name] for name in chosen], kind)
    shifts, counts = (1 - similarities).nanmean(0), (~similarities.isnan()).sum(0)
    with open(output, "x", newline="") as file:
        table = csv.writer(file)
        table.writerow(["gene", "cells", "shift"])
        for number in shifts.nan_to_num(-1).argsort(descending=True).tolist():
            table.writerow([chosen[number], int(counts[number]), f"{float(shifts[number]):.6g}"])
    print(f"{len(chosen)} genes in {len(lists)} cells; wrote {output}", file=sys.stderr)


if __name__ == "__main__":
    run(app)
