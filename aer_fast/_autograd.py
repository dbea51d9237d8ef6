"""What the functions of autograd share: a loss whose gradients are computed along with it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from aer_fast._rows import as_rows, row_ops

P = ParamSpec("P")
R = TypeVar("R")


def first_order(backward: Callable[P, R]) -> Callable[P, R]:
    """Refuse create_graph=True, whose result would silently lack what this backward depends on."""

    @functools.wraps(backward)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.is_grad_enabled():
            raise RuntimeError("create_graph=True: the gradients of aer_fast cannot be differentiated again")
        return backward(*args, **kwargs)

    return call


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


class Terminal(torch.autograd.Function):
    """Runs ``compute``, which returns the loss and its gradients; the backward hands these out, once.

    ``compute`` runs inside the forward, after autograd has noted where ``inputs`` come from: it may
    overwrite them. A gradient may be wider than its input: it is rounded after it was scaled. ``keep``
    holds the gradients through activation checkpointing. Without it they are saved as any saved tensor is,
    and checkpointing drops them and computes the loss again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        compute: Callable[[], tuple[Tensor, Sequence[Tensor | None]]],
        impl: str,
        keep: bool,
        *inputs: Tensor | None,
    ) -> Tensor:
        ctx.impl, ctx.spent = impl, False
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        with torch.autocast(next(x for x in inputs if x is not None).device.type, enabled=False):
            loss, grads = compute()  # sums stay float32
        ctx.kept = list(grads) if keep else None
        if not keep:
            ctx.save_for_backward(*grads)
        return loss

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError(
                "the gradient of this loss was handed out by its first backward and may be changed by now;"
                " compute the loss again"
            )
        ctx.spent = True
        grads, ctx.kept = ctx.saved_tensors if ctx.kept is None else ctx.kept, ()
        for grad in grads:
            if grad is not None:
                row_ops(ctx.impl).scale_grad(as_rows(grad), grad_loss)
        rounded = [None if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes)]
        return None, None, None, *rounded


def check_inplace(logits: Tensor) -> None:
    """Whether the gradient can overwrite the logits. Raises ValueError if not."""
    if logits.is_leaf or (logits._base is not None and logits._base.is_leaf):
        raise ValueError(
            "inplace=True would overwrite logits, a leaf that requires grad or a view of one;"
            " pass the output of a module, or inplace=False"
        )
    if torch.compiler.is_compiling():
        return  # it copies what can't be overwritten
    extent = 1  # entries that the dimensions so far reach over
    for stride, size in sorted(zip(logits.stride(), logits.shape)):
        if size > 1 and stride < extent:
            raise ValueError(
                "inplace=True needs logits whose entries do not share storage,"
                f" got strides {logits.stride()} of shape {tuple(logits.shape)}"
            )
        extent += stride * (size - 1)
    if as_rows(logits).data_ptr() != logits.data_ptr():
        raise ValueError(
            "inplace=True needs logits whose vocabulary is contiguous and whose rows are two strides"
            f" apart, got strides {logits.stride()} of shape {tuple(logits.shape)}"
        )


def overwriting(logits: Tensor, loss: Tensor, leaf: Tensor) -> Tensor:
    """A loss of ``leaf`` as one whose gradient overwrites the logits."""
    (grad,) = torch.autograd.grad(loss, leaf)
    value = loss.detach()
    over: Tensor = Terminal.apply(lambda: (value, (logits.detach().copy_(grad),)), "reference", False, logits)
    return over
