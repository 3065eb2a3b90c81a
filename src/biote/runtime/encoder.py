"""The encoder that every port's model is: embeddings, blocks and final norm over packed tokens.

Shapes: B batch, S padded length, T packed tokens, N hidden size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from .block import TransformerBlock, norm_of
from .config import EncoderConfig
from .cuda_graphs import MAX_TOKENS, GraphedEncoder
from .engine import layers_of, resolve_engine
from .packing import Packing, Tokens, require
from .precision import TOKEN_MULTIPLE, layer_precisions, refuse_unsupported, runs_of, weights_of
from .pretrained import BiotePreTrainedModel, Encoded, without_labels
from .rope import RotaryEmbedding


class EncoderModel(BiotePreTrainedModel):
    """A port adds `embeddings` and whatever else it has."""

    embeddings: nn.Module  # Tokens -> [T, N]
    token_types = 0  # how many there are; 0: token_type_ids are refused
    max_positions: int | None = None  # longer sequences are refused, as the original cannot run them

    def __init__(self, config: EncoderConfig, rope_base: float | None = None):
        config.check()
        super().__init__(config)
        self.engine = resolve_engine(config.engine)
        self.ops = layers_of(self.engine)
        if (rope_base is None) != (config.rope == "none"):
            raise ValueError(f"rope={config.rope!r} does not fit {type(self).__name__}")
        head_dim = config.hidden_size // config.num_attention_heads
        self.rotary = nn.ModuleList()  # one for each kind of rotation that the layers have
        if rope_base is not None:
            self.rotary.append(RotaryEmbedding(head_dim, rope_base, pairs=config.rope == "pairs"))
        precisions = layer_precisions(config.layer_precision, config.num_hidden_layers)
        refuse_unsupported(precisions, config.fp8_recipe, self.engine)
        self.layers = nn.ModuleList()
        for index, precision in enumerate(precisions):
            norm_dropout = config.hidden_dropout_prob if config.post_norm and index == 0 else 0.0
            with weights_of(precision, config):
                self.layers.append(TransformerBlock(config, self.ops, precision != "bf16", norm_dropout))
        self.final_norm = norm_of(config)
        self.precision_runs = runs_of(precisions, config.fp8_recipe)
        self.token_multiple = 1 if set(precisions) <= {"bf16"} else TOKEN_MULTIPLE
        self.graphed = GraphedEncoder()

    forward = without_labels(BiotePreTrainedModel.forward)

    def outputs(self, encoded: Encoded, labels: Tensor | None) -> BaseModelOutput:
        """Last hidden state [B, S, N], or packed [1, T, N], after the final norm; hidden_states: `original_states`."""
        return BaseModelOutput(last_hidden_state=encoded.packing.unpack(encoded.last))

    def encode(self, tokens: Tokens, keep_states: bool, attentions: bool | Callable[..., Tensor]) -> Encoded:
        """Run the blocks on real tokens only. The one forward calls this; users call the model.

        attentions: whether to keep each layer's maps, or what reads them instead: see the one forward.
        """
        if torch.compiler.is_compiling():  # no replay, and no device to switch to: torch's own business
            if tokens.ids is not None:
                self._check_token_ids(tokens.ids)
            return self._run(tokens, keep_states, attentions)
        with torch.cuda.device_of(tokens.packing.positions):  # kernels run where the tensors are
            if tokens.ids is not None:
                self._check_token_ids(tokens.ids)
                if self._can_replay(tokens) and not (keep_states or attentions):
                    last = self.graphed(self, self._last_states, tokens.ids, tokens.packing)
                    if last is not None:
                        return Encoded(last, tokens.packing)
            return self._run(tokens, keep_states, attentions)

    def _can_replay(self, tokens: Tokens) -> bool:
        if not self.config.cuda_graphs or self.training or torch.is_grad_enabled() or hasattr(self, "_is_replica"):
            return False
        packing, words = tokens.packing, self.get_input_embeddings().weight
        fits = packing.positions.is_cuda and len(packing.positions) <= MAX_TOKENS and tokens.types is None
        return fits and words.dtype in (torch.float16, torch.bfloat16) and words.device == packing.positions.device

    def _last_states(self, token_ids: Tensor, packing: Packing) -> Tensor:
        return self._run(Tokens(packing, token_ids)).last

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.graphed.graphs.clear()  # they hold the addresses of weights that are about to move
        return super()._apply(fn, recurse)

    def _run(
        self, tokens: Tokens, keep_states: bool = False, attentions: bool | Callable[..., Tensor] = False
    ) -> Encoded:
        """Embeddings, blocks, final norm."""
        packing = tokens.packing
        x = self.embeddings(tokens)
        self._check_engine(x)
        count = x.shape[0]
        rotary = self.rotary[0](packing.positions) if len(self.rotary) else None
        surplus = -count % self.token_multiple  # rows that quantised products want, past the last sequence
        if surplus:
            x = nn.functional.pad(x, (0, 0, 0, surplus))
            rotary = None if rotary is None else rotary.padded(surplus)
        delta: Tensor | None = None
        states: list[Tensor] = []  # the stream before each block and after the last
        reader = attentions if callable(attentions) else _as_they_are if attentions else None
        maps: list[Tensor] = []
        read: Tensor | None = None  # what the reader made of the layers so far
        for run, precision in self.precision_runs:
            with precision():
                for index in run:
                    if keep_states:
                        states.append((x if delta is None else x + delta)[:count])
                    read_maps = None if reader is None else partial(reader, index)
                    x, delta, read = self.layers[index](x, delta, packing, rotary, read_maps, read)
                    if attentions is True:
                        maps.append(read)
                        read = None
        x, delta = x[:count], None if delta is None else delta[:count]
        x, last = self.ops.add_norm(self.final_norm, x, delta, post_norm=False)
        hidden_states = None
        if keep_states:
            hidden_states = tuple(packing.unpack(state) for state in self.original_states([*states, x], last))
        return Encoded(last, packing, hidden_states, tuple(maps) if maps else read)

    def original_states(self, states: list[Tensor], last: Tensor) -> list[Tensor]:
        """What the original calls hidden_states, from the stream before each block and after the last, and its norm.

        By default: the embeddings and each block's output, the last one after the final norm.
        """
        return [*states[:-1], last]

    def packed_types(self, token_type_ids: Tensor | None, packing: Packing) -> Tensor | None:
        """token_type_ids int [B, S] -> [T]; ValueError for what the embeddings cannot look up."""
        if token_type_ids is None:
            return None
        if not self.token_types:
            raise ValueError(f"{type(self).__name__} has no token types; leave token_type_ids out")
        types = packing.pack(token_type_ids.to(packing.positions.device).expand(packing.shape))
        in_range = ((types >= 0) & (types < self.token_types)).all()
        require(in_range, f"token_type_ids must lie between 0 and {self.token_types - 1}")
        return types

    def check_positions(self, packing: Packing, given: bool) -> None:
        """ValueError for positions past the table; given: they are the caller's, not counted by us."""
        if self.max_positions is None:
            return
        if torch.compiler.is_compiling():
            in_range = ((packing.positions >= 0) & (packing.positions < self.max_positions)).all()
            require(in_range, f"a position is outside the {self.max_positions} that this model has")
            return
        if given and int(packing.positions.min()) < 0:
            raise ValueError("position_ids hold negative numbers")
        needed = int(packing.positions.max()) + 1 if given else packing.max_seqlen
        if needed > self.max_positions:
            raise ValueError(f"a sequence needs {needed} positions, but this model has {self.max_positions}")

    def refuse_to_be_traced(self, keep_attentions: bool) -> None:
        """RuntimeError for what torch.compile and torch.export cannot trace, and torch.jit only with fixed lengths."""
        if torch.jit.is_tracing():
            raise RuntimeError("torch.jit.trace would keep the example's lengths for all others: use torch.export")
        if self.engine == "te":
            raise RuntimeError(
                'torch cannot trace the kernels of engine="te": load the model with engine="torch" for torch.compile '
                "and torch.export"
            )
        if keep_attentions:
            raise RuntimeError("torch cannot trace output_attentions: ask for them outside of torch.compile")

    def refuse_in_replica(self, packed: bool) -> None:
        """RuntimeError for what DataParallel cannot copy or split; unquantised padded rows it can."""
        if packed or self.token_multiple > 1:
            what = "packed input" if packed else f"layer_precision={self.config.layer_precision!r}"
            raise RuntimeError(
                f"DataParallel, which Trainer takes where it sees several GPUs, cannot run {what}: start one process "
                "a GPU (torchrun --nproc-per-node N ...), or show it one GPU (CUDA_VISIBLE_DEVICES=0)"
            )

    def _check_token_ids(self, tokens: Tensor) -> None:
        if torch.compiler.is_compiling():
            in_range = ((tokens >= 0) & (tokens < self.config.vocab_size)).all()
            require(in_range, f"a token id is outside the vocabulary, 0 to {self.config.vocab_size - 1}")
            return
        low, high = (int(x) for x in torch.stack(tokens.aminmax()).tolist())
        if low < 0 or high >= self.config.vocab_size:
            bad = low if low < 0 else high
            raise ValueError(f"token id {bad} is outside the vocabulary, 0 to {self.config.vocab_size - 1}")

    def _check_engine(self, x: Tensor) -> None:
        half_precision = x.dtype in (torch.float16, torch.bfloat16) and not torch.compiler.is_compiling()
        if x.is_cuda and half_precision and torch.cuda.get_device_capability(x.device) < (8, 0):
            raise RuntimeError("this GPU is too old for attention in 16 bits: load the model with dtype=torch.float32")
        if self.engine != "te":
            return
        if not x.is_cuda:
            raise RuntimeError('engine="te" runs on CUDA only: model.to("cuda"), or load it with engine="torch"')
        if x.dtype == torch.float64:
            raise RuntimeError('engine="te" has no float64: use engine="torch" for reference runs')


def _as_they_are(layer: int, maps: Tensor, before: Tensor | None) -> Tensor:
    return maps
