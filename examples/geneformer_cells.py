r"""From counts to a picture: an .h5ad file -> token ids -> cell embeddings -> two principal components.

`pip install scanpy` brings the data: 700 blood cells (10x Genomics, "pbmc68k reduced"), which ship inside the package.
Without --source the model has RANDOM weights, and neither its picture nor anything else it gives says a thing about
biology: what cells share here is which genes they express. With a real checkpoint, the original's dictionaries and
cells whose genes are Ensembl ids (these have symbols):

    python examples/geneformer_cells.py --cells CELLS.h5ad --label cell_type \
        --source Geneformer-V2-104M --token-ids token_dictionary.json --medians medians.json
"""

import json
import tempfile
from pathlib import Path
from typing import Annotated

import anndata
import numpy as np
import pyarrow.parquet as pq
import torch
import typer
from scipy import sparse

from biote.cli import run
from biote_geneformer import GeneformerTEConfig, GeneformerTEModel, GeneformerTokenizer, cell_embeddings

SEED = 2025
app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


def blood_cells() -> anndata.AnnData:
    """The cells, with the raw counts that the package's log-normalised values come from; obs has their totals."""
    import scanpy

    cells = scanpy.datasets.pbmc68k_reduced()
    normalised = np.expm1(cells.raw.X.toarray())
    counts = np.rint(normalised * cells.obs["n_counts"].to_numpy()[:, None] / 1e4)
    return anndata.AnnData(
        sparse.csr_matrix(counts), obs=cells.obs[["bulk_labels", "n_counts"]], var=cells.raw.var[[]]
    )


def own_dictionaries(cells: anndata.AnnData, folder: Path) -> tuple[Path, Path]:
    """Token ids and medians made from these cells alone, as JSON: a stand-in for the original's, of a whole corpus."""
    if cells.X is None:
        raise ValueError("the cells have no X")
    counts = sparse.csr_matrix(cells.X).toarray()
    totals = cells.obs["n_counts"].to_numpy() if "n_counts" in cells.obs else np.nansum(counts, 1)
    normalised = counts / np.maximum(totals, 1)[:, None] * 1e4
    medians = {
        gene: float(np.median(values[values > 0]))
        for gene, values in zip(cells.var_names, normalised.T, strict=True)
        if (values > 0).any()
    }
    token_ids = {token: number for number, token in enumerate(["<pad>", "<mask>", "<cls>", "<eos>", *medians])}
    (folder / "token_ids.json").write_text(json.dumps(token_ids))
    (folder / "medians.json").write_text(json.dumps(medians))
    return folder / "token_ids.json", folder / "medians.json"


def random_model(vocabulary: int) -> GeneformerTEModel:
    """The shape of the V1 model, random weights from a fixed seed."""
    torch.manual_seed(SEED)
    config = GeneformerTEConfig(
        vocab_size=vocabulary, hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512,
        max_position_embeddings=4096,
    )  # fmt: skip
    return GeneformerTEModel(config)


def picture(embeddings: torch.Tensor, labels: list[str], title: str, path: Path) -> None:
    """The first two principal components, coloured by label."""
    from matplotlib.figure import Figure

    centred = embeddings - embeddings.mean(0)
    _, spread, directions = torch.linalg.svd(centred, full_matrices=False)
    points = centred @ directions[:2].T
    share = spread.square() / spread.square().sum()
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for label in sorted(set(labels)):
        chosen = torch.tensor([one == label for one in labels])
        axes.scatter(points[chosen, 0], points[chosen, 1], s=8, label=label)
    axes.set_xlabel(f"first component ({share[0]:.0%} of variance)")
    axes.set_ylabel(f"second component ({share[1]:.0%})")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="the picture")] = Path("cells.png"),
    cells: Annotated[
        Path | None, typer.Option(help="an .h5ad file of raw counts; default: scanpy's blood cells")
    ] = None,
    source: Annotated[str | None, typer.Option(help="tag, Hub id or folder of a checkpoint")] = None,
    token_ids: Annotated[Path | None, typer.Option(help="JSON: token id by gene")] = None,
    medians: Annotated[Path | None, typer.Option(help="JSON: median by gene")] = None,
    version: Annotated[str, typer.Option(help="V1 or V2: the rules of the checkpoint's input")] = "V2",
    label: Annotated[str, typer.Option(help="the column of obs to colour by")] = "bulk_labels",
) -> None:
    """Encode cells, embed them, and draw them."""
    if (token_ids is None) != (medians is None) or (token_ids is None and (source or version != "V2")):
        raise ValueError("a checkpoint needs --token-ids and --medians, both: the dictionaries it was trained with")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if cells is None:
            cells = folder / "cells.h5ad"
            blood_cells().write_h5ad(cells)
        if token_ids is None or medians is None:
            token_ids, medians = own_dictionaries(anndata.read_h5ad(cells), folder)
        tokenizer = GeneformerTokenizer(token_ids, medians, version)
        report = tokenizer.encode_file(cells, folder / "cells.parquet", obs_columns=[label])
        table = pq.read_table(folder / "cells.parquet")
    if report.written < 3:
        raise ValueError(f"{report.written} of {report.cells} cells have genes to rank: too few to draw")
    print(f"{report.written} of {report.cells} cells, {np.mean(table['length'].to_numpy()):.0f} tokens on average")
    model = GeneformerTEModel.from_original(source) if source else random_model(len(tokenizer.token_ids))
    if model.engine == "te":
        model.to("cuda")
    embeddings = cell_embeddings(model.eval(), table["input_ids"].to_pylist(), layer=-2, version=version)
    title = source or "RANDOM weights: which genes cells express,\nand no biology that a model has learnt"
    picture(embeddings, [str(one) for one in table[label].to_pylist()], title, output)
    print(f"embeddings {list(embeddings.shape)}; wrote {output}")


if __name__ == "__main__":
    run(app)
