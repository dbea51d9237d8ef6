"""What the ranks of a process group tell each other: a few numbers, one collective call."""

import torch
import torch.distributed as dist


def exchange_device(group: dist.ProcessGroup) -> torch.device:
    """Where the group's backend works; the same kind on every rank, wherever a rank's own tensors are."""
    if "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
