"""Verification: its rules at their edges, and how it is run."""

import sys

import pytest
import torch
from safetensors.torch import save_file

from biote.export import verify_isolated
from biote.runtime.verify import ATOL, FEW, FEW_FACTOR, GOLDEN_FILE, NOISE_FACTOR, RTOL, check_outputs, main

GOLDEN = {"logits": torch.tensor([3.0, -4.0], dtype=torch.float64)}


@pytest.mark.parametrize(("factor", "passed"), [(0.99, True), (1.01, False)])
def test_float64_is_judged_element_by_element(factor, passed):
    found = {"logits": GOLDEN["logits"] + torch.tensor([0.0, factor * (ATOL + 4 * RTOL)], dtype=torch.float64)}
    (check,) = check_outputs(found, GOLDEN, {}, "float64", "torch")
    assert check.passed == passed


@pytest.mark.parametrize(("numbers", "allowed"), [(FEW, NOISE_FACTOR), (FEW - 1, FEW_FACTOR)])
@pytest.mark.parametrize(("factor", "passed"), [(0.99, True), (1.01, False)])
def test_lower_dtypes_are_judged_by_the_originals_own_error(numbers, allowed, factor, passed):
    """Relative L2: the golden vector's length is 5; few numbers are allowed more."""
    golden = torch.zeros(numbers, dtype=torch.float64)
    golden[:2] = GOLDEN["logits"]
    found = golden.clone()
    found[1] += 5 * 0.02 * allowed * factor
    (check,) = check_outputs({"x": found}, {"x": golden}, {"bfloat16": {"x": 0.02}}, "bfloat16", "torch")
    assert check.passed == passed


def test_nan_never_passes():
    found = {"logits": torch.tensor([3.0, float("nan")], dtype=torch.float64)}
    checks = check_outputs(found, GOLDEN, {"float32": {"logits": 1.0}}, "float32", "torch")
    assert not [check for check in [*checks, *check_outputs(found, GOLDEN, {}, "float64", "torch")] if check.passed]


def test_a_golden_file_without_provenance_is_one_line(tmp_path, monkeypatch):
    save_file({"logits": torch.ones(1)}, tmp_path / GOLDEN_FILE)
    monkeypatch.setattr(sys, "argv", ["verify.py", str(tmp_path)])
    with pytest.raises(SystemExit, match=f"^error: {GOLDEN_FILE} lacks 'provenance'$"):
        main()


def test_the_folder_is_on_the_path_and_a_report_is_owed(tmp_path):
    """As for one who runs `python verify.py` in the folder."""
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "verify.py").write_text("import beside")
    with pytest.raises(ValueError, match="ended without a report"):
        verify_isolated(tmp_path)
