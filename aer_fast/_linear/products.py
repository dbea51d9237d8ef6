"""The matrix products of the LM head, with sums in float32 whatever the dtype of the factors.

On a GPU bfloat16 and float16 factors go straight into a product with float32 output. Elsewhere torch has no
such product: the factors are widened first, a slice of the vocabulary at a time, which is exact. A CPU that
multiplies bfloat16 does so for a gradient that one product makes whole, and rounds it once.

Sizes: n rows, V vocabulary entries, D hidden.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

SLICE = 1 << 22  # entries of a slice, at most
WORDS = 1024  # vocabulary entries of one, at most
PIECE = 1 << 13  # words at a time whose logits a CPU makes for statistics alone; the same for any rows


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """out [n, V] = hidden [n, D] · weightᵀ [D, V] + bias."""
    if hidden.device.type != "cpu" and _direct(hidden, hidden, out):
        _mm(hidden, weight.T, out)
    else:  # wide factors, too, take less time on a CPU in pieces that stay in its caches
        hidden = hidden.to(out.dtype)
        for s in _slices(*weight.shape):
            torch.mm(hidden, weight[s].to(out.dtype).T, out=out[:, s])
    return out if bias is None else out.add_(bias)


def grad_hidden(dz: Tensor, weight: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out [n, D] (+)= dz [n, V] · weight [V, D]; out is wide, or narrow as all the factors."""
    if _direct(dz, weight, out):
        _mm(dz, weight, out, accumulate)
    else:
        if len(weight) == 0 and not accumulate:
            out.zero_()
        for s in _slices(len(weight), _width(dz, weight)):
            _mm(dz[:, s].to(out.dtype), weight[s].to(out.dtype), out, accumulate or s.start > 0)


def narrow(factor: Tensor, rounded: Sequence[torch.dtype]) -> bool:
    """Whether a CPU makes gradients of these dtypes from narrow factors: a wide one takes a wide dz."""
    return factor.device.type == "cpu" and narrow_on_cpu(factor.dtype, rounded)


def narrow_on_cpu(dtype: torch.dtype, rounded: Sequence[torch.dtype]) -> bool:
    """`narrow`, of factors of a dtype."""
    return dtype == torch.bfloat16 and set(rounded) == {dtype} and has_bfloat16()


def over(z: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for dz [n, V] of a dtype as wide as that of the logits z [n, V] or half as wide, in their memory.

    Row i begins at row i of z or before it: it may be written once rows up to i have been read.
    """
    return z.view(dtype).view(-1)[: z.numel()].view(z.shape)


def grad_weight(dz: Tensor, hidden: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out [V, D] (+)= dzᵀ [V, n] · hidden [n, D]; out is wide where it accumulates, else rounded once."""
    wide = torch.promote_types(dz.dtype, torch.float32)
    if _direct(dz, hidden, out) and out.dtype in (hidden.dtype, wide):
        _mm(dz.T, hidden, out, accumulate)
        return
    hidden = hidden.to(wide)
    for s in _slices(len(out), _width(dz, hidden)):
        if out.dtype == wide:
            _mm(dz[:, s].to(wide).T, hidden, out[s], accumulate)
        else:
            out[s] = dz[:, s].to(wide).T @ hidden


# torch's product with a float32 output takes bfloat16 on NVIDIA's GPUs; to accumulate in it, from 2.11 on.
_WIDE_OUTPUT = torch.version.hip is None
_WIDE_SUM = TorchVersion(torch.__version__) >= "2.11"


def _direct(dz: Tensor, factor: Tensor, out: Tensor) -> bool:
    """Whether one product takes these factors: on a GPU, where they are wide, or where all are narrow."""
    if factor.element_size() >= 4:
        return factor.dtype == out.dtype
    return (factor.device.type == "cuda" and _WIDE_OUTPUT) or narrow(factor, [dz.dtype, out.dtype])


@functools.cache
def has_bfloat16() -> bool:
    """Whether this CPU has products of it. Others take longer for one than for that of widened factors."""
    has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return has and torch.backends.mkldnn.is_available()


def _width(dz: Tensor, factor: Tensor) -> int:
    """Entries of a word that are widened: of a factor [., D], and of dz [n, V] if it is narrow."""
    return factor.shape[1] + (len(dz) if dz.element_size() < 4 else 0)


def _slices(V: int, width: int) -> Iterator[slice]:
    size = slice_size(V, width)
    return (slice(start, min(start + size, V)) for start in range(0, V, size))


def slice_size(V: int, width: int) -> int:
    """Vocabulary entries of a slice."""
    return max(1, min(V, WORDS, SLICE // width))


def _mm(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif not accumulate:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif _WIDE_SUM:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        for s in _slices(*out.shape):
            out[s] += torch.mm(a[s], b, out_dtype=out.dtype)
