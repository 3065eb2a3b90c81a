"""ESM-2 on TransformerEngine. Importing this package registers its classes with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .convert import convert_hf_to_te, convert_te_to_hf
from .esm2_te import (
    Esm2TEConfig,
    Esm2TEForMaskedLM,
    Esm2TEForSequenceClassification,
    Esm2TEForTokenClassification,
    Esm2TEModel,
)
from .tokenizer import build_tokenizer

__all__ = [
    "Esm2TEConfig",
    "Esm2TEForMaskedLM",
    "Esm2TEForSequenceClassification",
    "Esm2TEForTokenClassification",
    "Esm2TEModel",
    "build_tokenizer",
    "convert_hf_to_te",
    "convert_te_to_hf",
]

AutoConfig.register("esm2_te", Esm2TEConfig)
AutoModel.register(Esm2TEConfig, Esm2TEModel)
AutoModelForMaskedLM.register(Esm2TEConfig, Esm2TEForMaskedLM)
AutoModelForTokenClassification.register(Esm2TEConfig, Esm2TEForTokenClassification)
AutoModelForSequenceClassification.register(Esm2TEConfig, Esm2TEForSequenceClassification)
