"""The two rules of verification, at their edges."""

import pytest
import torch

from biote.runtime.verify import ATOL, NOISE_FACTOR, RTOL, check_outputs

GOLDEN = {"logits": torch.tensor([3.0, -4.0], dtype=torch.float64)}


@pytest.mark.parametrize(("factor", "passed"), [(0.99, True), (1.01, False)])
def test_float64_is_judged_element_by_element(factor, passed):
    found = {"logits": GOLDEN["logits"] + torch.tensor([0.0, factor * (ATOL + 4 * RTOL)], dtype=torch.float64)}
    (check,) = check_outputs(found, GOLDEN, {}, "float64", "torch")
    assert check.passed == passed


@pytest.mark.parametrize(("factor", "passed"), [(0.99, True), (1.01, False)])
def test_lower_dtypes_are_judged_by_the_originals_own_error(factor, passed):
    """Relative L2: the golden vector's length is 5."""
    found = {"logits": GOLDEN["logits"] + torch.tensor([0.0, 5 * 0.02 * NOISE_FACTOR * factor], dtype=torch.float64)}
    (check,) = check_outputs(found, GOLDEN, {"bfloat16": {"logits": 0.02}}, "bfloat16", "torch")
    assert check.passed == passed


def test_nan_never_passes():
    found = {"logits": torch.tensor([3.0, float("nan")], dtype=torch.float64)}
    checks = check_outputs(found, GOLDEN, {"float32": {"logits": 1.0}}, "float32", "torch")
    assert not [check for check in [*checks, *check_outputs(found, GOLDEN, {}, "float64", "torch")] if check.passed]
