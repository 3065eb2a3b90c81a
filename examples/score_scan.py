# %% [markdown]
"""
# What a protein tolerates

A masked language model of proteins has read which residues evolution kept. Hide one residue, and it says how likely
each of the 20 would be in its place: a score of every single substitution, without an experiment. Here it is done for
ubiquitin, which has hardly changed between yeast and man.

    python examples/score_scan.py --output scan.png

From a file to a file, `biote score MODEL ubiquitin.fasta scan.csv --scan --plot` does the same.
"""

# %%
import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import biote
from biote.apps.score import AMINO_ACIDS, Scoring, score
from biote.apps.variants import scan_of
from biote.data.sequences import Record

# %% [markdown]
"""
## The model

A tag (`biote list` has them all), a Hub id, or a folder. The weights are downloaded the first time. It runs on the GPU
if there is one.
"""

# %%
parser = argparse.ArgumentParser(description="Score every single substitution of ubiquitin.")
parser.add_argument("--model", default="esm2_t33_650M_UR50D", help="a tag, a Hub id, or a folder")
parser.add_argument("--output", help="the heat map")
options = parser.parse_args([] if "ipykernel" in sys.modules else None)  # a notebook has no command line

model, tokenizer = biote.load(options.model, "masked-lm")
print(f"{options.model} on {model.device}, {model.dtype}")

# %% [markdown]
"""
## The scan

Each score is log p(mutant) - log p(wild type), where the residue is masked ("masked marginals"): 0 is as likely as the
wild type, less than 0 is less likely. 76 residues are 76 passes of the model, which run packed together.
"""

# %%
wild = Record("ubiquitin", "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG")
variants = list(scan_of(0, wild, AMINO_ACIDS))  # all 20 at each place, the wild type with them
scores = score(model, tokenizer, [wild], variants, Scoring("masked-marginals"))
matrix = scores.reshape(len(wild.sequence), len(AMINO_ACIDS))
print(f"{matrix.shape[0]} residues x {matrix.shape[1]} amino acids")

# %% [markdown]
"""
## The heat map

Red is likelier than the wild type, blue less likely; a dot is the wild type itself.
"""

# %%
most = np.abs(matrix).max()
figure, axes = plt.subplots(figsize=(14, 4.5), layout="constrained")
image = axes.imshow(matrix.T, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
axes.plot([AMINO_ACIDS.index(letter) for letter in wild.sequence], "k.", markersize=3)
axes.set_yticks(range(len(AMINO_ACIDS)), list(AMINO_ACIDS), fontsize=7)
places = [0, *range(9, len(wild.sequence), 10)]
axes.set_xticks(places, [f"{wild.sequence[place]}{place + 1}" for place in places])
axes.set_title(f"{wild.id}: masked marginals by {Path(options.model).name}")
figure.colorbar(image, label="score")
if options.output:
    figure.savefig(options.output, dpi=110)

# %% [markdown]
"""
## The sites

The mean over the 19 substitutions says how much a site tolerates.
"""

# %%
tolerance = matrix.sum(1) / (len(AMINO_ACIDS) - 1)  # the wild type's own score is 0
order = tolerance.argsort()


def named(places: np.ndarray) -> str:
    """Sites, each with its tolerance."""
    return ", ".join(f"{wild.sequence[place]}{place + 1} {tolerance[place]:.1f}" for place in places)


print(f"least tolerated: {named(order[:8])}")
print(f"most tolerated: {named(order[:-9:-1])}")

# %% [markdown]
"""
Ubiquitin binds most of its partners by a patch of leucine 8, isoleucine 44 and valine 70. Has the model noticed? Rank
1 is the least tolerated site.
"""

# %%
ranks = order.argsort() + 1
print(", ".join(f"{wild.sequence[site - 1]}{site} has rank {ranks[site - 1]}" for site in (8, 44, 70)))
