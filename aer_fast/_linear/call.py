"""What the linear functions have in common: their arguments, checked, and the rows that count.

Sizes: N tokens, V vocabulary entries, D hidden; n rows that count, in the order they are computed.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from aer_fast._autograd import Terminal
from aer_fast._linear.plan import Plan, plan
from aer_fast._validation import (
    Tokens,
    check_count,
    check_head,
    check_softcap,
    check_tokens,
    resolve_impl,
)

P = ParamSpec("P")
R = TypeVar("R")

# hidden, weight and bias as the caller passed them, or their gradients; None for those that get none.
Inputs = tuple[Tensor | None, Tensor | None, Tensor | None]


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """Keep torch.compile out: the graph of the surrounding model breaks before the call and goes on after it.

    The loop depends on how many rows count, which a graph can't know. torch._dynamo takes seconds to
    import: it is not touched until somebody else has imported it.
    """

    disabled: list[Callable[P, R]] = []

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            reason = "its loop depends on how many rows count"
            disabled.append(torch.compiler.disable(function, reason=reason))
        return disabled[0](*args, **kwargs)

    return call


@dataclass(frozen=True)
class Call:
    """The arguments that all linear functions take. Raises ValueError for what is wrong with one."""

    hidden: Tensor  # [..., D]
    weight: Tensor  # [V, D]
    target: Tensor  # [...]
    bias: Tensor | None  # [V]
    softcap: float | None
    chunk_tokens: int | None
    memory_budget: int | None
    impl: str
    planner: Callable[..., Plan] = plan  # a test may ask for a loop by another one

    def __post_init__(self) -> None:
        check_head(self.hidden, self.weight, self.bias, self.target)
        object.__setattr__(self, "softcap", check_softcap(self.softcap))
        check_count("chunk_tokens", self.chunk_tokens)
        check_count("memory_budget", self.memory_budget)
        object.__setattr__(self, "impl", resolve_impl(self.impl, self.hidden))

    @property
    def wide(self) -> torch.dtype:
        """The dtype of constants, and of sums."""
        return torch.promote_types(self.hidden.dtype, torch.float32)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype hidden and weight are multiplied in: autocast's, as for any product, or their own."""
        kind = self.hidden.device.type
        if self.hidden.dtype != torch.float64 and torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return self.hidden.dtype

    def tokens(self, temperature: Tensor | float, mask: Tensor | float | None) -> Tokens:
        return check_tokens(self.target, temperature, mask, self.weight.shape[0], self.wide)

    def by_reference(self, function: Callable[..., R], *args: Any, **options: Any) -> R:
        """A function of the specification, of hidden and weight in the dtype they are multiplied in."""
        hidden, weight, bias = (None if x is None else x.to(self.dtype) for x in self.savable_factors())
        with torch.autocast(self.hidden.device.type, enabled=False):
            return function(hidden, weight, *args, bias=bias, softcap=self.softcap, **options)

    @property
    def factors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.hidden, self.weight, self.bias

    def savable_factors(self) -> tuple[Tensor | None, ...]:
        """Copies of what was made under inference_mode, which no backward could save."""
        copies = torch.is_grad_enabled()
        return tuple(x.clone() if copies and x is not None and x.is_inference() else x for x in self.factors)

    def inputs(self) -> Inputs:
        """The factors that get a gradient."""

        def wants(x: Tensor | None) -> Tensor | None:
            return x if torch.is_grad_enabled() and x is not None and x.requires_grad else None

        return wants(self.hidden), wants(self.weight), wants(self.bias)

    def terminal(self, compute: Callable[[], tuple[Tensor, Inputs]]) -> Tensor:
        """The loss of ``compute``, which returns it and the gradients of `inputs`."""
        if any(x is not None for x in self.inputs()):
            loss: Tensor = Terminal.apply(compute, self.impl, True, *self.factors)
            return loss
        with torch.autocast(self.hidden.device.type, enabled=False):
            return compute()[0]

    def how(self) -> "How":
        """To be asked before autocast is left."""
        return How(self.softcap, self.impl, self.dtype, self.chunk_tokens, self.memory_budget, self.planner)


class How(NamedTuple):
    """What of a call is no tensor."""

    softcap: float | None
    impl: str
    dtype: torch.dtype  # of the factors
    chunk_tokens: int | None
    memory_budget: int | None
    planner: Callable[..., Plan]


class Head(NamedTuple):
    """The language-model head and the rows it is applied to."""

    hidden: Tensor  # [..., D], as the caller has it
    weight: Tensor  # [V, D], in the dtype it is multiplied in
    bias: Tensor | None  # [V]
    softcap: float | None
    impl: str
    places: Tensor  # [n], the rows' places among the N
    target: Tensor  # [n]
    temperature: Tensor  # [n]
    planner: Callable[..., Plan]  # of a number of rows, and which gradients there are

    @property
    def wide(self) -> torch.dtype:
        """The dtype of logits and of sums."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    def plan(self, rows: int, inputs: Inputs = (None, None, None), **options: Any) -> Plan:
        """The plan for so many rows, with gradients for the inputs that are not None."""
        grads = {"grad_hidden": inputs[0] is not None, "grad_weight": inputs[1] is not None}
        return self.planner(rows, **grads, **options)

    def take(self, index: Tensor) -> Tensor:
        """hidden [k, D] of the tokens at ``index``, in the dtype it is multiplied in."""
        lead = self.hidden.shape[:-1]
        try:
            rows = self.hidden.view(-1, self.hidden.shape[-1]).index_select(0, index)
        except RuntimeError:  # [B, T] does not merge, and need not be copied for that
            rows = self.hidden[torch.unravel_index(index, lead)]
        return rows.to(self.weight.dtype)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.wide, device=self.hidden.device)

    def empty_dz(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.weight.dtype, device=self.hidden.device)


def head_of(
    hidden: Tensor,  # [..., D]
    weight: Tensor,
    bias: Tensor | None,
    *,
    how: How,
    places: Tensor,  # [n]
    target: Tensor,  # [N] and so is the next
    temperature: Tensor,
) -> Head:
    """The head on the rows at ``places``, without history."""
    kind = hidden.device.type
    planner = functools.partial(
        how.planner,
        V=weight.shape[0],
        D=weight.shape[1],
        tokens=target.numel(),
        dtype=how.dtype,
        device="cpu" if kind == "cpu" else "cuda",  # or another accelerator
        param_dtype=weight.dtype,
        softcap=how.softcap is not None,
        impl="triton" if how.impl == "triton" else "torch",
        chunk_tokens=how.chunk_tokens,
        memory_budget=how.memory_budget,
    )
    return Head(
        hidden.detach(),
        weight.detach().to(how.dtype),
        None if bias is None else bias.detach().to(how.dtype),
        how.softcap,
        how.impl,
        places,
        target[places],
        temperature[places],
        planner,
    )


def order_rows(first: Tensor, live: Tensor, *counted: Tensor) -> tuple[Tensor, list[int]]:
    """The places of the live rows, those of ``first`` (which are live) before the others; how many of each.

    The one time that the host waits for the device.
    """
    rank = live.to(torch.uint8) + first
    counts = torch.stack((first, live, *counted)).sum(-1).tolist()
    return rank.argsort(stable=True, descending=True)[: counts[1]], counts
