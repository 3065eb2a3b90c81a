"""Biological foundation models as HuggingFace PreTrainedModels on TransformerEngine layers."""

__version__ = "0.1.0"
