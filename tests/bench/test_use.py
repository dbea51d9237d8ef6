"""Whole steps and what fits, choices among products and loops, the split of a call: what benches compute."""

import gc
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from aer_fast import plan
from aer_fast._linear import products as ours
from bench import cases, conftest, measure, model, operations, profiling, test_step, tuning
from bench.cases import AS_IT_IS
from bench.peers.providers import Provider
from bench.tuning import Loop
from tests.helpers.heads import Products

pytestmark = [pytest.mark.needs("bench", "transformers"), pytest.mark.host]

# ---- a model and its step


@pytest.fixture
def policy() -> Any:
    torch.manual_seed(0)
    return model.build(model.SHAPES["tiny"], 50, torch.float32, "cpu")


def test_hidden_states_predict_the_response() -> None:
    ids = torch.arange(2 * 64).view(2, 64)
    body = lambda input_ids, use_cache: SimpleNamespace(last_hidden_state=input_ids[..., None])  # noqa: E731
    hidden = model.hidden_of(SimpleNamespace(model=body), ids)
    assert torch.equal(hidden[:, 0] + 1, model.targets_of(ids))
    assert len(hidden) == model.rows_of(ids.numel()) == 2 * 56


def test_layers_are_computed_twice_and_see_no_mask(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(*factors: Tensor, **options: Any) -> Tensor:
        seen.append((options["attn_mask"], options["is_causal"]))
        return attention(*factors, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    model.hidden_of(policy, torch.randint(50, (3, 64))).sum().backward()
    assert seen == [(None, True)] * 2 * model.SHAPES["tiny"].layers
    seen.clear()
    kept = model.build(replace(model.SHAPES["tiny"], recompute=False), 50, torch.float32, "cpu")
    model.hidden_of(kept, torch.randint(50, (3, 64))).sum().backward()
    assert len(seen) == model.SHAPES["tiny"].layers


def test_a_step_reaches_every_weight_and_changes_none(policy: Any) -> None:
    before = [x.detach().clone() for x in policy.parameters()]
    optimizer = model.optimizer_of(policy)
    assert set(optimizer.state) == set(policy.parameters())  # as after a first step
    model.train(policy, optimizer, torch.randint(50, (2, 64)), lambda h, w: (h @ w.T).square().mean())
    assert all(torch.equal(x, y) for x, y in zip(policy.parameters(), before))
    assert all(x.grad is None and optimizer.state[x]["exp_avg"].any() for x in policy.parameters())


# ---- what fits


def up_to(limit: float) -> Callable[[int], bool]:
    """What fits; no size is asked for twice, and there is an end to it."""
    seen: set[int] = set()

    def fits(size: int) -> bool:
        assert size not in seen
        assert size < 1 << 30
        seen.add(size)
        return size <= limit

    return fits


@pytest.mark.parametrize("limit", [64, 65, 127, 300, 1000, 5000, 50_000])
@pytest.mark.parametrize("first", [48, 64])
def test_a_search_finds_what_fits(limit: int, first: int) -> None:
    search = test_step.Search(up_to(limit), unit=16)
    search.run(first, most=1 << 20)
    assert search.high is not None
    assert search.low <= limit < search.high
    assert search.high - search.low <= max(16, 0.05 * search.low)
    assert all(size % 16 == 0 for size in search.probes)
    assert len(search.probes) <= math.log2(limit / first) + 2 + 5  # doublings, and halves of one


def test_a_search_ends_at_its_edges() -> None:
    search = test_step.Search(up_to(math.inf), unit=16)
    search.run(first=64, most=300)
    assert (search.low, search.high, search.probes) == (300, None, [64, 128, 256, 300])
    search = test_step.Search(up_to(0), unit=16)
    search.run(first=64, most=300)
    assert (search.low, search.high) == (0, 16)
    times = iter([0.0, 1.0, 6.0, 11.0])  # the start, and before each probe
    search = test_step.Search(up_to(math.inf), unit=16, seconds=10.0, clock=lambda: next(times, 0.0))
    search.run(first=64, most=1 << 20)
    assert search.probes == [64, 128]


def full(message: str = "no") -> None:
    raise torch.OutOfMemoryError(message)


def test_what_did_not_fit_leaves_nothing_behind() -> None:
    held = []

    def work() -> None:
        tensor = torch.ones(8)
        held.append(weakref.ref(tensor))
        cycle: list[Any] = [tensor]
        cycle.append(cycle)
        full()

    gc.disable()
    try:
        assert not test_step.fits(work)
        assert held[0]() is None
    finally:
        gc.enable()
    assert test_step.fits(lambda: None)


def test_only_a_lack_of_memory_counts_as_one() -> None:
    def fail(error: Exception) -> None:
        raise error

    assert not test_step.fits(lambda: fail(RuntimeError("CUDA error: out of memory")))
    assert not test_step.fits(lambda: fail(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling")))
    with pytest.raises(RuntimeError, match="sizes"):
        test_step.fits(lambda: fail(RuntimeError("sizes differ")))


def loss_up_to(limit: int) -> Callable[..., Tensor]:
    """Of hidden, weight and inputs; memory ends at so many rows, in the backward."""

    def loss(hidden: Tensor, weight: Tensor, inputs: operations.Inputs) -> Tensor:
        if len(hidden) > limit:
            hidden.register_hook(lambda _: full())
        assert len(inputs.target) == len(inputs.old_logprob) == len(hidden)
        return (hidden @ weight.T).square().mean()

    return loss


def test_the_most_tokens_of_a_provider() -> None:
    of = replace(test_step.RANGES["tiny"], V=50, first=128, most=2048)
    provider = Provider("p", lambda: loss_up_to(model.rows_of(640)), "loss")
    search, costs = test_step.most_tokens(of, provider, math.inf)
    assert (search.low, search.high) == (640, 704)
    assert set(costs) == {size for size in search.probes if size <= 640}
    assert all(cost["ms"] > 0 for cost in costs.values())


def test_a_backward_that_broke_off_leaves_no_gradients(policy: Any) -> None:
    provider = Provider("p", lambda: loss_up_to(model.rows_of(64)), "loss")
    steps = test_step.Steps(policy, model.optimizer_of(policy), provider, 50, 64, math.inf)
    # The first layer's gradients come last: the backward breaks off when it is nearly done.
    hook = policy.model.layers[0].mlp.down_proj.weight.register_hook(lambda grad: full())
    assert not steps.fit(64)
    assert all(x.grad is None for x in policy.parameters())
    hook.remove()
    assert steps.fit(64)
    assert not steps.fit(128)


def test_on_a_cpu_the_resident_size_is_held_to_the_cap(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.PeakMemory, "peak", property(lambda self: 1025.0))
    provider = Provider("p", lambda: loss_up_to(10**9), "loss")
    for cap, fits in ((1.0, False), (1.1, True)):
        steps = test_step.Steps(policy, model.optimizer_of(policy), provider, 50, 64, cap)
        assert steps.fit(128) == fits


def test_a_larger_card_is_held_to_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    fractions: list[float] = []
    monkeypatch.setattr(test_step, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    card = SimpleNamespace(total_memory=140 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    for cap, expected in ((70.0, 0.5), (math.inf, 1.0), (200.0, 1.0)):
        with test_step.capped(cap) as within:
            assert fractions[-1] == expected
            assert within == 140 * expected
        assert fractions[-1] == 1.0


def test_rows_that_fit_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = []
    run: Any = SimpleNamespace(
        begin=lambda identity, missing, **_: rows.append(identity),
        write=lambda status, **costs: rows.append({"status": status, **costs}),
    )
    of = test_step.RANGES["tiny"]
    case = cases.Case(cases.STEP, of.first, of.V, 128)
    provider = Provider("p", dict, "loss")
    cost = {"ms": 2.0, "mib": 3.0, "reserved_gib": 4.0}
    for low, high in ((640, 704), (0, 64)):
        search = test_step.Search(bool, 64, low=low, high=high, probes=[1, 2])
        monkeypatch.setattr(test_step, "most_tokens", lambda *_, search=search: (search, {640: cost}))
        test_step.test_tokens_that_fit(of, case, provider, 1.0, run)
    assert rows[0]["shape"] == {"V": 1024, "D": 128}
    assert (rows[1]["status"], rows[1]["ms"], rows[1]["peak_mib"]) == ("ok", 2.0, 3.0)
    found = {"tokens": 640, "too_many": 704, "cap_gib": 1.0, "probes": 2, "reserved_gib": 4.0}
    assert rows[1]["found"] == found
    assert (rows[3]["status"], rows[3]["found"]["tokens"]) == ("out of memory", 0)


@pytest.mark.parametrize("cap", [None, 77.0])
def test_a_search_runs_where_a_cap_asks_for_it_and_alone(cap: float | None) -> None:
    left_out: list[Any] = []
    hook = SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items))
    config: Any = SimpleNamespace(getoption=lambda name: cap, hook=hook)
    search, step = SimpleNamespace(fixturenames=["memory_cap", "run"]), SimpleNamespace(fixturenames=["run"])
    items: list[Any] = [step, search, step]
    conftest.pytest_collection_modifyitems(config, items)
    assert items == ([step, step] if cap is None else [search])
    assert left_out == ([search] if cap is None else [step, step])


# ---- products and loops

SHAPE = tuning.Shape(40, 70, 8, torch.float32, (16,))


@pytest.mark.parametrize("product", tuning.WAYS)
def test_every_way_makes_the_product(product: str) -> None:
    f = tuning.factors(SHAPE)
    expected = {
        "logits": f.hidden @ f.weight.T,
        "grad_hidden": f.dz @ f.weight,
        "grad_weight": f.dz.T @ f.hidden,
    }[product]
    every = tuning.ways(product, SHAPE)
    assert {AS_IT_IS, "tiles of 16"} <= set(every)
    for way in every.values():
        output = way(f)()
        torch.testing.assert_close(output, expected[-len(output) :], atol=1e-4, rtol=1e-5)
        assert tuning.off(product, SHAPE, output) < 1e-5
        assert tuning.off(product, SHAPE, output * 1.01) > 5e-3
        assert tuning.off(product, SHAPE, output.roll(1, 0)) > 0.1


def test_the_least_that_a_product_costs() -> None:
    shape = tuning.Shape(3, 5, 2)  # in bfloat16: 2 bytes
    assert tuning.least("logits", shape) == (2 * (3 * 2 + 5 * 2) + 4 * 3 * 5, 60.0)
    assert tuning.least("grad_hidden", shape) == (2 * (3 * 5 + 5 * 2) + 4 * 3 * 2, 60.0)
    assert tuning.least("grad_weight", shape) == (2 * (3 * 5 + 3 * 2) + 2 * 5 * 2, 60.0)


def test_a_loop_takes_the_place_of_the_planned_one() -> None:
    made = plan(100, 1000, 64)
    rows = tuning.take(Loop("rows", 32, 16), made)
    assert (rows.order, rows.chunk, rows.tile, rows.slice) == ("rows", 32, 16, 1000)
    rows = tuning.take(Loop("rows", 512, 256), made)
    assert (rows.chunk, rows.tile) == (100, 100)
    words = tuning.take(Loop("vocabulary", 256, 16), replace(made, compact=True))
    assert (words.order, words.chunk, words.tile, words.slice) == ("vocabulary", 100, 16, 256)
    assert not words.compact
    forward = plan(100, 1000, 64, grad_hidden=False, grad_weight=False)
    assert tuning.take(Loop("rows", 32, 16), forward) == forward
    inplace = tuning.take(Loop("rows", 32, 16), plan(100, 1000, 64, dtype=torch.float32, device="cpu"))
    assert inplace.chunk == inplace.tile == 32


def test_the_loop_that_is_named_is_the_one_that_runs() -> None:
    case, loop = tuning.loops("tiny")[1]
    assert loop is not None
    seen = Products(case.V, case.D)

    def judge(identity: dict[str, Any], missing: str, build: Callable[[], Any], **_: Any) -> None:
        work = build()
        factors = work.fresh()
        with seen:
            result = work.step(*factors)
        assert max(work.errors(result).values()) < 1e-4
        assert identity["provider"] == str(loop)
        assert work.found() == {"chunk": 32, "tile": 32, "slice": 1024}

    run: Any = type("Run", (), {"__call__": staticmethod(judge)})()
    run.config = SimpleNamespace(getoption=lambda name: "tiny")
    run.record = SimpleNamespace(impl="torch")
    tuning.test_loop(case, loop, run)
    assert seen.rows["logits"] == [32, 32]


# ---- the split of a call


def test_the_bare_products_are_those_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, int, bool, torch.dtype]] = []

    def spy(name: str) -> Callable[..., Any]:
        original = getattr(ours, name)

        def call(first: Tensor, second: Tensor, *rest: Any, accumulate: bool = False) -> Any:
            made.append((name, len(first), accumulate, rest[-1].dtype))
            return original(first, second, *rest, **({"accumulate": True} if accumulate else {}))

        return call

    for name in ("logits", "grad_hidden", "grad_weight"):
        monkeypatch.setattr(ours, name, spy(name))
    hidden, weight = torch.randn(12, 8).bfloat16(), torch.randn(20, 8).bfloat16()
    loop = replace(plan(12, 20, 8), order="rows", chunk=8, tile=5)
    wide, half = torch.float32, torch.bfloat16
    profiling.bare(loop, hidden, weight)()
    head = [("logits", 5, False, wide), ("logits", 3, False, wide)]
    chunk = [("grad_hidden", 8, False, wide), ("grad_weight", 8, False, wide)]
    last = [("logits", 4, False, wide), ("grad_hidden", 4, False, wide), ("grad_weight", 4, True, wide)]
    assert made == head + chunk + last
    made.clear()
    profiling.bare(replace(loop, chunk=12, tile=12), hidden, weight)()
    assert made[-1] == ("grad_weight", 12, False, half)  # one product is rounded once


def test_turns_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "TURNS", {"cpu": 2, "cuda": 2})
    monkeypatch.setattr(profiling, "DEVICE", "cpu")
    calls: list[str] = []
    times = profiling.by_turns({name: lambda name=name: calls.append(name) for name in "ab"})  # type: ignore[misc]
    assert calls == list("ababab")
    assert [len(found) for found in times.values()] == [2, 2]
