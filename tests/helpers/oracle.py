"""The error budget every implementation is held to."""

import math

import torch
from torch import Tensor

EPS32 = torch.finfo(torch.float32).eps


def assert_within_budget(
    actual: Tensor, eager: Tensor, exact: Tensor, *, terms: int, input_scale: float
) -> None:
    """Assert that `actual` is about as close to `exact` (float64) as `eager` is.

    A kernel may be as wrong as eager PyTorch is at the same dtype, plus the rounding that no implementation
    avoids: one rounding of the output, float32 accumulation over `terms` addends (error grows like
    sqrt(terms)), and one ulp of logits as large as `input_scale`. No constant here was fitted to a kernel;
    one that needs more has a bug.
    """
    assert actual.shape == exact.shape
    assert actual.dtype != torch.float64
    assert torch.isfinite(actual).all()
    scale = exact.abs().max().item() if exact.numel() else 0.0
    rounding = (torch.finfo(actual.dtype).eps + math.sqrt(terms) * EPS32) * scale
    conditioning = EPS32 * input_scale * max(1.0, scale)
    budget = max_error(eager, exact) + rounding + conditioning
    error = max_error(actual, exact)
    assert error <= budget, f"error {error:.3e} exceeds budget {budget:.3e}"


def max_error(actual: Tensor, exact: Tensor) -> float:
    difference = (actual.double() - exact.double()).abs()
    return difference.max().item() if difference.numel() else 0.0
