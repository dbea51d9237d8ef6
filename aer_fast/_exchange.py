"""What the ranks of a process group tell each other: where their numbers go, and checksums to compare."""

import torch
import torch.distributed as dist
from torch import Tensor

Alike = Tensor | int | bool | None  # what ranks can compare: a number, or none
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def exchange_device(group: dist.ProcessGroup) -> torch.device:
    """Where the group's backend works; the same kind on every rank, wherever a rank's own tensors are."""
    if "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def checksum(x: Tensor, counts: Tensor | None = None) -> Tensor:
    """Of the bits of x [..., D] or [...] and their places, in the tokens that count [N]; [], int64."""
    if counts is None:
        counts = torch.ones(x.numel(), dtype=torch.bool, device=x.device)
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    bits = x.detach().view(_BITS[x.element_size()])
    if bits.numel() != counts.numel():
        bits = bits.sum(-1, dtype=torch.int64)
    bits = bits.reshape(-1).to(torch.int64)
    places = torch.arange(1, counts.numel() + 1, device=x.device)
    return (bits * places).where(counts, 0).sum()


def of_numbers(*numbers: float | None) -> int:
    """A checksum of a call's numbers; -1 is none."""
    return hash(numbers) >> 1 if any(x is not None for x in numbers) else -1
