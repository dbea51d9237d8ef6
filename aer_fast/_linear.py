"""The machine behind the linear functions: a loop over pieces of the logits, never all of them.

    for each chunk of the rows that count:
        for each tile of the chunk:    z = hidden · weightᵀ in float32;   statistics, loss, and dz over z
        grad_hidden = dz · weight;     grad_weight += dzᵀ · hidden

or, where the plan says so, all statistics first and then dz, one slice of the vocabulary after another.
The row operations are those of _rows or of the Triton kernels, `_plan` chooses the loop.

Sizes: N tokens, V vocabulary entries, D hidden; n rows that count, in the order they are computed.
"""

import functools
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from aer_fast import _products
from aer_fast._plan import Plan
from aer_fast._plan import plan as make_plan
from aer_fast._validation import row_ops

P = ParamSpec("P")
R = TypeVar("R")

# Of the logits [t, V] of some rows, which of n they are, and where their gradients go ([t, V], or None where
# none are wanted): do what is to be done. Returns the rows, within the t, whose gradients were written one
# after another; None for all.
Emit = Callable[[Tensor, slice, Tensor | None], Tensor | None]
# Of some rows' logprob, entropy and largest probability: the gradients of the loss with respect to the two.
Score = Callable[[slice, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


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


def factor_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype hidden and weight are multiplied in: autocast's, as for any product, or their own."""
    kind = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


# hidden, weight and bias as the caller passed them; None for those that get no gradient.
Inputs = tuple[Tensor | None, Tensor | None, Tensor | None]


def wanted(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Inputs:
    """The inputs that get a gradient."""

    def wants(x: Tensor | None) -> Tensor | None:
        return x if torch.is_grad_enabled() and x is not None and x.requires_grad else None

    return wants(hidden), wants(weight), wants(bias)


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
    param_dtype: torch.dtype  # of the weight as the caller has it, before autocast

    @property
    def wide(self) -> torch.dtype:
        """The dtype of logits and of sums."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    @property
    def inplace(self) -> bool:
        """Whether dz overwrites the logits; else it has a place of its own, in the factors' dtype."""
        return self.impl == "torch" and self.hidden.device.type == "cpu"

    @property
    def unit(self) -> bool:
        """Whether dz, for want of range, is held without the factor 1 / denominator, which comes last."""
        return self.weight.dtype == torch.float16 and not self.inplace

    def scales(self, scale: Tensor, size: Tensor) -> tuple[Tensor, Tensor | None]:
        """What dz and what the sums over it are multiplied by; ``size``: the largest factor of dz besides."""
        if not self.unit:
            return scale, None
        size = size.where((size > 0) & size.isfinite(), 1.0)
        return 1.0 / size, scale * size

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
    softcap: float | None,
    impl: str,
    dtype: torch.dtype,
    places: Tensor,  # [n]
    target: Tensor,  # [N] and so is the next
    temperature: Tensor,
) -> Head:
    """The head on the rows at ``places``, in ``dtype`` and without history."""
    bias = None if bias is None else bias.detach().to(dtype)
    return Head(
        hidden.detach(),
        weight.detach().to(dtype),
        bias,
        softcap,
        impl,
        places,
        target[places],
        temperature[places],
        weight.dtype,
    )


def held_dtype(like: Tensor) -> torch.dtype:
    """The dtype a gradient is held in: float16 has no room for one that a loss scaler has yet to multiply."""
    return torch.float32 if like.dtype == torch.float16 else like.dtype


class Gradients:
    """The gradients of hidden, weight and bias, summed up chunk by chunk; None for what gets none."""

    def __init__(self, head: Head, inputs: Inputs, scale: Tensor | None):
        """``scale`` multiplies the sums at the end."""
        self.head, self.scale = head, scale
        hidden, self.like_weight, self.like_bias = inputs
        self.hidden = None
        if hidden is not None:
            self.hidden = torch.zeros(hidden.shape, dtype=held_dtype(hidden), device=hidden.device)
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def add(self, index: Tensor, dz: Tensor, last: bool) -> None:
        """Add what the rows at ``index`` give, by their dz [rows, V]; ``last``: nothing follows."""
        if index.numel() == 0:
            return
        head = self.head
        if self.hidden is not None:
            self.put_hidden(index, self.product_with_weight(dz, head.weight, None))
        if self.like_weight is not None:
            hidden = head.take(index)
            accumulate = self.weight is not None
            if self.weight is None:
                # a single product is rounded once by itself; a sum of several has to stay wide until its end
                dtype = held_dtype(self.like_weight) if last and self.scale is None else head.wide
                self.weight = torch.empty(self.like_weight.shape, dtype=dtype, device=hidden.device)
            _products.grad_weight(dz, hidden, self.weight, accumulate)
        if self.like_bias is not None:
            total = dz.sum(0, dtype=head.wide)
            self.bias = total if self.bias is None else self.bias.add_(total)

    def product_with_weight(self, dz: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
        """dz · weight, added to ``out`` if given; [rows, D], wide."""
        accumulate = out is not None
        if out is None:
            out = self.head.empty(dz.shape[0], weight.shape[1])
        _products.grad_hidden(dz, weight, out, accumulate)
        return out

    def put_hidden(self, index: Tensor, rows: Tensor) -> None:
        assert self.hidden is not None
        rows = rows if self.scale is None else rows.mul_(self.scale)
        flat = self.hidden.view(-1, self.hidden.shape[-1])
        flat.index_copy_(0, index, rows.to(self.hidden.dtype))

    def finish(self) -> Inputs:
        """Return the gradients in the shapes of the inputs, and their dtypes or wider."""

        def rounded(total: Tensor | None, like: Tensor | None) -> Tensor | None:
            if like is None:
                return None
            if total is None:
                return torch.zeros(like.shape, dtype=held_dtype(like), device=like.device)
            return (total if self.scale is None else total.mul_(self.scale)).to(held_dtype(like))

        weight, self.weight = self.weight, None
        return self.hidden, rounded(weight, self.like_weight), rounded(self.bias, self.like_bias)


def order_rows(first: Tensor, live: Tensor, *counted: Tensor) -> tuple[Tensor, list[int]]:
    """The places of the live rows, those of ``first`` (which are live) before the others; how many of each.

    The one time that the host waits for the device.
    """
    counts = torch.stack([x.sum() for x in (first, live, *counted)]).tolist()
    index = torch.where(first, 0, torch.where(live, 1, 2)).argsort(stable=True)[: counts[1]]
    return index, counts


def chunks_of(rows: range, plan: Plan, ends: list[int] | None = None) -> list[list[slice]]:
    """Cut rows into chunks of tiles; with ``ends``, the ends of the sequences, only between sequences."""
    if ends is None:
        whole = [range(i, min(i + plan.chunk, rows.stop)) for i in rows[:: plan.chunk]]
        return [[slice(i, min(i + plan.tile, c.stop)) for i in c[:: plan.tile]] for c in whole]
    tiles = _pack([slice(*pair) for pair in pairwise([0, *ends]) if pair[0] < pair[1]], plan.tile)
    chunks = _pack(tiles, plan.chunk)
    return [[t for t in tiles if c.start <= t.start < c.stop] for c in chunks]


def _pack(pieces: list[slice], most: int) -> list[slice]:
    """Join neighbours to pieces of at most ``most`` rows; one that is longer stays alone."""
    joined: list[slice] = []
    for piece in pieces:
        if joined and piece.stop - joined[-1].start <= most:
            joined[-1] = slice(joined[-1].start, piece.stop)
        else:
            joined.append(piece)
    return joined


def by_rows(head: Head, chunks: list[list[slice]], emit: Emit, gradients: Gradients | None) -> None:
    """Make the logits tile by tile, hand them to ``emit``; after each chunk, the products with its dz."""
    V = head.weight.shape[0]
    tile_rows = max((t.stop - t.start for c in chunks for t in c), default=0)
    chunk_rows = max((c[-1].stop - c[0].start for c in chunks), default=0)
    dz = None
    if gradients is not None and not head.inplace:
        dz = head.empty_dz(chunk_rows, V)
    buffer = None
    for number, chunk in enumerate(chunks):
        if buffer is None:
            buffer = head.empty(tile_rows, V)
        filled, kept = 0, []
        for at in chunk:
            index = head.places[at]
            z = buffer[: len(index)]
            _products.logits(head.take(index), head.weight, head.bias, z)
            out = None
            if gradients is not None:
                out = z if dz is None else dz[filled : filled + len(index)]
            live = emit(z, at, out)
            kept.append(index if live is None else index[live])
            filled += len(kept[-1])
        if gradients is not None:
            done = (buffer if dz is None else dz)[:filled]
            if dz is not None:
                del buffer, z, out  # the products need the memory
                buffer = None
            gradients.add(torch.cat(kept), done, last=number == len(chunks) - 1)


def split(head: Head, score: Score, keep: Callable[[Tensor, Tensor, Tensor], None] | None = None) -> Emit:
    """An emit of three steps: statistics, score, gradient. ``keep`` is handed what the third needs."""
    ops = row_ops(head.impl)

    def emit(z: Tensor, at: slice, out: Tensor | None) -> Tensor | None:
        constants = (head.target[at], head.temperature[at], head.softcap)
        logprob, entropy, state = ops.token_stats_fwd(z.unsqueeze(0), *constants)
        grad_logprob, grad_entropy = score(at, logprob, entropy, state[1])
        if keep is not None:
            keep(state, grad_logprob, grad_entropy)
        if out is None:
            return None
        live = nonzero(grad_logprob, grad_entropy)
        ops.token_stats_bwd(
            z.unsqueeze(0), *constants, state, grad_logprob, grad_entropy, out.unsqueeze(0), live
        )
        return live

    return emit


def nonzero(grad_logprob: Tensor, grad_entropy: Tensor) -> Tensor:
    """The rows with a gradient; NaN is one."""
    return ((grad_logprob != 0) | (grad_entropy != 0)).nonzero()[:, 0]


def loss_pass(
    head: Head,
    inputs: Inputs,
    first: int,
    score: Score,
    *,
    scale: Tensor | None,
    clippable: int = 0,
    fused: Callable[[bool], Emit] | None = None,
    ends: list[int] | None = None,
    chunk_tokens: int | None,
    memory_budget: int | None,
) -> Inputs:
    """Score every row; return the gradients of the ``inputs`` that are not None.

    The ``first`` rows may have a gradient, the others have none. ``fused(compact)`` does the same as
    `split` of ``score`` in one step. ``scale`` is the factor that the score leaves out, if any.
    """
    n = head.places.numel()
    sizes = {"chunk_tokens": chunk_tokens, "memory_budget": memory_budget}
    trains = any(x is not None for x in inputs)
    first = first if trains else 0
    if n > first:  # before there are gradients to hold
        plan = plan_of(head, n - first, (None, None, None), **sizes)
        emit = fused(False) if fused is not None else split(head, score)
        by_rows(head, chunks_of(range(first, n), plan, None if first else ends), emit, None)
    if not trains:
        return None, None, None

    plan = plan_of(head, first, inputs, clippable=clippable, **sizes)
    gradients = Gradients(head, inputs, scale)
    chunks = chunks_of(range(first), plan, ends)
    if plan.order == "vocabulary":
        kept: list[tuple[Tensor, Tensor, Tensor]] = []
        by_rows(head, chunks, split(head, score, lambda *x: kept.append(x)), None)
        if kept:
            state, grad_logprob, grad_entropy = (torch.cat(x, -1) for x in zip(*kept))
            rows = nonzero(grad_logprob, grad_entropy)
            by_vocabulary(head, plan, rows, state, grad_logprob, grad_entropy, gradients)
    else:
        emit = fused(plan.compact) if fused is not None else split(head, score)
        by_rows(head, chunks, emit, gradients)
    return gradients.finish()


def plan_of(head: Head, rows: int, inputs: Inputs, **options: Any) -> Plan:
    """The plan for so many rows of a head, with gradients for the inputs that are not None."""
    return make_plan(
        rows,
        *head.weight.shape,
        tokens=head.hidden.shape[:-1].numel(),
        dtype=head.weight.dtype,
        device="cpu" if head.hidden.device.type == "cpu" else "cuda",  # or another accelerator
        grad_hidden=inputs[0] is not None,
        grad_weight=inputs[1] is not None,
        param_dtype=head.param_dtype,
        softcap=head.softcap is not None,
        impl="triton" if head.impl == "triton" else "torch",
        **options,
    )


def by_vocabulary(
    head: Head,
    plan: Plan,
    rows: Tensor,  # [k], those of n with a gradient
    state: Tensor,  # [STATE, m], of the first m >= max(rows) rows
    grad_logprob: Tensor,  # [m]
    grad_entropy: Tensor,  # [m]
    gradients: Gradients,
) -> None:
    """The gradients of rows whose statistics are known, a slice of the vocabulary at a time."""
    if rows.numel() == 0:
        return
    ops = row_ops(head.impl)
    V, D = head.weight.shape
    index, target, temperature = (x[rows] for x in (head.places, head.target, head.temperature))
    state, grad_logprob, grad_entropy = state[:, rows], grad_logprob[rows], grad_entropy[rows]
    hidden = head.take(index)
    total = None
    if gradients.like_weight is not None:
        dtype = held_dtype(gradients.like_weight) if gradients.scale is None else head.wide
        gradients.weight = torch.empty(V, D, dtype=dtype, device=hidden.device)
    if gradients.like_bias is not None:
        gradients.bias = head.empty(V)
    for start in range(0, V, plan.slice):
        s = slice(start, min(start + plan.slice, V))
        weight, bias = head.weight[s], None if head.bias is None else head.bias[s]
        z = _products.logits(hidden, weight, bias, head.empty(len(index), len(weight)))
        dz = z if head.inplace else head.empty_dz(*z.shape)
        here = torch.where((target >= s.start) & (target < s.stop), target - s.start, -1)
        ops.token_stats_bwd(
            z.unsqueeze(0),
            here,
            temperature,
            head.softcap,
            state,
            grad_logprob,
            grad_entropy,
            dz.unsqueeze(0),
        )
        if gradients.hidden is not None:
            total = gradients.product_with_weight(dz, weight, total)
        if gradients.weight is not None:
            _products.grad_weight(dz, hidden, gradients.weight[s])
        if gradients.bias is not None:
            gradients.bias[s] = dz.sum(0, dtype=head.wide)
        del z, dz  # before the next are there
    if total is not None:
        gradients.put_hidden(index, total)
