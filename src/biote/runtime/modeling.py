"""What every port's PreTrainedModel shares: configuration, loading, the packed encoder, and the task heads' forward.

Shapes: B batch, S padded length, T packed tokens, N hidden size, V vocabulary, C labels.
Packed input is one row [1, T] with HF's flash-attention arguments (cu_seq_lens_q/k, max_length_q/k); outputs have the
shape of the input: [B, S, ...] for padded rows (zeros where there is no token), [1, T, ...] for packed ones.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from .block import ACTIVATIONS, TransformerBlock
from .cuda_graphs import MAX_TOKENS, GraphedEncoder
from .engine import ENGINES, layers_of, resolve_engine
from .packing import Packing, plan_packing
from .precision import FP8_RECIPES, TOKEN_MULTIPLE, layer_precisions, refuse_unsupported, runs_of, weights_of
from .rope import ROPES, RotaryEmbedding, inverse_frequencies


@strict
class EncoderConfig(PreTrainedConfig):
    """Fields that every port's configuration has.

    engine: "te" (TransformerEngine), "torch" (plain PyTorch) or "auto" (te where it can run).
    hidden_act: "gelu" is the exact erf form; "gelu_tanh" its tanh approximation, asked for by name; "relu"; "swiglu".
    rms_norm: RMS norms instead of layer norms. attention_bias, mlp_bias: biases of the blocks' linear layers.
    rope: rotary positions turn dimension i with i + D/2 ("half") or 2i with 2i + 1 ("pairs"); "none" has no rotation.
    post_norm: the blocks are a post-norm model's, shifted (see `block.py`).
    layer_precision: "bf16" (the model's dtype), "fp8", "mxfp8" or "nvfp4": one word for all layers, or a list.
    fp8_recipe: "delayed", "current" or "block" scaling, for layers in "fp8".
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
    layer_norm_eps: float = 1e-5
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    pad_token_id: int | None = 1
    engine: str = "auto"
    layer_precision: str | list[str] = "bf16"
    fp8_recipe: str = "delayed"
    quantized_weights: bool = False
    cuda_graphs: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.check()
        super().__post_init__(**kwargs)

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
        precisions = layer_precisions(self.layer_precision, self.num_hidden_layers)
        if self.quantized_weights and set(precisions) == {"bf16"}:
            raise ValueError('quantized_weights needs layers of a layer_precision other than "bf16"')

    @property
    def feed_forward_width(self) -> int:
        """Features between the two linear layers of a feed-forward block."""
        return self.intermediate_size


@dataclass
class Encoded:
    """What the encoder gives a head, packed."""

    last: Tensor  # [T, N]
    packing: Packing
    hidden_states: tuple[Tensor, ...] | None  # in the caller's rows
    attentions: tuple[Tensor, ...] | None  # [B, H, S, S] each


class BiotePreTrainedModel(PreTrainedModel):
    """Loading and saving. A weight that the checkpoint lacks is an error, except a new task head, which HF reports."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _no_split_modules = ["TransformerBlock"]
    _input_embed_layer = "word_embeddings"
    _new_head: str | None = None  # the module that may be absent from a checkpoint of another architecture

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but a missing weight raises ValueError instead of being drawn at random."""
        with_info = kwargs.pop("output_loading_info", False)
        kwargs["output_loading_info"] = True
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model, info = loaded
        head_is_new = cls._new_head is not None and cls.__name__ not in (model.config.architectures or [])
        missing = [
            key for key in sorted(info["missing_keys"]) if not (head_is_new and key.startswith(f"{cls._new_head}."))
        ]
        if missing:
            raise ValueError(
                f"{pretrained_model_name_or_path or 'the checkpoint'} lacks {len(missing)} weights of {cls.__name__}: "
                f"{', '.join(missing)}"
            )
        return (model, info) if with_info else model

    @classmethod
    def from_original(
        cls,
        source: str,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        **config_kwargs: Any,
    ) -> Any:
        """Load an original checkpoint (tag, Hub id or local folder) directly; needs the `biote` package.

        dtype: None keeps the checkpoint's. device: None is the GPU for the te engine, the CPU for the torch engine.
        config_kwargs: fields of this port's configuration, as engine="torch".
        """
        try:
            from biote.convert import load_original
        except ImportError as error:
            raise ImportError("from_original converts with the biote package, which is not installed") from error
        return load_original(
            cls,
            source,
            revision=revision,
            subfolder=subfolder,
            dtype=dtype,
            device=device,
            config_kwargs=config_kwargs,
        )

    def with_quantized_weights(self) -> Any:
        """This model on the GPU with quantised weights, for inference: made anew, the weights copied.

        Needs layers in "fp8", "mxfp8" or "nvfp4" (`config.layer_precision`); ValueError without.
        """
        config = type(self.config).from_dict({**self.config.to_dict(), "quantized_weights": True})
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device("cuda"), torch.no_grad():  # with gradients, TE would also hold every weight transposed
                quantized = type(self)(config)
        finally:
            torch.set_default_dtype(before)
        quantized.load_state_dict(self.state_dict())  # copying into a quantised weight quantises
        return quantized.eval().requires_grad_(False)

    def _set_gradient_checkpointing(self, enable: bool = True, **options: Any) -> None:  # type: ignore[override]
        """With the te engine, TE's own recomputation, which keeps fp8 scales as they were in the forward pass."""
        if enable and self.base_model.engine == "te":
            from transformer_engine.pytorch import checkpoint

            options["gradient_checkpointing_func"] = partial(checkpoint, use_reentrant=False)
        super()._set_gradient_checkpointing(enable=enable, **options)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        spread = self.config.initializer_range
        if isinstance(module, nn.Embedding) and self.config.uniform_initializer:
            init.uniform_(module.weight, -spread, spread)
        elif isinstance(module, nn.Embedding):
            super()._init_weights(module)
        elif isinstance(module, RotaryEmbedding):
            init.copy_(module.inv_freq, inverse_frequencies(module.head_dim, module.base))
        else:  # by name, so that both engines' layers start alike
            for name, parameter in module.named_parameters(recurse=False):
                if name.endswith("bias"):
                    init.zeros_(parameter)
                elif parameter.dim() == 1:
                    init.ones_(parameter)
                elif self.config.uniform_initializer:
                    init.uniform_(parameter, -spread, spread)
                else:
                    init.normal_(parameter, mean=0.0, std=spread)


class EncoderModel(BiotePreTrainedModel):
    """Embeddings, blocks and final norm over packed tokens. A port adds `embeddings` and whatever else it has."""

    # called with (input_ids [T] or None, inputs_embeds [T, N] or None, packing), and with token types [T] if given
    embeddings: nn.Module  # -> [T, N]
    token_types = 0  # how many there are; if any, `embeddings` takes them, int [T], as a fourth argument
    max_positions: int | None = None  # longer sequences are refused, as the original cannot run them

    def __init__(self, config: EncoderConfig, rope_base: float | None = None):
        config.check()
        super().__init__(config)
        self.engine = resolve_engine(config.engine)
        layers = layers_of(self.engine)
        if (rope_base is None) != (config.rope == "none"):
            raise ValueError(f"rope={config.rope!r} does not fit {type(self).__name__}")
        if rope_base is not None:
            self.rotary = RotaryEmbedding(config.hidden_size // config.num_attention_heads, rope_base)
        precisions = layer_precisions(config.layer_precision, config.num_hidden_layers)
        refuse_unsupported(precisions, config.fp8_recipe, self.engine)
        self.layers = nn.ModuleList()
        for index, precision in enumerate(precisions):
            norm_dropout = config.hidden_dropout_prob if config.post_norm and index == 0 else 0.0
            with weights_of(precision, config):
                self.layers.append(TransformerBlock(config, layers, norm_dropout))
        norm = layers.RMSNorm if config.rms_norm else layers.LayerNorm
        self.final_norm = norm(config.hidden_size, eps=config.layer_norm_eps)
        self.precision_runs = runs_of(precisions, config.fp8_recipe)
        self.token_multiple = 1 if set(precisions) <= {"bf16"} else TOKEN_MULTIPLE
        self.graphed = GraphedEncoder()

    def encode(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        token_type_ids: Tensor | None,
        cu_seq_lens_q: Tensor | None,
        cu_seq_lens_k: Tensor | None,
        max_length_q: int | None,
        max_length_k: int | None,
        output_attentions: bool | None,
        output_hidden_states: bool | None,
    ) -> Encoded:
        """Pack once, run the blocks on real tokens only. Heads call this; users call the model."""
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        packing = plan_packing(
            inputs, attention_mask, position_ids, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k
        )
        tokens = packing.pack(inputs)
        self._check_positions(packing, position_ids)
        self._check_engine(next(self.layers.parameters()))
        keep_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        keep_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if input_ids is not None:
            self._check_token_ids(tokens)
            if self._can_replay(tokens) and not (keep_states or keep_attentions or token_type_ids is not None):
                return Encoded(self.graphed(self._last_states, tokens, packing), packing, None, None)
        types = self._packed_token_types(token_type_ids, packing)
        given = (tokens, None) if inputs_embeds is None else (None, tokens)
        x = self.embeddings(*given, packing, *types)
        return Encoded(*self._run(x, packing, bool(keep_states), bool(keep_attentions)))

    def _can_replay(self, tokens: Tensor) -> bool:
        fits = tokens.is_cuda and len(tokens) <= MAX_TOKENS and self.dtype in (torch.float16, torch.bfloat16)
        return self.config.cuda_graphs and fits and not self.training and not torch.is_grad_enabled()

    def _last_states(self, token_ids: Tensor, packing: Packing) -> Tensor:
        return self._run(self.embeddings(token_ids, None, packing), packing)[0]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.graphed.graphs.clear()  # they hold the addresses of weights that are about to move
        return super()._apply(fn, recurse)

    def _run(
        self, x: Tensor, packing: Packing, keep_states: bool = False, keep_attentions: bool = False
    ) -> tuple[Tensor, Packing, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
        """The blocks and the final norm over embeddings [T, N]."""
        tokens = len(x)
        rotary = None if self.config.rope == "none" else self.rotary(packing.positions)
        surplus = -tokens % self.token_multiple  # rows that quantised products want, past the last sequence
        if surplus:
            x = F.pad(x, (0, 0, 0, surplus))
            if rotary is not None:
                rotary = (F.pad(rotary[0], (0, 0, 0, surplus)), F.pad(rotary[1], (0, 0, 0, surplus)))
        delta: Tensor | None = None
        states: list[Tensor] = []  # the stream before each block and after the last
        attentions = []
        for run, precision in self.precision_runs:
            with precision():
                for index in run:
                    layer: Any = self.layers[index]
                    if keep_states:
                        states.append((x if delta is None else x + delta)[:tokens])
                    if keep_attentions:
                        attentions.append(layer.attention.probabilities(x, delta, packing, rotary))
                    x, delta = layer(x, delta, packing, rotary)
        x = (x if delta is None else x + delta)[:tokens]
        last = self.final_norm(x)
        hidden_states = None
        if keep_states:
            hidden_states = tuple(packing.unpack(state) for state in self.original_states([*states, x], last))
        return last, packing, hidden_states, tuple(attentions) if keep_attentions else None

    def original_states(self, states: list[Tensor], last: Tensor) -> list[Tensor]:
        """What the original calls hidden_states, from the stream before each block and after the last, and its norm.

        By default: the embeddings and each block's output, the last one after the final norm.
        """
        return [*states[:-1], last]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple:
        """Last hidden state [B, S, N] (or packed [1, T, N]), after the final norm; arguments as of `plan_packing`.

        hidden_states: see `original_states`.
        """
        encoded = self.encode(
            input_ids, attention_mask, position_ids, inputs_embeds, token_type_ids, cu_seq_lens_q, cu_seq_lens_k,
            max_length_q, max_length_k, output_attentions, output_hidden_states,
        )  # fmt: skip
        output = BaseModelOutput(
            last_hidden_state=encoded.packing.unpack(encoded.last),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return _returned(output, self.config, return_dict)

    def _packed_token_types(self, token_type_ids: Tensor | None, packing: Packing) -> tuple[Tensor, ...]:
        if token_type_ids is None:
            return ()
        if not self.token_types:
            raise ValueError(f"{type(self).__name__} has no token types; leave token_type_ids out")
        types = packing.pack(token_type_ids.to(packing.positions.device).expand(packing.shape))
        if not 0 <= int(types.min()) <= int(types.max()) < self.token_types:
            raise ValueError(f"token_type_ids must lie between 0 and {self.token_types - 1}")
        return (types,)

    def _check_positions(self, packing: Packing, position_ids: Tensor | None) -> None:
        if self.max_positions is None:
            return
        if position_ids is not None and int(packing.positions.min()) < 0:
            raise ValueError("position_ids hold negative numbers")
        needed = packing.max_seqlen if position_ids is None else int(packing.positions.max()) + 1
        if needed > self.max_positions:
            raise ValueError(f"a sequence needs {needed} positions, but this model has {self.max_positions}")

    def _check_token_ids(self, tokens: Tensor) -> None:
        low, high = (int(x) for x in torch.stack(tokens.aminmax()).tolist())
        if low < 0 or high >= self.config.vocab_size:
            bad = low if low < 0 else high
            raise ValueError(f"token id {bad} is outside the vocabulary, 0 to {self.config.vocab_size - 1}")

    def _check_engine(self, x: Tensor) -> None:
        half_precision = x.dtype in (torch.float16, torch.bfloat16)
        if x.is_cuda and half_precision and torch.cuda.get_device_capability(x.device) < (8, 0):
            raise RuntimeError("this GPU is too old for attention in 16 bits: load the model with dtype=torch.float32")
        if self.engine != "te":
            return
        if not x.is_cuda:
            raise RuntimeError('engine="te" runs on CUDA only: model.to("cuda"), or load it with engine="torch"')
        if x.dtype == torch.float64:
            raise RuntimeError('engine="te" has no float64: use engine="torch" for reference runs')


class MaskedLMModel(BiotePreTrainedModel):
    """Forward of a port's ...ForMaskedLM, which owns `model` and `lm_head`."""

    model: EncoderModel
    lm_head: Any  # [T, N] -> [T, V]; its `decoder` is the output embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head.decoder = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MaskedLMOutput | tuple:
        """Logits [B, S, V]; loss is the mean cross-entropy over real tokens whose label (int64 [B, S]) is not -100."""
        encoded = self.model.encode(
            input_ids, attention_mask, position_ids, inputs_embeds, token_type_ids, cu_seq_lens_q, cu_seq_lens_k,
            max_length_q, max_length_k, output_attentions, output_hidden_states,
        )  # fmt: skip
        logits = self.lm_head(encoded.last)  # [T, V]
        output = MaskedLMOutput(
            loss=_token_loss(logits, labels, encoded.packing),
            logits=encoded.packing.unpack(logits),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return _returned(output, self.config, return_dict)


class TokenClassificationModel(BiotePreTrainedModel):
    """A port's ...ForTokenClassification, which names its `encoder_class`: one linear layer over each token."""

    encoder_class: type[EncoderModel]
    _new_head = "classifier"

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        self.model: Any = self.encoder_class(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> TokenClassifierOutput | tuple:
        """Logits [B, S, C]; loss is the mean cross-entropy over real tokens whose label (int64 [B, S]) is not -100."""
        encoded = self.model.encode(
            input_ids, attention_mask, position_ids, inputs_embeds, token_type_ids, cu_seq_lens_q, cu_seq_lens_k,
            max_length_q, max_length_k, output_attentions, output_hidden_states,
        )  # fmt: skip
        logits = self.classifier(self.dropout(encoded.last))  # [T, C]
        output = TokenClassifierOutput(
            loss=_token_loss(logits, labels, encoded.packing),
            logits=encoded.packing.unpack(logits),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return _returned(output, self.config, return_dict)


class SequenceClassificationModel(BiotePreTrainedModel):
    """Forward of a port's ...ForSequenceClassification, which owns `model` and `classifier`."""

    model: EncoderModel
    classifier: nn.Module
    _new_head = "classifier"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple:
        """Logits [B, C] from each sequence's first token; loss by `config.problem_type`, or by num_labels and dtype.

        labels: int64 [B] (classes), float [B, C] (several labels at once) or float [B] / [B, C] (regression).
        """
        encoded = self.model.encode(
            input_ids, attention_mask, position_ids, inputs_embeds, token_type_ids, cu_seq_lens_q, cu_seq_lens_k,
            max_length_q, max_length_k, output_attentions, output_hidden_states,
        )  # fmt: skip
        logits = self.classifier(encoded.last[encoded.packing.first_tokens])  # [B, C]
        output = SequenceClassifierOutput(
            loss=_sequence_loss(logits, labels, self.config),
            logits=logits,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return _returned(output, self.config, return_dict)


def _returned(output: Any, config: PreTrainedConfig, return_dict: bool | None) -> Any:
    as_dict = config.return_dict if return_dict is None else return_dict
    return output if as_dict else output.to_tuple()


def _wide(logits: Tensor) -> Tensor:
    """Losses are taken in float32 at least."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _token_loss(logits: Tensor, labels: Tensor | None, packing: Packing) -> Tensor | None:
    if labels is None:
        return None
    return F.cross_entropy(_wide(logits), packing.pack(labels.to(logits.device)))


def _sequence_loss(logits: Tensor, labels: Tensor | None, config: PreTrainedConfig) -> Tensor | None:
    if labels is None:
        return None
    logits, labels = _wide(logits), labels.to(logits.device)
    problem = config.problem_type
    if problem is None and config.num_labels == 1:
        problem = "regression"
    elif problem is None:
        problem = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
    if problem == "single_label_classification":
        return F.cross_entropy(logits, labels.view(-1))
    labels = labels.to(logits.dtype).view_as(logits)
    if problem == "regression":
        return F.mse_loss(logits, labels)
    return F.binary_cross_entropy_with_logits(logits, labels)
