"""Masked-LM training from one set of random weights: the loss of every engine and precision beside the original's.

All sides start from the same weights, see the same batches and masks in the same order, and take the same AdamW steps.
Each keeps float32 master weights, steps on those, and computes with a copy of them rounded to its dtype. Under
torch.autocast, each operation's own rule would decide what is rounded: layer norms and the residual stream would
be float32 in one implementation and not in another. With weights in bf16 the dtype is the same throughout for all, and
is the one in which the engines are validated. --autocast measures the other way: float32 weights under autocast.

The proteins are drawn from fixed order-2 Markov chains over the 20 amino acids, one for each of a few families: there
is something to learn. How much two runs may differ is measured on the original itself: run again, with its rows in
reverse order, and in float32.
Shapes: B proteins, S padded length, T packed tokens.
"""

import argparse
import copy
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import provenance, write_result
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import EsmConfig, EsmForMaskedLM, logging

from biote.convert import own_state
from biote.runtime.engine import why_not_te
from biote_esm2 import convert_hf_to_te

SHAPES = {"8M": (6, 320, 20), "35M": (12, 480, 20)}  # layers, hidden size, heads
CLS, PAD, EOS, MASK = 0, 1, 2, 32
FIRST_RESIDUE, RESIDUES = 4, 20
SHORTEST, LONGEST, MEDIAN_LOG, SIGMA = 40, 512, 5.2, 0.6  # tokens of a protein, log-normal
CHOSEN, MASKED, REPLACED = 0.15, 0.12, 0.135  # of 15% of the residues, 80% are masked and 10% replaced
FAMILIES, CONTRAST = 8, 1.5  # chains that proteins are drawn from, standard deviation of their log-odds
PEAK_RATE, WARM_UP_STEPS = 1e-3, 20
WINDOW = 20  # steps that differences are averaged over
SEED = 2023


@dataclass(frozen=True)
class Side:
    """One training run. engine None is the original; noise: the original differing from itself."""

    name: str
    engine: str | None = None
    dtype: torch.dtype = torch.bfloat16
    noise: bool = False
    reverse: bool = False
    packed: bool = False
    recompute: bool = False
    fields: dict[str, Any] = field(default_factory=dict)


def fp8(recipe: str) -> Side:
    return Side(f"te engine, fp8 {recipe} scaling", "te", fields={"layer_precision": "fp8", "fp8_recipe": recipe})


ORIGINAL = Side("original")
SIDES = (
    ORIGINAL,
    Side("original, run again", noise=True),
    Side("original, rows reversed", noise=True, reverse=True),
    Side("original, fp32", noise=True, dtype=torch.float32),
    Side("torch engine", "torch"),
    Side("te engine", "te"),
    Side("te engine, packed, recomputation", "te", packed=True, recompute=True),
    fp8("delayed"),
    fp8("current"),
    fp8("block"),
)


@dataclass(frozen=True)
class Batch:
    """Token ids, attention mask and labels (-100 where nothing is asked), [B, S] each."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def inputs(self, side: Side) -> tuple[dict[str, Any], Tensor]:
        """What the model of a side is called with, and labels in the shape of its logits."""
        ids, mask, labels = (x.flip(0) if side.reverse else x for x in (self.ids, self.mask, self.labels))
        if not side.packed:
            return {"input_ids": ids, "attention_mask": mask}, labels
        keep, lengths = mask.bool(), mask.sum(1)
        bounds = F.pad(lengths.cumsum(0), (1, 0)).int()
        packed = {"input_ids": ids[keep][None], "cu_seq_lens_q": bounds, "max_length_q": int(lengths.max())}
        return packed, labels[keep][None]


def chain_of_residues(proteins: int, length: int, generator: torch.Generator) -> Tensor:
    """Draw int64 [proteins, length], 0 to 19: by the two residues before, and by what the protein's family favours."""
    second, first = CONTRAST * torch.randn(2, RESIDUES, RESIDUES, generator=generator)
    favoured = CONTRAST * torch.randn(FAMILIES, 1, 1, RESIDUES, generator=generator)
    chances = (second[:, None] + first[None] + favoured).softmax(-1)  # [family, residue before last, last, next]
    bounds = chances.cumsum(-1)[..., :-1]
    family = torch.randint(FAMILIES, (proteins,), generator=generator)
    residues = torch.randint(RESIDUES, (proteins, length), generator=generator)
    drawn = torch.rand(proteins, length, 1, generator=generator)
    for at in range(2, length):
        residues[:, at] = (drawn[:, at] > bounds[family, residues[:, at - 2], residues[:, at - 1]]).sum(-1)
    return residues


def batches_of(steps: int, proteins: int, device: torch.device) -> list[Batch]:
    """A batch for each step, the same on every machine with the same torch."""
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.empty(steps, proteins).log_normal_(MEDIAN_LOG, SIGMA, generator=generator)
    lengths = drawn.clamp(SHORTEST, LONGEST).long()
    residues = FIRST_RESIDUE + chain_of_residues(steps * proteins, LONGEST, generator).view(steps, proteins, LONGEST)
    return [_batch(*one, generator, device) for one in zip(residues, lengths, strict=True)]


def _batch(residues: Tensor, lengths: Tensor, generator: torch.Generator, device: torch.device) -> Batch:
    columns, ends = torch.arange(int(lengths.max())), lengths[:, None] - 1
    ids = residues[:, : len(columns)].clone()
    ids[:, 0] = CLS
    ids = ids.masked_fill(columns == ends, EOS).masked_fill(columns > ends, PAD)
    is_residue = ids >= FIRST_RESIDUE
    chance = torch.rand(ids.shape, generator=generator).masked_fill(~is_residue, 1.0)
    others = torch.randint(FIRST_RESIDUE, FIRST_RESIDUE + RESIDUES, ids.shape, generator=generator)
    labels = ids.masked_fill(chance >= CHOSEN, -100)
    ids = torch.where((chance >= MASKED) & (chance < REPLACED), others, ids).masked_fill(chance < MASKED, MASK)
    return Batch(ids.to(device), (columns <= ends).long().to(device), labels.to(device))


def starting_model(shape: str) -> EsmForMaskedLM:
    """The original in float32, as it initialises itself: every side starts from these weights."""
    layers, hidden, heads = SHAPES[shape]
    torch.manual_seed(SEED)
    config = EsmConfig(
        vocab_size=33, pad_token_id=PAD, mask_token_id=MASK, hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, intermediate_size=4 * hidden, position_embedding_type="rotary", token_dropout=True,
        emb_layer_norm_before=False, layer_norm_eps=1e-5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return EsmForMaskedLM(config)


def build(side: Side, start: EsmForMaskedLM, device: torch.device) -> Any:
    """The side's model in float32, its weights bit for bit those of `start`."""
    if side.engine is None:
        return copy.deepcopy(start).to(device).train()
    model: Any = convert_hf_to_te(start, engine=side.engine, **side.fields)
    expected = own_state(convert_hf_to_te(start, engine="torch"))
    assert all(torch.equal(tensor.cpu(), expected[key]) for key, tensor in own_state(model).items())
    if side.recompute:
        model.gradient_checkpointing_enable()
    return model.to(device).train()


class MixedPrecision:
    """AdamW on float32 master weights, which a model computes with in a dtype of its own."""

    def __init__(self, model: Any, dtype: torch.dtype):
        self.masters = [nn.Parameter(weight.detach().clone()) for weight in model.parameters()]
        rotary = model.base_model.rotary_embeddings if isinstance(model, EsmForMaskedLM) else model.model.rotary[0]
        frequencies = rotary.inv_freq.clone()
        model.to(dtype)
        rotary.inv_freq = frequencies  # in float32 for all: the original's would be rounded with its weights
        self.weights = list(model.parameters())
        self.optimizer = torch.optim.AdamW(self.masters, lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda at: min(1, (at + 1) / WARM_UP_STEPS))

    @torch.no_grad()
    def step(self) -> None:
        pairs = list(zip(self.masters, self.weights, strict=True))
        for master, weight in pairs:
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        self.optimizer.step()
        self.schedule.step()
        for master, weight in pairs:
            weight.copy_(master)


def train(side: Side, model: Any, batches: list[Batch], autocast: bool) -> list[float]:
    """The loss at each step."""
    lowered = autocast and side.dtype != torch.float32
    mixed = MixedPrecision(model, torch.float32 if lowered else side.dtype)
    losses = []
    for batch in batches:
        inputs, labels = batch.inputs(side)
        with torch.autocast(labels.device.type, side.dtype, enabled=lowered):
            logits = model(**inputs).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())  # not the model's: bf16 in the original
        loss.backward()
        mixed.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def smoothed(losses: dict[str, list[float]], name: str) -> Tensor:
    """How far a side's loss is from the original's: the mean of each WINDOW steps in a row, or of all if fewer."""
    loss, reference = (torch.tensor(losses[key], dtype=torch.float64) for key in (name, ORIGINAL.name))
    difference = loss - reference
    return difference.unfold(0, min(WINDOW, len(difference)), 1).mean(1)


def summary(losses: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Each side's loss, and where of all its steps it is farthest from the original's."""
    rows = []
    for side in SIDES:
        if side.name not in losses:
            continue
        loss, difference = losses[side.name], smoothed(losses, side.name)
        worst = int(difference.abs().argmax())
        last = loss[-WINDOW:]
        rows.append({
            "side": side.name, "noise": side.noise, "first_loss": loss[0], "last_loss": sum(last) / len(last),
            "largest_difference": float(difference[worst]), "window": min(WINDOW, len(loss)),
            "from_step": worst + 1, "to_step": worst + min(WINDOW, len(loss)),
        })  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The summary as Markdown."""
    window = rows[0]["window"]
    lines = [f"| side | first loss | loss, last {window} steps | largest mean difference of {window} steps | which |"]
    lines.append("|---" * 5 + "|")
    for row in rows:
        losses, steps = f"{row['first_loss']:.4f} | {row['last_loss']:.4f}", f"{row['from_step']} to {row['to_step']}"
        lines.append(f"| {row['side']} | {losses} | {row['largest_difference']:+.4f} | {steps} |")
    return "\n".join(lines)


def plot(losses: dict[str, list[float]], path: Path) -> None:
    """Loss curves above, their smoothed differences to the original below; the original against itself in grey."""
    figure = Figure(figsize=(9, 9), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    styles = iter(("-", "--", ":"))
    for side in SIDES:
        if side.name not in losses:
            continue
        style: dict[str, Any] = {"color": "0.6", "linestyle": next(styles)} if side.noise else {}
        style |= {"color": "black"} if side is ORIGINAL else {}
        loss, difference = losses[side.name], smoothed(losses, side.name)
        above.plot(range(1, len(loss) + 1), loss, label=side.name, linewidth=1, **style)
        below.plot(range(len(loss) - len(difference) + 1, len(loss) + 1), difference.tolist(), linewidth=1, **style)
    above.set_ylabel("masked-LM loss")
    above.legend(fontsize="small")
    below.set_ylabel(f"loss - original's, mean of {WINDOW} steps")
    below.set_xlabel("step")
    figure.savefig(path, dpi=150)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train every side that the device can, and write after each, so that a run cut short keeps what it has."""
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    record = provenance(("torch", "transformers", "biote", *(["transformer_engine"] if on_gpu else [])))
    if on_gpu:
        record["device"] = torch.cuda.get_device_name()
    batches = batches_of(arguments.steps, arguments.proteins, device)
    record |= {
        "model": arguments.model, "steps": arguments.steps, "seed": SEED, "learning_rate": PEAK_RATE,
        "warm_up_steps": WARM_UP_STEPS, "proteins_a_step": arguments.proteins,
        "tokens_a_step": round(sum(int(batch.mask.sum()) for batch in batches) / len(batches)),
        "precision": "float32 weights, autocast" if arguments.autocast else "bf16 weights, float32 master weights",
        "seconds": {}, "failed": {}, "losses": {},
    }  # fmt: skip
    start = starting_model(arguments.model)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for side in SIDES:
        if side.engine == "te" and not on_gpu:
            continue
        begun = time.perf_counter()
        try:
            losses = train(side, build(side, start, device), batches, arguments.autocast)
        except Exception as error:  # of one side: the others still count; reported, and the exit status tells
            record["failed"][side.name] = f"{type(error).__name__}: {error}"
            continue
        record["seconds"][side.name] = round(time.perf_counter() - begun, 1)
        record["losses"][side.name] = [round(loss, 6) for loss in losses]
        print(f"{side.name:34} {losses[0]:.4f} -> {losses[-1]:.4f} in {record['seconds'][side.name]} s", flush=True)
        if ORIGINAL.name in record["losses"]:
            record["summary"] = summary(record["losses"])
        write_result(arguments.output / "training_curves.json", record)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="8M")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--proteins", type=int, default=32, help="in a batch")
    parser.add_argument("--autocast", action="store_true", help="float32 weights under torch.autocast")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu leaves the te engine out")
    parser.add_argument("--output", type=Path, required=True, help="folder for training_curves.json and .png")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    why_not_te()  # imports TransformerEngine first: after torch has loaded its own cuDNN, a second copy may clash
    record = run(arguments)
    plot(record["losses"], arguments.output / "training_curves.png")
    print(table(record["summary"]))
    if record["failed"]:
        raise SystemExit("\n".join(f"{name} failed: {why}" for name, why in record["failed"].items()))


if __name__ == "__main__":
    main()
