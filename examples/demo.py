"""The main job, end to end: an original ESM-2 checkpoint -> converted, exported, verified, converted back, and used.

Without --source the original is built by transformers' own EsmForMaskedLM: the shape of the published 8M model, random
weights from a fixed seed, so that the demo runs where the Hub cannot be reached.
"""

import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, EsmConfig, EsmForMaskedLM, logging

from biote.cli import run
from biote.convert import convert_folder, locate
from biote.export import export
from biote_esm2 import Esm2TEForMaskedLM, build_tokenizer
from biote_esm2.convert import PORT, load_hf

PROTEINS = Path(__file__).parent / "proteins.fasta"
SHAPES = {  # layers, hidden size, heads, feed-forward size
    "esm2_t6_8M_UR50D": (6, 320, 20, 1280),
    "esm2_t12_35M_UR50D": (12, 480, 20, 1920),
    "esm2_t33_650M_UR50D": (33, 1280, 20, 5120),
}
SEED = 2023
console = Console()
app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


def build_original(tag: str, folder: Path, seed: int = SEED) -> Path:
    """Write an original of a published shape: random weights, frequencies rounded to fp16 as in the published ones."""
    layers, hidden, heads, ffn = SHAPES[tag]
    torch.manual_seed(seed)
    config = EsmConfig(
        vocab_size=33, pad_token_id=1, mask_token_id=32, hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, intermediate_size=ffn, position_embedding_type="rotary", token_dropout=True,
        emb_layer_norm_before=False, layer_norm_eps=1e-5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = EsmForMaskedLM(config)
    frequencies = model.esm.rotary_embeddings.inv_freq
    frequencies.copy_(frequencies.half())
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def read_fasta(path: Path) -> dict[str, str]:
    """Sequences by the first word of their headers."""
    sequences: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(">"):
            name = line[1:].split()[0]
            sequences[name] = ""
        else:
            sequences[name] += line.strip()
    return sequences


def embed(model: Any, batch: dict[str, torch.Tensor], repeats: int = 3) -> tuple[torch.Tensor, float]:
    """Last hidden states, and the median seconds of a forward pass."""
    seconds = []
    with torch.inference_mode():
        for _ in range(repeats):
            start = time.perf_counter()
            hidden = model(**batch, output_hidden_states=True).hidden_states[-1]
            seconds.append(time.perf_counter() - start)
    return hidden, sorted(seconds)[repeats // 2]


def same_tensors(first: Path, second: Path) -> int:
    """Load two originals with transformers and compare bit for bit; the number of tensors that are equal."""
    states = [load_hf(folder, "AutoModelForMaskedLM", torch.float32).state_dict() for folder in (first, second)]
    differing = [key for key, tensor in states[0].items() if not torch.equal(tensor, states[1][key])]
    if differing:
        raise ValueError(f"the round trip changed {', '.join(differing)}")
    return len(states[0])


@app.command()
def main(
    source: Annotated[str | None, typer.Option(help="tag, Hub id or folder; default: built here at random")] = None,
    output: Annotated[Path, typer.Option(help="folder for everything the demo makes")] = Path("build/demo"),
) -> None:
    """Convert, export, verify, convert back, and embed the proteins of examples/proteins.fasta with both models."""
    logging.set_verbosity_error()
    shutil.rmtree(output, ignore_errors=True)
    tag = "esm2_t6_8M_UR50D"
    console.rule("1  the original")
    original = locate(source) if source else build_original(tag, output / "original")
    console.print(f"{source or f'{tag}, random weights of seed {SEED}'} is in {original}")
    console.rule("2  convert, export, verify where neither biote nor its port can be imported")
    export(source or str(original), output / "exported", port_name=PORT.name)
    console.rule("3  convert back")
    convert_folder(output / "exported", output / "back", "hf")
    console.print(f"{same_tensors(original, output / 'back')} tensors of the original are back, bit for bit")
    console.rule("4  embed the example proteins")
    console.print(_comparison(original, output / "exported"))


def _comparison(original: Path, exported: Path) -> Table:
    proteins = read_fasta(PROTEINS)
    batch = dict(AutoTokenizer.from_pretrained(exported)(list(proteins.values()), padding=True, return_tensors="pt"))
    batch = {key: batch[key] for key in ("input_ids", "attention_mask")}
    keep = batch["attention_mask"].bool()
    tokens = int(keep.sum())
    with console.status("running both models"):
        theirs, their_seconds = embed(EsmForMaskedLM.from_pretrained(original).eval(), batch)
        model = Esm2TEForMaskedLM.from_pretrained(exported, engine="torch").eval()
        ours, our_seconds = embed(model, batch)
    error = float((ours - theirs)[keep].abs().max())
    table = Table(title=f"{len(proteins)} proteins, {tokens:,} tokens, float32 on this CPU")
    for column in ("", "real tokens/s", "ratio", "largest error against the original"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("original", f"{tokens / their_seconds:,.0f}", "1.0", "0")
    table.add_row("biote", f"{tokens / our_seconds:,.0f}", f"{their_seconds / our_seconds:.1f}", f"{error:.1e}")
    return table


if __name__ == "__main__":
    run(app)
