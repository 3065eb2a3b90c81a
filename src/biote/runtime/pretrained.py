"""What every class of every port shares: loading, saving, and the one forward.

Shapes: B batch, S padded length, T packed tokens, N hidden size, H heads.
Packed input is one row [1, T] with HF's flash-attention arguments (cu_seq_lens_q/k, max_length_q/k); outputs have the
shape of the input: [B, S, ...] for padded rows (zeros where there is no token), [1, T, ...] for packed ones.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput

from .packing import Packing, Tokens, plan_packing
from .rope import RotaryEmbedding, inverse_frequencies

UNUSED = (  # arguments of the originals' forward that mean nothing to an encoder, or that no port has
    "head_mask", "encoder_hidden_states", "encoder_attention_mask", "past_key_values", "cache", "use_cache",
    "cache_position", "is_causal", "seq_idx", "num_items_in_batch",
)  # fmt: skip

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


@dataclass
class Encoded:
    """What the encoder gives a head, packed."""

    last: Tensor  # [T, N], after the final norm
    packing: Packing
    hidden_states: tuple[Tensor, ...] | None = None  # in the caller's rows
    attentions: tuple[Tensor, ...] | Tensor | None = None  # maps [B, H, S, S], or what their reader made of them


class BiotePreTrainedModel(PreTrainedModel):
    """Loading and saving. A weight that the checkpoint lacks is an error, except a new task head, which HF reports."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _no_split_modules = ["TransformerBlock"]
    _input_embed_layer = "word_embeddings"
    _new_head: str | None = None  # the module that may be absent from a checkpoint of another architecture

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
        output_attentions: bool | Callable[[int, Tensor, Tensor | None], Tensor] | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        cu_seq_lens_q_padded: Tensor | None = None,
        cu_seq_lens_k_padded: Tensor | None = None,
        labels: Tensor | None = None,
        **unused: Any,
    ) -> Any:
        """Pack once, encode, and what the class makes of it: see `outputs`.

        input_ids: int [B, S], or inputs_embeds: [B, S, N]; exactly one. token_type_ids: int [B, S].
        attention_mask, position_ids, cu_seq_lens_*, max_length_*: as of `plan_packing`. labels: see `read_labels`.
        output_attentions: True for the maps of all layers, [B, H, S, S] each; or a function that reads a layer's maps
        where they are made, so that no two layers' are held at once: (layer, maps, what it returned for the layer
        before or None) -> Tensor. Its last result is then the output's `attentions`.
        unused: those of UNUSED, if None or False; anything else raises TypeError or ValueError.
        """
        refuse_meaning(type(self).__name__, unused)
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        encoder: Any = self.base_model
        if getattr(self, "_is_replica", False):  # torch's mark of DataParallel
            encoder.refuse_in_replica(packed=cu_seq_lens_q is not None)
        keep_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            encoder.refuse_to_be_traced(bool(attentions))
        bounds = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, cu_seq_lens_q_padded, cu_seq_lens_k_padded)
        packing = plan_packing(inputs, attention_mask, position_ids, *bounds)
        labels = None if labels is None else self.read_labels(labels, packing)
        packed = packing.pack(inputs)
        ids, embeds = (packed, None) if inputs_embeds is None else (None, packed)
        encoder.check_positions(packing, given=position_ids is not None)
        tokens = Tokens(packing, ids, embeds, encoder.packed_types(token_type_ids, packing))
        encoded = encoder.encode(tokens, bool(keep_states), attentions if callable(attentions) else bool(attentions))
        output = self.outputs(encoded, labels)
        for name in ("hidden_states", "attentions"):
            if getattr(encoded, name) is not None:
                output[name] = getattr(encoded, name)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def read_labels(self, labels: Tensor, packing: Packing) -> Tensor:
        """Labels as `outputs` takes them; ValueError for what the loss could not read."""
        raise TypeError(f"{type(self).__name__} has no loss: leave labels out")

    def outputs(self, encoded: Encoded, labels: Tensor | None) -> Any:
        """A ModelOutput of what the class makes of the packed states; hidden states and attentions are added to it."""
        raise TypeError(f"{type(self).__name__} has no outputs")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but a missing weight raises ValueError instead of being drawn at random."""
        _refuse_other_model(cls, pretrained_model_name_or_path, kwargs)
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


def refuse_meaning(owner: str, unused: dict[str, Any]) -> None:
    """TypeError for an argument that is none of UNUSED, ValueError for one that asks for something."""
    for name, value in unused.items():
        if name not in UNUSED:
            raise TypeError(f"{owner}.forward() got an unexpected keyword argument {name!r}")
        if value is not None and value is not False:
            raise ValueError(f"{owner} has no use for {name}: leave it out, or None")


def _refuse_other_model(cls: Any, name: Any, kwargs: dict[str, Any]) -> None:
    """ValueError where a folder holds another model: transformers would fill ours with what little fits."""
    if name is None or kwargs.get("config") is not None:
        return
    try:
        where = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
        found = cls.config_class.get_config_dict(name, **where)[0].get("model_type")
    except OSError:  # no config.json, as beside an adapter: transformers knows what to say
        return
    if found not in (None, cls.config_class.model_type):
        raise ValueError(
            f"{name} holds a model of type {found!r}, not {cls.config_class.model_type!r}: "
            f"an original is converted and loaded by {cls.__name__}.from_original"
        )


def without_labels(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` of a model that has no loss: its signature, which Trainer reads, has no labels, and it takes none."""
    shown = inspect.signature(forward)

    @wraps(forward)
    def bare(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "labels" in kwargs:
            raise TypeError(f"{type(self).__name__} has no loss: leave labels out")
        return forward(self, *args, **kwargs)

    others = [parameter for name, parameter in shown.parameters.items() if name != "labels"]
    bare.__signature__ = shown.replace(parameters=others)  # type: ignore[attr-defined]
    bare.__annotations__ = {**forward.__annotations__, "return": BaseModelOutput}  # sentence-transformers asks for it
    del bare.__annotations__["labels"]
    return bare
