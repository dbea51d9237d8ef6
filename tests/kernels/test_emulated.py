"""The kernels as they are compiled for a GPU, emulated (`bench.ptx`); run with ``--emulate TARGET`` only.

`make test` runs what is not thorough for sm_90; `make emulated` runs this and the numerical tests of
impl="triton" for every target. The mutations at the end show what the emulation notices.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from aer_fast import ppo_loss, reference, token_stats
from aer_fast.kernels import ppo_loss as ppo_kernels
from aer_fast.kernels import primitives
from aer_fast.kernels import token_stats as stats_kernels
from bench import aot
from bench.ptx import EmulationError
from tests.helpers import sanitizer

pytestmark = pytest.mark.emulated
thorough = pytest.mark.thorough
CPU = torch.device("cpu")
MODULES = (primitives, stats_kernels, ppo_kernels)
FUNCTIONS = {x for module in MODULES for x in vars(module).values() if isinstance(x, JITFunction)}


@pytest.mark.parametrize("V", sanitizer.VOCABULARIES)
@pytest.mark.parametrize("softcap", [None, pytest.param(20.0, marks=thorough)])
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, *(pytest.param(x, marks=thorough) for x in (torch.float16, torch.float32))]
)
def test_every_variant_is_right(dtype: torch.dtype, softcap: float | None, V: int) -> None:
    sanitizer.run(dtype, V, softcap, CPU)


@pytest.mark.parametrize("V", [256, 1025, *(pytest.param(V, marks=thorough) for V in (4104, 16_392))])
@pytest.mark.parametrize("softcap", [None, pytest.param(20.0, marks=thorough)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=thorough)])
def test_every_variant_of_a_pair_is_right(dtype: torch.dtype, softcap: float | None, V: int) -> None:
    sanitizer.run_pairs(dtype, V, softcap, CPU)


# ---- rows at a bound of the clip range: the last bit of a logprob decides


def loss_and_grad(logits: Tensor, target: Tensor, old_logprob: Tensor, impl: str, **options: Any) -> Tensor:
    leaf = logits.clone().requires_grad_()
    ones = torch.ones(len(target), dtype=logits.dtype)
    ppo_loss(leaf, target, old_logprob, ones, impl=impl, denominator=1.0, **options).loss.backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("entropy_coef", [0.0, 0.01])
def test_one_row_at_the_bound(entropy_coef: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # a tile this small shares eight logits between lanes
    monkeypatch.setattr(primitives, "tile_config", lambda V, align, itemsize: {"BLOCK_V": 8, "num_warps": 1})
    logits = torch.tensor([[1.0, 0.3, 2.3, -1.2, -2.5, 1.0, 1.5, 2.1]])
    inputs = logits, torch.tensor([6]), torch.tensor([-2.0765528678894043])
    check_rows_at_the_bound(*inputs, entropy_coef)


@pytest.mark.parametrize("entropy_coef", [pytest.param(0.0, marks=thorough), 0.01])
@pytest.mark.parametrize(
    "V", [16, *(pytest.param(V, marks=thorough) for V in (1, 33, 40, 96, 256, 512, 513))]
)
def test_a_row_is_clipped_or_not_as_a_whole(V: int, entropy_coef: float) -> None:
    logits, target = 2 * torch.randn(200, V), torch.randint(V, (200,))
    logprob = reference.token_stats(logits.double(), target).logprob
    old_logprob = (logprob - torch.tensor(1.2).double().log()).float()
    check_rows_at_the_bound(logits, target, old_logprob, entropy_coef)


@pytest.mark.parametrize("V", [33, 200, 512])
def test_the_lanes_of_a_warp_hold_the_same(V: int) -> None:
    lanes_of_a_warp(V)


def lanes_of_a_warp(V: int) -> None:
    """Statistics of many rows; that lanes disagree on one is an error of the emulation."""
    logits, target = torch.randn(99, V), torch.randint(V, (99,))
    actual = token_stats(logits, target, impl="triton")
    exact = reference.token_stats(logits.double(), target)
    for a, e in zip(actual, exact):
        assert (a - e).abs().max() < 1e-5


def check_rows_at_the_bound(logits: Tensor, target: Tensor, old_logprob: Tensor, coef: float) -> None:
    actual = loss_and_grad(logits, target, old_logprob, "triton", entropy_coef=coef).double()
    exact = logits.double()
    clipped, whole = (
        loss_and_grad(exact, target, old_logprob.double() + shift, "reference", entropy_coef=coef)
        for shift in (-1e-3, 0.0012)
    )
    errors = torch.stack([(actual - x).abs().amax(1) for x in (clipped, whole)])
    assert (errors.amin(0) <= 2e-3 * whole.abs().amax(1) + 1e-6).all()


# ---- what a launch is specialised on


def stats_and_grad(logits: Tensor, target: Tensor) -> Tensor:
    stats = token_stats(logits, target, temperature=0.7, impl="triton")
    (grad,) = torch.autograd.grad((stats.logprob - stats.entropy).sum(), logits)
    return torch.cat([stats.logprob[:, None], stats.entropy[:, None], grad], dim=1).detach()


@pytest.mark.parametrize(
    "V", [1001, *(pytest.param(V, marks=thorough) for V in (45, 1002, 1004, 1008, 5001))]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=thorough)])
def test_a_row_is_the_same_wherever_it_lies(dtype: torch.dtype, V: int) -> None:
    rows, target = torch.randn(3, V).to(dtype), torch.tensor([V - 1, V // 2, 0])
    expected = stats_and_grad(rows.clone().requires_grad_(), target)
    assert torch.equal(stats_and_grad(rows[1:2].requires_grad_(), target[1:2]), expected[1:2])  # alone
    for padding in (8, 16 - V % 16):
        padded = torch.full((3, V + padding), torch.nan, dtype=dtype)
        padded[:, :V] = rows
        view = padded[:, :V].detach().requires_grad_()
        assert not view.is_contiguous()
        assert torch.equal(stats_and_grad(view, target), expected)


@pytest.mark.parametrize(("start", "stride"), [(1, 1008), (2, 1008), (4, 1008), (0, 1009), (0, 1012)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=thorough)])
def test_rows_may_lie_anywhere(start: int, stride: int, dtype: torch.dtype) -> None:
    memory, target = torch.randn(2048).to(dtype), torch.tensor([1007, 3])
    rows = memory[start : start + 2 * stride].view(2, stride)[:, :1008].detach().requires_grad_()
    expected = stats_and_grad(rows.detach().clone().requires_grad_(), target)
    assert torch.allclose(stats_and_grad(rows, target), expected, atol=1e-6, rtol=1e-2)


def test_what_is_aligned_alike_is_compiled_once() -> None:
    kernels = {f for f in FUNCTIONS if f.__name__.endswith("_kernel")}
    assert len(kernels) == 5
    forget()
    for V, padding in ((1001, 0), (1001, 23), (1001, 2), (2047, 1)):
        logits = torch.zeros(3, V + padding)[:, :V].detach().requires_grad_()
        for rows in (slice(3), slice(1), slice(1, 2)):
            part = logits[rows]
            target = torch.zeros(len(part), dtype=torch.long)
            (2 * ppo_loss(part, target, None, 1.0, impl="triton").loss).backward()
            token_stats(part, target, impl="triton").logprob.sum().backward()
            stats_kernels.row_sums_fwd(part.detach().unsqueeze(0), target, torch.ones(len(part)), 0.0)
    for kernel in kernels:
        (cache, *_), *others = kernel.device_caches.values()
        assert not others
        assert 1 <= len(cache) <= 2, kernel  # Triton tells whether 16 divides the address


# ---- mutations: what is wrong with a kernel is noticed


@contextmanager
def mutated(function: JITFunction[Any], old: str, new: str) -> Iterator[None]:
    source = function.src
    assert source.count(old) == 1, source
    function._unsafe_update_src(source.replace(old, new))
    forget()
    try:
        yield
    finally:
        function._unsafe_update_src(source)
        forget()


def forget() -> None:
    """Compile everything again."""
    for function in FUNCTIONS:
        function.hash = None
        function.device_caches.clear()


def every_variant() -> None:
    for V in (1027, 96):
        sanitizer.run(torch.bfloat16, V, None, CPU)


def in_place() -> None:
    for V in (1027, 96):
        logits = torch.randn(4, V).bfloat16().requires_grad_()
        target = torch.tensor([V - 1, V // 3, V * 4 // 5, V // 3])
        advantage = torch.tensor([1.0, -1.0, 1.0, 0.0])
        ppo_loss(logits * 1, target, None, advantage, inplace=True, impl="triton").loss.backward()


BARRIER = "tl.debug_barrier()"
A_RACE, NOT_WRITTEN, OUT_OF_BOUNDS = "a race with", "was not written", "out of bounds"
BARRIERS = {
    "after the statistics": (
        ppo_kernels._ppo_loss_kernel,
        f"overwrites it\n        {BARRIER}",
        "overwrites it",
    ),
    "after the target's load": (primitives.store_row_grad, f"{BARRIER}\n    e_target", "e_target"),
    "before the target's store": (primitives.store_row_grad, f"{BARRIER}\n    tl.store", "tl.store"),
}


def test_lanes_that_round_differently_are_noticed() -> None:
    mutation = primitives.sum_of_lanes, "x + 0.0", "x"
    with mutated(*mutation), pytest.raises(EmulationError, match="different values"):
        lanes_of_a_warp(33)


@pytest.mark.parametrize("name", BARRIERS)
def test_a_missing_barrier_is_noticed(name: str) -> None:
    with mutated(*BARRIERS[name]), pytest.raises(EmulationError, match=A_RACE):
        in_place()


LANE = 'tl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r,r", [n], tl.int32, is_pure=True, pack=1)'
MUTATIONS: dict[str, tuple[JITFunction[Any], str, str, str]] = {
    "a tile loaded beyond the end": (
        primitives.load_tile,
        "mask=offs_v < V",
        "mask=offs_v <= V",
        OUT_OF_BOUNDS,
    ),
    "a gradient stored beyond the end": (
        primitives.store_row_grad,
        "offs_v, grad, mask=inside",
        "offs_v, grad, mask=offs_v <= V",
        f"{OUT_OF_BOUNDS}|{A_RACE}",
    ),
    "a gradient that ends too early": (
        primitives.store_row_grad,
        "offs_v, grad, mask=inside",
        "offs_v, grad, mask=offs_v < V - 1",
        NOT_WRITTEN,
    ),
    "zeros that end too early": (
        primitives.zero_row,
        "range(0, V, BLOCK_V)",
        "range(0, V - BLOCK_V, BLOCK_V)",
        NOT_WRITTEN,
    ),
    "the target's gradient at another place": (
        primitives.store_row_grad,
        "tl.store(grad_ptr + target,",
        "tl.store(grad_ptr + target + 1,",
        f"{OUT_OF_BOUNDS}|{A_RACE}",
    ),
    "a row of another block": (
        primitives.row_of,
        "(n % I)",
        "((n + 1) % I)",
        "",  # wrong values
    ),
    "a missing store": (
        stats_kernels._token_stats_fwd_kernel,
        "tl.store(state_ptr + 2 * N, mean_d)",
        "",
        NOT_WRITTEN,
    ),
    "a store to an input": (
        stats_kernels._token_stats_fwd_kernel,
        "tl.store(logprob_ptr + n, logprob)",
        "tl.store(temperature_ptr + n, logprob)",
        OUT_OF_BOUNDS,
    ),
    "a branch by lane": (
        ppo_kernels._ppo_loss_kernel,
        "if active > 0:",
        f"if active * {LANE} > 3:",
        "parts the threads",
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x == "a missing store" else thorough) for x in MUTATIONS]
)
def test_a_mutation_is_noticed(name: str) -> None:
    function, old, new, message = MUTATIONS[name]
    with mutated(function, old, new), pytest.raises((EmulationError, AssertionError)) as error:
        every_variant()
    assert re.search(message, str(error.value)), error.value


UNALIGNED = (primitives.row_of, "tl.multiple_of(ptr + offset * ALIGN, ", "tl.add(ptr + offset * ALIGN, 0 * ")


@thorough
@pytest.mark.parametrize(("form", "specialised"), [("4|V", False), ("odd", True)])
def test_rows_shared_otherwise_among_the_threads_are_noticed(form: str, specialised: bool) -> None:
    variant = aot.Variant("token_stats fwd", "sm_90", "bf16", form, softcap=False)
    assert aot.report(variant).problems() == []
    integers = [p for f in FUNCTIONS for p in f.params if p.name in primitives.INTEGERS]
    with pytest.MonkeyPatch.context() as patch, mutated(*UNALIGNED):
        for parameter in integers:
            patch.setattr(parameter, "do_not_specialize", not specialised)
        problems = aot.report(variant).problems()
    assert any("another kernel for Form" in problem for problem in problems), problems


@thorough
@pytest.mark.parametrize(
    "kernel",
    [
        stats_kernels._token_stats_fwd_kernel,
        stats_kernels._row_sums_kernel,
        stats_kernels._token_stats_bwd_kernel,
        ppo_kernels._ppo_loss_kernel,
    ],
    ids=lambda kernel: kernel.__name__,
)
def test_specialised_strides_are_noticed(kernel: JITFunction[Any]) -> None:
    strides = [p for p in kernel.params if p.name.startswith("stride_")]
    with pytest.MonkeyPatch.context() as patch:
        for parameter in strides:
            patch.setattr(parameter, "do_not_specialize", False)
        with pytest.raises(AssertionError):
            test_what_is_aligned_alike_is_compiled_once()
