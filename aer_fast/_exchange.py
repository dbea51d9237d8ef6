"""What the ranks of a process group tell each other: where their numbers go, and checksums to compare."""

import torch
import torch.distributed as dist
from torch import Tensor

Alike = Tensor | int | bool | None  # what ranks can compare: a number, or none
_MIX = (-7046029254386353131, -4658895280553007687, -7723592293110705685, -5840758589994634535)  # odd
_AT_ONCE = {True: 1 << 20, False: 1 << 23}  # entries that are mixed at once: on a CPU, elsewhere
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
    rows = x.detach().reshape(N, -1) if N else x.detach().reshape(0, 1)
    rows = rows.view(_BITS[rows.element_size()])
    columns = torch.arange(1, rows.shape[1] + 1, device=x.device) * _MIX[0] + salt
    most = max(1, _AT_ONCE[x.device.type == "cpu"] // max(1, rows.shape[1]))
    sums = [_mixed(part.to(torch.int64) + columns).sum(-1) for part in torch.split(rows, most)]
    places = torch.arange(1, N + 1, device=x.device) * _MIX[1]
    mixed = _mixed(torch.cat(sums) + places)
    return (mixed if counts is None else mixed.where(counts, 0)).sum()


def _mixed(x: Tensor) -> Tensor:
    """Of int64, each entry by itself; in place. After splitmix64, with what a sign bit does to its shifts."""
    for factor in _MIX[2:]:
        x.mul_(factor).bitwise_xor_(x >> 31)
    return x


def of_numbers(*numbers: float | None) -> int:
    """A checksum of a call's numbers; -1 is none."""
    return hash(numbers) >> 1 if any(x is not None for x in numbers) else -1


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def of_dtype(dtype: torch.dtype) -> int:
    """A number to compare."""
    return DTYPES.index(dtype)
