"""What ranks that hold slices of a vocabulary tell each other: faults, traffic, memory, DTensors."""

import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import aer_fast
from aer_fast import plan
from aer_fast._linear import products
from aer_fast._rows import strips
from tests.helpers.heads import linear_ppo_loss, peak_memory, run
from tests.helpers.ranks import counted, on_ranks

pytestmark = pytest.mark.host
N, V, D = 23, 50, 12


def objective(logprob: Tensor, entropy: Tensor, advantage: Tensor) -> Tensor:
    return -(logprob * advantage + 0.1 * entropy * logprob.detach())


def errors() -> None:
    group, rank = dist.group.WORLD, dist.get_rank()
    torch.manual_seed(0)
    hidden, target = torch.randn(N, D, requires_grad=True), torch.randint(2 * V, (N,))
    weight = torch.randn(V, D, requires_grad=True)
    loss, stats, count = aer_fast.linear_token_loss, aer_fast.linear_token_stats, [0]

    def raises(error: type[Exception], words: str, call: Any) -> None:
        began = time.monotonic()
        with pytest.raises(error, match=words):
            call()
        assert time.monotonic() - began < 20
        dist.barrier()  # nobody is left waiting

    def late(logprob: Tensor, entropy: Tensor) -> Tensor:
        count[0] += 1
        if rank == 1 and count[0] > 2:
            raise KeyError("mine")
        return -logprob

    def never(logprob: Tensor, entropy: Tensor) -> Tensor:
        return -logprob

    def broken(after: int) -> Any:
        """The product of rank 1 that fails: like memory that is out."""
        original, done = products.grad_hidden, [0]

        def grad_hidden(*args: Any, **options: Any) -> None:
            done[0] += 1
            if rank == 1 and done[0] > after:
                raise MemoryError("no room")
            original(*args, **options)

        return patch.object(products, "grad_hidden", grad_hidden)

    # Before a chunk: an argument that is wrong on one rank alone.
    other = weight[:, :3] if rank == 1 else weight
    own, theirs = r"weight must be \[V, D\]", r"rank 1 of the group has raised ValueError: weight must be"
    raises(ValueError, own if rank == 1 else theirs, lambda: stats(hidden, other, target, group=group))
    logits = torch.randn(N, V)
    cap = -1.0 if rank == 0 else None
    words = "softcap must be positive"
    raises(ValueError, words, lambda: aer_fast.token_stats(logits, target, softcap=cap, group=group))
    raises(ValueError, words, lambda: aer_fast.ppo_loss(logits, target, None, 1.0, softcap=cap, group=group))
    raises(ValueError, "target must be in", lambda: stats(hidden, weight, target + V, group=group))
    raises(
        ValueError,
        "vocab_size must be at most",
        lambda: stats(hidden, weight, target, group=group, vocab_size=101),
    )

    # In a chunk and after it.
    for chunk, calls in ((5, 0), (N, 2)):
        count[0] = calls
        options = {"group": group, "chunk_tokens": chunk}
        kind: type[Exception] = KeyError if rank == 1 else RuntimeError
        raises(kind, "mine", partial(loss, hidden, weight, target, late, **options))
    count[0] = 2  # the last thing that anybody does, with no sum after it
    frozen = partial(loss, hidden.detach(), weight, target, late, group=group)
    raises(kind, "mine", frozen)
    kind = MemoryError if rank == 1 else RuntimeError
    for after in (0, 1, 2):
        with broken(after):
            raises(kind, "no room", partial(loss, hidden, weight, target, never, group=group, chunk_tokens=9))
    with broken(1):
        out = stats(hidden, weight, target, group=group, chunk_tokens=9)
        raises(kind, "no room", out.logprob.sum().backward)

    # What must be alike: tokens above all.
    mine = hidden + (1e-6 if rank == 0 else 0)
    for call in (
        lambda: stats(mine, weight, target, group=group),
        lambda: stats(hidden, weight, target.roll(rank), group=group),
        lambda: aer_fast.token_stats(logits, target.roll(rank), group=group),
    ):
        raises(ValueError, r"must be the same on all ranks.*full_tensor\(\)", call)
    mask = (torch.arange(N) != rank).float()
    raises(
        ValueError,
        "tokens that count",
        lambda: aer_fast.linear_ppo_loss(hidden, weight, target, None, 1.0, mask, group=group),
    )
    each: dict[str, tuple[Any, Any]] = {
        "temperature": (1.0, 2.0),
        "softcap": (None, 3.0),
        "vocab_size": (None, 60),
        "reduce_hidden": (True, False),
        "bias": (None, torch.zeros(V)),
    }
    for name, values in each.items():
        raises(ValueError, name, partial(stats, hidden, weight, target, group=group, **{name: values[rank]}))
    policy: dict[str, tuple[str, Any]] = {
        "advantage": ("given per token", torch.full((N,), float(rank))),
        "entropy_coef": ("given per token", 0.1 * (rank + 1)),
        "clip": ("clip", (0.2, 0.1 + rank)),
        "denominator": ("denominator", 1.0 + rank),
    }
    for name, (words, value) in policy.items():
        given = {"old_logprob": 0.0, "advantage": 1.0, "group": group} | {name: value}
        raises(ValueError, words, partial(aer_fast.linear_ppo_loss, hidden, weight, target, **given))
        raises(ValueError, words, partial(aer_fast.ppo_loss, logits, target, **given))
    mine = torch.full((N,), float(rank))
    raises(ValueError, "token_tensors", partial(loss, hidden, weight, target, objective, mine, group=group))
    cuts = torch.tensor([0, 5 + rank, N])
    raises(
        ValueError, "cu_seqlens", partial(loss, hidden, weight, target, never, group=group, cu_seqlens=cuts)
    )
    raises(
        ValueError,
        "hidden.requires_grad",
        lambda: stats(hidden.detach() if rank else hidden, weight, target, group=group),
    )
    raises(ValueError, "takes no group", lambda: stats(hidden, weight, target, group=group, impl="reference"))
    with pytest.raises(ValueError, match="group must be a process group"):
        stats(hidden, weight, target, group="all")
    out = stats(hidden, weight, target, group=group)
    raises(ValueError, "the upstream gradient", out.logprob[: N - rank].sum().backward)


def test_an_error_of_one_rank_is_an_error_of_all(tmp_path: Path) -> None:
    on_ranks(2, errors, tmp_path)


def hidden_differences() -> None:
    """What a simple sum of bits would not see, and what comes late."""
    group, rank = dist.group.WORLD, dist.get_rank()
    torch.manual_seed(0)
    hidden, weight, logits = torch.randn(6, D), torch.randn(V, D), torch.randn(6, V)
    hidden = torch.cat((hidden[:, : D // 2], -hidden[:, : D // 2]), -1).requires_grad_()
    weight.requires_grad_()
    target, other = torch.tensor([0, 1, 3, 4, 5, 6]), torch.tensor([2, 0, 3, 4, 5, 6])
    stats, loss = aer_fast.linear_token_stats, aer_fast.linear_ppo_loss

    def raises(error: type[Exception], words: str, call: Any) -> None:
        with pytest.raises(error, match=words):
            call()
        dist.barrier()

    targets = (target, other)[rank]
    raises(ValueError, "target must be the same", lambda: aer_fast.token_stats(logits, targets, group=group))
    mask = torch.tensor([[1.0, 0, 0, 1, 1, 1], [0.0, 1, 1, 0, 1, 1]][rank])
    raises(ValueError, "count", lambda: aer_fast.ppo_loss(logits, target, None, 1.0, mask, group=group))
    for mine in (hidden.flip(-1) if rank else hidden, -hidden if rank else hidden, hidden.roll(rank, 0)):
        raises(ValueError, "hidden must be the same", partial(stats, mine, weight, target, group=group))
    few = (hidden[: 6 - rank], weight, target[: 6 - rank])
    raises(ValueError, r"number of tokens.*full_tensor\(\)", partial(stats, *few, group=group))
    one, two = torch.rand(6), torch.rand(6)
    pair = (one, two) if rank else (two, one)
    options: dict[str, Any] = {"old_logprob": None, "advantage": pair[0], "entropy_coef": pair[1]}
    raises(ValueError, "given per token", partial(loss, hidden, weight, target, **options, group=group))

    def both(logprob: Tensor, entropy: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return logprob * a - entropy * b

    mixed = partial(aer_fast.linear_token_loss, hidden, weight, target, both, *pair, group=group)
    raises(ValueError, "token_tensors", mixed)
    own = weight.detach().to((torch.float32, torch.bfloat16)[rank])
    with torch.autocast("cpu", torch.bfloat16):
        raises(ValueError, "dtype of weight", partial(stats, hidden, own, target, group=group))
    upstream = stats(hidden, weight, target, group=group).logprob * (1.0 + rank)
    raises(ValueError, "the upstream gradient", upstream.sum().backward)
    inplace: Any = "yes" if rank else False
    call = partial(aer_fast.ppo_loss, logits, target, None, 1.0, inplace=inplace, group=group)
    raises(ValueError, "inplace must be", call)


def late_faults() -> None:
    """Between the meeting and the first chunk, and after the last message of numbers."""
    group, rank = dist.group.WORLD, dist.get_rank()
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    target, logits = torch.randint(V, (6,)), torch.randn(6, V, requires_grad=True)

    def fails(*args: Any, **options: Any) -> Any:
        raise MemoryError("no room")

    def statistics() -> Any:
        return aer_fast.linear_token_stats(hidden, weight, target, group=group)

    calls: dict[tuple[str, str], Any] = {
        ("aer_fast._linear.ppo_loss", "head_of"): lambda: aer_fast.linear_ppo_loss(
            hidden, weight, target, None, 1.0, group=group
        ),
        ("aer_fast._linear.token_stats", "head_of"): statistics,
        ("aer_fast._linear.token_stats", "statistics"): statistics,
        ("aer_fast._rows.sums", "finish"): statistics,
        ("aer_fast._split.Columns", "write_grad"): lambda: aer_fast.ppo_loss(
            logits * 1, target, None, 1.0, group=group
        ),
        ("aer_fast._linear.products", "grad_weight"): statistics().logprob.sum().backward,
    }
    kind = MemoryError if rank == 1 else RuntimeError
    for (place, name), call in calls.items():
        with pytest.MonkeyPatch.context() as patched:
            if rank == 1:
                patched.setattr(f"{place}.{name}", fails)
            with pytest.raises(kind, match="no room"):
                call()
        dist.barrier()
        assert statistics().logprob.isfinite().all()  # the group works on


@pytest.mark.parametrize("body", [hidden_differences, late_faults], ids=lambda body: str(body.__name__))
def test_nothing_goes_unnoticed(body: Any, tmp_path: Path) -> None:
    on_ranks(2, body, tmp_path)


def traffic() -> None:
    group, size = dist.group.WORLD, dist.get_world_size()
    torch.manual_seed(0)
    hidden, weight, target = torch.randn(40, D), torch.randn(V, D), torch.randint(V, (40,))
    hidden.requires_grad_()
    predicted = plan(40, size * V, D, dtype=torch.float32, device="cpu", ranks=size, chunk_tokens=20)
    meeting = 33 * 8 * (size - 1)
    with counted() as found:
        out = aer_fast.linear_ppo_loss(hidden, weight, target, None, 1.0, group=group, chunk_tokens=20)
        out.loss.backward()
    chunk = [("gather", (4 * 20 + 1) * 4 * (size - 1)), ("sum", (20 * D + 1) * 4)]
    assert found.calls == [("gather", meeting), *chunk, *chunk, ("gather", 8 * (size - 1))]
    sums = sum(n for kind, n in found.calls if kind == "sum")
    gathered = sum(n for kind, n in found.calls[1:-1] if kind == "gather")
    ring = 2 * (size - 1) * (sums - 8) // size
    assert gathered - 8 * (size - 1) + ring == predicted.traffic
    with counted() as found:
        aer_fast.linear_token_stats(hidden.detach(), weight, target, group=group, chunk_tokens=20)
    statistics = ("gather", (4 * 40 + 1) * 4 * (size - 1))
    assert found.calls == [("gather", meeting), statistics, ("gather", 8 * (size - 1))]
    with counted() as found:
        aer_fast.ppo_loss((hidden @ weight.T), target, None, 1.0, group=group).loss.backward()
    statistics = ("gather", (4 * 40 + 1) * 4 * (size - 1))
    assert found.calls == [("gather", meeting), statistics, ("gather", 8 * (size - 1))]


def test_traffic(tmp_path: Path) -> None:
    """One message of integers, four numbers a token and rank, the sum of grad_hidden, a flag: no more."""
    on_ranks(2, traffic, tmp_path)


def full_tensor(x: Any) -> Any:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def dtensors() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    hidden, target, advantage = torch.randn(2, 8, D), torch.randint(V + 1, (2, 8)), torch.randn(2, 8)
    weight, bias = torch.randn(V + 1, D), torch.randn(V + 1)  # which do not divide evenly
    inputs: dict[str, Any] = {"hidden": hidden, "weight": weight, "bias": bias, "target": target}
    inputs |= {"old_logprob": None, "advantage": advantage}
    whole, expected = run(aer_fast.linear_ppo_loss, inputs)
    for split_hidden in (None, Replicate(), Shard(0), Shard(1), Shard(2)):
        placed = {name: distribute_tensor(inputs[name], mesh, [Shard(0)]) for name in ("weight", "bias")}
        if split_hidden is not None:
            placed["hidden"] = distribute_tensor(hidden, mesh, [split_hidden])
        out, grads = run(aer_fast.linear_ppo_loss, inputs | placed)
        torch.testing.assert_close(out.loss, whole.loss)
        for name, grad in grads.items():
            assert getattr(grad, "placements", None) == getattr(placed.get(name), "placements", None), name
            full = full_tensor(grad)
            torch.testing.assert_close(full, expected[name], rtol=1e-4, atol=1e-6)
    whole_head = {name: distribute_tensor(inputs[name], mesh, [Replicate()]) for name in ("weight", "bias")}
    for placement in (None, Replicate(), Shard(1)):
        placed = whole_head
        if placement is not None:
            placed = whole_head | {"hidden": distribute_tensor(hidden, mesh, [placement])}
        _, grads = run(aer_fast.linear_ppo_loss, inputs | placed)
        for name, grad in grads.items():
            torch.testing.assert_close(full_tensor(grad), expected[name], rtol=1e-4, atol=1e-6)
    placed = {name: distribute_tensor(inputs[name], mesh, [Shard(0)]) for name in ("weight", "bias")}
    placed["hidden"] = distribute_tensor(hidden, mesh, [Replicate()])
    _, grads = run(aer_fast.linear_ppo_loss, inputs | placed, reduce_hidden=False)
    torch.testing.assert_close(full_tensor(grads["hidden"]), expected["hidden"], rtol=1e-4, atol=1e-6)

    owner = torch.nn.Linear(D, V, bias=False)
    fully_shard(owner, mesh=mesh)
    with pytest.raises(ValueError, match=r"weight must be .* FSDP2.*weight.full_tensor\(\)"):
        aer_fast.linear_token_stats(hidden, owner.weight, target)
    with pytest.raises(ValueError, match=r"group must be None for a weight that is whole"):
        aer_fast.linear_token_stats(hidden, whole_head["weight"], target, group=dist.group.WORLD)
    columns = distribute_tensor(weight, mesh, [Shard(1)])
    with pytest.raises(ValueError, match=r"weight must be split by vocabulary"):
        aer_fast.linear_token_stats(hidden, columns, target)
    with pytest.raises(ValueError, match=r"hidden must be a plain tensor"):
        aer_fast.linear_token_stats(distribute_tensor(hidden, mesh, [Shard(0)]), weight, target)


def test_heads_that_are_dtensors(tmp_path: Path) -> None:
    """Gradients have the placements of what they are of; FSDP2's parameters are refused."""
    on_ranks(2, dtensors, tmp_path)


def memory() -> None:
    size, rank = dist.get_world_size(), dist.get_rank()
    n, words, width, chunk = 256, 16_000, 128, 64
    strips.CPU_STRIP = 0  # as little scratch as can be: it has its size whatever the vocabulary's
    target, taken = torch.randint(words, (n,)), []
    hidden, weight = torch.randn(n, width), torch.randn(words, width)
    for part, group in ((weight, None), (weight.tensor_split(size)[rank].clone(), dist.group.WORLD)):
        made: list[Any] = []

        def spying(*sizes: Any, made: list[Any] = made, **options: Any) -> Any:
            made.append(plan(*sizes, **options))
            return made[-1]

        inputs: dict[str, Any] = {"hidden": hidden.requires_grad_(), "weight": part.requires_grad_()}
        inputs |= {"target": target, "old_logprob": None, "advantage": 1.0}
        inputs |= {"chunk_tokens": chunk, "planner": spying}
        kept: list[Any] = []
        peak = peak_memory(lambda: kept.append(linear_ppo_loss(**inputs, group=group)))  # noqa: B023
        assert 0.9 <= max(x.memory for x in made) / peak <= 1.1, group
        taken.append(peak)
    fixed = n * width * 4  # grad_hidden; all else is the logits of a chunk and grad_weight, with scratch
    assert (taken[1] - fixed) / (taken[0] - fixed) == pytest.approx(1 / size, rel=0.1)


def test_memory_of_a_rank(tmp_path: Path) -> None:
    """Two ranks halve the logits of a chunk and the gradient of the weight, as `plan` says."""
    on_ranks(2, memory, tmp_path)
