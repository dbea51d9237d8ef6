"""What torch.compile sees of the operations from logits: a few nodes, whose insides run as they always do.

A graph can't hold what the operations do on the host: launch a kernel on a grid of its own, look for the
rows that count. So each of them is an opaque operator here, torch.ops.aer_fast.*, which calls the row
operations of "triton" or "torch" when the graph runs; the graph knows its shapes alone, and changing ones
are no trouble. Only a graph uses these: called directly, an operator costs more than a small launch.

Sizes: N tokens, in the leading dimensions [...] of the logits; V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aer_fast._policy_loss import PolicyLoss, Settings
from aer_fast._rows import as_rows, row_ops
from aer_fast.kernels.layout import FIELDS, STATE


def token_stats(
    logits: Tensor,  # [..., V]
    target: Tensor,  # [N]
    temperature: Tensor,  # [N]
    softcap: float | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Return logprob and entropy, each [N], with gradients."""
    logprob, entropy = _TokenStats.apply(logits, target, temperature, softcap, impl)
    return logprob, entropy


def ppo_loss(
    logits: Tensor,  # [..., V]
    target: Tensor,  # [N]
    temperature: Tensor,  # [N]
    softcap: float | None,
    loss: PolicyLoss,
    impl: str,
    *,
    needs_grad: bool,
    inplace: bool,
) -> tuple[Tensor, Tensor]:
    """Return the loss [] and its fields [FIELDS, N]; only the loss has a gradient."""
    settings = [float(x) for x in loss.settings]
    arguments = (target, temperature, softcap, loss.constants, settings, loss.scale, impl)
    if needs_grad:
        value, fields = _PPOLoss.apply(logits, inplace, *arguments)
        return value, fields
    fields, _ = torch.ops.aer_fast.ppo_loss_fwd(logits, False, *arguments)
    return fields[0].sum() * loss.scale, fields


class _TokenStats(torch.autograd.Function):
    """`_token_stats._TokenStats` in words that a graph knows."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, temperature: Tensor, softcap: float | None, impl: str
    ) -> tuple[Tensor, Tensor]:
        ctx.softcap, ctx.impl = softcap, impl
        logprob, entropy, state = torch.ops.aer_fast.token_stats_fwd(
            logits, target, temperature, softcap, impl
        )
        ctx.save_for_backward(logits, target, temperature, state)
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = torch.ops.aer_fast.token_stats_bwd(*ctx.saved_tensors, *grads, ctx.softcap, ctx.impl)
        return grad, None, None, None, None


class _PPOLoss(torch.autograd.Function):
    """`_autograd.Terminal` of `ppo_loss` in words that a graph knows.

    A graph does not look at the upstream gradient: it multiplies, whatever the factor is, and leaves it to
    the compiler where the product goes. Nor does it notice a second backward, which the compiler may get
    wrong.

    inplace: the gradient is written over a copy of the logits. The compiler leaves that copy out, and so
    has the logits themselves overwritten, where they were made inside the graph and are not needed later.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, inplace: bool, *arguments: Any) -> tuple[Tensor, Tensor]:
        if inplace:
            grad = logits.clone(memory_format=torch.contiguous_format)
            fields = torch.ops.aer_fast.ppo_loss_fwd_(grad, *arguments)
        else:
            fields, grad = torch.ops.aer_fast.ppo_loss_fwd(logits, True, *arguments)
        ctx.constants = 1 + len(arguments)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(fields)
        *_, scale, _ = arguments
        return fields[0].sum() * scale, fields

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grad_loss, *[None] * ctx.constants


@torch.library.custom_op(
    "aer_fast::token_stats_fwd",
    mutates_args=(),
    schema="(Tensor logits, Tensor target, Tensor temperature, float? softcap, str impl)"
    " -> (Tensor logprob, Tensor entropy, Tensor state)",
)
def _token_stats_fwd(
    logits: Tensor, target: Tensor, temperature: Tensor, softcap: float | None, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return logprob [N], entropy [N] and state [STATE, N] of logits [..., V]."""
    with torch.autocast(logits.device.type, enabled=False):  # sums stay float32
        return row_ops(impl).token_stats_fwd(as_rows(logits), target, temperature, softcap)


@_token_stats_fwd.register_fake
def _(
    logits: Tensor, target: Tensor, temperature: Tensor, softcap: float | None, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    state = temperature.new_empty(len(STATE), target.numel())
    return torch.empty_like(temperature), torch.empty_like(temperature), state


@torch.library.custom_op(
    "aer_fast::token_stats_bwd",
    mutates_args=(),
    schema="(Tensor logits, Tensor target, Tensor temperature, Tensor state, Tensor grad_logprob,"
    " Tensor grad_entropy, float? softcap, str impl) -> Tensor",
)
def _token_stats_bwd(
    logits: Tensor,
    target: Tensor,
    temperature: Tensor,
    state: Tensor,
    grad_logprob: Tensor,  # [N]
    grad_entropy: Tensor,  # [N]
    softcap: float | None,
    impl: str,
) -> Tensor:
    """Return the gradient of the logits [..., V]."""
    rows = as_rows(logits)
    grad = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    grads = grad_logprob.contiguous(), grad_entropy.contiguous()
    with torch.autocast(logits.device.type, enabled=False):
        row_ops(impl).token_stats_bwd(rows, target, temperature, softcap, state, *grads, grad)
    return grad.view(logits.shape)


@_token_stats_bwd.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


# What both operators of the loss take, those of `_ppo_fields` in its order.
_ARGUMENTS = (
    "Tensor target, Tensor temperature, float? softcap, Tensor constants, float[] settings, Tensor scale,"
    " str impl"
)


def _ppo_fields(
    rows: Tensor,  # [O, I, V]
    grad: Tensor | None,  # [O, I, V], written; may be rows
    target: Tensor,
    temperature: Tensor,
    softcap: float | None,
    constants: Tensor,
    settings: Sequence[float],
    scale: Tensor,
    impl: str,
) -> Tensor:
    on_policy, *numbers = settings
    loss = PolicyLoss(constants, Settings(bool(on_policy), *numbers), scale)
    with torch.autocast(rows.device.type, enabled=False):
        return row_ops(impl).ppo_loss_fwd(rows, target, temperature, softcap, loss, grad)


@torch.library.custom_op(
    "aer_fast::ppo_loss_fwd",
    mutates_args=(),
    schema=f"(Tensor logits, bool needs_grad, {_ARGUMENTS}) -> (Tensor fields, Tensor grad)",
)
def _ppo_loss_fwd(logits: Tensor, needs_grad: bool, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Return fields [FIELDS, N] and the gradient of the logits [..., V], or [0] where none is needed."""
    rows = as_rows(logits)
    if not needs_grad:
        return _ppo_fields(rows, None, *arguments), logits.new_empty(0)
    grad = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
    return _ppo_fields(rows, grad, *arguments), grad.view(logits.shape)


@_ppo_loss_fwd.register_fake
def _(logits: Tensor, needs_grad: bool, *arguments: Any) -> tuple[Tensor, Tensor]:
    shape = logits.shape if needs_grad else (0,)
    return _empty_fields(*arguments), torch.empty(shape, dtype=logits.dtype, device=logits.device)


@torch.library.custom_op(
    "aer_fast::ppo_loss_fwd_",
    mutates_args=("logits",),
    schema=f"(Tensor(a!) logits, {_ARGUMENTS}) -> Tensor fields",
)
def _ppo_loss_fwd_(logits: Tensor, *arguments: Any) -> Tensor:
    """Return fields [FIELDS, N]; contiguous logits [..., V] become their own gradient."""
    rows = logits.view(1, -1, logits.shape[-1])  # never a copy, whose gradient would be lost
    return _ppo_fields(rows, rows, *arguments)


@_ppo_loss_fwd_.register_fake
def _(logits: Tensor, *arguments: Any) -> Tensor:
    return _empty_fields(*arguments)


def _empty_fields(target: Tensor, temperature: Tensor, *_: Any) -> Tensor:
    return temperature.new_empty(len(FIELDS), target.numel())
