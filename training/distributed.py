"""One process or many: the process group, FSDP2, and what ranks tell each other.

Every rank knows all rollouts of a step and computes the same advantages and coefficients; they differ in
which sequences they run through the model.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from training.policy import Policy

T = TypeVar("T")


class World:
    """The processes of a run. With one nothing here does anything."""

    def __init__(self) -> None:
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        local = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Of all processes; None where there is one."""
        return dist.group.WORLD if self.size > 1 else None

    def gather(self, mine: list[T]) -> list[T]:
        """The lists of all ranks, interleaved: rank r held the elements r, r + size, ... of the result."""
        if self.size == 1:
            return mine
        lists: list[Any] = [None] * self.size
        dist.all_gather_object(lists, mine)
        return [lists[k % self.size][k // self.size] for k in range(sum(map(len, lists)))]

    def gather_shares(self, values: dict[int, Any]) -> dict[int, Any]:
        """The union of what the ranks know."""
        if self.size == 1:
            return values
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, values)
        return {key: value for part in parts for key, value in part.items()}

    def most(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        return int(self._reduced(torch.tensor([float(number)]), dist.ReduceOp.MAX)[0])

    def total(self, sums: Tensor) -> Tensor:
        return self._reduced(sums, dist.ReduceOp.SUM)

    def same(self, value: T) -> T:
        """What the first rank says."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()

    def _reduced(self, values: Tensor, op: Any) -> Tensor:
        if self.size == 1:
            return values
        values = values.to(self.device, torch.float64)
        dist.all_reduce(values, op)
        return values


@contextmanager
def world() -> Iterator[World]:
    """The processes that torchrun, or what sets its variables, has started; or this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield World()
        return
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # a rank may sample for long while others wait
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=timedelta(hours=2))
    try:
        yield World()
        dist.barrier()
    finally:
        dist.destroy_process_group()


def shard(policy: Policy, here: World) -> Policy:
    """FSDP2 over all ranks: one group a decoder layer, the rest (embedding, head) with the root."""
    if here.size == 1:
        return policy
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # inputs are not cast: log-probabilities, advantages and weights stay float32
    precision = MixedPrecisionPolicy(
        param_dtype=policy.autocast, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    names = policy.causal_lm._no_split_modules or ()
    for module in policy.model.modules():
        if type(module).__name__ in names:
            fully_shard(module, mp_policy=precision)
    fully_shard(policy, mp_policy=precision)
    return policy


def whole(parameter: Tensor) -> Tensor:
    """A sharded parameter as a plain tensor; all ranks must ask."""
    full = getattr(parameter, "full_tensor", None)
    return parameter.detach() if full is None else full().detach()
