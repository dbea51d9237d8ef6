"""The machine behind the linear functions: autograd, memory, what takes part in which product."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aer_fast import Plan, plan, token_stats
from aer_fast._linear.loops import chunks_of
from aer_fast._rows.strips import Rows, exp2_of, exp_of
from tests import ROOT
from tests.helpers.heads import (
    LOOPS,
    Products,
    head,
    inputs_loss,
    linear_ppo_loss,
    linear_token_loss,
    linear_token_stats,
    run,
    take_loop,
)

pytestmark = pytest.mark.numerics
IMPLS = ["torch", "triton"]


def reinforce(logprob: Tensor, entropy: Tensor, advantage: Tensor) -> Tensor:
    return -advantage * logprob - 0.1 * entropy


def token_loss(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Any:
    advantage = torch.linspace(-1, 1, target.numel(), device=target.device).view(target.shape)
    return linear_token_loss(hidden, weight, target, reinforce, advantage, **options)


def ppo(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Any:
    advantage = torch.linspace(-1, 1, target.numel(), device=target.device).view(target.shape)
    return linear_ppo_loss(hidden, weight, target, None, advantage, entropy_coef=0.1, **options)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "ppo_loss": ppo,
    "token_loss": token_loss,
    "token_stats": linear_token_stats,
}
functions = pytest.mark.parametrize("name", FUNCTIONS)
impls = pytest.mark.parametrize("impl", [*IMPLS, "reference"])
fast_impls = pytest.mark.parametrize("impl", IMPLS)


@functions
@impls
def test_a_scaled_loss_gives_scaled_gradients(name: str, impl: str, device: torch.device) -> None:
    inputs = head(6, 50, 8, device, torch.float32)
    leaves = [inputs[k].requires_grad_() for k in ("hidden", "weight", "bias")]

    def grads(factor: float) -> tuple[Tensor, ...]:
        loss = inputs_loss(FUNCTIONS[name](*leaves[:2], inputs["target"], bias=leaves[2], impl=impl))
        return torch.autograd.grad(factor * loss, leaves)

    for scaled, plain in zip(grads(-3.0), grads(1.0)):
        torch.testing.assert_close(scaled, -3 * plain)
    assert all((g == 0).all() for g in grads(0.0))
    if name != "token_stats":
        assert all(g.isnan().all() for g in grads(torch.nan))


@functions
@impls
@pytest.mark.parametrize("mixed", [False, True])
def test_a_loss_scaler_comes_before_float16_rounds(
    name: str, impl: str, mixed: bool, device: torch.device
) -> None:
    """Gradients that float16 can't hold, times a scale, are what float16 makes of the product."""
    inputs = {k: v[:8] for k, v in head(8, 50, 8, device, torch.float16).items() if k != "bias"}
    inputs["weight"] = head(8, 50, 8, device, torch.float16)["weight"]
    if name == "token_stats":
        pytest.skip("its upstream gradient is known when its gradients are made")
    grads = []
    for denominator, factor in ((8.0, 1.0), (8 * 2.0**20, 2.0**20)):
        hidden = inputs["hidden"].detach().clone().requires_grad_()
        weight = inputs["weight"].detach().clone().to(torch.float32 if mixed else torch.float16)
        weight.requires_grad_()
        with torch.autocast(device.type, dtype=torch.float16, enabled=mixed):
            out = FUNCTIONS[name](hidden, weight, inputs["target"], denominator=denominator, impl=impl)
        (factor * out.loss).backward()
        grads.append((hidden.grad, weight.grad))
    for plain, scaled in zip(*grads):
        assert plain is not None
        assert scaled is not None
        assert plain.any()
        if impl == "reference":  # plain autograd rounds where it likes
            continue
        torch.testing.assert_close(scaled, plain, rtol=2e-3, atol=0)


@functions
@fast_impls
def test_gradients_of_gradients_are_refused(name: str, impl: str, device: torch.device) -> None:
    inputs = head(6, 50, 8, device, torch.float32)
    hidden = inputs["hidden"].requires_grad_()
    loss = inputs_loss(FUNCTIONS[name](hidden, inputs["weight"], inputs["target"], impl=impl))
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@functions
@fast_impls
def test_the_planner_is_asked_about_this_call(name: str, impl: str, device: torch.device) -> None:
    asked: list[dict[str, Any]] = []

    def spying(*sizes: int, **options: Any) -> Plan:
        asked.append({"rows": sizes[0]} | options)
        return plan(*sizes, **options)

    inputs = head(10, 50, 8, device, torch.float32)
    inputs["target"][7:] = -100
    with torch.autocast(device.type, dtype=torch.bfloat16):
        options = {"softcap": 3.0, "chunk_tokens": 3, "memory_budget": 10**6, "planner": spying}
        run(FUNCTIONS[name], inputs, ("bias",), impl=impl, **options)
    common = {"rows": 7, "tokens": 10, "V": 50, "D": 8, "softcap": True, "impl": impl}
    common |= {"dtype": torch.bfloat16, "param_dtype": torch.float32, "hidden_dtype": torch.float32}
    common |= {"chunk_tokens": 3, "memory_budget": 10**6}
    assert all(question.items() >= common.items() for question in asked)
    assert asked[-1]["grad_hidden"] is True
    assert asked[-1]["grad_weight"] is True


@fast_impls
def test_the_planner_knows_which_rows_clipping_can_kill(impl: str, device: torch.device) -> None:
    asked: list[int] = []

    def spying(*sizes: int, **options: Any) -> Plan:
        asked.append(options.get("clippable", 0))
        return plan(*sizes, **options)

    inputs = head(10, 50, 8, device, torch.float32) | {"old_logprob": -3.0, "advantage": 1.0}
    coef = torch.tensor([0.0] * 4 + [0.1] * 6, device=device)
    mask = torch.tensor([0.0] + [1.0] * 9, device=device)
    for options, expected in (
        ({"entropy_coef": coef, "mask": mask}, 3),
        ({"entropy_coef": coef, "old_logprob": None}, 0),
        ({"ref_logprob": -3.0, "kl_coef": 0.1}, 0),
        ({}, 10),
    ):
        run(linear_ppo_loss, inputs | options, impl=impl, planner=spying)
        assert asked.pop() == expected


@fast_impls
@pytest.mark.parametrize("chunk_tokens", [1, 4])
def test_chunk_tokens_is_obeyed(impl: str, chunk_tokens: int, device: torch.device) -> None:
    inputs = head(10, 50, 8, device, torch.float32)
    with Products(50, 8) as products:
        for function in FUNCTIONS.values():
            run(function, inputs, impl=impl, chunk_tokens=chunk_tokens)
    assert {max(rows) for rows in products.rows.values()} == {chunk_tokens}


@functions
@impls
def test_gradients_accumulate(name: str, impl: str, device: torch.device) -> None:
    parts = [head(n, 50, 8, device, torch.float32) for n in (3, 4)]
    weight = parts[0]["weight"].clone().requires_grad_()
    expected = torch.zeros_like(weight)
    for part in parts:
        loss = inputs_loss(FUNCTIONS[name](part["hidden"], weight, part["target"], impl=impl))
        expected += torch.autograd.grad(loss, weight)[0]
        inputs_loss(FUNCTIONS[name](part["hidden"], weight, part["target"], impl=impl)).backward()
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("name", ["ppo_loss", "token_loss"])
@impls
def test_a_second_backward_raises(name: str, impl: str, device: torch.device) -> None:
    inputs = head(6, 50, 8, device, torch.float32)
    weight = inputs["weight"].requires_grad_()
    loss = FUNCTIONS[name](inputs["hidden"], weight, inputs["target"], impl=impl).loss
    loss.backward()
    with pytest.raises(RuntimeError):
        loss.backward()


@pytest.mark.parametrize("name", ["ppo_loss", "token_loss"])
@fast_impls
def test_the_gradient_is_handed_out_once_and_without_a_copy(
    name: str, impl: str, device: torch.device
) -> None:
    inputs = head(6, 50, 8, device, torch.float32)
    weight = inputs["weight"].requires_grad_()
    loss = FUNCTIONS[name](inputs["hidden"], weight, inputs["target"], impl=impl).loss
    (made,) = [x for x in loss.grad_fn.kept if x is not None]
    place = made.data_ptr()
    del made
    loss.backward(retain_graph=True)
    assert weight.grad is not None
    assert weight.grad.data_ptr() == place
    with pytest.raises(RuntimeError, match="first backward"):
        loss.backward()


@functions
@fast_impls
@pytest.mark.parametrize("loop", LOOPS)
def test_what_needs_no_gradient_costs_none(name: str, impl: str, loop: str, device: torch.device) -> None:
    taken = {"planner": take_loop(loop)}
    products = Products(50, 8)
    inputs = head(10, 50, 8, device, torch.float32)
    del inputs["bias"]
    function = FUNCTIONS[name]
    kept = loop == "planned" and device.type == "cpu"  # the logits of statistics, for their backward
    twice = loop == "vocabulary" or (name == "token_stats" and not kept)
    forward = 20 if twice else 10  # and again for the gradient
    for frozen, expected in (
        ((), (forward, 10, 10)),
        (("weight",), (forward, 10, 0)),
        (("hidden",), (forward, 0, 10)),
        (("hidden", "weight"), (10, 0, 0)),
    ):
        products.clear()
        with products:
            run(function, inputs, frozen, impl=impl, **taken)
        assert products.totals == expected, frozen
    products.clear()
    inputs["hidden"].requires_grad_()
    for context in (torch.no_grad, torch.inference_mode):
        with context(), products:
            out = function(**inputs, impl=impl, **taken)
        assert not any(x.requires_grad for x in out if isinstance(x, Tensor))
    assert products.totals == (20, 0, 0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loop", LOOPS)
def test_rows_without_a_gradient_take_part_in_one_product_or_none(
    impl: str, loop: str, device: torch.device
) -> None:
    """10 rows: 2 masked, 3 without advantage and bonus, 2 clipped, 3 learning."""
    taken = {"planner": take_loop(loop)}
    products = Products(50, 8)
    inputs = head(10, 50, 8, device, torch.float32)
    logprob = linear_token_stats(
        inputs["hidden"], inputs["weight"], inputs["target"], bias=inputs["bias"]
    ).logprob
    advantage = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1, 1, 1], device=device)
    mask = torch.ones(10, device=device)
    mask[8:] = 0
    old = logprob.clone()
    old[4:6] -= 1  # clipped
    learning = {"planned": 5, "chunks": 5, "compact": 3, "vocabulary": 3}[loop]
    if impl == "torch" and device.type == "cpu":
        learning = 3  # there leaving rows out costs nothing
    again = 3 if loop == "vocabulary" else 0
    for options, expected in (({}, 8), ({"stats": "active"}, 5)):
        products.clear()
        arguments = {"old_logprob": old, "advantage": advantage, "mask": mask} | options
        with products:
            out, grads = run(linear_ppo_loss, inputs | arguments, impl=impl, **taken)
        assert products.totals == (expected + again, learning, learning)
        gradient = (grads["hidden"] != 0).any(-1)
        assert gradient.nonzero()[:, 0].tolist() == [0, 6, 7]
        torch.testing.assert_close(out.metrics["active_fraction"], torch.tensor(3 / expected, device=device))


@functions
@impls
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loop", LOOPS)
def test_autocast_is_that_of_any_product(
    name: str,
    impl: str,
    dtype: torch.dtype,
    loop: str,
    device: torch.device,
) -> None:
    """Under autocast the factors are rounded to its dtype; gradients keep the dtype of the parameters."""
    taken = {"planner": take_loop(loop)}
    inputs = head(13, 101, 8, device, torch.float32)
    narrow = {k: v if k == "target" else v.to(dtype) for k, v in inputs.items()}
    expected, expected_grads = run(FUNCTIONS[name], narrow, impl=impl, **taken)
    mixed = inputs | {"hidden": narrow["hidden"]}  # as a layer before the head returns them
    for arguments in (inputs, mixed):
        leaves = {k: arguments[k].clone().requires_grad_() for k in ("hidden", "weight", "bias")}
        with torch.autocast(device.type, dtype=dtype):
            out = FUNCTIONS[name](**(arguments | leaves), impl=impl, **taken)
            loss = inputs_loss(out)
        loss.backward()
        torch.testing.assert_close(out[0], expected[0])
        for key, leaf in leaves.items():
            assert leaf.grad is not None
            assert leaf.grad.dtype == leaf.dtype
            limit = torch.finfo(dtype).eps * expected_grads[key].abs().max().item()
            assert (leaf.grad.float() - expected_grads[key].float()).abs().max() <= limit
    if impl != "triton":  # torch's autocast leaves float64 alone
        double = {k: v if k == "target" else v.double() for k, v in inputs.items()}
        exact, _ = run(FUNCTIONS[name], double, impl=impl, **taken)
        with torch.autocast(device.type, dtype=dtype):
            again, _ = run(FUNCTIONS[name], double, impl=impl, **taken)
        assert torch.equal(again[0], exact[0])


def test_gradients_of_wide_parameters_under_autocast_are_not_rounded(device: torch.device) -> None:
    inputs = head(13, 101, 8, device, torch.float32)
    weight = inputs["weight"].requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ppo(inputs["hidden"], weight, inputs["target"]).loss.backward()
    assert weight.grad is not None
    assert not torch.equal(weight.grad, weight.grad.bfloat16().float())


class Model(nn.Module):
    """Embedding, one layer, and a head that may be tied to the embedding."""

    def __init__(self, name: str, impl: str, tied: bool = False):
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.layer = nn.Linear(8, 8)
        self.head = nn.Linear(8, 50, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.name, self.impl = name, impl

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.layer(self.embedding(ids)))
        target = ids.roll(-1)
        if self.name == "logits":
            return inputs_loss(token_stats(hidden @ self.head.weight.T, target, impl="reference"))
        return inputs_loss(FUNCTIONS[self.name](hidden, self.head.weight, target, impl=self.impl))

    def grads(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(self.parameters())))


@functions
@impls
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(name: str, impl: str, reentrant: bool, device: torch.device) -> None:
    model = Model(name, impl).to(device)
    ids = torch.randint(50, (7,), device=device)
    expected = model.grads(model(ids))
    products = Products(50, 8)
    model.zero_grad()
    with products:
        if reentrant:  # the old kind needs an input with a gradient
            start = torch.ones((), requires_grad=True, device=device)
            loss = checkpoint(lambda x: x * model(ids), start, use_reentrant=True)
        else:
            loss = checkpoint(model, ids, use_reentrant=False)
        loss.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)
    if impl != "reference" and name != "token_stats":
        # the gradients were kept: the head is not computed again. The old kind runs the forward twice
        assert products.totals == ((14, 7, 7) if reentrant else (7, 7, 7))


@functions
@impls
def test_tied_embeddings(name: str, impl: str, device: torch.device) -> None:
    model = Model(name, impl, tied=True).to(device)
    ids = torch.randint(50, (7,), device=device)
    exact = Model(name, "reference", tied=True).to(device).double()
    exact.load_state_dict(model.state_dict())
    assert len(list(model.parameters())) == 3
    for actual, expected in zip(model.grads(model(ids)), exact.grads(exact(ids))):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-6)


@functions
@pytest.mark.filterwarnings("ignore::UserWarning")  # dynamo's own
def test_torch_compile_breaks_the_graph_once_and_goes_on(name: str, device: torch.device) -> None:
    import torch._dynamo
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()  # it remembers, across tests, which functions it has given up on
    model = Model(name, "auto").to(device)
    ids = torch.randint(50, (7,), device=device)
    expected = model.grads(model(ids))
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    for _ in range(3):
        loss = compiled(ids)
    torch.testing.assert_close(model.grads(loss), expected)
    assert counter.frame_count == 2  # before and after
    assert torch._dynamo.explain(model)(ids).graph_break_count == 1
    torch._dynamo.reset()


def test_dynamo_is_not_imported_for_nothing() -> None:
    code = (
        "import sys, torch, aer_fast\n"
        "hidden, weight = torch.randn(2, 3, requires_grad=True), torch.randn(9, 3)\n"
        "aer_fast.linear_ppo_loss(hidden, weight, torch.tensor([1, 2]), None, 1.0).loss.backward()\n"
        "print([m for m in ('torch._dynamo', 'triton') if m in sys.modules])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@functions
@fast_impls
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_call_gives_the_same_bits(
    name: str,
    impl: str,
    loop: str,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    taken = {"planner": take_loop(loop)}
    inputs = head(20, 301, 33, device, dtype)
    first, first_grads = run(FUNCTIONS[name], inputs, impl=impl, **taken)
    torch.empty(12345, device=device)  # other addresses
    copies = {k: v.clone() for k, v in inputs.items()}
    second, second_grads = run(FUNCTIONS[name], copies, impl=impl, **taken)
    assert torch.equal(first[0], second[0])
    for key, grad in first_grads.items():
        assert torch.equal(grad, second_grads[key])


@fast_impls
@pytest.mark.parametrize("V", [31, 1000, 1001, 50_257])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_depends_on_its_own_logits_alone(impl: str, V: int, threads: int, device: torch.device) -> None:
    """Given the logits, the statistics of a row have the same bits whatever rows are beside it.

    The logits come from a matrix product, which may sum in another order when it has other rows: that is
    all that can differ between two batches.
    """
    if impl == "triton" and V > 2000 and device.type == "cpu":
        pytest.skip("long under the interpreter")
    if impl == "torch" and device.type == "cuda":
        pytest.skip("on a GPU torch sums in an order that depends on the number of rows")
    logits = torch.randn(45, V, device=device)
    logits[:, -7:] += 12  # at the end of a row torch may compute an entry by other code: there the mass is
    target = torch.randint(V - 7, (45,), device=device)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = token_stats(logits, target, impl=impl)
        singles = range(45) if impl == "torch" else (0, 44)
        for rows in (slice(3, 5), slice(7, 40), *(slice(i, i + 1) for i in singles)):
            part = token_stats(logits[rows].clone(), target[rows], impl=impl)
            assert torch.equal(part.logprob, whole.logprob[rows])
            assert torch.equal(part.entropy, whole.entropy[rows])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("function", [exp_of, exp2_of])
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize(("r", "V"), [(1, 31), (3, 1001), (7, 20_005), (1, 50_257), (2, 50_257)])
def test_an_exponential_has_the_same_bits_wherever_the_entry_lies(
    function: Callable[[Tensor, Tensor], None], threads: int, r: int, V: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        logits, last = torch.zeros(1, r, V), torch.zeros(1, 1, V)
        d, e = Rows(logits, slice(0, r)).buffers(torch.float32, 2)
        d.uniform_(-20, 0)
        function(d, e)
        for i in range(r):
            one, alone = Rows(last, slice(0, 1)).buffers(torch.float32, 2)
            function(one.copy_(d[i : i + 1].roll(-(V // 2))), alone)
            assert torch.equal(alone.roll(V // 2)[0], e[i])
        if function is exp2_of:
            kept = e.clone()
            exp2_of(d, d)
            assert torch.equal(d, kept)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_order_of_rows_changes_nothing_but_rounding(dtype: torch.dtype, device: torch.device) -> None:
    inputs = head(40, 1000, 33, device, dtype)
    order = torch.randperm(40, device=device)
    mixed = inputs | {k: inputs[k][order] for k in ("hidden", "target")}
    out, grads = run(linear_ppo_loss, inputs | {"old_logprob": None, "advantage": 1.0})
    other, other_grads = run(linear_ppo_loss, mixed | {"old_logprob": None, "advantage": 1.0})
    torch.testing.assert_close(other.logprob, out.logprob[order], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(other_grads["hidden"], grads["hidden"][order])


def test_chunks_cover_every_row_once() -> None:
    for n, chunk, tile in ((10, 3, 2), (10, 10, 4), (1, 5, 5), (0, 4, 4), (9, 3, 3)):
        made = plan(max(n, 1), 50, 8, chunk_tokens=chunk)
        made = type(made)(**(made.__dict__ | {"chunk": chunk, "tile": tile}))
        pieces = chunks_of(range(n), made)
        rows = [i for c in pieces for t in c for i in range(t.start, t.stop)]
        assert rows == list(range(n))
        assert all(t.stop - t.start <= tile for c in pieces for t in c)
        assert all(sum(t.stop - t.start for t in c) <= chunk for c in pieces)
        ends = [i for i in (2, 2, 3, 8, n) if i <= n]
        whole = chunks_of(range(n), made, ends)
        assert [i for c in whole for t in c for i in range(t.start, t.stop)] == list(range(n))
        assert {t.stop for c in whole for t in c} <= set(ends)
        for t in (t for c in whole for t in c):
            assert t.stop - t.start <= tile or not any(t.start < end < t.stop for end in ends)
