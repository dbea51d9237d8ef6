"""Public operation: the clipped PPO loss with an entropy bonus, from hidden states and the LM head."""

from typing import Literal

import torch
from torch import Tensor

from aer_fast import _linear, reference
from aer_fast._ppo_loss import PPOTokens, check_settings, ppo_tokens, reference_options
from aer_fast._terminal import Terminal
from aer_fast._validation import Impl, check_count, check_head, check_softcap, resolve_impl, row_ops
from aer_fast.reference import FIELDS, PPOLoss, ppo_fields


@_linear.eager
def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    old_logprob: Tensor | float | None,
    advantage: Tensor | float,
    mask: Tensor | float | None = None,
    *,
    bias: Tensor | None = None,
    entropy_coef: Tensor | float = 0.0,
    clip: tuple[float, float] = (0.2, 0.2),
    dual_clip: float | None = None,
    ref_logprob: Tensor | float | None = None,
    kl_coef: float = 0.0,
    importance_weight: Tensor | float | None = None,
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    stats: Literal["all", "active"] = "all",
    chunk_tokens: int | None = None,
    memory_budget: int | None = None,
    impl: Impl = "auto",
) -> PPOLoss:
    """`ppo_loss` of logits = hidden · weightᵀ + bias, which never exist as a whole.

    The loss is terminal, so the gradients of hidden, weight and bias are computed along with it, chunk by
    chunk, in three matrix products; two where the weight is frozen, one where no gradient is wanted. The
    logits are float32 whatever the dtype of hidden and weight, and so are the sums of the gradients, which
    are rounded once.

    Rows that cost nothing: masked ones. Rows that cost one product: those without advantage, coefficient
    and KL, and, where `plan` finds that it pays, those whose gradient clipping removes.

    Shapes: each argument marked [...] is a number, a 0-d tensor, or a tensor of the rank of target whose
    sizes are 1 or equal to target's. All of them are constants: hidden, weight and bias receive gradients.

    Args:
        hidden: [..., D], float32, bfloat16 or float16 (float64 for "torch" and "reference").
        weight: [V, D], of the LM head, in the dtype of hidden. Under autocast both are cast as for any
            matrix product; their gradients come back in their own dtypes.
        target: [...], int64, in [0, V); -100 masks the token. Masked rows are never read.
        old_logprob, advantage, mask, entropy_coef, clip, dual_clip, ref_logprob, kl_coef,
            importance_weight, denominator, temperature, softcap: as in `ppo_loss`.
        bias: [V], of the LM head; -inf bans a token.
        stats: "all", or "active" to leave out rows that cannot have a gradient (advantage 0, coefficient 0,
            no KL): their logprob and entropy come back as 0 and the metrics cover the other rows only.
            Never feed `AdaptiveEntropy` from those.
        chunk_tokens: rows of a chunk; None: what `plan` chooses.
        memory_budget: bytes above the inputs that the call may take, gradients included; None: what `plan`
            takes by default. A small budget may cost a fourth product, see there.
        impl: as in `token_stats`. An explicit choice never falls back.

    Returns:
        PPOLoss(loss, logprob, entropy, metrics), as `ppo_loss`. The backward of the loss hands out the
        gradients, scaled where the upstream gradient is not 1; it can run once.

    Raises:
        ValueError: if an argument is not as above. On a GPU the values of tensors are not read: a bad
            target, temperature or mask makes the loss NaN. There the host waits for the device once a call,
            to learn how many rows count, and once a tile where rows that clipping kills are left out.

    torch.compile: a graph break; the graphs before and after the call stay compiled.

    Example:
        >>> hidden = torch.zeros(2, 3, 8, requires_grad=True)
        >>> weight = torch.randn(50, 8, requires_grad=True)
        >>> target = torch.ones(2, 3, dtype=torch.long)
        >>> advantage = torch.tensor([[1.0], [-1.0]])
        >>> out = linear_ppo_loss(hidden, weight, target, None, advantage, entropy_coef=0.01)
        >>> out.loss.backward()
        >>> round(out.loss.item(), 5)  # -0.01 log 50: the surrogate is 0 on average
        -0.03912
    """
    check_head(hidden, weight, bias, target)
    softcap = check_softcap(softcap)
    if stats not in ("all", "active"):
        raise ValueError(f"stats must be 'all' or 'active', got {stats!r}")
    check_count("chunk_tokens", chunk_tokens)
    check_count("memory_budget", memory_budget)
    impl_name = resolve_impl(impl, hidden)
    loss_settings = check_settings(clip, dual_clip, ref_logprob, kl_coef)
    tokens = ppo_tokens(
        target,
        old_logprob,
        advantage,
        mask,
        entropy_coef,
        ref_logprob,
        importance_weight,
        temperature,
        denominator,
        loss_settings,
        V=weight.shape[0],
        dtype=torch.promote_types(hidden.dtype, torch.float32),
        impl=impl_name,
    )
    dtype = _linear.factor_dtype(hidden)
    trainable = _trainable(tokens)
    computed = tokens.live if stats == "all" else trainable
    if impl_name == "reference":
        options = reference_options(target, tokens, denominator, softcap)
        if denominator is None:  # all tokens count in it, also those that are left out
            options["denominator"] = tokens.weight.where(tokens.live, 0.0).sum()
        options["target"] = options["target"].where(computed.view(target.shape), reference.IGNORE)
        bias = None if bias is None else bias.to(dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            return reference.linear_ppo_loss(hidden.to(dtype), weight.to(dtype), bias=bias, **options)

    inputs = _linear.wanted(hidden, weight, bias)
    trains = any(x is not None for x in inputs)
    fields = tokens.weight

    def compute() -> tuple[Tensor, _linear.Inputs]:
        """Fill the fields; return the loss and the gradients that are wanted."""
        nonlocal fields
        first = trainable if trains else computed
        clippable = _clippable(tokens, first)
        index, (n_first, n, n_clippable) = _linear.order_rows(first, computed, clippable)
        settings = (softcap, impl_name, dtype, index, tokens.target, tokens.temperature)
        head = _linear.head_of(hidden, weight, bias, *settings)
        token_weight, terms = tokens.weight[index], tokens.terms.at(index)
        size = (terms.advantage * terms.importance_weight).abs() + terms.entropy_coef.abs() + terms.kl_coef
        size = (token_weight * size).amax() if n > 0 else tokens.scale
        scale, last_scale = head.scales(tokens.scale, size)
        computed_fields = token_weight.new_zeros(len(FIELDS), n)

        def score(at: slice, logprob: Tensor, entropy: Tensor, top1: Tensor) -> tuple[Tensor, Tensor]:
            result = ppo_fields(logprob, entropy, top1, token_weight[at], terms.at(at))
            computed_fields[:, at] = result[0]
            return scale * result[1], scale * result[2]

        def fused(compact: bool) -> _linear.Emit:
            if compact and impl_name == "triton":
                return _linear.split(head, score)
            options = {"compact": compact} if compact else {}
            row_op = row_ops(impl_name).ppo_loss_fwd

            def emit(z: Tensor, at: slice, out: Tensor | None) -> Tensor | None:
                computed_fields[:, at] = row_op(
                    z.unsqueeze(0),
                    head.target[at],
                    token_weight[at],
                    head.temperature[at],
                    terms.at(at),
                    scale,
                    softcap,
                    None if out is None else out.unsqueeze(0),
                    **options,
                )
                return computed_fields[-1, at].nonzero()[:, 0] if compact else None

            return emit

        grads = _linear.loss_pass(
            head,
            inputs,
            n_first,
            score,
            scale=last_scale,
            clippable=n_clippable,
            fused=fused,
            chunk_tokens=chunk_tokens,
            memory_budget=memory_budget,
        )
        fields = token_weight.new_zeros(len(FIELDS), tokens.target.numel())
        fields.index_copy_(1, index, computed_fields)
        return computed_fields[0].sum() * tokens.scale, grads

    if trains:
        loss = Terminal.apply(compute, impl_name, True, hidden, weight, bias)
    else:
        with torch.autocast(hidden.device.type, enabled=False):
            loss = compute()[0]
    logprob, entropy = (fields[FIELDS.index(name)].view(target.shape) for name in ("logprob", "entropy"))
    return PPOLoss(loss, logprob, entropy, reference.ppo_metrics(fields))


def _trainable(tokens: PPOTokens) -> Tensor:
    """The live rows that may have a gradient, as far as is known before their ratio is."""
    terms = tokens.terms
    if terms.ref_logprob is not None:
        return tokens.live
    return tokens.live & ((terms.advantage != 0) | (terms.entropy_coef != 0))


def _clippable(tokens: PPOTokens, rows: Tensor) -> Tensor:
    """Those of the rows that have no gradient when their ratio is clipped."""
    if tokens.terms.old_logprob is None or tokens.terms.ref_logprob is not None:
        return torch.zeros_like(rows)
    return rows & (tokens.terms.entropy_coef == 0)
