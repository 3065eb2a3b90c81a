"""Cells a second of rank-value encoding, from an .h5ad file to parquet, and peak memory, for growing numbers of cells.

Cells are random: 20,000 genes, of which about 2,000 have counts in a cell, as in a typical droplet experiment.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from common import RESULTS, provenance, write_result
from scipy import sparse

from biote_geneformer import GeneformerTokenizer

GENES, EXPRESSED = 20_000, 2_000


def write_cells(path: Path, cells: int) -> None:
    """Write random counts by cells (CSR); gene popularity falls off, so that cells share genes."""
    generator = np.random.default_rng(0)
    popularity = 1 / (np.arange(GENES) + 500.0)
    thresholds = np.minimum(EXPRESSED * popularity / popularity.sum(), 0.9)
    blocks = []
    for start in range(0, cells, 1000):
        block = generator.random((min(1000, cells - start), GENES), dtype=np.float32) < thresholds
        rows = sparse.csr_matrix(block, dtype=np.float32)
        rows.data[:] = generator.geometric(0.4, len(rows.data))
        blocks.append(rows)
    names = [f"ENSG{number:011}" for number in range(GENES)]
    anndata.AnnData(sparse.vstack(blocks, format="csr"), var=pd.DataFrame(index=names)).write_h5ad(path)


def encode(path: Path, output: Path) -> dict[str, float]:
    """Encode in a process of its own: seconds without imports, and the process's peak memory."""
    names = [f"ENSG{number:011}" for number in range(GENES)]
    token_ids = {name: number for number, name in enumerate(["<pad>", "<mask>", "<cls>", "<eos>", *names])}
    medians = dict(zip(names, np.random.default_rng(1).uniform(0.5, 4, GENES), strict=True))
    tokenizer = GeneformerTokenizer(token_ids, medians)
    start = time.perf_counter()
    tokenizer.encode_file(path, output)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--output", type=Path, default=RESULTS / "geneformer_tokenizer.json")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    rows = []
    for cells in arguments.cells:
        with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1) as pool:
            path = Path(folder) / "cells.h5ad"
            pool.apply(write_cells, (path, cells))
            with multiprocessing.get_context("spawn").Pool(1) as fresh:
                found = fresh.apply(encode, (path, Path(folder) / "cells.parquet"))
        rows.append({"cells": cells, **found, "cells_per_s": cells / found["seconds"]})
        print(rows[-1], flush=True)
    packages = ("anndata", "numpy", "scipy", "pyarrow", "biote")
    write_result(arguments.output, {**provenance(packages), "genes": GENES, "expressed": EXPRESSED, "rows": rows})


if __name__ == "__main__":
    main()
