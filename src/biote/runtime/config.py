"""Fields that every port's configuration has."""

from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME

from .activations import ACTIVATIONS
from .engine import ENGINES
from .precision import FP8_RECIPES, layer_precisions
from .rope import ROPES


@strict
class EncoderConfig(PreTrainedConfig):
    """The part of a port's configuration that the core reads.

    engine: "te" (TransformerEngine), "torch" (plain PyTorch) or "auto" (te where it can run).
    hidden_act: "gelu" is the exact erf form; "gelu_tanh" its tanh approximation, asked for by name; "relu"; "swiglu".
    rms_norm: RMS norms instead of layer norms. attention_bias, mlp_bias: biases of the blocks' linear layers.
    rope: rotary positions turn dimension i with i + D/2 ("half") or 2i with 2i + 1 ("pairs"); "none" has no rotation.
    post_norm: the blocks are a post-norm model's, shifted (see `block.py`).
    layer_precision: "bf16" (the model's dtype), "fp8", "mxfp8" or "nvfp4": one word for all layers, or a list.
    fp8_recipe: for layers in "fp8", what a tensor is scaled by: "current", its own largest number; "block", those of
        its blocks; "delayed", the largest of its kind in earlier steps of training, or at the first call its own: no
        call in inference moves it, and numbers up to 8 times as large still fit.
    quantized_weights: hold the weights of quantised layers quantised only, for inference in half the memory; such a
        model is made by `model.with_quantized_weights()` and cannot be saved.
    cuda_graphs: replay recorded CUDA graphs in inference; what they cost and when they pay is in `cuda_graphs.py`.
    """

    uniform_initializer: ClassVar[bool] = False  # new weights are drawn evenly within +-initializer_range

    vocab_size: int = 33
    hidden_size: int = 320
    num_hidden_layers: int = 6
    num_attention_heads: int = 20
    intermediate_size: int = 1280
    hidden_act: str = "gelu"
    rms_norm: bool = False
    attention_bias: bool = True
    mlp_bias: bool = True
    rope: str = "half"
    post_norm: bool = False
    layer_norm_eps: float | int = 1e-5
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    initializer_range: float | int = 0.02
    pad_token_id: int | None = 1
    engine: str = "auto"
    layer_precision: str | list[str] = "bf16"
    fp8_recipe: str = "delayed"
    quantized_weights: bool = False
    cuda_graphs: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.check()
        super().__post_init__(**kwargs)

    def to_json_file(self, json_file_path: Any, use_diff: bool = True) -> None:
        """As in transformers, which saves by this before it uploads; a config.json is joined by the code it names."""
        path = Path(json_file_path)
        if path.name == CONFIG_NAME:
            self._write_code(path.parent)
        super().to_json_file(path, use_diff)

    def _write_code(self, folder: Path) -> None:
        if type(self).__module__.startswith("transformers_modules."):  # a folder's own: transformers has copied it
            mapped: dict[str, str] = getattr(self, "auto_map", {})  # to a Hub repository, if it is from one
            self.auto_map = {auto: name.rpartition("--")[2] for auto, name in mapped.items()}
            return
        try:
            from biote.remote_code import write_code
        except ImportError:
            return
        self.auto_map = write_code(type(self), folder) or getattr(self, "auto_map", {})

    def check(self) -> None:
        """ValueError for a field that no layer understands: from_pretrained sets its arguments after __post_init__."""
        if self.engine not in ENGINES:
            raise ValueError(f"engine={self.engine!r} is unknown; choose one of {', '.join(ENGINES)}")
        if self.rope not in ROPES:
            raise ValueError(f"rope={self.rope!r} is unknown; choose one of {', '.join(ROPES)}")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act={self.hidden_act!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size={self.hidden_size} does not divide into {self.num_attention_heads} heads")
        if self.fp8_recipe not in FP8_RECIPES:
            raise ValueError(f"fp8_recipe={self.fp8_recipe!r} is unknown; choose one of {', '.join(FP8_RECIPES)}")
        layers = 1 if isinstance(self.layer_precision, str) else self.num_hidden_layers  # one word is for them all
        precisions = layer_precisions(self.layer_precision, layers)
        if self.quantized_weights and set(precisions) == {"bf16"}:
            raise ValueError('quantized_weights needs layers of a layer_precision other than "bf16"')

    @property
    def feed_forward_width(self) -> int:
        """Features between the two linear layers of a feed-forward block."""
        return self.intermediate_size
