"""What the ranks of a process group tell each other: where their numbers go, and checksums to compare."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

Alike = Tensor | int | bool | None  # what ranks can compare: a number, or none
_MIX = (-7046029254386353131, -4658895280553007687, -7723592293110705685, -5840758589994634535)  # odd
_AT_ONCE = {True: 1 << 16, False: 1 << 23}  # entries that are mixed at once: on a CPU, elsewhere
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def exchange_device(group: dist.ProcessGroup) -> torch.device:
    """Where the group's backend works; the same kind on every rank, wherever a rank's own tensors are."""
    if "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def checksum(x: Tensor, counts: Tensor | None = None, salt: int = 0) -> Tensor:
    """Of the bits of x [..., D] or [...] and their places, in the tokens that count [N]; [], int64.

    Each entry is mixed with its place before it is added, so that exchanged entries, or signs, do not cancel.
    """
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    N = x.numel() if counts is None else counts.numel()
    if N == 0:
        return torch.zeros((), dtype=torch.int64, device=x.device)
    width = x.numel() // N
    places = torch.arange(N, device=x.device)
    columns = torch.arange(1, width + 1, device=x.device) * _MIX[0] + salt
    sums = []
    for at in torch.split(places, max(1, _AT_ONCE[x.device.type == "cpu"] // width)):
        bits = take(x.detach(), at, width).view(_BITS[x.element_size()])
        sums.append(_mixed(bits.to(torch.int64) + columns).sum(-1))
    mixed = _mixed(torch.cat(sums) + (places + 1) * _MIX[1])
    return (mixed if counts is None else mixed.where(counts, 0)).sum()


def take(x: Tensor, index: Tensor, width: int) -> Tensor:
    """The tokens at ``index`` [k] of x: [k, width] of [..., width], or [k, 1] of [...]."""
    try:
        return x.view(-1, width).index_select(0, index)
    except RuntimeError:  # [B, T] does not merge, and need not be copied for that
        lead = x.shape[:-1] if x.shape[-1] == width else x.shape
        return x[torch.unravel_index(index, lead)].view(-1, width)


def _mixed(x: Tensor) -> Tensor:
    """Of int64, each entry by itself; in place. After splitmix64, with what a sign bit does to its shifts."""
    for factor in _MIX[2:]:
        x.mul_(factor).bitwise_xor_(x >> 31)
    return x


def of_numbers(*numbers: float | None) -> int:
    """A checksum of a call's numbers; -1 is none."""
    if all(x is None for x in numbers):
        return -1
    numbers = tuple(-math.pi if x is None else x for x in numbers)  # None has another hash in each process
    return hash(numbers) >> 1


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def of_dtype(dtype: torch.dtype) -> int:
    """A number to compare."""
    return DTYPES.index(dtype)
