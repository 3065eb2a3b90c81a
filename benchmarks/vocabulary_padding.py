"""Whether a decoder is faster with its vocabulary padded: Geneformer's, whose 20,275 genes align to nothing. bf16.

"as it is": the product with the decoder's weight. "padded on the way": with a padded copy of it, made in each call.
"stored padded": with a weight that is stored so. All three give logits [T, V]; training adds the loss and backward.
Shapes: T packed tokens, N hidden size, V vocabulary.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from common import provenance, tagged, write_result
from gpu_speed import PACKAGES, measure
from torch import Tensor, nn
from torch.nn import functional as F

MULTIPLE = 64
TAGS = ("Geneformer-V1-10M", "Geneformer-V2-316M")
TOKENS = (2_048, 32_768)


def decoders(hidden: int, vocabulary: int) -> dict[str, tuple[nn.Linear, Callable[[nn.Linear, Tensor], Tensor]]]:
    """Each side's layer, and how it computes logits [T, V] from states [T, N]."""
    surplus = -vocabulary % MULTIPLE

    def layer(rows: int) -> nn.Linear:
        return nn.Linear(hidden, rows, device="cuda", dtype=torch.bfloat16)

    def padded(decoder: nn.Linear, x: Tensor) -> Tensor:
        weight, bias = F.pad(decoder.weight, (0, 0, 0, surplus)), F.pad(decoder.bias, (0, surplus))
        return F.linear(x, weight, bias)[:, :vocabulary]

    return {
        "as it is": (layer(vocabulary), lambda decoder, x: decoder(x)),
        "padded on the way": (layer(vocabulary), padded),
        "stored padded": (layer(vocabulary + surplus), lambda decoder, x: decoder(x)[:, :vocabulary]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="the .json file")
    arguments = parser.parse_args()
    rows = []
    for tag in TAGS:
        shape = tagged(tag)[1].shape
        hidden, vocabulary = shape["hidden_size"], shape["vocab_size"]
        for tokens in TOKENS:
            x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            labels = torch.randint(0, vocabulary, (tokens,), device="cuda")
            for side, (decoder, logits) in decoders(hidden, vocabulary).items():

                def forward() -> Tensor:
                    return logits(decoder, x)  # noqa: B023 (called before the loop goes on)

                def training() -> Tensor:
                    loss = F.cross_entropy(forward().float(), labels)  # noqa: B023
                    loss.backward()
                    return loss

                for mode, step in (("forward", forward), ("training", training)):
                    ms = measure(step, mode == "training")["ms"]
                    rows.append({"model": tag, "tokens": tokens, "mode": mode, "side": side, "ms": ms})
                    print(f"{tag:20} {tokens:6} tokens  {mode:9} {side:18} {ms:8.3f} ms", flush=True)
    write_result(arguments.output, {**provenance(PACKAGES), "device": torch.cuda.get_device_name(), "rows": rows})


if __name__ == "__main__":
    main()
