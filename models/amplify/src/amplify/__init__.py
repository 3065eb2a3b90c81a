"""AMPLIFY on TransformerEngine. Importing this package registers its classes with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .amplify_te import (
    AmplifyTEConfig,
    AmplifyTEForMaskedLM,
    AmplifyTEForSequenceClassification,
    AmplifyTEForTokenClassification,
    AmplifyTEModel,
)
from .convert import convert_hf_to_te, convert_te_to_hf
from .modeling_amplify import AMPLIFY, AMPLIFYConfig
from .tokenizer import build_tokenizer

__all__ = [
    "AMPLIFY",
    "AMPLIFYConfig",
    "AmplifyTEConfig",
    "AmplifyTEForMaskedLM",
    "AmplifyTEForSequenceClassification",
    "AmplifyTEForTokenClassification",
    "AmplifyTEModel",
    "build_tokenizer",
    "convert_hf_to_te",
    "convert_te_to_hf",
]

AutoConfig.register("amplify_te", AmplifyTEConfig)
AutoModel.register(AmplifyTEConfig, AmplifyTEModel)
AutoModelForMaskedLM.register(AmplifyTEConfig, AmplifyTEForMaskedLM)
AutoModelForTokenClassification.register(AmplifyTEConfig, AmplifyTEForTokenClassification)
AutoModelForSequenceClassification.register(AmplifyTEConfig, AmplifyTEForSequenceClassification)
