"""The three products of the linear path, where factors are widened a slice of the vocabulary at a time."""

import pytest
import torch
from torch import Tensor

from aer_fast._linear import products
from tests.helpers.oracle import EPS32, max_error

N, V, D = 5, 5000, 1024  # five slices
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def factors(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, D], weight [V, D] and dz [N, V]."""
    assert products.slice_size(V, D) < V
    shapes = ((N, D), (V, D), (N, V))
    hidden, weight, dz = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    return hidden, weight, dz


def check(actual: Tensor, first: Tensor, second: Tensor, start: Tensor | float = 0.0) -> None:
    """actual = start + first · second, but for the rounding of sums in float32 and of actual itself."""
    exact = first.double() @ second.double() + start
    size = (first.double().abs() @ second.double().abs()).max().item()
    rounding = torch.finfo(actual.dtype).eps * exact.abs().max().item()
    assert max_error(actual, exact) <= rounding + EPS32 * first.shape[1] ** 0.5 * size


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_logits(dtype: torch.dtype, has_bias: bool, device: torch.device) -> None:
    hidden, weight, _ = factors(dtype, device)
    bias = torch.randn(V, device=device).to(dtype) if has_bias else None
    out = products.logits(hidden, weight, bias, torch.empty(N, V, device=device))
    check(out, hidden, weight.T, 0.0 if bias is None else bias.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_gradients_are_written_and_added(dtype: torch.dtype, device: torch.device) -> None:
    hidden, weight, dz = factors(dtype, device)
    for product, first, second in (
        (products.grad_hidden, dz, weight),
        (products.grad_weight, dz, hidden),
    ):
        left = first if second is weight else first.T
        out = torch.empty(left.shape[0], D, device=device)
        product(first, second, out, False)
        check(out, left, second)
        before = out.clone()
        product(first, second, out, True)
        check(out, left, second, before.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_a_single_gradient_of_the_weight_is_rounded_once(dtype: torch.dtype, device: torch.device) -> None:
    hidden, _, dz = factors(dtype, device)
    out = torch.empty(V, D, device=device, dtype=dtype)
    products.grad_weight(dz, hidden, out)
    check(out, dz.T, hidden)
