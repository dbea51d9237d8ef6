"""Random LM heads for the tests of the linear functions, the loops they may take, and their error budget."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import aer_fast
from aer_fast import Plan, plan, reference
from aer_fast._linear import products
from bench.peers.planned import with_planner
from tests.helpers.oracle import EPS32, max_error

# What a plan may be: its own choice, small chunks, small chunks with dead rows left out, the other order.
LOOPS = ("planned", "chunks", "compact", "vocabulary")

INPUTS = ("hidden", "weight", "bias")


def take_loop(name: str) -> Callable[..., Plan]:
    """A planner by which every call takes this loop; without a gradient, on a CPU, some words at a time."""

    def chosen(*sizes: Any, **options: Any) -> Plan:
        made = plan(*sizes, **options)
        if name != "planned":
            made = replace(made, held=0)
        if name == "planned":
            return made
        if not any(options.get(f"grad_{name}") for name in INPUTS):
            return replace(made, tile=4, slice=made.V // 3 + 1) if made.inplace else made
        if name == "vocabulary":
            return replace(made, order="vocabulary", slice=made.V // 3 + 1, tile=4, compact=False)
        compact = name == "compact" or (made.compact and made.inplace)
        return replace(made, order="rows", chunk=5, tile=5 if made.inplace else 3, compact=compact)

    return chosen


def _planned(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with one more argument: a planner."""

    def call(*args: Any, planner: Callable[..., Plan] | None = None, **options: Any) -> Any:
        chosen = function if planner is None else with_planner(function, planner)
        return chosen(*args, **options)

    return call


linear_distill_loss = _planned(aer_fast.linear_distill_loss)
linear_ppo_loss = _planned(aer_fast.linear_ppo_loss)
linear_token_loss = _planned(aer_fast.linear_token_loss)
linear_token_stats = _planned(aer_fast.linear_token_stats)


class Products(TorchDispatchMode):
    """The rows and the factors' dtypes of every matrix product with a head [V, D] while it is entered."""

    def __init__(self, V: int, D: int) -> None:
        super().__init__()
        self.V, self.D = V, D
        self.rows: dict[str, list[int]] = {}
        self.entries: dict[str, int] = {}  # rows times words
        self.dtypes: dict[str, set[torch.dtype]] = {}
        self.clear()

    def clear(self) -> None:
        self.rows = {"logits": [], "grad_hidden": [], "grad_weight": []}
        self.entries = dict.fromkeys(self.rows, 0)
        self.dtypes = {made: set() for made in self.rows}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            one, other = [x for x in args if isinstance(x, Tensor)][-2:]
            (n, inner), columns = one.shape, other.shape[1]
            if columns != self.D and inner == self.D:
                self._note("logits", n, columns, one, other)
            elif columns == self.D and inner >= self.V // 3 - 1:  # slices of words are as long, rows fewer
                self._note("grad_hidden", n, inner, one, other)
            elif columns == self.D and inner != self.D and n != self.D:
                self._note("grad_weight", inner, n, one, other)
        return func(*args, **(kwargs or {}))

    def _note(self, made: str, rows: int, words: int, *factors: Tensor) -> None:
        self.rows[made].append(rows)
        self.entries[made] += rows * words
        self.dtypes[made] |= {x.dtype for x in factors}

    @property
    def totals(self) -> tuple[float, ...]:
        """Rows of V words each; of a row in three slices, three make one."""
        return tuple(entries / self.V for entries in self.entries.values())


def head(N: int, V: int, D: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """hidden, weight, bias and target; logits of about ±4."""
    return {
        "hidden": (2 * torch.randn(N, D, device=device)).to(dtype),
        "weight": (2 * torch.randn(V, D, device=device) / D**0.5).to(dtype),
        "bias": torch.randn(V, device=device).to(dtype),
        "target": torch.randint(V, (N,), device=device),
    }


def run(
    function: Callable[..., Any], inputs: dict[str, Any], frozen: tuple[str, ...] = (), **options: Any
) -> tuple[Any, dict[str, Tensor]]:
    """The result, and the gradients of hidden, weight and bias that are not frozen."""
    inputs = inputs | options
    leaves = {}
    for name in INPUTS:
        if inputs.get(name) is not None and name not in frozen:
            inputs[name] = leaves[name] = inputs[name].detach().clone().requires_grad_()
    result = function(**inputs)
    upstream = inputs_loss(result)
    if upstream.requires_grad:
        upstream.backward()
    return result, {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def inputs_loss(result: Any) -> Tensor:
    """The loss of a result, or one made of its statistics."""
    loss: Tensor
    if hasattr(result, "loss"):
        loss = result.loss
        return loss
    slope = torch.linspace(-1, 1, result.logprob.numel(), device=result.logprob.device)
    slope = slope.view(result.logprob.shape)
    loss = (slope * result.logprob).sum() + (slope.abs() * result.entropy).sum() / 3
    return loss


def widened(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs, with factors in float64."""
    return {k: v.double() if k in INPUTS and v is not None else v for k, v in inputs.items()}


def assert_matches_float64(
    function: Callable[..., Any],
    inputs: dict[str, Any],
    impl: str,
    frozen: tuple[str, ...] = (),
    **options: Any,
) -> None:
    """Hold an implementation to the error budget: values, metrics and gradients.

    As in `assert_within_budget`: eager's own error and the rounding nobody avoids. Here that is of the
    logits, sums of D products, of the gradients' sums, and of dz where it is held in the factors' dtype;
    each as large as float32 (dz: the dtype) makes it for the sum of the absolute values of its terms.
    """
    actual, grads = run(function, inputs, frozen, impl=impl, **options)
    eager, eager_grads = run(function, inputs, frozen, impl="reference", **options)
    exact, exact_grads = run(function, widened(inputs), frozen, impl="reference", **options)

    hidden, weight = inputs["hidden"].double().nan_to_num(), inputs["weight"].double()
    N, D = hidden.shape
    V = len(weight)
    temperature = inputs.get("temperature", options.get("temperature", 1.0))
    coldest = float(torch.as_tensor(temperature).nan_to_num(1.0).min())
    logits_error = EPS32 * (D**0.5 * (hidden.abs() @ weight.abs().T).max().item() + V**0.5) / coldest

    def check(name: str, a: Tensor, e: Tensor, x: Tensor, allowed: float) -> None:
        assert a.shape == x.shape, name
        assert torch.isfinite(a).all(), name
        error, budget = max_error(a, x), max_error(e, x) + allowed
        assert error <= budget, f"{name}: error {error:.2e} exceeds {budget:.2e}"

    values = {k: v for k, v in actual._asdict().items() if isinstance(v, Tensor)}
    pairs = [(k, v, getattr(eager, k), getattr(exact, k)) for k, v in values.items()]
    if hasattr(actual, "metrics"):
        assert actual.metrics.keys() == exact.metrics.keys()
        pairs += [(k, v, eager.metrics[k], exact.metrics[k]) for k, v in actual.metrics.items()]
    for name, a, e, x in pairs:
        assert a.dtype == torch.float32
        check(name, a, e, x, logits_error * max(1.0, x.abs().max().item() if x.numel() else 0.0))

    dz = logits_gradient(function, widened(inputs), options).abs()
    terms = {"hidden": (dz @ weight.abs(), V), "weight": (dz.T @ hidden.abs(), N), "bias": (dz.sum(0), N)}
    dtype = inputs["hidden"].dtype
    rounds = impl == "triton" or products.narrow(inputs["weight"], [dtype])
    narrow = torch.finfo(dtype).eps if rounds and dtype != torch.float32 else 0.0
    assert grads.keys() == exact_grads.keys()
    for name, grad in grads.items():
        assert grad.dtype == dtype, name
        total, count = terms[name]
        largest = total.max().item() if total.numel() else 0.0
        rounding = torch.finfo(dtype).eps * exact_grads[name].abs().max().item() if grad.numel() else 0.0
        allowed = rounding + largest * (narrow + EPS32 * count**0.5 + 4 * logits_error)
        check(name, grad, eager_grads[name], exact_grads[name], allowed)


def logits_gradient(function: Callable[..., Any], inputs: dict[str, Any], options: dict[str, Any]) -> Tensor:
    """dz of float64 inputs: the gradient at the logits, from the specification."""
    dz: list[Tensor] = []
    original = reference.linear_logits

    def spying(*arguments: Any) -> Tensor:
        logits = original(*arguments)
        if logits.requires_grad:  # not a teacher's
            logits.register_hook(dz.append)
        return logits

    with patch.object(reference, "linear_logits", spying):
        run(function, inputs, impl="reference", **options)
    return dz[0] if dz else torch.zeros(inputs["hidden"].shape[0], len(inputs["weight"]), dtype=torch.float64)


def peak_memory(call: Callable[[], None]) -> int:
    """The most bytes that were allocated and not yet freed, counted from before the call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def with_teacher(
    N: int, V: int, D: int, device: torch.device, dtype: torch.dtype, V_ref: int | None = None
) -> dict[str, Any]:
    """`head`, and a teacher of another size."""
    inputs = head(N, V, D, device, dtype)
    teacher = head(N, V_ref or V, D + 5, device, dtype)
    return inputs | {f"ref_{name}": teacher[name] for name in ("hidden", "weight", "bias")}


def per_token(N: int, device: torch.device) -> dict[str, Any]:
    return {
        "mask": (torch.arange(N, device=device) % 4 != 2).float() * 1.5,
        "coef": torch.randn(N, device=device),
        "entropy_coef": 0.1 * (torch.arange(N, device=device) % 3),
        "temperature": 0.5 + torch.rand(N, device=device),
        "ref_temperature": 0.5 + torch.rand(N, device=device),
        "softcap": 10.0,
        "ref_softcap": 12.0,
        "denominator": 7.0,
    }
