"""Check this checkpoint against the original's golden values: `python verify.py [FOLDER]`.

golden_values.safetensors holds inputs and what the original implementation computed from them in float64, with the
original's own rounding error at float32 and bfloat16. Float64 must agree element by element; every other dtype may be
at most NOISE_FACTOR times as far from the float64 values as the original itself is at that dtype, a quantity of fewer
than FEW numbers FEW_FACTOR times.
Shapes: B batch, S padded length, N hidden size, V vocabulary.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor

GOLDEN_FILE = "golden_values.safetensors"
RTOL, ATOL = 1e-5, 1e-8  # float64 against float64
NOISE_FACTOR = 1.1
FEW, FEW_FACTOR = 500, 2.5  # the error of a classifier's dozen logits scatters by a factor of two about the original's
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Check:
    """One quantity of one run: `error` must not exceed `allowed`."""

    engine: str
    dtype: str
    quantity: str
    error: float  # float64: largest |ours - golden| / (ATOL + RTOL |golden|); else relative L2
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # false for NaN


def read_golden(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (inputs and float64 outputs) and provenance of a golden file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: there are no golden values to check against")
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (a handle, not a dict)
        return tensors, json.loads((file.metadata() or {})["provenance"])


def outputs_of(model: Any, input_ids: Tensor, attention_mask: Tensor, contacts: bool = True) -> dict[str, Tensor]:
    """Logits, last hidden state [B, S, N] and contacts, whichever the model has; zero at padding, float64, on the CPU.

    contacts=False leaves contacts out, which need a second pass.
    """
    with torch.no_grad():
        output = model(input_ids, attention_mask=attention_mask, output_hidden_states=True)
        found = {"last_hidden_state": output.hidden_states[-1]}
        if "logits" in output:
            found["logits"] = output.logits
        if contacts and hasattr(model, "predict_contacts"):
            found["contacts"] = model.predict_contacts(input_ids, attention_mask)
    rows = attention_mask.shape
    for key, value in found.items():
        if value.shape[:2] == rows:
            found[key] = value * attention_mask[..., None].to(value)
    return {key: value.double().cpu() for key, value in found.items()}


def relative_l2(ours: Tensor, golden: Tensor) -> float:
    """Distance of two tensors over the norm of the second."""
    return float((ours - golden).norm() / golden.norm())


def exact_error(ours: Tensor, golden: Tensor) -> float:
    """Largest deviation in units of what RTOL and ATOL allow."""
    return float(((ours - golden).abs() / (ATOL + RTOL * golden.abs())).max())


def check_outputs(
    ours: dict[str, Tensor], golden: dict[str, Tensor], noise: Any, dtype: str, engine: str
) -> list[Check]:
    """Compare the outputs of a run at `dtype`; noise: the original's relative L2 by dtype and quantity."""
    checks = []
    for quantity, value in ours.items():
        if dtype == "float64":
            checks.append(Check(engine, dtype, quantity, exact_error(value, golden[quantity]), 1.0))
        else:
            error = relative_l2(value, golden[quantity])
            factor = FEW_FACTOR if value.numel() < FEW else NOISE_FACTOR
            checks.append(Check(engine, dtype, quantity, error, factor * noise[dtype][quantity]))
    return checks


def verify(folder: Path, load: Callable[..., Any] | None = None) -> list[Check]:
    """Run the checkpoint in `folder` on its golden inputs, by every engine and dtype that this machine has.

    load: (Auto class, dtype=, and fields of the configuration) -> the model; by default by the folder's own code.
    """
    golden, provenance = read_golden(folder / GOLDEN_FILE)
    load = partial(load or partial(_load_by_its_own_code, folder), provenance["auto_class"])
    exact = {"layer_precision": "bf16", "quantized_weights": False}  # whatever layers its last user quantised
    runs = [("torch", "cpu", "float64"), ("torch", "cpu", "float32"), ("torch", "cpu", "bfloat16")]
    if torch.cuda.is_available():
        engine = load(dtype=torch.bfloat16, engine="auto", **exact).base_model.engine
        runs.append((engine, "cuda", "bfloat16"))
    checks = []
    for engine, device, dtype in runs:
        model = load(dtype=DTYPES[dtype], engine=engine, **exact).to(device).eval()
        ours = outputs_of(model, golden["input_ids"].to(device), golden["attention_mask"].to(device))
        checks += check_outputs(ours, golden, provenance["noise"], dtype, engine)
    return checks


def _load_by_its_own_code(folder: Path, auto: str, **how: Any) -> Any:
    return getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True, **how)


def report(checks: list[Check]) -> None:
    """Print one line a check; ValueError if any failed."""
    print(f"{'engine':8}{'dtype':10}{'quantity':20}{'error':>12}{'allowed':>12}")
    for check in checks:
        verdict = "ok" if check.passed else "FAILED"
        print(
            f"{check.engine:8}{check.dtype:10}{check.quantity:20}{check.error:12.3g}{check.allowed:12.3g}  {verdict}"
        )
    if not checks or not all(check.passed for check in checks):
        raise ValueError("the checkpoint does not reproduce the original's golden values")


def main() -> None:
    """Verify, print one line a check, exit with status 1 if any failed."""
    parser = argparse.ArgumentParser(description="Check a checkpoint against the original's golden values.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent)
    parser.add_argument("--json", type=Path, help="also write the checks to this file")
    arguments = parser.parse_args()
    try:
        checks = verify(arguments.folder)
        if arguments.json:
            arguments.json.write_text(json.dumps([asdict(check) for check in checks]), encoding="utf-8")
        report(checks)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        sys.exit(f"error: {error}")
    except KeyError as error:
        sys.exit(f"error: {GOLDEN_FILE} lacks {error}")


if __name__ == "__main__":
    main()
