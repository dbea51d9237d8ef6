"""Public operation: any loss of log-probability and entropy, fused with the LM head."""

from collections.abc import Callable

import torch
from torch import Tensor

from aer_fast import _linear, reference
from aer_fast._terminal import Terminal
from aer_fast._validation import (
    Impl,
    check_boundaries,
    check_count,
    check_head,
    check_number,
    check_softcap,
    check_values,
    denominator_scale,
    per_token,
    poison,
    resolve_impl,
    savable,
    token_tensor,
)
from aer_fast.reference import IGNORE, PPOLoss


@_linear.eager
def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    objective: Callable[..., Tensor],
    *token_tensors: Tensor | float,
    mask: Tensor | float | None = None,
    denominator: Tensor | float | None = None,
    bias: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_tokens: int | None = None,
    memory_budget: int | None = None,
    impl: Impl = "auto",
) -> PPOLoss:
    """A loss of your own, of logprob and entropy, fused with the LM head as `linear_ppo_loss` is.

        L = Σ mask · objective(logprob, entropy, *token_tensors) / denominator

    The objective is called on one piece of the batch after another, on tensors [n] of its unmasked tokens,
    and differentiated there; with that, the gradients of hidden, weight and bias are computed before the
    logits of the piece are gone. Three matrix products, two with a frozen weight; tokens the objective
    gives no gradient take part in one.

    Args:
        hidden: [..., D], float32, bfloat16 or float16 (float64 for "torch" and "reference").
        weight: [V, D], of the LM head, in the dtype of hidden (or under autocast).
        target: [...], int64, in [0, V); -100 masks the token.
        objective: called with logprob [n], entropy [n] (float32, with gradients) and the token tensors [n];
            returns a loss per token [n]. It must treat tokens one by one, or sequences one by one if
            ``cu_seqlens`` is given. It may be called several times, and without need for its gradient.
        token_tensors: [...], of any dtype: numbers, 0-d tensors, or tensors of the rank of target whose
            sizes are 1 or equal to target's. Constants: no gradient, nor for anything the objective closes
            over.
        mask: [...], bool or weights >= 0. The objective does not see tokens with mask 0.
        denominator: a number or 0-d tensor; None for the sum of ``mask`` over tokens whose target is not
            -100. With no token at all the loss is 0.
        bias: [V], of the LM head.
        temperature: [...], τ > 0.
        softcap: positive, or None.
        cu_seqlens: [S + 1] integers from 0 to N, ascending: sequence s is the tokens from cu_seqlens[s] to
            cu_seqlens[s + 1] of the flattened target, and is never cut: for losses with a ratio per
            sequence. Its values are read by the host. A sequence longer than a chunk makes it larger.
        chunk_tokens, memory_budget, impl: as in `linear_ppo_loss`.

    Returns:
        PPOLoss(loss, logprob, entropy, metrics): the loss to call backward on, once; logprob and entropy
        [...], detached, 0 where masked; metrics with ``tokens``, ``entropy`` (mean) and ``active_fraction``
        (share of tokens with a gradient). All float32 (float64 for float64 hidden).

    Raises:
        ValueError: if an argument is not as above, or the objective does not return [n]. On a GPU the
            values of target, temperature and mask are not read: a bad one makes the loss NaN.

    Example:
        CISPO (2506.13585): the clipped ratio is a constant weight of the log-probability.

        >>> def cispo(logprob, entropy, old_logprob, advantage):
        ...     ratio = (logprob.detach() - old_logprob).exp()
        ...     return -ratio.clamp(max=5.0) * advantage * logprob
        >>> hidden = torch.zeros(2, 3, 8, requires_grad=True)
        >>> weight = torch.randn(50, 8, requires_grad=True)
        >>> target = torch.ones(2, 3, dtype=torch.long)
        >>> old_logprob, advantage = torch.full((2, 3), -3.912), torch.tensor([[1.0], [-0.5]])
        >>> out = linear_token_loss(hidden, weight, target, cispo, old_logprob, advantage)
        >>> out.loss.backward()
        >>> round(out.loss.item(), 3)  # mean of A log 50
        0.978
    """
    check_head(hidden, weight, bias, target)
    softcap = check_softcap(softcap)
    if not callable(objective):
        raise ValueError(f"objective must be callable, got {type(objective).__name__}")
    if denominator is not None and not isinstance(denominator, Tensor):
        check_number("denominator", denominator)
    check_count("chunk_tokens", chunk_tokens)
    check_count("memory_budget", memory_budget)
    impl_name = resolve_impl(impl, hidden)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    V = weight.shape[0]
    flat_target = savable(target).reshape(-1)
    token_weight = per_token("mask", True if mask is None else mask, target, dtype)
    temperatures = per_token("temperature", temperature, target, dtype)
    constants = [token_tensor(k, x, target, dtype) for k, x in enumerate(token_tensors)]
    boundaries = check_boundaries(cu_seqlens, target.numel())
    live = (flat_target != IGNORE) & (token_weight != 0)
    check_values(flat_target, temperatures, V, live, token_weight)
    if impl_name != "triton" and target.device.type != "cpu":
        flat_target, temperatures = poison(flat_target, temperatures, V)
    token_weight = token_weight.where(token_weight >= 0, torch.nan)
    scale = denominator_scale(denominator, token_weight.where(live, 0.0), live)
    factor_dtype = _linear.factor_dtype(hidden)
    if impl_name == "reference":
        shaped = [x.view(target.shape) for x in (flat_target, token_weight, temperatures)]
        with torch.autocast(hidden.device.type, enabled=False):
            return reference.linear_token_loss(
                *(hidden.to(factor_dtype), weight.to(factor_dtype), shaped[0], objective),
                *(x.view(target.shape) for x in constants),
                mask=shaped[1],
                denominator=denominator,
                bias=None if bias is None else bias.to(factor_dtype),
                temperature=shaped[2],
                softcap=softcap,
            )

    inputs = _linear.wanted(hidden, weight, bias)
    fields = token_weight.new_zeros(4, target.numel())  # loss, logprob, entropy, active

    def compute() -> tuple[Tensor, _linear.Inputs]:
        """Fill the fields; return the loss and the gradients that are wanted."""
        index, (n, _) = _linear.order_rows(live, live)
        settings = (softcap, impl_name, factor_dtype, index, flat_target, temperatures)
        head = _linear.head_of(hidden, weight, bias, *settings)
        ends = None
        if boundaries is not None:
            counts = torch.nn.functional.pad(live.cumsum(0), (1, 0))
            ends = counts[boundaries.to(counts.device)].tolist()
        inner_scale, last_scale = head.scales(scale, token_weight[index].amax() if n > 0 else scale)

        def score(at: slice, logprob: Tensor, entropy: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
            rows = index[at]
            picked = [x[rows] for x in constants]
            loss, *grads = reference.objective_grads(objective, token_weight[rows], logprob, entropy, picked)
            active = (grads[0] != 0) | (grads[1] != 0)
            fields[:, rows] = torch.stack((loss, logprob, entropy, active.to(loss.dtype)))
            return inner_scale * grads[0], inner_scale * grads[1]

        grads = _linear.loss_pass(
            head,
            inputs,
            n,
            score,
            scale=last_scale,
            ends=ends,
            chunk_tokens=chunk_tokens,
            memory_budget=memory_budget,
        )
        return fields[0].sum() * scale, grads

    if any(x is not None for x in inputs):
        loss = Terminal.apply(compute, impl_name, True, hidden, weight, bias)
    else:
        with torch.autocast(hidden.device.type, enabled=False):
            loss = compute()[0]
    metrics = reference.objective_metrics(live, fields[2], fields[3])
    return PPOLoss(loss, fields[1].view(target.shape), fields[2].view(target.shape), metrics)
