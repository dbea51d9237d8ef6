"""Public operation: token log-probability and policy entropy, from hidden states and the LM head."""

from typing import Any

import torch
from torch import Tensor

from aer_fast import _linear, reference
from aer_fast._terminal import first_order
from aer_fast._validation import (
    Impl,
    check_count,
    check_head,
    check_softcap,
    check_values,
    per_token,
    poison,
    resolve_impl,
    row_ops,
    savable,
)
from aer_fast.reference import IGNORE, TokenStats


@_linear.eager
def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
    memory_budget: int | None = None,
    impl: Impl = "auto",
) -> TokenStats:
    """`token_stats` of logits = hidden · weightᵀ + bias, which never exist as a whole.

    Both outputs carry gradients to hidden, weight and bias. One matrix product in the forward, of which one
    tile is held at a time; three in the backward, which computes the logits anew, and only for tokens whose
    upstream gradient is not 0. Where the loss is known beforehand, `linear_token_loss` needs three in all.

    Args:
        hidden: [..., D], float32, bfloat16 or float16 (float64 for "torch" and "reference").
        weight: [V, D], of the LM head, in the dtype of hidden. Under autocast both are cast as for any
            matrix product; their gradients come back in their own dtypes.
        target: [...], int64, in [0, V), or -100: such a row is never read, its outputs and its gradient
            are 0.
        bias: [V], of the LM head; -inf bans a token.
        temperature: τ > 0: a number, a 0-d tensor, or one per token (sizes 1 or equal to those of target).
            No gradient.
        softcap: positive, or None.
        chunk_tokens, memory_budget: as in `linear_ppo_loss`.
        impl: as in `token_stats`. An explicit choice never falls back.

    Returns:
        TokenStats(logprob, entropy), each [...] float32 (float64 for float64 hidden).

    Raises:
        ValueError: if an argument is not as above. On a GPU the values of target and of a temperature
            tensor are not read: a bad one makes its row NaN.

    torch.compile: a graph break; the graphs before and after the call stay compiled.

    Example:
        >>> hidden, weight = torch.zeros(2, 3, 8), torch.randn(50, 8)
        >>> stats = linear_token_stats(hidden, weight, torch.ones(2, 3, dtype=torch.long))
        >>> round(stats.entropy[0, 0].item(), 4)  # log 50
        3.912
    """
    check_head(hidden, weight, bias, target)
    softcap = check_softcap(softcap)
    check_count("chunk_tokens", chunk_tokens)
    check_count("memory_budget", memory_budget)
    impl_name = resolve_impl(impl, hidden)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    temperatures = per_token("temperature", temperature, target, wide)
    flat_target = savable(target).reshape(-1)
    check_values(flat_target, temperatures, weight.shape[0], flat_target != IGNORE)
    if impl_name != "triton" and hidden.device.type != "cpu":
        flat_target, temperatures = poison(flat_target, temperatures, weight.shape[0])
    dtype = _linear.factor_dtype(hidden)
    if impl_name == "reference":
        with torch.autocast(hidden.device.type, enabled=False):
            return reference.linear_token_stats(
                hidden.to(dtype),
                weight.to(dtype),
                flat_target.view(target.shape),
                bias=None if bias is None else bias.to(dtype),
                temperature=temperatures.view(target.shape),
                softcap=softcap,
            )
    sizes = {"chunk_tokens": chunk_tokens, "memory_budget": memory_budget}
    settings = (softcap, impl_name, dtype, sizes)
    if hidden.is_inference() and torch.is_grad_enabled():
        hidden = hidden.clone()  # it could not be saved for the backward
    logprob, entropy = _LinearTokenStats.apply(hidden, weight, bias, flat_target, temperatures, settings)
    return TokenStats(logprob.view(target.shape), entropy.view(target.shape))


class _LinearTokenStats(torch.autograd.Function):
    """Saves its inputs and a few numbers a row; the backward computes the logits anew."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [..., D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        target: Tensor,  # [N]
        temperature: Tensor,  # [N]
        settings: tuple[float | None, str, torch.dtype, dict[str, int | None]],
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.settings = softcap, impl, dtype, sizes = settings
        with torch.autocast(hidden.device.type, enabled=False):
            live = target != IGNORE
            index, _ = _linear.order_rows(live, live)
            head = _linear.head_of(hidden, weight, bias, softcap, impl, dtype, index, target, temperature)
            n = index.numel()
            plan = _linear.plan_of(head, n, (None, None, None), **sizes)
            stats = temperature.new_zeros(2, n)
            states: list[Tensor] = []

            def emit(z: Tensor, at: slice, _: Tensor | None) -> None:
                constants = (head.target[at], head.temperature[at], softcap)
                stats[0, at], stats[1, at], state = row_ops(impl).token_stats_fwd(z.unsqueeze(0), *constants)
                states.append(state)

            _linear.by_rows(head, _linear.chunks_of(range(n), plan), emit, None)
        state = torch.cat(states, -1) if states else stats.new_zeros(0, 0)
        ctx.save_for_backward(hidden, weight, bias, target, temperature, index, state)
        full = stats.new_zeros(2, target.numel()).index_copy_(1, index, stats)
        return full[0], full[1]

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, temperature, index, state = ctx.saved_tensors
        softcap, impl, dtype, sizes = ctx.settings
        needed = (x if needs else None for x, needs in zip((hidden, weight, bias), ctx.needs_input_grad))
        inputs: _linear.Inputs = (next(needed), next(needed), next(needed))
        if all(x is None for x in inputs) or all(g is None for g in grads):
            return (None,) * 6
        with torch.autocast(hidden.device.type, enabled=False):
            zeros = torch.zeros_like(temperature)
            grad_logprob, grad_entropy = ((zeros if g is None else g)[index] for g in grads)
            rows = _linear.nonzero(grad_logprob, grad_entropy)
            head = _linear.head_of(
                hidden, weight, bias, softcap, impl, dtype, index[rows], target, temperature
            )
            state, grad_logprob, grad_entropy = state[:, rows], grad_logprob[rows], grad_entropy[rows]
            scale = None
            if head.unit and rows.numel() > 0:  # dz of about 1, whatever the loss was divided by
                scale = torch.maximum(grad_logprob.abs().amax(), grad_entropy.abs().amax())
                grad_logprob, grad_entropy = grad_logprob / scale, grad_entropy / scale
            gradients = _linear.Gradients(head, inputs, scale)
            plan = _linear.plan_of(head, rows.numel(), inputs, operation="stats", **sizes)
            if plan.order == "vocabulary":
                everything = torch.arange(rows.numel(), device=rows.device)
                _linear.by_vocabulary(head, plan, everything, state, grad_logprob, grad_entropy, gradients)
            else:

                def emit(z: Tensor, at: slice, out: Tensor | None) -> None:
                    assert out is not None
                    constants = (head.target[at], head.temperature[at], softcap, state[:, at].contiguous())
                    upstream = (grad_logprob[at], grad_entropy[at])
                    row_ops(impl).token_stats_bwd(z.unsqueeze(0), *constants, *upstream, out.unsqueeze(0))

                _linear.by_rows(head, _linear.chunks_of(range(rows.numel()), plan), emit, gradients)
            made = zip(gradients.finish(), inputs)
            return *(None if g is None or x is None else g.to(x.dtype) for g, x in made), None, None, None
