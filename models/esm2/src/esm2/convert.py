"""ESM-2's port: formats (the original's and NVIDIA's) with mappings and configurations, and published checkpoints."""

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import EsmConfig, PreTrainedModel

from biote.convert import convert_model
from biote.mapping import Drop, FuseQKV, LeaveOut, Mapping, PadRows, Recompute, Rename, Rule, Shared
from biote.port import UNSET, Checkpoint, Format, Json, ModelPort, read_fields, refuse_other
from biote.runtime.rope import inverse_frequencies

from .esm2_te import (
    Esm2TEConfig,
    Esm2TEForMaskedLM,
    Esm2TEForSequenceClassification,
    Esm2TEForTokenClassification,
    Esm2TEModel,
)
from .tokenizer import build_tokenizer

WEIGHT_AND_BIAS = ("weight", "bias")
WORDS = "model.embeddings.word_embeddings.weight"
OUR_LAYER, HF_LAYER = "model.layers.{i}.", "esm.encoder.layer.{i}."
NVIDIA_LAYER = "model.encoder.layers.{i}."
HF_INV_FREQ = "rotary_embeddings.inv_freq"
ARCHITECTURE: Json = {  # what every ESM-2 has, in fields of our configuration
    "rms_norm": False, "attention_bias": True, "mlp_bias": True, "rope": "half", "post_norm": False,
    "tie_word_embeddings": True,
}  # fmt: skip
NVIDIA_VOCABULARY = 64  # rows of the vocabulary in NVIDIA's padded checkpoints
SAME_NAMES = (  # fields that EsmConfig and ours have in common
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "layer_norm_eps",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "pad_token_id", "mask_token_id",
    "eos_token_id", "max_position_embeddings", "token_dropout", "tie_word_embeddings", "id2label", "label2id",
    "problem_type", "dtype",
)  # fmt: skip


def hf_mapping(config: Esm2TEConfig, theirs: Json, auto: str) -> Mapping:
    """transformers' EsmModel and its heads, in every spelling that released versions wrote."""
    rename = [
        ("esm.encoder.emb_layer_norm_after.{k}", "model.final_norm.{k}"),
        (HF_LAYER + "attention.LayerNorm.{k}", OUR_LAYER + "attention.norm.{k}"),
        (HF_LAYER + "attention.output.dense.{k}", OUR_LAYER + "attention.proj.{k}"),
        (HF_LAYER + "LayerNorm.{k}", OUR_LAYER + "mlp.norm.{k}"),
        (HF_LAYER + "intermediate.dense.{k}", OUR_LAYER + "mlp.fc1.{k}"),
        (HF_LAYER + "output.dense.{k}", OUR_LAYER + "mlp.fc2.{k}"),
    ]
    rules: list[Rule] = [Rename(theirs=(a,), ours=(b,)) for a, b in rename + HF_HEADS[auto]]
    rules += [
        Shared(
            theirs=("esm.embeddings.word_embeddings.weight",),
            also=("lm_head.decoder.weight",) if auto == "AutoModelForMaskedLM" else (),
            ours=(WORDS,),
        ),
        FuseQKV(
            theirs=tuple(HF_LAYER + f"attention.self.{part}.{{k}}" for part in ("query", "key", "value")),
            ours=(OUR_LAYER + "attention.qkv.{k}",),
            heads=config.num_attention_heads,
        ),
        Shared(
            theirs=(HF_LAYER + "attention.self." + HF_INV_FREQ,),
            also=("esm." + HF_INV_FREQ, "esm.encoder.layer.*.attention.self." + HF_INV_FREQ),
            ours=("model.rotary.0.inv_freq",),
            keep_dtype=True,
        ),
        Drop(theirs=("esm.embeddings.position_ids",), why="a constant 0, 1, 2, ... of old files"),
        Drop(theirs=("esm.embeddings.position_embeddings.weight",), why="unused: ESM-2 is rotary"),
    ]
    contacts = "esm.contact_head.regression.{k}"
    if config.contact_head:
        rules.append(Rename(theirs=(contacts,), ours=("model.contact_head.regression.{k}",)))
    else:
        rules.append(Drop(theirs=(contacts,), why="asked for: contact_head=False"))
    if auto == "AutoModel":
        rules.append(Drop(theirs=("esm.pooler.dense.{k}",), why="never trained: ESM-2 has no pooler"))
    respell = [(r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")]
    mapping = Mapping.of(*rules, respell=respell, i=range(config.num_hidden_layers), k=WEIGHT_AND_BIAS)
    return mapping.under("esm.", "model.") if auto == "AutoModel" else mapping


HF_HEADS: dict[str, list[tuple[str, str]]] = {
    "AutoModel": [],
    "AutoModelForMaskedLM": [
        ("lm_head.dense.{k}", "lm_head.dense.{k}"),
        ("lm_head.layer_norm.{k}", "lm_head.layer_norm.{k}"),
        ("lm_head.bias", "lm_head.decoder.bias"),
    ],
    "AutoModelForTokenClassification": [("classifier.{k}", "classifier.{k}")],
    "AutoModelForSequenceClassification": [
        ("classifier.dense.{k}", "classifier.dense.{k}"),
        ("classifier.out_proj.{k}", "classifier.out_proj.{k}"),
    ],
}


def nvidia_mapping(config: Esm2TEConfig, theirs: Json, auto: str) -> Mapping:
    """The TE checkpoints that NVIDIA publishes: no contact head, no rotary frequencies, padded vocabulary."""
    rename = [
        ("model.encoder.emb_layer_norm_after.{k}", "model.final_norm.{k}"),
        (NVIDIA_LAYER + "self_attention.layernorm_qkv.layer_norm_{k}", OUR_LAYER + "attention.norm.{k}"),
        (NVIDIA_LAYER + "self_attention.layernorm_qkv.{k}", OUR_LAYER + "attention.qkv.{k}"),
        (NVIDIA_LAYER + "self_attention.proj.{k}", OUR_LAYER + "attention.proj.{k}"),
        (NVIDIA_LAYER + "layernorm_mlp.layer_norm_{k}", OUR_LAYER + "mlp.norm.{k}"),
        (NVIDIA_LAYER + "layernorm_mlp.fc1_{k}", OUR_LAYER + "mlp.fc1.{k}"),
        (NVIDIA_LAYER + "layernorm_mlp.fc2_{k}", OUR_LAYER + "mlp.fc2.{k}"),
    ]
    their_rows = theirs.get("padded_vocab_size") or config.vocab_size
    pad_rows = partial(PadRows, our_rows=config.vocab_size, their_rows=their_rows)
    rules: list[Rule] = [
        pad_rows(
            theirs=("model.embeddings.word_embeddings.weight",),
            also=("lm_head.decoder.weight",) if auto == "AutoModelForMaskedLM" else (),
            ours=(WORDS,),
        ),
        Recompute(
            ours=("model.rotary.0.inv_freq",),
            make=lambda: inverse_frequencies(config.hidden_size // config.num_attention_heads, config.rope_theta),
            why="NVIDIA's modules recompute the frequencies",
            keep_dtype=True,
        ),
        LeaveOut(ours=("model.contact_head.regression.{k}",), why="NVIDIA's layout has no contact head"),
    ]
    if auto == "AutoModelForMaskedLM":
        rename += [
            ("lm_head.dense.{k}", "lm_head.dense.{k}"),
            ("lm_head.decoder.layer_norm_{k}", "lm_head.layer_norm.{k}"),
        ]
        rules.append(pad_rows(theirs=("lm_head.decoder.bias",), ours=("lm_head.decoder.bias",), fill="min"))
    elif auto == "AutoModelForTokenClassification":
        rename.append(("classifier.{k}", "classifier.{k}"))
    rules += [Rename(theirs=(a,), ours=(b,)) for a, b in rename]
    mapping = Mapping.of(*rules, i=range(config.num_hidden_layers), k=WEIGHT_AND_BIAS)
    return mapping.under("model.", "model.") if auto == "AutoModel" else mapping


def read_hf_config(theirs: Json, keys: Collection[str]) -> Esm2TEConfig:
    """EsmConfig's JSON -> ours; ValueError naming everything in it that is not ESM-2."""
    required = {
        "position_embedding_type": ("rotary",), "emb_layer_norm_before": (False, None), "hidden_act": ("gelu", None),
        "is_decoder": (False, None), "add_cross_attention": (False, None), "is_folding_model": (False, None),
    }  # fmt: skip
    wrong = [f"{key}={theirs.get(key)!r}" for key, allowed in required.items() if theirs.get(key) not in allowed]
    if wrong:
        raise ValueError(f"this is an ESM model, but not an ESM-2 one: {', '.join(wrong)}")
    config = _common_config({**EsmConfig().to_dict(), **theirs})
    config.contact_head = any(".contact_head." in f".{key}" for key in keys)
    return config


def read_nvidia_config(theirs: Json, keys: Collection[str]) -> Esm2TEConfig:
    """NVEsmConfig's JSON -> ours, with the exact GELU of the original (NVIDIA's modules compute `gelu_tanh`)."""
    if theirs.get("qkv_weight_interleaved") is False:
        raise ValueError("qkv_weight_interleaved=False: only NVIDIA's published layout, interleaved by head, is read")
    config = _common_config(theirs)
    config.contact_head = False
    return config


def _common_config(theirs: Json) -> Esm2TEConfig:
    required = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    missing = [key for key in required if key not in theirs]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    rope = theirs.get("rope_parameters") or {}
    return Esm2TEConfig(
        **read_fields(theirs, {name: name for name in SAME_NAMES}, Esm2TEConfig),
        rope_theta=theirs.get("rope_theta") or rope.get("rope_theta") or 10000.0,
    )


def write_hf_config(config: Esm2TEConfig, auto: str) -> Json:
    """Ours -> EsmConfig's JSON."""
    refuse_other(config, {**ARCHITECTURE, "hidden_act": "gelu"}, "transformers' ESM, whose GELU is exact,")
    return {"model_type": "esm", **_written(config)}


def write_nvidia_config(config: Esm2TEConfig, auto: str) -> Json:
    """Ours -> NVEsmConfig's JSON."""
    refuse_other(config, ARCHITECTURE, "NVIDIA's layout")
    if config.hidden_act not in ("gelu", "gelu_tanh"):
        raise ValueError(f"NVIDIA's layout has no counterpart of hidden_act={config.hidden_act!r}")
    return {
        "model_type": "nv_esm",
        **_written(config),
        "qkv_weight_interleaved": True,
        "encoder_activation": "gelu",
        "padded_vocab_size": NVIDIA_VOCABULARY,
        "attn_input_format": "bshd",
        "fuse_qkv_params": True,
    }


def _written(config: Esm2TEConfig) -> Json:
    ours = config.to_dict()
    same = {name: ours.get(name) for name in (*SAME_NAMES, "rope_theta") if name not in UNSET or ours.get(name)}
    return {**same, "hidden_act": "gelu", "position_embedding_type": "rotary", "emb_layer_norm_before": False}


def build_hf(theirs: Json, auto: str) -> PreTrainedModel:
    """The original implementation for a config.json."""
    config = EsmConfig.from_dict(theirs)
    if auto == "AutoModel":
        return transformers.EsmModel(config, add_pooling_layer=False)
    return getattr(transformers, HF_CLASSES[auto])(config)


def load_hf(folder: Path, auto: str, dtype: torch.dtype) -> PreTrainedModel:
    """The original, loaded by transformers itself; eager attention, which can return attention maps."""
    cls = getattr(transformers, HF_CLASSES[auto])
    return cls.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


HF_CLASSES = {
    "AutoModel": "EsmModel",
    "AutoModelForMaskedLM": "EsmForMaskedLM",
    "AutoModelForTokenClassification": "EsmForTokenClassification",
    "AutoModelForSequenceClassification": "EsmForSequenceClassification",
}
NVIDIA_CLASSES = {
    "AutoModel": "NVEsmModel",
    "AutoModelForMaskedLM": "NVEsmForMaskedLM",
    "AutoModelForTokenClassification": "NVEsmForTokenClassification",
}


def _published(tag: str, layers: int, hidden: int, heads: int, parameters: str, cameo: str, casp14: str) -> Checkpoint:
    shape = {
        "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
    }  # fmt: skip
    facts = {"parameters": parameters, "CAMEO contact precision": cameo, "CASP14 contact precision": casp14}
    return Checkpoint(f"facebook/{tag}", shape=shape, facts=facts)


PUBLISHED: list[tuple[str, int, int, int, str, str, str]] = [  # tag, layers, hidden, heads, then facts
    ("esm2_t6_8M_UR50D", 6, 320, 20, "7,512,353", "0.48", "0.37"),
    ("esm2_t12_35M_UR50D", 12, 480, 20, "33,501,153", "0.56", "0.41"),
    ("esm2_t30_150M_UR50D", 30, 640, 20, "148,139,553", "0.65", "0.49"),
    ("esm2_t33_650M_UR50D", 33, 1280, 20, "651,042,593", "0.70", "0.51"),
    ("esm2_t36_3B_UR50D", 36, 2560, 40, "2,839,004,193", "0.72", "0.52"),
    ("esm2_t48_15B_UR50D", 48, 5120, 40, "15,129,098,273", "0.72", "0.55"),
]

PORT = ModelPort(
    name="esm2",
    title="ESM-2",
    package="biote_esm2",
    license="mit",
    config_class=Esm2TEConfig,
    classes={
        "AutoModel": Esm2TEModel,
        "AutoModelForMaskedLM": Esm2TEForMaskedLM,
        "AutoModelForTokenClassification": Esm2TEForTokenClassification,
        "AutoModelForSequenceClassification": Esm2TEForSequenceClassification,
    },
    formats={
        "hf": Format("esm", HF_CLASSES, hf_mapping, read_hf_config, write_hf_config, build_hf, load_hf, EsmConfig),
        "nvidia": Format("nv_esm", NVIDIA_CLASSES, nvidia_mapping, read_nvidia_config, write_nvidia_config),
    },
    tags={published[0]: _published(*published) for published in PUBLISHED},
    build_tokenizer=build_tokenizer,
    example_inputs=("MKTAYIAKQRQISFVKSHFSRQ<mask>EERLGLIEVQAPIL", "GSHMLE<mask>PQ"),
    trained_tokens=1024,
)


def convert_hf_to_te(model_hf: PreTrainedModel, **config_kwargs: Any) -> PreTrainedModel:
    """transformers' Esm... model -> the Esm2TE... model of the same head; config_kwargs set fields of Esm2TEConfig."""
    return convert_model(PORT, model_hf, "te", config_kwargs)


def convert_te_to_hf(model_te: PreTrainedModel, **config_kwargs: Any) -> PreTrainedModel:
    """An Esm2TE... model -> transformers' Esm... model of the same head; config_kwargs set fields of EsmConfig."""
    return convert_model(PORT, model_te, "hf", config_kwargs)
