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
    """Clipped PPO loss with an entropy bonus for each token, and its gradient along with it.

    With logprob ℓ and entropy H of `token_stats`, A the advantage and r = exp(ℓ - old_logprob):

        S = min(r A, clip(r, 1 - clip[0], 1 + clip[1]) A)
        S ← max(S, dual_clip A)    where A < 0, if dual_clip is given
        d = ref_logprob - ℓ
        L = -importance_weight S - entropy_coef H + kl_coef (exp(d) - d - 1)
        loss = Σ mask L / denominator

    The bonus is of the exact entropy of the whole vocabulary, and its gradient flows through the logits. AER
    (2510.10959) enters as a coefficient per token, see `AdaptiveEntropy`. The clipped surrogate is PPO's
    (1707.06347), the dual clip that of 1912.09729, the KL estimate Schulman's k3.

    The gradient of a row is written in the forward, while the row is at hand. The backward only hands it out:
    this costs nothing if the upstream gradient is 1, and one pass over the gradient otherwise. It can run
    once.

    Shapes: V is the size of the vocabulary, [...] the shape of target, for example [B, T]. An argument marked
    [...] is a number, a 0-d tensor, or a tensor of target's rank whose sizes are 1 or target's: [B, 1] fits
    [B, T], and [B] is an error. All of these are constants: only logits gets a gradient.

    Args:
        logits: [..., V], float32, bfloat16 or float16; with impl "torch" or "reference" also float64. A token
            whose logit is -inf is banned: it contributes 0 and its gradient is 0.
        target: [...], int64: the taken tokens, in [0, V). -100 masks a token whatever ``mask`` says. To
            predict the next token, shift the target and end each sequence with -100: the logits need no
            slice.
        old_logprob: [...], log-probability under the policy that the ratio is clipped against. None for
            on-policy: r = 1, with its gradient.
        advantage: [...], the advantage A.
        mask: [...], bool or weights >= 0; None for 1. A row with mask 0 is never read; its gradient is 0.
        entropy_coef: [...], weight of the entropy bonus. Positive values reward entropy.
        clip: (ε_low, ε_high), each >= 0; inf for no bound on that side.
        dual_clip: above 1; None for no dual clip.
        ref_logprob: [...], log-probability under the reference policy, at the same temperature. Needed if
            kl_coef > 0.
        kl_coef: weight of the KL estimate, >= 0.
        importance_weight: [...], corrects for a sampler that differs from the trainer; None for 1.
        denominator: a number or a 0-d tensor. With the number of tokens of all micro-batches on all ranks,
            the result does not depend on how the batch is cut. None: the sum of ``mask`` over the tokens
            whose target is not -100. Without a token the loss is 0.
        temperature: [...], the temperature > 0 that the tokens were sampled at.
        softcap: positive; None for no softcap.
        inplace: write the gradient over the logits' own storage, so that no second [..., V] tensor exists.
            The logits are gone after the call, and their version counter is bumped; they stay where no
            gradient is asked for. Not for a leaf that requires grad.
        impl: as in `token_stats`. "reference" is plain autograd: a retained graph can run again.
        group: as in `token_stats`. With a group the host waits for the device.
        vocab_size: as in `token_stats`.

    Returns:
        A `PPOLoss`: the 0-d loss; logprob and entropy, each [...], detached, 0 where masked; and metrics, a
        dict of 0-d tensors that `reference.ppo_metrics` describes. `merge_metrics` merges the metrics of
        several calls. All are float32 (float64 for float64 logits). Without a group the host does not wait
        for the device.

    Raises:
        ValueError: if an argument is not as above. The values of tensors are not read on a GPU, nor anywhere
            under torch.compile: there a bad target, temperature or mask makes its row, and so the loss, NaN.

    torch.compile: one node of the graph, with ``fullgraph=True`` too. Sizes and numbers may change from call
    to call; other values of clip, dual_clip, kl_coef and softcap are compiled anew. Some things differ there:

    - The backward multiplies by the upstream gradient whatever that is: one pass over the gradient.
    - With ``inplace`` the logits are overwritten only if the graph has made them and does not need them
      later, as when inductor compiles the LM head together with the loss. Elsewhere a copy is overwritten,
      with the same result and no memory saved.
    - A second backward is not refused: do not retain the graph.
    - "reference" breaks the graph.

    Examples:
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
