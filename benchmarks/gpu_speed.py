"""Speed on one GPU, all sides in one run: the original, NVIDIA's recipe, both engines of biote. Random weights, bf16.

"NVIDIA recipe" is a stack of te.TransformerLayer over packed tokens (THD) with TE's rotary embedding, as NVIDIA's
ports ship it. Every side ends in the masked-LM logits; training adds the loss and backward. Medians.
A case is MODEL:TOKENS:forward or :training. TOKENS is about how many, as proteins of random lengths, or BxS for B
sequences of S tokens.
Shapes: T packed tokens, B sequences, S padded length, N hidden size.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformer_engine.pytorch as te
from common import provenance, tagged, write_result
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_engine.common.recipe import DelayedScaling

from biote.runtime.config import EncoderConfig
from biote.runtime.cuda_graphs import MAX_TOKENS

TAGS = {
    "8M": "esm2_t6_8M_UR50D", "650M": "esm2_t33_650M_UR50D", "3B": "esm2_t36_3B_UR50D", "AMPLIFY 350M": "AMPLIFY_350M",
    "Geneformer 316M": "Geneformer-V2-316M",
}  # fmt: skip
AUTO = "AutoModelForMaskedLM"
COMPILED = ("650M",)
PACKAGES = ("torch", "transformers", "biote", "transformer_engine")
WARM_UPS, REPEATS, SECONDS = 3, 9, 0.4
COMPILED_TOKENS = range(1_000, 12_000)  # compiled sides take long to build; elsewhere they are left out
Step = Callable[[], Tensor]


def lengths_of(case: str) -> list[int]:
    """BxS: B sequences of S tokens; else protein-like lengths that make about so many tokens.

    Protein-like: log-normal, median 270, at most 1024 tokens.
    """
    if "x" in case:
        sequences, length = case.split("x")
        return [int(length)] * int(sequences)
    tokens = int(case)
    if tokens <= 1024:
        return [tokens]
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        drawn = float(torch.empty(1).log_normal_(5.6, 0.7, generator=generator))
        lengths.append(int(min(max(drawn, 32), 1024)))
    lengths[-1] += -sum(lengths) % 16  # NVIDIA's recipe does not pad for fp8
    return lengths


class Batch:
    """One batch, padded and packed."""

    def __init__(self, model: str, tokens: str):
        self.lengths = lengths_of(tokens)
        self.tokens = sum(self.lengths)
        generator = torch.Generator().manual_seed(1)
        last = 24 if tagged(TAGS[model])[0].build_tokenizer else config_of(model).vocab_size  # amino acids, or genes
        ids = torch.randint(4, last, (self.tokens,), generator=generator)
        mask = torch.arange(max(self.lengths)) < torch.tensor(self.lengths)[:, None]
        rows = torch.ones(mask.shape, dtype=torch.long)
        rows[mask] = ids
        self.padded = {"input_ids": rows.cuda(), "attention_mask": mask.long().cuda()}
        self.padded_labels = torch.where(mask, rows, -100).cuda()
        bounds = F.pad(torch.tensor(self.lengths).cumsum(0), (1, 0)).int().cuda()
        longest = max(self.lengths)
        self.packed: dict[str, Any] = {"input_ids": ids[None].cuda(), "cu_seq_lens_q": bounds, "max_length_q": longest}


def config_of(model: str, **fields: Any) -> EncoderConfig:
    port, checkpoint = tagged(TAGS[model])
    return port.config_class(**checkpoint.shape, **fields)


def original(model: str, compiled: bool) -> Any:
    form = tagged(TAGS[model])[0].formats["hf"]
    assert form.build is not None
    with torch.device("cuda"):
        hf = form.build(form.write_config(config_of(model, engine="torch"), AUTO), AUTO).to(torch.bfloat16)
    if compiled:
        for layer in blocks_of(hf):
            layer.compile()
    return hf


def blocks_of(model: nn.Module) -> nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 4)


def ours(model: str, engine: str, compiled: bool = False, **fields: Any) -> Any:
    with torch.device("cuda"):
        built = tagged(TAGS[model])[0].classes[AUTO](config_of(model, engine=engine, **fields)).to(torch.bfloat16)
    if compiled:
        for layer in built.base_model.layers:
            layer.compile()
    return built


class NvidiaRecipe(nn.Module):
    """Embedding, te.TransformerLayer stack in THD, final norm (post-norm: first norm), masked-LM head."""

    def __init__(self, model: str):
        super().__init__()
        config = config_of(model)
        hidden, heads = config.hidden_size, config.num_attention_heads
        self.embeddings = nn.Embedding(config.vocab_size, hidden)
        self.post_norm = config.post_norm
        self.layers = nn.ModuleList(
            te.TransformerLayer(
                hidden, config.feed_forward_width, heads, hidden_dropout=0.0, attention_dropout=0.0,
                layernorm_epsilon=1e-5, self_attn_mask_type="padding", attn_input_format="thd",
                activation=config.hidden_act, bias=config.mlp_bias, rotary_pos_interleaved=config.rope == "pairs",
                normalization="RMSNorm" if config.rms_norm else "LayerNorm", fuse_qkv_params=True,
                qkv_weight_interleaved=True, output_layernorm=config.post_norm,
                apply_residual_connection_post_layernorm=config.post_norm, params_dtype=torch.bfloat16,
                layer_number=number + 1,
            )
            for number in range(config.num_hidden_layers)
        )  # fmt: skip
        self.rotary = None
        if config.rope != "none":
            self.rotary = te.attention.RotaryPositionEmbedding(hidden // heads, interleaved=config.rope == "pairs")
        self.norm = (te.RMSNorm if config.rms_norm else te.LayerNorm)(hidden)
        small = {**tagged(TAGS[model])[1].shape, "num_hidden_layers": 1, "engine": "torch"}
        port = tagged(TAGS[model])[0]
        self.head = port.classes[AUTO](port.config_class(**small)).lm_head

    def forward(self, input_ids: Tensor, cu_seq_lens_q: Tensor, max_length_q: int) -> Tensor:
        x = self.embeddings(input_ids[0])
        x = self.norm(x) if self.post_norm else x
        frequencies = None if self.rotary is None else self.rotary(max_seq_len=1024)
        for layer in self.layers:
            x = layer(
                x, rotary_pos_emb=frequencies, cu_seqlens_q=cu_seq_lens_q, cu_seqlens_kv=cu_seq_lens_q,
                max_seqlen_q=max_length_q, max_seqlen_kv=max_length_q,
            )  # fmt: skip
        return self.head(x if self.post_norm else self.norm(x))


def forward_and_backward(model: nn.Module, loss: Callable[[], Tensor]) -> Tensor:
    model.zero_grad(set_to_none=True)
    value = loss()
    value.backward()
    return value


def sides(model: str, batch: Batch, training: bool) -> dict[str, Callable[[], Step]]:
    """Builders of one step each, by name; a side is built, timed and dropped before the next."""

    def hf(compiled: bool) -> Step:
        built = original(model, compiled).train(training)
        if training:
            return lambda: forward_and_backward(built, lambda: built(**batch.padded, labels=batch.padded_labels).loss)
        return lambda: built(**batch.padded).logits

    def nvidia(fp8: bool) -> Step:
        with torch.device("cuda"):
            built = NvidiaRecipe(model).to(torch.bfloat16).train(training)
        recipe = DelayedScaling()

        def logits() -> Tensor:
            with te.autocast(enabled=True, recipe=recipe) if fp8 else nullcontext():
                return built(**batch.packed)

        if training:
            labels = batch.packed["input_ids"][0]
            return lambda: forward_and_backward(built, lambda: F.cross_entropy(logits().float(), labels))
        return logits

    def biote(engine: str, compiled: bool = False, **fields: Any) -> Step:
        built = ours(model, engine, compiled, **fields).train(training)
        if training:
            labels = batch.packed["input_ids"]
            return lambda: forward_and_backward(built, lambda: built(**batch.packed, labels=labels).loss)
        return lambda: built(**batch.packed).logits

    named: dict[str, Callable[[], Step]] = {
        "original padded": lambda: hf(False),
        "original padded, compiled": lambda: hf(True),
        "NVIDIA recipe": lambda: nvidia(False),
        "NVIDIA recipe, fp8": lambda: nvidia(True),
        "torch engine": lambda: biote("torch"),
        "torch engine, compiled": lambda: biote("torch", compiled=True),
        "te engine": lambda: biote("te"),
        "te engine, fp8": lambda: biote("te", layer_precision="fp8"),
    }
    if not training and batch.tokens <= MAX_TOKENS:
        named["te engine, graph"] = lambda: biote("te", cuda_graphs=True)
        named["te engine, fp8, graph"] = lambda: biote("te", cuda_graphs=True, layer_precision="fp8")
    if batch.tokens % 16:
        named.pop("NVIDIA recipe, fp8")
    if batch.tokens not in COMPILED_TOKENS or model not in COMPILED:
        named = {name: build for name, build in named.items() if "compiled" not in name}
    return named


def measure(step: Step, training: bool) -> dict[str, float]:
    """Median milliseconds by CUDA events, and the host's share: what the call itself takes to return."""
    with nullcontext() if training else torch.inference_mode():
        for _ in range(WARM_UPS):
            step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        milliseconds, host = [], []
        until = time.perf_counter() + SECONDS
        while len(milliseconds) < REPEATS or (time.perf_counter() < until and len(milliseconds) < 200):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begun = time.perf_counter()
            start.record()
            step()
            host.append(1e3 * (time.perf_counter() - begun))
            end.record()
            end.synchronize()
            milliseconds.append(start.elapsed_time(end))
    return {
        "ms": statistics.median(milliseconds),
        "host_ms": statistics.median(host),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
    }


def ceilings() -> dict[str, float]:
    """TFLOP/s of a large bf16 product and TB/s of a large copy, measured here."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    copied = torch.empty(2**30, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(copied)
    product = measure(lambda: a @ b, False)["ms"]
    copy = measure(lambda: target.copy_(copied), False)["ms"]
    return {"bf16_tflops": 2 * 8192**3 / product / 1e9, "copy_tb_s": 2 * copied.numel() * 2 / copy / 1e9}


def floor_ms(model: str, batch: Batch, rates: dict[str, float]) -> float:
    """No forward pass is much faster: products and attention at the product's rate, and the least bytes of the rest.

    Least bytes a token and layer: two norms, rotation of queries and keys, activation, each reading and writing once.
    """
    config = config_of(model)
    hidden, width = config.hidden_size, config.feed_forward_width
    up = 2 * width if config.hidden_act == "swiglu" else width
    weights = 4 * hidden**2 + (up + width) * hidden
    products = 2 * weights * batch.tokens
    decoder = 2 * hidden * config.vocab_size * batch.tokens
    attention = sum(4 * length**2 * hidden for length in batch.lengths)
    least_bytes = 2 * batch.tokens * (8 * hidden + up + width) + 2 * weights
    seconds = (products + attention) / rates["bf16_tflops"] / 1e12 + least_bytes / rates["copy_tb_s"] / 1e12
    return 1e3 * (config.num_hidden_layers * seconds + decoder / rates["bf16_tflops"] / 1e12)


def rows(model: str, tokens: str, training: bool, wanted: list[str], rates: dict[str, float]) -> Iterator[dict]:
    batch = Batch(model, tokens)
    common = {
        "model": model, "mode": "training" if training else "forward", "tokens": batch.tokens,
        "sequences": len(batch.lengths), "padded_tokens": len(batch.lengths) * max(batch.lengths),
        "floor_ms": floor_ms(model, batch, rates) * (3 if training else 1),
    }  # fmt: skip
    for name, build in sides(model, batch, training).items():
        if wanted and name not in wanted:
            continue
        try:
            found: dict[str, Any] = measure(build(), training)
            found["tokens_per_s"] = batch.tokens / found["ms"] * 1e3
        except torch.OutOfMemoryError:
            found = {"ms": None, "note": "out of memory"}
        except Exception as error:  # of one side: the others still count, and the table says what happened
            found = {"ms": None, "note": f"{type(error).__name__}: {str(error)[:100]}"}
        yield {**common, "side": name, **found}
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=[
        "650M:300:forward", "650M:10000:forward", "650M:43000:forward", "650M:10000:training", "650M:43000:training",
        "AMPLIFY 350M:300:forward", "AMPLIFY 350M:10000:forward", "AMPLIFY 350M:43000:forward",
        "AMPLIFY 350M:43000:training", "3B:16000:forward", "8M:300:forward",
        "Geneformer 316M:1x2048:forward", "Geneformer 316M:16x2048:forward", "Geneformer 316M:8x4096:forward",
        "Geneformer 316M:16x2048:training", "Geneformer 316M:8x4096:training",
    ])  # fmt: skip
    parser.add_argument("--sides", nargs="*", default=[], help="only these")
    parser.add_argument("--output", type=Path, required=True, help="the .json file")
    arguments = parser.parse_args()
    rates = ceilings()
    print(rates)
    record = {**provenance(PACKAGES), "device": torch.cuda.get_device_name(), "ceilings": rates, "rows": []}
    for case in arguments.cases:
        model, tokens, mode = case.split(":")
        for row in rows(model, tokens, mode == "training", arguments.sides, rates):
            record["rows"].append(row)
            ms = row["note"] if row["ms"] is None else f"{row['ms']:9.2f} ms  host {row['host_ms']:8.2f} ms"
            rate = f"{row.get('tokens_per_s', 0):10,.0f} tok/s  floor {row['floor_ms']:.2f} ms"
            print(f"{case:31} {row['side']:28} {ms} {rate}", flush=True)
            write_result(arguments.output, record)  # as it goes: a run cut short keeps what it has


if __name__ == "__main__":
    main()
