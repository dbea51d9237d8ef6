"""Ranks of a gloo group, each a process, for tests of a vocabulary that is split between them."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

SECONDS = 60  # after which a rank that waits gives up
N, V, D = 23, 50, 12
SLICES = {2: ([17, V], [0, V], [V, V]), 3: ([16, 33, V], [5, 5, V])}  # ends: uneven, and empty ones


def on_ranks(size: int, body: Callable[..., None], folder: Path, *args: Any) -> None:
    """Call ``body(*args)`` on each of ``size`` ranks; what raises on one raises here."""
    spawn(_rank, (size, body, folder, args), size)


def _rank(rank: int, size: int, body: Callable[..., None], folder: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    store = f"file://{folder}/{body.__name__}"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=SECONDS)
    )
    try:
        body(*args)
        dist.barrier()
    finally:
        dist.destroy_process_group()
        # Errors that were caught still refer to the group. Its threads must end before the interpreter does:
        # one that asks for Python's lock later ends the process by SIGABRT.
        gc.collect()


class Whole(torch.autograd.Function):
    """The slice of a whole tensor that is ours; its gradient is put together from all ranks'."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, start: int, stop: int, dim: int) -> Tensor:
        ctx.shape, ctx.place = whole.shape, (dim, start, stop - start)
        return whole.narrow(dim, start, stop - start).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        whole = grad.new_zeros(ctx.shape)
        whole.narrow(*ctx.place).copy_(grad)
        dist.all_reduce(whole)  # the others are 0: exact
        return whole, None, None, None


def split(function: Callable[..., Any], ends: list[int]) -> Callable[..., Any]:
    """A function of a whole head, or of whole logits, of which each rank computes its slice up to its end.

    impl="reference" stays whole.
    """

    def call(**inputs: Any) -> Any:
        if inputs["impl"] == "reference":
            return function(**{k: v for k, v in inputs.items() if k != "group"})
        start, stop = [0, *ends][dist.get_rank()], ends[dist.get_rank()]
        for name, dim in (
            *((name, 0) for name in ("weight", "bias", "ref_weight", "ref_bias")),
            *((name, -1) for name in ("logits", "ref_logits")),
        ):
            if inputs.get(name) is not None:
                inputs[name] = Whole.apply(inputs[name], start, stop, dim)
        return function(**inputs, group=dist.group.WORLD)

    return call


class Traffic:
    """Collectives, and the bytes that this rank gets in them."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count the collectives of torch.distributed."""
    traffic, gather, reduce = Traffic(), dist.all_gather, dist.all_reduce

    def all_gather(out: list[Tensor], mine: Tensor, **options: Any) -> Any:
        traffic.calls.append(("gather", sum(x.nbytes for x in out) - mine.nbytes))
        return gather(out, mine, **options)

    def all_reduce(mine: Tensor, **options: Any) -> Any:
        traffic.calls.append(("sum", mine.nbytes))
        return reduce(mine, **options)

    with patch.object(dist, "all_gather", all_gather), patch.object(dist, "all_reduce", all_reduce):
        yield traffic


def equal_on_all_ranks(*tensors: Tensor) -> None:
    for tensor in tensors:
        mine = tensor.detach().float().reshape(-1).contiguous()
        others = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(others, mine)
        assert all(torch.equal(mine, other) for other in others)


def raises(error: type[Exception], words: str, call: Any) -> None:
    began = time.monotonic()
    with pytest.raises(error, match=words):
        call()
    assert time.monotonic() - began < 20
    dist.barrier()  # nobody is left waiting
