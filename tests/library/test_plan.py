"""The planner is a pure function: what it chooses, and that the memory it predicts is what is taken."""

import importlib
import math
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from aer_fast import Plan, plan
from aer_fast._linear import products
from tests.helpers.heads import linear_ppo_loss, linear_token_loss, linear_token_stats, peak_memory

module = importlib.import_module("aer_fast._linear.plan")

GIB, MIB = 1 << 30, 1 << 20
QWEN = (151_936, 4096)


def test_one_chunk_keeps_dz_and_needs_no_accumulator() -> None:
    made = plan(8192, *QWEN)
    assert (made.order, made.chunks, made.products) == ("rows", 1, 3)
    assert made.memory < 5 * GIB


def test_products_are_those_that_are_needed() -> None:
    assert plan(8192, *QWEN, grad_weight=False).products == 2
    assert plan(8192, *QWEN, grad_hidden=False).products == 2
    assert plan(8192, *QWEN, grad_hidden=False, grad_weight=False).products == 1
    assert plan(8192, *QWEN, operation="stats").products == 4


def test_statistics_keep_their_logits_where_these_fit() -> None:
    sizes: dict[str, Any] = {"operation": "stats", "dtype": torch.float32}
    made = plan(512, 49_152, 576, device="cpu", **sizes)
    assert (made.products, made.held, made.chunks) == (3, 4 * 512 * 49_152, 1)
    assert made.memory >= made.held + 4 * 49_152 * 576  # and the gradient
    assert "kept for the backward" in str(made)
    for other in (
        plan(2048, 151_936, 576, device="cpu", **sizes),  # do not fit
        plan(512, 49_152, 576, device="cpu", chunk_tokens=512, **sizes),
        plan(512, 49_152, 576, device="cpu", ranks=2, **sizes),
        plan(512, 49_152, 576, device="cuda", **sizes),  # unless it is asked for
    ):
        assert (other.products, other.held) == (4, 0)
    asked = plan(512, 49_152, 576, device="cuda", memory_budget=GIB, **sizes)
    assert (asked.products, asked.held) == (3, made.held)
    assert asked.memory <= GIB
    assert plan(512, 49_152, 576, device="cpu", dtype=torch.float32).held == 0  # of a loss there is no need


def test_a_cpu_makes_statistics_alone_of_some_words_at_a_time() -> None:
    sizes: dict[str, Any] = {"dtype": torch.float32, "grad_hidden": False, "grad_weight": False}
    made = plan(2000, 151_936, 576, device="cpu", **sizes)
    assert (made.products, made.tile, made.slice, made.chunk) == (1, 504, 8192, 504)
    assert made.memory < 24 * MIB < 4 * made.tile * 151_936
    assert "4 chunks of 504 rows, logits of 504 rows and 8,192 words at a time" in str(made)
    assert plan(2000, 151_936, 576, device="cpu", chunk_tokens=1000, **sizes).chunk == 512
    others: tuple[dict[str, Any], ...] = (
        {"device": "cpu", "impl": "triton"},
        {"device": "cpu", "ref_D": 576},  # pairs need their whole rows
        {"device": "cpu", "grad_bias": True},
        {"device": "cuda", "impl": "torch"},
    )
    for options in others:
        other = plan(2000, 151_936, 576, **options, **sizes)
        assert other.slice == 151_936
        assert other.memory > 100 * MIB


def test_little_memory_turns_the_loop_around() -> None:
    """2.5 GiB hold neither the float32 accumulator nor all of dz beside the gradient: a fourth product."""
    made = plan(8192, *QWEN, memory_budget=int(2.5 * GIB))
    assert (made.order, made.products) == ("vocabulary", 4)
    assert made.memory <= 2.5 * GIB
    assert made.seconds > plan(8192, *QWEN).seconds


def test_between_the_two_there_is_an_accumulator() -> None:
    """Many rows: dz of all would not fit, several chunks and a sum in float32 do."""
    made = plan(65_536, *QWEN)
    assert made.order == "rows"
    assert made.chunks > 1
    accumulator = 4 * QWEN[0] * QWEN[1]
    assert made.memory > accumulator + 2 * made.chunk * QWEN[0]


def test_float32_never_needs_the_other_order_on_a_gpu_with_room() -> None:
    made = plan(65_536, *QWEN, dtype=torch.float32)
    assert (made.order, made.products) == ("rows", 3)


def test_memory_does_not_grow_with_rows_beyond_tensors_of_that_length() -> None:
    per_row = 4096 * (2 + 2 + 4) + 1024  # hidden, its gradient, and statistics
    small, large = plan(32_768, *QWEN), plan(262_144, *QWEN)
    assert large.memory - small.memory < (262_144 - 32_768) * per_row


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation", ["loss", "stats"])
def test_more_memory_is_never_slower(device: str, dtype: torch.dtype, operation: Any) -> None:
    last = None
    for budget in (GIB // 4, GIB, 2 * GIB, 4 * GIB, 16 * GIB, 256 * GIB):
        options = {"device": device, "dtype": dtype, "operation": operation}
        made = plan(16_384, 50_257, 1024, memory_budget=budget, **options)
        assert last is None or made.seconds <= last.seconds * 1.01
        if made.memory > budget:  # nothing fits: the smallest there is
            assert made.memory <= plan(16_384, 50_257, 1024, memory_budget=1, **options).memory
        last = made
    assert last is not None
    assert last.chunks == 1


def test_the_same_question_has_the_same_answer_whatever_is_free() -> None:
    assert plan(8192, *QWEN) == plan(8192, *QWEN)


@pytest.mark.parametrize("rows", [0, 1, 3, 64, 65, 1000])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize("chunk_tokens", [None, 1, 7, 10_000])
def test_every_plan_can_be_run(rows: int, device: str, budget: int | None, chunk_tokens: int | None) -> None:
    for V, D in ((1, 1), (7, 3), (5000, 64)):
        for wanted in (True, False):
            options: dict[str, Any] = {"memory_budget": budget, "chunk_tokens": chunk_tokens}
            made = plan(rows, V, D, device=device, grad_hidden=wanted, grad_weight=wanted, **options)
            assert 1 <= made.tile <= made.chunk <= max(rows, 1)
            assert 1 <= made.slice <= V
            assert chunk_tokens is None or (made.chunk <= chunk_tokens and made.order == "rows")


def test_rows_that_clipping_kills_are_left_out_where_that_pays() -> None:
    """A tenth of the rows, two products: more than reading the logits once again, if D is large."""
    assert plan(8192, *QWEN, clippable=8192).compact
    assert not plan(8192, 151_936, 512, clippable=8192).compact
    assert not plan(8192, *QWEN, clippable=100).compact
    assert not plan(8192, *QWEN).compact
    assert plan(8192, 151_936, 512, dtype=torch.float32, device="cpu").compact  # costs nothing there


def test_the_smallest_loop_is_small() -> None:
    """Whatever fits is found, down to one row or 64 words at a time."""
    forward = plan(100, 262_144, 4096, grad_hidden=False, grad_weight=False, memory_budget=170 * MIB)
    assert forward.memory <= 170 * MIB
    made = plan(100, 151_936, 64, impl="torch", clippable=100, memory_budget=300 * MIB)
    assert made.memory <= 300 * MIB
    assert plan(8192, *QWEN, memory_budget=int(1.5 * GIB)).memory <= 1.5 * GIB


def test_masked_tokens_count_in_the_gradient_of_hidden() -> None:
    few, all_of_them = plan(100, 5000, 4096), plan(100, 5000, 4096, tokens=10_000)
    assert all_of_them.memory - few.memory >= 9_900 * 4096 * 2


def test_the_last_rounding_holds_the_sum_and_the_gradient() -> None:
    made = plan(512, *QWEN, chunk_tokens=64)
    assert made.memory >= (4 + 2) * QWEN[0] * QWEN[1]


def test_it_can_be_printed() -> None:
    text = str(plan(65_536, *QWEN))
    assert re.search(r"65,536 rows, V = 151,936, D = 4,096, bfloat16 on cuda", text)
    assert re.search(r"\d+ chunks of [\d,]+ rows, logits of 1,024 rows at a time", text)
    assert re.search(r"3 products, \d\.\d\d GiB, \d+ ms on an H100", text)
    assert "words at a time" in str(plan(8192, *QWEN, memory_budget=int(2.5 * GIB)))


def ppo(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, **options: Any) -> Any:
    N = len(target)
    constants = (torch.full((N,), -10.0), torch.randn(N))
    return linear_ppo_loss(hidden, weight, target, *constants, entropy_coef=0.01, **options)


def half_silent(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, **options: Any) -> Any:
    N = len(target)
    advantage = torch.randn(N).where(torch.arange(N) % 2 == 0, 0.0)
    return linear_ppo_loss(hidden, weight, target, None, advantage, **options)


def mostly_masked(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, **options: Any) -> Any:
    target = target.where(torch.arange(len(target)) % 4 == 0, -100)
    return ppo(hidden, weight, target, **options)


def autocast(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, **options: Any) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return ppo(hidden, weight, target, **options)


def half_clipped(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, **options: Any) -> Any:
    factors = hidden.detach(), weight.detach()
    old = linear_token_stats(*factors, target, softcap=options["softcap"]).logprob
    old = old - (torch.arange(len(target)) % 2).float()
    return linear_ppo_loss(hidden, weight, target, old, 1.0, **options)


def half_silent_objective(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, **options: Any
) -> Any:
    learns = torch.arange(len(target)) % 2 == 0
    return linear_token_loss(
        hidden, weight, target, lambda logprob, entropy, learns: -logprob * learns, learns, **options
    )


def token_loss(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, **options: Any) -> Any:
    return linear_token_loss(hidden, weight, target, lambda logprob, entropy: -logprob - entropy, **options)


def token_stats(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, **options: Any) -> None:
    stats = linear_token_stats(hidden, weight, target, **options)
    if stats.logprob.requires_grad:
        (stats.logprob.sum() + stats.entropy.sum()).backward()


def keeping(made: list[Plan]) -> Callable[..., Plan]:
    """A planner whose plans are kept in ``made``."""

    def planner(*sizes: Any, **options: Any) -> Plan:
        made.append(plan(*sizes, **options))
        return made[-1]

    return planner


FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
@pytest.mark.parametrize("multiplies", [False, True])
@pytest.mark.parametrize(
    ("function", "dtype", "budget", "frozen", "softcap"),
    [
        (ppo, FP32, None, (), None),
        (ppo, FP32, 80, (), None),
        (ppo, FP32, 60, (), None),
        (ppo, FP32, 80, (), 30.0),
        (ppo, FP32, 90, ("weight",), None),
        (ppo, FP32, 90, ("hidden",), None),
        (ppo, FP32, 60, ("hidden", "weight"), None),
        (ppo, BF16, None, (), None),
        (ppo, BF16, 130, (), None),
        (ppo, BF16, 90, (), None),
        (ppo, BF16, 60, ("hidden", "weight"), None),
        (half_silent, FP32, None, (), None),
        (half_silent, FP32, 90, (), None),
        (mostly_masked, FP32, None, (), None),
        (mostly_masked, BF16, 60, (), None),
        (half_clipped, FP32, 80, (), None),
        (half_clipped, FP32, 80, (), 30.0),
        (half_silent_objective, FP32, 80, (), None),
        (half_silent_objective, FP32, 80, (), 30.0),
        (autocast, FP32, None, (), None),
        (autocast, FP32, 80, ("weight",), None),
        (autocast, FP32, 90, ("hidden", "weight"), None),
        (token_loss, FP32, 80, (), None),
        (token_loss, BF16, 120, (), None),
        (token_stats, FP32, 120, (), None),
        (token_stats, FP32, 60, (), None),
        (token_stats, BF16, 120, (), None),
        (token_stats, BF16, 90, (), None),
        (token_stats, FP32, 120, ("hidden", "weight"), None),
    ],
)
def test_predicted_memory_is_what_is_taken(
    function: Callable[..., Any],
    dtype: torch.dtype,
    budget: int | None,
    frozen: tuple[str, ...],
    softcap: float | None,
    multiplies: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Within 10% on the CPU, by torch's own account of its allocations; also if it multiplies bfloat16."""
    if multiplies and dtype == FP32 and function is not autocast:
        pytest.skip("nothing is bfloat16")
    monkeypatch.setattr(products, "has_bfloat16", lambda: multiplies)
    N, V, D = 512, 32_000, 256
    factors = {"hidden": torch.randn(N, D).to(dtype), "weight": torch.randn(V, D).to(dtype)}
    for name, x in factors.items():
        x.requires_grad_(name not in frozen)
    target = torch.randint(V, (N,))
    made: list[Plan] = []

    limit = None if budget is None else budget * MIB
    result = []

    def call() -> None:
        options = {"softcap": softcap, "memory_budget": limit, "impl": "torch", "planner": keeping(made)}
        result.append(function(**factors, target=target, **options))

    peak = peak_memory(call)
    predicted = max(p.memory for p in made)  # of forward and backward, where they have a plan each
    assert 0.9 <= predicted / peak <= 1.1, f"predicted {predicted / MIB:.1f} MiB, took {peak / MIB:.1f}"
    assert limit is None or predicted <= limit


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
@pytest.mark.parametrize("function", [ppo, token_stats])
@pytest.mark.parametrize(
    ("N", "V", "D", "chunk", "frozen"),
    [
        (4096, 2048, 32, 2048, None),  # of few words and many rows slices of dz are a good part
        (512, 1024, 4096, 64, "hidden"),  # of few rows those of the weight
    ],
)
def test_slices_that_are_widened_are_counted(
    function: Callable[..., Any],
    N: int,
    V: int,
    D: int,
    chunk: int,
    frozen: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where chunks are added up, those of a narrow dz are; those of the weight are for the logits."""
    monkeypatch.setattr(products, "has_bfloat16", lambda: True)
    factors = {"hidden": torch.randn(N, D), "weight": torch.randn(V, D)}
    factors = {name: x.bfloat16().requires_grad_(name != frozen) for name, x in factors.items()}
    target = torch.randint(V, (N,))
    made: list[Plan] = []

    kept = []
    options: dict[str, Any] = {
        "impl": "torch",
        "planner": keeping(made),
        "chunk_tokens": chunk,
        "softcap": None,
    }
    peak = peak_memory(lambda: kept.append(function(**factors, target=target, **options)))
    predicted = max(p.memory for p in made)
    assert any(p.chunks > 1 for p in made)
    assert 0.9 <= predicted / peak <= 1.1, f"predicted {predicted / MIB:.1f} MiB, took {peak / MIB:.1f}"


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
@pytest.mark.parametrize("multiplies", [False, True])
@pytest.mark.parametrize("wide", ["hidden", "weight"])
def test_under_autocast_a_gradient_is_counted_in_the_dtype_of_its_input(
    wide: str, multiplies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "has_bfloat16", lambda: multiplies)
    N, V, D = 4096, 2048, 512
    factors = {"hidden": torch.randn(N, D), "weight": torch.randn(V, D)}
    factors = {name: x.to(FP32 if name == wide else BF16).requires_grad_() for name, x in factors.items()}
    target = torch.randint(V, (N,))
    made: list[Plan] = []

    kept = []
    options: dict[str, Any] = {"impl": "torch", "planner": keeping(made), "softcap": None}
    peak = peak_memory(lambda: kept.append(autocast(**factors, target=target, **options)))
    predicted = made[-1].memory
    assert 0.9 <= predicted / peak <= 1.1, f"predicted {predicted / MIB:.1f} MiB, took {peak / MIB:.1f}"


def test_this_cpu_is_asked_for_bfloat16_alone_and_not_for_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loops of ranks must be the same, whatever their machines multiply."""

    def plans(multiplies: bool, **options: Any) -> Plan:
        monkeypatch.setattr(products, "has_bfloat16", lambda: multiplies)
        return plan(64, 32_000, 256, device="cpu", **options)

    assert plans(True).memory < plans(False).memory
    same: tuple[dict[str, Any], ...] = (
        {"ranks": 2},
        {"dtype": FP32},
        {"param_dtype": FP32},
        {"impl": "triton"},
    )
    for options in same:
        assert plans(True, **options) == plans(False, **options)


def test_a_split_vocabulary() -> None:
    """A rank's share: its words, a chunk in one piece, and what it receives."""
    for ranks in (2, 3, 8):
        made = plan(8192, 151_936, 4096, ranks=ranks)
        assert made.tile == made.chunk
        assert made.slice == -(-151_936 // ranks)
        gathered, summed = 4 * 8192 * 4 * (ranks - 1), 2 * (ranks - 1) * 8192 * 4096 * 4 // ranks
        assert made.traffic == gathered + summed
        frozen = plan(8192, 151_936, 4096, ranks=ranks, grad_hidden=False)
        assert (
            frozen.traffic == plan(8192, 151_936, 4096, ranks=ranks, reduce_hidden=False).traffic == gathered
        )
        assert f"151,936 / {ranks}" in str(made)
        assert f"{made.traffic / MIB:,.1f} MiB received" in str(made)
        searched = plan(65_536, 151_936, 4096, ranks=ranks)
        assert searched.order != "rows" or searched.tile == searched.chunk
    assert plan(8192, 151_936, 4096).traffic == 0
    with pytest.raises(ValueError, match="ranks must be an integer >= 1"):
        plan(8, 8, 8, ranks=0)


def test_the_loop_taken_without_a_search_is_what_the_search_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(1)
    calls = []
    for _ in range(100):
        rows, D = generator.choice([1, 5, 500, 8192, 60_000]), generator.choice([64, 1024, 4096])
        options = {
            "dtype": generator.choice([torch.float32, torch.bfloat16]),
            "device": generator.choice(["cuda", "cpu"]),
            "operation": generator.choice(["loss", "stats"]),
            "grad_weight": generator.random() < 0.7,
            "clippable": generator.choice([0, rows]),
            "memory_budget": generator.choice([None, 1 << 28, 1 << 31, 1 << 36]),
        }
        calls.append(((rows, generator.choice([1000, 151_936]), D), options))
    taken = [plan(*sizes, **options) for sizes, options in calls]
    assert {made.held > 0 for made in taken} == {True, False}  # kept logits need one chunk, and no search

    def searched(one: Any, costs: Any, *arguments: Any) -> Any:
        seen.append(one)
        return search(one, costs, *arguments)

    seen: list[Any] = []
    search, memory = module._search, module._Costs.memory
    answers: list[float] = []
    monkeypatch.setattr(module, "_search", searched)

    def answer(costs: Any, loop: Any) -> float:
        found: float = answers.pop() if answers and not loop.keeps else memory(costs, loop)
        return found

    monkeypatch.setattr(module._Costs, "memory", answer)
    for (sizes, options), expected in zip(calls, taken):
        if not expected.held:
            answers.append(math.inf)  # whether the single chunk fits: no
            assert plan(*sizes, **options) == expected
    assert len(seen) == sum(not made.held for made in taken)


def test_a_bias_alone_takes_the_memory_that_is_planned() -> None:
    """Its gradient is of whole rows, whatever else is frozen."""
    N, V, D = 1000, 20_000, 16
    inputs = {"hidden": torch.randn(N, D), "weight": torch.randn(V, D), "target": torch.randint(V, (N,))}
    bias, made = torch.zeros(V, requires_grad=True), list[Plan]()
    found = []

    def call(**options: Any) -> None:
        stats = linear_token_stats(**inputs, bias=bias, planner=keeping(made), **options)
        found.append(torch.autograd.grad(stats.logprob.sum(), bias)[0])

    peak = peak_memory(lambda: call(memory_budget=40 * MIB))
    assert 0.9 <= max(p.memory for p in made) / peak <= 1.1
    call(chunk_tokens=900)
    torch.testing.assert_close(*found)
    logits = (inputs["hidden"] @ inputs["weight"].T).requires_grad_()
    logprob = logits.log_softmax(-1).gather(-1, inputs["target"][:, None])
    torch.testing.assert_close(
        found[0], torch.autograd.grad(logprob.sum(), logits)[0].sum(0), atol=1e-3, rtol=1e-4
    )
