"""NVIDIA's published layout, written by real te.TransformerLayer modules, is read, computed and written back."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from biote.convert import convert_folder
from biote.files import WEIGHTS
from biote.runtime.verify import NOISE_FACTOR, relative_l2
from biote_esm2 import Esm2TEForMaskedLM

# te.TransformerLayer warns of its own ways of calling TE's attention
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
HIDDEN, HEADS, FFN, LAYERS, VOCABULARY, PADDED, EPS = 128, 4, 256, 3, 33, 64, 1e-5
LENGTHS = (100, 37, 61)
CONFIG = {
    "model_type": "nv_esm", "architectures": ["NVEsmForMaskedLM"], "vocab_size": VOCABULARY, "pad_token_id": 1,
    "padded_vocab_size": PADDED, "mask_token_id": 32, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "intermediate_size": FFN, "layer_norm_eps": EPS, "token_dropout": False,
    "position_embedding_type": "rotary", "emb_layer_norm_before": False, "qkv_weight_interleaved": True,
    "dtype": "bfloat16", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def random_stack():
    """Layers as NVIDIA's port builds them, every parameter random."""
    import transformer_engine.pytorch as te

    layers = [
        te.TransformerLayer(
            HIDDEN, FFN, HEADS, hidden_dropout=0.0, attention_dropout=0.0, layernorm_epsilon=EPS, activation="gelu",
            self_attn_mask_type="padding", attn_input_format="thd", fuse_qkv_params=True, qkv_weight_interleaved=True,
            params_dtype=torch.bfloat16, layer_number=number + 1,
        )
        for number in range(LAYERS)
    ]  # fmt: skip
    with torch.no_grad():
        for parameter in (p for layer in layers for p in layer.parameters()):
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.dim() == 1))
    return layers


def checkpoint_of(layers):
    """The stack's tensors and random ends, by NVIDIA's names."""
    state = {
        f"model.encoder.layers.{i}.{key}": tensor
        for i, layer in enumerate(layers)
        for key, tensor in layer.state_dict().items()
        if "_extra_state" not in key
    }
    shapes = {
        "model.embeddings.word_embeddings.weight": (PADDED, HIDDEN), "lm_head.dense.weight": (HIDDEN, HIDDEN),
        "lm_head.dense.bias": (HIDDEN,), "lm_head.decoder.bias": (PADDED,),
    }  # fmt: skip
    for prefix in ("model.encoder.emb_layer_norm_after.", "lm_head.decoder.layer_norm_"):
        shapes |= {f"{prefix}weight": (HIDDEN,), f"{prefix}bias": (HIDDEN,)}
    state |= {key: torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.2 for key, shape in shapes.items()}
    state["model.embeddings.word_embeddings.weight"][VOCABULARY:] = 0
    state["lm_head.decoder.bias"][VOCABULARY:] = torch.finfo(torch.bfloat16).min
    return state


def logits_of(layers, state, ids, bounds):
    """What NVIDIA's modules compute from packed token ids [T]."""
    import transformer_engine.pytorch as te

    longest = max(LENGTHS)
    frequencies = te.attention.RotaryPositionEmbedding(HIDDEN // HEADS)(max_seq_len=longest)
    sizes = {"cu_seqlens_q": bounds, "cu_seqlens_kv": bounds, "max_seqlen_q": longest, "max_seqlen_kv": longest}
    x = state["model.embeddings.word_embeddings.weight"][ids]
    for layer in layers:
        x = layer(x, rotary_pos_emb=frequencies, **sizes)
    after, head = "model.encoder.emb_layer_norm_after.", "lm_head.decoder.layer_norm_"
    x = F.layer_norm(x, (HIDDEN,), state[f"{after}weight"], state[f"{after}bias"], EPS)
    x = F.gelu(F.linear(x, state["lm_head.dense.weight"], state["lm_head.dense.bias"]))
    x = F.layer_norm(x, (HIDDEN,), state[f"{head}weight"], state[f"{head}bias"], EPS)
    return F.linear(x, state["model.embeddings.word_embeddings.weight"], state["lm_head.decoder.bias"])[:, :VOCABULARY]


def test_nvidia_layout_round_trips_and_computes_the_same(tmp_path):
    torch.manual_seed(0)
    layers = random_stack()
    state = checkpoint_of(layers)
    (tmp_path / "nvidia").mkdir()
    (tmp_path / "nvidia" / "config.json").write_text(json.dumps(CONFIG))
    save_file({key: tensor.cpu().contiguous() for key, tensor in state.items()}, tmp_path / "nvidia" / WEIGHTS)
    convert_folder(tmp_path / "nvidia", tmp_path / "te", "te")
    convert_folder(tmp_path / "te", tmp_path / "back", "nvidia")
    back = load_file(tmp_path / "back" / WEIGHTS)
    assert back.keys() == state.keys()
    assert all(torch.equal(tensor, state[key].cpu()) for key, tensor in back.items())

    ids = torch.randint(4, 33, (sum(LENGTHS),), device="cuda")
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int().cuda()
    batch = {"input_ids": ids[None], "cu_seq_lens_q": bounds, "max_length_q": max(LENGTHS)}
    fields = {"hidden_act": "gelu_tanh"}
    ours = Esm2TEForMaskedLM.from_pretrained(tmp_path / "te", engine="te", dtype=torch.bfloat16, **fields).cuda()
    exact = Esm2TEForMaskedLM.from_pretrained(tmp_path / "te", engine="torch", dtype=torch.float64, **fields).cuda()
    with torch.inference_mode():
        theirs = logits_of(layers, state, ids, bounds).double()
        reference = exact(**batch).logits[0]
        found = ours(**batch).logits[0].double()
    assert relative_l2(found, reference) <= NOISE_FACTOR * relative_l2(theirs, reference)
    assert relative_l2(theirs, reference) < 0.05, "the stack and our reading of it compute the same function"
