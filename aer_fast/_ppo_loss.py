"""Public operation: the clipped PPO loss with an entropy bonus, from logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aer_fast import _split, reference
from aer_fast._autograd import Terminal, check_inplace, overwriting
from aer_fast._policy_loss import by_reference, policy_loss, result
from aer_fast._rows import as_rows, compiled, row_ops
from aer_fast._validation import (
    Impl,
    check_flag,
    check_logits,
    check_softcap,
    check_tokens,
    resolve_impl,
    unpadded,
)
from aer_fast.reference import PPOLoss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def ppo_loss(
    logits: Tensor,
    target: Tensor,
    old_logprob: Tensor | float | None,
    advantage: Tensor | float,
    mask: Tensor | float | None = None,
    *,
    entropy_coef: Tensor | float = 0.0,
    clip: tuple[float, float] = (0.2, 0.2),
    dual_clip: float | None = None,
    ref_logprob: Tensor | float | None = None,
    kl_coef: float = 0.0,
    importance_weight: Tensor | float | None = None,
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    inplace: bool = False,
    impl: Impl = "auto",
    group: ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> PPOLoss:
    """Clipped policy loss with a per-token entropy bonus, its gradient computed along with it.

    With logprob ℓ and entropy H of `token_stats` and the ratio r = exp(ℓ - old_logprob),

        S = min(r A, clip(r, 1 - clip[0], 1 + clip[1]) A);   A < 0 and dual_clip: S = max(S, dual_clip A)
        L = -importance_weight S - entropy_coef H + kl_coef (exp(d) - d - 1),   d = ref_logprob - ℓ
        loss = Σ mask L / denominator

    The bonus is of the exact entropy of the whole vocabulary and its gradient flows through the logits; a
    coefficient per token is how AER (2510.10959) enters, see `AdaptiveEntropy`. The clipped surrogate is
    PPO's (1707.06347), the dual clip 1912.09729's, the KL estimator Schulman's k3.

    The loss is terminal, so a row's gradient is written in the forward, while the row is at hand. The
    backward then costs nothing when the upstream gradient is 1, and one pass over the gradient otherwise;
    it can run once.

    Shapes: each argument below marked [...] is a number, a 0-d tensor, or a tensor of the rank of target
    whose sizes are 1 or equal to target's. All of them are constants: only logits receive a gradient.

    Args:
        logits: [..., V], float32, bfloat16 or float16 (float64 for "torch" and "reference"). Entries may be
            -inf: banned tokens contribute 0 and receive 0.
        target: [...], int64, in [0, V); -100 masks the token whatever ``mask`` says. To predict the next
            token, shift the target and mark the end of a sequence with -100; that needs no slice of logits.
        old_logprob: [...], of the policy that is clipped against; None for on-policy: r = 1, gradient kept.
        advantage: [...], A.
        mask: [...], bool or weights >= 0. Rows with mask 0 are never read; their gradient is 0.
        entropy_coef: [...], c. Positive values reward entropy.
        clip: (ε_low, ε_high), each >= 0; inf for no bound on that side.
        dual_clip: above 1, or None.
        ref_logprob: [...], of the reference policy at the same temperature. Needed if kl_coef > 0.
        kl_coef: β >= 0.
        importance_weight: [...], for the mismatch of sampler and trainer; None for 1.
        denominator: a number or 0-d tensor, such as the number of tokens of all micro-batches on all ranks,
            which makes the result independent of how a batch is cut. None: the sum of ``mask`` over
            tokens whose target is not -100. With no token at all the loss is 0.
        temperature: [...], τ > 0, the temperature the tokens were sampled at.
        softcap: positive, or None.
        inplace: write the gradient over the logits' own storage: no second [..., V] tensor exists. The
            logits are gone after the call (their version counter is bumped), except where no gradient is
            asked for. Not for a leaf that requires grad.
        impl: as in `token_stats`; "reference" is plain autograd, which a retained graph can run again.
        group, vocab_size: as in `token_stats`. With a group the host waits for the device.

    Returns:
        PPOLoss(loss, logprob, entropy, metrics): the 0-d loss; logprob and entropy [...], detached, 0 where
        masked; metrics, a dict of 0-d tensors described in `reference.ppo_metrics`; those of several
        calls are merged by `merge_metrics`. All float32 (float64 for float64 logits). Nothing waits for the
        device.

    Raises:
        ValueError: if an argument is not as above. On a GPU the values of tensors are not read: a bad
            target, temperature or mask makes its row, and so the loss, NaN. So it is on any device under
            torch.compile.

    torch.compile: one node of the graph, with ``fullgraph=True`` too, for sizes and numbers that change from
    call to call; other values of clip, dual_clip, kl_coef and softcap are compiled anew, and "reference"
    breaks the graph. The backward then multiplies by the upstream gradient whatever that is: one pass over
    the gradient. With ``inplace`` the logits are overwritten where the graph has made them and does not need
    them later, as when inductor compiles the LM head together with the loss; elsewhere a copy is overwritten
    instead, with the same result and no memory saved. A second backward is not refused there: do not retain
    the graph.

    Example:
        >>> logits = torch.zeros(2, 3, 50, requires_grad=True)
        >>> target = torch.ones(2, 3, dtype=torch.long)
        >>> out = ppo_loss(logits, target, None, torch.tensor([[1.0], [-1.0]]), entropy_coef=0.01)
        >>> out.loss.backward()
        >>> round(out.loss.item(), 5)  # -0.01 log 50: the surrogate is 0 on average
        -0.03912
    """
    terms: dict[str, Any] = {
        "old_logprob": old_logprob,
        "advantage": advantage,
        "entropy_coef": entropy_coef,
        "clip": clip,
        "dual_clip": dual_clip,
        "ref_logprob": ref_logprob,
        "kl_coef": kl_coef,
        "importance_weight": importance_weight,
    }
    if group is not None:
        return _split.ppo_loss(
            logits,
            target,
            mask=1.0 if mask is None else mask,
            denominator=denominator,
            temperature=temperature,
            softcap=softcap,
            inplace=inplace,
            impl=impl,
            group=group,
            vocab_size=vocab_size,
            **terms,
        )
    check_flag("inplace", inplace)
    check_logits(logits, target)
    logits = unpadded(logits, vocab_size)
    softcap = check_softcap(softcap)
    impl_name = resolve_impl(impl, logits)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    kernel = impl_name == "triton"
    tokens = check_tokens(
        target, temperature, 1.0 if mask is None else mask, logits.shape[-1], dtype, kernel=kernel
    )
    policy = policy_loss(target, tokens, denominator, **terms)
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    if inplace and needs_grad:
        check_inplace(logits)
    if impl_name == "reference":
        leaf = logits.detach().clone().requires_grad_() if inplace and needs_grad else logits
        out = by_reference(
            reference.ppo_loss,
            leaf,
            loss=policy,
            tokens=tokens,
            target=target,
            denominator=denominator,
            softcap=softcap,
        )
        return out if leaf is logits else out._replace(loss=overwriting(logits, out.loss, leaf))
    arguments = (tokens.target, tokens.temperature, softcap, policy)
    if torch.compiler.is_compiling():
        loss, fields = compiled.ppo_loss(
            logits, *arguments, impl_name, needs_grad=needs_grad, inplace=inplace
        )
        return result(loss, fields, target.shape)

    fields = policy.constants

    def compute() -> tuple[Tensor, tuple[Tensor | None]]:
        """Fill the fields; return the loss and, if it is wanted, its gradient."""
        nonlocal fields
        rows = as_rows(logits.detach())
        grad = None
        if needs_grad:
            grad = rows if inplace else torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        fields = row_ops(impl_name).ppo_loss_fwd(rows, *arguments, grad)
        return fields[0].sum() * policy.scale, (None if grad is None else grad.view(logits.shape),)

    if needs_grad:
        loss = Terminal.apply(compute, impl_name, False, logits)
    else:
        with torch.autocast(logits.device.type, enabled=False):
            loss = compute()[0]
    return result(loss, fields, target.shape)
