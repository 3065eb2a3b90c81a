# %% [markdown]
"""
# Proteins as points

A protein language model turns a protein into a vector, and like proteins into vectors that are near each other. Here
are 26 proteins of four families, embedded, and drawn by their first two principal components.

    python examples/embed_proteins.py --output proteins.png

`families.csv` has the sequences as UniProt has them (CC BY 4.0), first methionine and signal peptide included; of
polyubiquitin the first repeat.
"""

# %%
import argparse
import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import biote

# %% [markdown]
"""
## The model

A tag (`biote list` has them all), a Hub id, or a folder. The weights are downloaded the first time. It runs on the GPU
if there is one.
"""

# %%
parser = argparse.ArgumentParser(description="Draw proteins of four families by their embeddings.")
parser.add_argument("--model", default="esm2_t33_650M_UR50D", help="a tag, a Hub id, or a folder")
parser.add_argument("--output", help="the picture")
options = parser.parse_args([] if "ipykernel" in sys.modules else None)  # a notebook has no command line

model, _ = biote.load(options.model, "embedding", dtype="auto")
print(f"{options.model} on {model.device}, {model.dtype}")

# %% [markdown]
"""
## The embeddings

`biote.embed` takes sequences and gives an array: a row a protein, the mean over the last hidden state of its residues.
From a file to a file, `biote embed MODEL families.csv embeddings.h5` does the same.
"""

# %%
folder = Path(__file__).parent if "__file__" in globals() else Path()
with (folder / "families.csv").open(encoding="utf-8", newline="") as file:
    proteins = list(csv.DictReader(file))

embeddings = biote.embed(model, [protein["sequence"] for protein in proteins])
print(f"{len(proteins)} proteins, {embeddings.shape[1]} numbers each")

# %% [markdown]
"""
## The picture

The principal components are the singular vectors of the centred embeddings.
"""

# %%
centred = embeddings - embeddings.mean(0)
_, spread, directions = np.linalg.svd(centred, full_matrices=False)
points = centred @ directions[:2].T
share = spread**2 / (spread**2).sum()

families = np.array([protein["family"] for protein in proteins])
figure, axes = plt.subplots(figsize=(8, 6), layout="constrained")
for family in dict.fromkeys(families):
    axes.scatter(*points[families == family].T, label=family)
for protein, place in zip(proteins, points, strict=True):
    axes.annotate(protein["id"], place, xytext=(4, 3), textcoords="offset points", fontsize=6)
axes.set_xlabel(f"first component ({share[0]:.0%} of variance)")
axes.set_ylabel(f"second component ({share[1]:.0%})")
axes.set_title(f"embeddings by {Path(options.model).name}")
axes.legend()
if options.output:
    figure.savefig(options.output, dpi=110)

# %% [markdown]
"""
## In a number

Two dimensions are a shadow of what is there. In all of them: whose nearest neighbour, by cosine, is of its own family?
Mind that this is an easy question: which amino acids a protein has tells these families apart, so that a model of
random weights answers it too. Ask one that matters to you.
"""

# %%
directed = centred / np.linalg.norm(centred, axis=1, keepdims=True)
cosines = directed @ directed.T
np.fill_diagonal(cosines, -1)
nearest = cosines.argmax(1)
same = families[nearest] == families
print(f"{same.sum()} of {len(proteins)} proteins have their nearest neighbour in their own family")
for place in np.flatnonzero(~same):
    print(f"  not {proteins[place]['id']}, whose nearest is {proteins[nearest[place]]['id']}")
