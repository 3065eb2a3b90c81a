"""Geneformer's port: the original's format with its mapping and configuration, and published checkpoints."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import BertConfig, PreTrainedModel

from biote.convert import convert_model
from biote.mapping import Drop, FuseQKV, Mapping, Rename, Rule, Shared
from biote.port import UNSET, Checkpoint, Format, Json, ModelPort, read_fields, refuse_other

from .cells import read_cells
from .dictionaries import MEDIANS, TOKEN_IDS, read_dictionary
from .geneformer_te import (
    GeneformerTEConfig,
    GeneformerTEForMaskedLM,
    GeneformerTEForSequenceClassification,
    GeneformerTEForTokenClassification,
    GeneformerTEModel,
)

WEIGHT_AND_BIAS = ("weight", "bias")
OUR_LAYER, HF_LAYER = "model.layers.{i}.", "bert.encoder.layer.{i}."
SAME_NAMES = (  # fields that BertConfig and ours have in common
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "max_position_embeddings", "type_vocab_size",
    "initializer_range", "layer_norm_eps", "pad_token_id", "tie_word_embeddings", "id2label", "label2id",
    "problem_type", "dtype",
)  # fmt: skip


def hf_mapping(config: GeneformerTEConfig, theirs: Json, auto: str) -> Mapping:
    """transformers' BertModel and its heads; every norm goes to the layer that reads it (see `block.py`)."""
    rename = [
        ("bert.embeddings.position_embeddings.weight", "model.embeddings.position_embeddings.weight"),
        ("bert.embeddings.token_type_embeddings.weight", "model.embeddings.token_type_embeddings.weight"),
        (HF_LAYER + "attention.output.dense.{k}", OUR_LAYER + "attention.proj.{k}"),
        (HF_LAYER + "attention.output.LayerNorm.{k}", OUR_LAYER + "mlp.norm.{k}"),
        (HF_LAYER + "intermediate.dense.{k}", OUR_LAYER + "mlp.fc1.{k}"),
        (HF_LAYER + "output.dense.{k}", OUR_LAYER + "mlp.fc2.{k}"),
    ]
    last = config.num_hidden_layers - 1
    first_norms = ["bert.embeddings.LayerNorm.{k}"]
    first_norms += [f"bert.encoder.layer.{i}.output.LayerNorm.{{k}}" for i in range(last)]
    rename += [(norm, f"model.layers.{i}.attention.norm.{{k}}") for i, norm in enumerate(first_norms)]
    rename.append((f"bert.encoder.layer.{last}.output.LayerNorm.{{k}}", "model.final_norm.{k}"))
    masked = auto == "AutoModelForMaskedLM"
    rules: list[Rule] = [Rename(theirs=(a,), ours=(b,)) for a, b in rename + HF_HEADS[auto]]
    rules += [
        Shared(
            theirs=("bert.embeddings.word_embeddings.weight",),
            also=("cls.predictions.decoder.weight",) if masked else (),
            ours=("model.embeddings.word_embeddings.weight",),
        ),
        FuseQKV(
            theirs=tuple(HF_LAYER + f"attention.self.{part}.{{k}}" for part in ("query", "key", "value")),
            ours=(OUR_LAYER + "attention.qkv.{k}",),
            heads=config.num_attention_heads,
        ),
        Drop(theirs=("bert.embeddings.position_ids",), why="a constant 0, 1, 2, ... of old files"),
    ]
    if masked:
        rules.append(
            Shared(
                theirs=("cls.predictions.bias",),
                also=("cls.predictions.decoder.bias",),
                ours=("lm_head.decoder.bias",),
            )
        )
        rules.append(Drop(theirs=("cls.seq_relationship.{k}",), why="next-sentence prediction: not this head's"))
    if auto != "AutoModelForSequenceClassification":
        rules.append(Drop(theirs=("bert.pooler.dense.{k}",), why="Geneformer was trained without a pooler"))
    mapping = Mapping.of(*rules, respell=RESPELL, i=range(config.num_hidden_layers), k=WEIGHT_AND_BIAS)
    return mapping.under("bert.", "model.") if auto == "AutoModel" else mapping


RESPELL = [(r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")]
HF_HEADS: dict[str, list[tuple[str, str]]] = {
    "AutoModel": [],
    "AutoModelForMaskedLM": [
        ("cls.predictions.transform.dense.{k}", "lm_head.dense.{k}"),
        ("cls.predictions.transform.LayerNorm.{k}", "lm_head.layer_norm.{k}"),
    ],
    "AutoModelForTokenClassification": [("classifier.{k}", "classifier.{k}")],
    "AutoModelForSequenceClassification": [
        ("bert.pooler.dense.{k}", "classifier.dense.{k}"),
        ("classifier.{k}", "classifier.out_proj.{k}"),
    ],
}


def read_hf_config(theirs: Json, keys: Collection[str]) -> GeneformerTEConfig:
    """BertConfig's JSON -> ours; ValueError naming everything in it that the port does not compute."""
    required = {
        "hidden_act": ("relu", "gelu"), "position_embedding_type": ("absolute", None), "is_decoder": (False, None),
        "add_cross_attention": (False, None), "tie_word_embeddings": (True,), "classifier_dropout": (None,),
    }  # fmt: skip
    defaults = BertConfig().to_dict()
    wrong = [
        f"{key}={theirs.get(key, defaults.get(key))!r}"
        for key, allowed in required.items()
        if theirs.get(key, defaults.get(key)) not in allowed
    ]
    if wrong:
        raise ValueError(f"this is a BERT, but not one that this port computes: {', '.join(wrong)}")
    names = {name: name for name in SAME_NAMES}
    return GeneformerTEConfig(**read_fields({**defaults, **theirs}, names, GeneformerTEConfig))


def write_hf_config(config: GeneformerTEConfig, auto: str) -> Json:
    """Ours -> BertConfig's JSON."""
    architecture = {
        "rms_norm": False, "attention_bias": True, "mlp_bias": True, "rope": "none", "post_norm": True,
        "tie_word_embeddings": True,
    }  # fmt: skip
    refuse_other(config, architecture, "transformers' BERT")
    if config.hidden_act not in ("relu", "gelu"):
        raise ValueError(f"hidden_act={config.hidden_act!r} has no counterpart in the original")
    ours = config.to_dict()
    same = {name: ours.get(name) for name in SAME_NAMES if name not in UNSET or ours.get(name)}
    return {"model_type": "bert", **same}


def build_hf(theirs: Json, auto: str) -> PreTrainedModel:
    """The original implementation for a config.json."""
    config = BertConfig.from_dict(theirs)
    if auto == "AutoModel":
        return transformers.BertModel(config, add_pooling_layer=False)
    return getattr(transformers, HF_CLASSES[auto])(config)


def load_hf(folder: Path, auto: str, dtype: torch.dtype) -> PreTrainedModel:
    """The original, loaded by transformers itself; eager attention, which can return attention maps."""
    cls = getattr(transformers, HF_CLASSES[auto])
    bare = {"add_pooling_layer": False} if auto == "AutoModel" else {}
    return cls.from_pretrained(folder, dtype=dtype, attn_implementation="eager", **bare).eval()


HF_CLASSES = {
    "AutoModel": "BertModel",
    "AutoModelForMaskedLM": "BertForMaskedLM",
    "AutoModelForTokenClassification": "BertForTokenClassification",
    "AutoModelForSequenceClassification": "BertForSequenceClassification",
}
REPOSITORY, PINNED = "ctheodoris/Geneformer", "f45a6c7d"  # one repository, a folder each; the revision others pin


def _published(layers: int, hidden: int, ffn: int, vocabulary: int, positions: int, parameters: str) -> dict[str, Any]:
    shape = {
        "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": hidden // 64,
        "intermediate_size": ffn, "vocab_size": vocabulary, "max_position_embeddings": positions,
    }  # fmt: skip
    return {"shape": shape, "facts": {"parameters": parameters}}


V2_104M = _published(12, 768, 3072, 20275, 4096, "104,386,867")
PUBLISHED = {
    "Geneformer-V1-10M": _published(6, 256, 512, 25426, 2048, "10,288,722"),
    "gf-12L-38M-i4096": _published(12, 512, 1024, 20275, 4096, "37,997,363"),
    "Geneformer-V2-104M": V2_104M,
    "Geneformer-V2-104M_CLcancer": V2_104M,
    "Geneformer-V2-316M": _published(18, 1152, 4608, 20275, 4096, "316,354,867"),
}

PORT = ModelPort(
    name="geneformer",
    title="Geneformer",
    package="biote_geneformer",
    license="apache-2.0",
    config_class=GeneformerTEConfig,
    classes={
        "AutoModel": GeneformerTEModel,
        "AutoModelForMaskedLM": GeneformerTEForMaskedLM,
        "AutoModelForTokenClassification": GeneformerTEForTokenClassification,
        "AutoModelForSequenceClassification": GeneformerTEForSequenceClassification,
    },
    formats={
        "hf": Format("bert", HF_CLASSES, hf_mapping, read_hf_config, write_hf_config, build_hf, load_hf, BertConfig)
    },
    tags={tag: Checkpoint(REPOSITORY, PINNED, tag, **published) for tag, published in PUBLISHED.items()},
    build_tokenizer=None,
    example_inputs=((2, 17, 9, 40, 1, 23, 31, 12, 5, 3), (2, 8, 1, 30, 3)),
    read_cells=read_cells,
    files={TOKEN_IDS: read_dictionary, MEDIANS: read_dictionary},
)


def convert_hf_to_te(model_hf: PreTrainedModel, **config_kwargs: Any) -> PreTrainedModel:
    """transformers' Bert... model -> the GeneformerTE... model of the same head; config_kwargs set its fields."""
    return convert_model(PORT, model_hf, "te", config_kwargs)


def convert_te_to_hf(model_te: PreTrainedModel, **config_kwargs: Any) -> PreTrainedModel:
    """A GeneformerTE... model -> transformers' Bert... model of the same head; config_kwargs set its fields."""
    return convert_model(PORT, model_te, "hf", config_kwargs)
