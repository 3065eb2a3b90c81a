"""AMPLIFY's port: formats (the original's, NVIDIA's) with mappings and configurations, and published checkpoints."""

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from biote.convert import convert_model
from biote.mapping import FuseQKV, Mapping, PadRows, Recompute, Rename, Rule
from biote.port import UNSET, Checkpoint, Format, Json, ModelPort, read_fields, refuse_other
from biote.runtime.rope import inverse_frequencies

from .amplify_te import (
    AmplifyTEConfig,
    AmplifyTEForMaskedLM,
    AmplifyTEForSequenceClassification,
    AmplifyTEForTokenClassification,
    AmplifyTEModel,
)
from .modeling_amplify import AMPLIFY, ROPE_BASE, AMPLIFYConfig
from .tokenizer import build_tokenizer

WORDS = "model.embeddings.word_embeddings.weight"
OUR_LAYER, HF_LAYER = "model.layers.{i}.", "transformer_encoder.{i}."
NVIDIA_LAYER = "amplify.transformer_encoder.{i}."
NVIDIA_VOCABULARY = 32  # rows of the vocabulary in NVIDIA's checkpoints
SAME_NAMES = (  # fields that AMPLIFYConfig and ours have in common
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "rms_norm",
    "layer_norm_after_embedding", "layer_norm_before_last_layer", "pad_token_id", "mask_token_id", "bos_token_id",
    "eos_token_id", "id2label", "label2id", "problem_type", "dtype",
)  # fmt: skip
RENAMED = {  # theirs -> ours
    "norm_eps": "layer_norm_eps", "att_bias": "attention_bias", "ffn_bias": "mlp_bias",
    "max_length": "max_position_embeddings", "dropout_prob": "hidden_dropout_prob",
    "decoder_init_range": "initializer_range",
}  # fmt: skip
ACTIVATIONS = {"SwiGLU": "swiglu", "ReLU": "relu", "GELU": "gelu"}  # theirs, in any case of letters -> ours


def hf_mapping(config: AmplifyTEConfig, theirs: Json, auto: str) -> Mapping:
    """chandar-lab's AMPLIFY, with every norm, bias and activation that its configuration can ask for."""
    up, down = ("ffn.w12", "ffn.w3") if config.hidden_act == "swiglu" else ("ffn.0", "ffn.2")
    rename = [
        ("encoder.weight", WORDS),
        (HF_LAYER + "attention_norm.{n}", OUR_LAYER + "attention.norm.{n}"),
        (HF_LAYER + "wo.{a}", OUR_LAYER + "attention.proj.{a}"),
        (HF_LAYER + "ffn_norm.{n}", OUR_LAYER + "mlp.norm.{n}"),
        (HF_LAYER + up + ".{f}", OUR_LAYER + "mlp.fc1.{f}"),
        (HF_LAYER + down + ".{f}", OUR_LAYER + "mlp.fc2.{f}"),
        ("decoder.weight", "lm_head.decoder.weight"),
        ("decoder.bias", "lm_head.decoder.bias"),
    ]
    if config.layer_norm_after_embedding:
        rename.append(("layer_norm_1.{n}", "model.embeddings.layer_norm.{n}"))
    if config.layer_norm_before_last_layer:
        rename.append(("layer_norm_2.{n}", "model.final_norm.{n}"))
    qkv = FuseQKV(
        theirs=tuple(HF_LAYER + part + ".{a}" for part in "qkv"),
        ours=(OUR_LAYER + "attention.qkv.{a}",),
        heads=config.num_attention_heads,
    )
    rules: list[Rule] = [Rename(theirs=(a,), ours=(b,)) for a, b in rename]
    return Mapping.of(
        *rules, qkv, _frequencies(config), i=range(config.num_hidden_layers), n=_weights(not config.rms_norm),
        a=_weights(config.attention_bias), f=_weights(config.mlp_bias),
    )  # fmt: skip


def nvidia_mapping(config: AmplifyTEConfig, theirs: Json, auto: str) -> Mapping:
    """The TE checkpoints that NVIDIA publishes: the last norm fused with the decoder, the vocabulary padded."""
    their_rows = theirs.get("padded_vocab_size") or NVIDIA_VOCABULARY
    pad_rows = partial(PadRows, our_rows=config.vocab_size, their_rows=their_rows)
    rename = [
        (NVIDIA_LAYER + "self_attention.layernorm_qkv.layer_norm_weight", OUR_LAYER + "attention.norm.weight"),
        (NVIDIA_LAYER + "self_attention.layernorm_qkv.weight", OUR_LAYER + "attention.qkv.weight"),
        (NVIDIA_LAYER + "self_attention.proj.weight", OUR_LAYER + "attention.proj.weight"),
        (NVIDIA_LAYER + "layernorm_mlp.layer_norm_weight", OUR_LAYER + "mlp.norm.weight"),
        (NVIDIA_LAYER + "layernorm_mlp.fc1_weight", OUR_LAYER + "mlp.fc1.weight"),
        (NVIDIA_LAYER + "layernorm_mlp.fc2_weight", OUR_LAYER + "mlp.fc2.weight"),
        ("decoder.layer_norm_weight", "model.final_norm.weight"),
    ]
    rules: list[Rule] = [Rename(theirs=(a,), ours=(b,)) for a, b in rename]
    rules += [
        pad_rows(theirs=("amplify.encoder.weight",), ours=(WORDS,)),
        pad_rows(theirs=("decoder.weight",), ours=("lm_head.decoder.weight",)),
        pad_rows(theirs=("decoder.bias",), ours=("lm_head.decoder.bias",), fill="min"),
        _frequencies(config),
    ]
    return Mapping.of(*rules, i=range(config.num_hidden_layers))


def _weights(bias: bool) -> tuple[str, ...]:
    return ("weight", "bias") if bias else ("weight",)


def _frequencies(config: AmplifyTEConfig) -> Recompute:
    head_dim = config.hidden_size // config.num_attention_heads
    return Recompute(
        ours=("model.rotary.0.inv_freq",),
        make=lambda: inverse_frequencies(head_dim, ROPE_BASE),
        why="the original stores no frequencies: it computes them",
        exact=True,
        keep_dtype=True,
    )


def read_config(theirs: Json, keys: Collection[str]) -> AmplifyTEConfig:
    """AMPLIFYConfig's JSON, chandar-lab's or NVIDIA's -> ours; ValueError naming what is missing or unknown."""
    required = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    missing = [key for key in required if key not in theirs]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    activation = str(theirs.get("hidden_act", "SwiGLU")).lower()
    if activation not in ACTIVATIONS.values():
        raise ValueError(f"hidden_act={theirs['hidden_act']!r} is none of the original's: {', '.join(ACTIVATIONS)}")
    fields = read_fields(theirs, {**{name: name for name in SAME_NAMES}, **RENAMED}, AmplifyTEConfig)
    dropout = fields.get("hidden_dropout_prob", 0.0)  # one number in the original, an integer in its published files
    fields |= {"hidden_dropout_prob": float(dropout), "attention_probs_dropout_prob": float(dropout)}
    return AmplifyTEConfig(**fields, hidden_act=activation)


def write_hf_config(config: AmplifyTEConfig, auto: str) -> Json:
    """Ours -> AMPLIFYConfig's JSON."""
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    if config.hidden_act not in names:
        raise ValueError(f"hidden_act={config.hidden_act!r} has no counterpart in the original, whose GELU is exact")
    refuse_other(config, {"rope": "pairs", "post_norm": False, "tie_word_embeddings": False}, "the original")
    if config.hidden_dropout_prob != config.attention_probs_dropout_prob:
        raise ValueError("the original has one dropout probability; hidden_ and attention_probs_dropout_prob differ")
    ours = config.to_dict()
    fields = {name: ours.get(name) for name in SAME_NAMES if name not in UNSET or ours.get(name)}
    fields |= {theirs: ours[name] for theirs, name in RENAMED.items()}
    return {
        "model_type": AMPLIFYConfig.model_type,
        **fields,
        "embedding_init_range": config.initializer_range,
        "hidden_act": names[config.hidden_act],
    }


def write_nvidia_config(config: AmplifyTEConfig, auto: str) -> Json:
    """Ours -> NVIDIA's AMPLIFYConfig JSON; ValueError for what that layout has no place for."""
    published = {
        "hidden_act": "swiglu", "rms_norm": True, "attention_bias": False, "mlp_bias": False,
        "layer_norm_after_embedding": False, "layer_norm_before_last_layer": True,
    }  # fmt: skip
    refuse_other(config, published, "NVIDIA's layout, of the published architecture only,")
    if config.vocab_size > NVIDIA_VOCABULARY:
        raise ValueError(f"NVIDIA's layout has {NVIDIA_VOCABULARY} rows of vocabulary, not {config.vocab_size}")
    return {**write_hf_config(config, auto), "padded_vocab_size": NVIDIA_VOCABULARY}


def build_hf(theirs: Json, auto: str) -> PreTrainedModel:
    """The reference implementation for a config.json; the checkpoint's own code is never run."""
    known = AMPLIFYConfig.__dataclass_fields__
    return AMPLIFY(AMPLIFYConfig(**{key: value for key, value in theirs.items() if key in known}))


def load_hf(folder: Path, auto: str, dtype: torch.dtype) -> PreTrainedModel:
    """The reference implementation with the folder's weights."""
    return AMPLIFY.from_pretrained(folder, dtype=dtype).eval()


ARCHITECTURES = {"AutoModelForMaskedLM": "AMPLIFY"}
NVIDIA_ARCHITECTURES = {"AutoModelForMaskedLM": "AMPLIFYForMaskedLM"}
PINNED = "d918a9e8"  # the revision of both sizes that others pin: its masks are binary
SHAPES: dict[str, Json] = {
    "AMPLIFY_120M": {},
    "AMPLIFY_350M": {
        "hidden_size": 960, "num_hidden_layers": 32, "num_attention_heads": 15, "intermediate_size": 3840,
    },
}  # fmt: skip
PARAMETERS = {"AMPLIFY_120M": "118,276,507", "AMPLIFY_350M": "354,008,667"}
CONTACT_PRECISION = {  # at L, in per cent, from the original's model card
    "AMPLIFY_120M": {"CAMEO": "17.8 ± 14.1", "CASP14": "12.4 ± 11.3", "CASP15": "16.9 ± 13.2"},
    "AMPLIFY_350M": {"CAMEO": "20.9 ± 15.7", "CASP14": "16.6 ± 13.6", "CASP15": "20.0 ± 14.6"},
}


def _published(name: str) -> Checkpoint:
    precision = {f"{test} contact precision at L (%)": value for test, value in CONTACT_PRECISION[name].items()}
    facts = {"parameters": PARAMETERS[name], **precision}
    return Checkpoint(f"chandar-lab/{name}", PINNED, shape=SHAPES[name], facts=facts)


def _published_base(name: str) -> Checkpoint:
    """Stage 1 of the training alone, with contexts of 512."""
    shape = {**SHAPES[name], "max_position_embeddings": 512}
    return Checkpoint(f"chandar-lab/{name}_base", shape=shape, facts={"parameters": PARAMETERS[name]})


PORT = ModelPort(
    name="amplify",
    title="AMPLIFY",
    package="biote_amplify",
    license="mit",
    config_class=AmplifyTEConfig,
    classes={
        "AutoModel": AmplifyTEModel,
        "AutoModelForMaskedLM": AmplifyTEForMaskedLM,
        "AutoModelForTokenClassification": AmplifyTEForTokenClassification,
        "AutoModelForSequenceClassification": AmplifyTEForSequenceClassification,
    },
    formats={
        "hf": Format(
            "AMPLIFY", ARCHITECTURES, hf_mapping, read_config, write_hf_config, build_hf, load_hf, AMPLIFYConfig
        ),
        "nvidia": Format("AMPLIFY", NVIDIA_ARCHITECTURES, nvidia_mapping, read_config, write_nvidia_config),
    },
    tags={
        **{name: _published(name) for name in SHAPES},
        **{f"{name}_base": _published_base(name) for name in SHAPES},
    },
    build_tokenizer=build_tokenizer,
    example_inputs=("MKTAYIAKQRQISFVKSHFSRQ<mask>EERLGLIEVQAPIL", "GSHMLE<mask>PQ"),
)


def convert_hf_to_te(model_hf: PreTrainedModel, **config_kwargs: Any) -> PreTrainedModel:
    """The reference AMPLIFY -> AmplifyTEForMaskedLM; config_kwargs set fields of AmplifyTEConfig."""
    return convert_model(PORT, model_hf, "te", config_kwargs)


def convert_te_to_hf(model_te: PreTrainedModel, **config_kwargs: Any) -> PreTrainedModel:
    """AmplifyTEForMaskedLM -> the reference AMPLIFY; config_kwargs set fields of AMPLIFYConfig."""
    return convert_model(PORT, model_te, "hf", config_kwargs)
