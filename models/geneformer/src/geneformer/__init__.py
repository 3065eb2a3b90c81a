"""Geneformer on TransformerEngine. Importing this package registers its classes with transformers' Auto classes."""

from typing import TYPE_CHECKING, Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .convert import convert_hf_to_te, convert_te_to_hf
from .embeddings import cell_embeddings, gene_embeddings
from .geneformer_te import (
    GeneformerTEConfig,
    GeneformerTEForMaskedLM,
    GeneformerTEForSequenceClassification,
    GeneformerTEForTokenClassification,
    GeneformerTEModel,
)
from .perturb import delete_genes, overexpress_genes, perturbation_similarities

if TYPE_CHECKING:
    from .tokenizer import GeneformerTokenizer

__all__ = [
    "GeneformerTEConfig",
    "GeneformerTEForMaskedLM",
    "GeneformerTEForSequenceClassification",
    "GeneformerTEForTokenClassification",
    "GeneformerTEModel",
    "GeneformerTokenizer",
    "cell_embeddings",
    "convert_hf_to_te",
    "convert_te_to_hf",
    "delete_genes",
    "gene_embeddings",
    "overexpress_genes",
    "perturbation_similarities",
]

AutoConfig.register("geneformer_te", GeneformerTEConfig)
AutoModel.register(GeneformerTEConfig, GeneformerTEModel)
AutoModelForMaskedLM.register(GeneformerTEConfig, GeneformerTEForMaskedLM)
AutoModelForTokenClassification.register(GeneformerTEConfig, GeneformerTEForTokenClassification)
AutoModelForSequenceClassification.register(GeneformerTEConfig, GeneformerTEForSequenceClassification)


def __getattr__(name: str) -> Any:
    """Import the tokenizer when it is asked for: its libraries would cost every command two hundred megabytes."""
    if name == "GeneformerTokenizer":
        from .tokenizer import GeneformerTokenizer

        return GeneformerTokenizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
