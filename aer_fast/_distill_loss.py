"""Public operation: the divergence from a teacher over the whole vocabulary, from logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from aer_fast import _split, reference
from aer_fast._autograd import Terminal, check_inplace, eager, overwriting
from aer_fast._distill import (
    FIELDS,
    Targets,
    by_reference,
    check_apart,
    check_ref,
    distill_terms,
    result,
    rows_like,
)
from aer_fast._rows import as_rows, pair_ops
from aer_fast._rows.pairs import Grads, Pair, PairStats
from aer_fast._validation import (
    Impl,
    check_count,
    check_entries,
    check_flag,
    check_logits,
    check_range,
    check_tokens,
    check_vocab_size,
    resolve_impl,
)
from aer_fast.kernels.layout import IGNORE
from aer_fast.reference import DistillLoss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@eager
def distill_loss(
    logits: Tensor,
    ref_logits: Tensor,
    target: Tensor | None = None,
    mask: Tensor | float | None = None,
    *,
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl",
    jsd_beta: float = 0.5,
    coef: Tensor | float = 1.0,
    entropy_coef: Tensor | float = 0.0,
    temperature: Tensor | float = 1.0,
    ref_temperature: Tensor | float | None = None,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    ref_logprob_floor: float | None = None,
    denominator: Tensor | float | None = None,
    inplace: bool = False,
    impl: Impl = "auto",
    group: ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> DistillLoss:
    """Divergence of a student from a teacher over the whole vocabulary, and its gradient along with it.

    With p the student's distribution, q the teacher's, and H the student's entropy:

        loss = Σ mask (coef D - entropy_coef H) / denominator

        reverse_kl   D = KL(p‖q) = Σᵥ pᵥ (log pᵥ - log qᵥ)
        forward_kl   D = KL(q‖p)
        jsd          D = β KL(q‖m) + (1 - β) KL(p‖m),   m = β q + (1 - β) p,   β = jsd_beta

    It is meant for on-policy distillation after GKD (2306.13649), whose jsd this is: β = 0 gives forward_kl
    and β = 1 gives reverse_kl. There is no factor temperature². The teacher is a constant.

    A student close to its teacher loses no digits. In the kernels each term of the sum is non-negative and
    vanishes where the two agree; impl="torch" computes such rows in float64. A KL of 1e-10 is as accurate,
    relative to the float32 logits, as one of 1. With a softcap the kernels round the softcapped logits to
    float32: there a KL of 1e-8 is right to a thousandth, one of 1e-10 to a hundredth.

    Shapes: [...] is the shape of the rows, for example [B, T]. An argument marked [...] is a number, a 0-d
    tensor, or a tensor of their rank whose sizes are 1 or theirs. All of these are constants: only logits
    gets a gradient.

    Args:
        logits: [..., V], of the student, float32, bfloat16 or float16; with impl "torch" or "reference" also
            float64. Entries may be -inf.
        ref_logits: [..., V_ref], of the teacher, of any of these dtypes. Where V and V_ref differ, as padded
            vocabularies do, the first entries, which both have, count; the others have probability 0.
        target: [...], int64, in [0, max(V, V_ref)) and below ``vocab_size``. It is needed only for the
            results logprob and ref_logprob, and to mask tokens with -100. None: all tokens count, and these
            two results are None.
        mask: [...], bool or weights >= 0; None for 1. A row with mask 0 is never read; its gradient is 0.
        divergence: "reverse_kl", "forward_kl" or "jsd", as above.
        jsd_beta: β, within [0, 1].
        coef: [...], weight of the divergence. A token with coef 0 has no divergence in its loss, even an
            infinite one.
        entropy_coef: [...], weight of the student's entropy. Positive values reward entropy.
        temperature: [...], the student's temperature, > 0.
        ref_temperature: [...], the teacher's temperature, > 0; None for the student's.
        softcap: the student's, positive; None for no softcap.
        ref_softcap: the teacher's, positive; None for no softcap. It is not taken from the student.
        ref_logprob_floor: below 0, for reverse_kl: log q counts as at least this. Without it, a student that
            gives mass to a token that the teacher bans has an infinite divergence and a NaN gradient.
        denominator: as in `ppo_loss`. None: the sum of ``mask`` over the tokens whose target is not -100.
        inplace: write the gradient over the storage of logits, as in `ppo_loss`.
        impl: as in `token_stats`.
        group: as in `token_stats`. Then ref_logits are a slice, too, which begins at the same token. The host
            waits for the device.
        vocab_size: size of the vocabulary, where both logits are padded beyond it. None: the shorter of V and
            V_ref, as above.

    Returns:
        A `DistillLoss`: the 0-d loss; divergence, entropy, logprob and ref_logprob, each [...], detached, 0
        where masked; and metrics, which `reference.distill_metrics` describes and `merge_metrics` merges.
        logprob and ref_logprob are -inf for a target that only one of the vocabularies has, and None without
        target. All are float32 (float64 for float64 logits).

    Raises:
        ValueError: if an argument is not as above. The values of tensors are not read on a GPU: there a bad
            target, temperature or mask makes its row, and so the loss, NaN.

    torch.compile: a graph break. The graphs before and after the call stay compiled.

    Examples:
        >>> logits = torch.zeros(2, 3, 50, requires_grad=True)
        >>> ref_logits = torch.zeros(2, 3, 50)
        >>> ref_logits[..., 0] = 1.0
        >>> out = distill_loss(logits, ref_logits)
        >>> out.loss.backward()
        >>> round(out.loss.item(), 5)
        0.01379
    """
    if group is not None:
        return _split.distill_loss(
            logits,
            ref_logits,
            target,
            mask=mask,
            denominator=denominator,
            temperature=temperature,
            softcap=softcap,
            inplace=inplace,
            impl=impl,
            group=group,
            vocab_size=vocab_size,
            divergence=divergence,
            jsd_beta=jsd_beta,
            coef=coef,
            entropy_coef=entropy_coef,
            ref_temperature=ref_temperature,
            ref_softcap=ref_softcap,
            ref_logprob_floor=ref_logprob_floor,
        )
    check_flag("inplace", inplace)
    for name, x in (("logits", logits), ("ref_logits", ref_logits)):
        check_entries(name, x)
    check_ref("ref_logits", ref_logits, logits, "logits")
    check_count("vocab_size", vocab_size)
    sizes = [check_vocab_size(vocab_size, x.shape[-1]) for x in (logits, ref_logits)]
    V = min(sizes)
    if target is not None:
        check_logits(logits, target)
    targets = Targets.of(target, logits, V, max(sizes))
    impl_name = resolve_impl(impl, logits)
    if impl_name == "triton":
        resolve_impl(impl_name, ref_logits)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    tokens = check_tokens(targets.inside, temperature, 1.0 if mask is None else mask, None, dtype)
    check_range(tokens.target, tokens.live, max(sizes))
    terms = distill_terms(
        targets.inside,
        tokens,
        denominator,
        divergence=divergence,
        jsd_beta=jsd_beta,
        coef=coef,
        entropy_coef=entropy_coef,
        ref_temperature=ref_temperature,
        softcap=softcap,
        ref_softcap=ref_softcap,
        ref_logprob_floor=ref_logprob_floor,
    )
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    if inplace and needs_grad:
        check_inplace(logits)
        check_apart(logits, ref_logits)
    if impl_name == "reference":
        leaf = logits.detach().clone().requires_grad_() if inplace and needs_grad else logits
        known = by_reference(terms, targets, tokens.live)
        known |= {"softcap": terms.which.softcap, "denominator": denominator, "vocab_size": V}
        out = reference.distill_loss(leaf, ref_logits, **known)
        return out if leaf is logits else out._replace(loss=overwriting(logits, out.loss, leaf))
    fields = terms.mask.new_zeros(len(FIELDS), tokens.live.numel())

    def score(rows: Tensor | slice, stats: PairStats) -> Grads:
        fields[:, rows], grads = terms.at(rows).score(stats)
        return grads

    def compute() -> tuple[Tensor, tuple[Tensor | None]]:
        """Fill the fields; return the loss and, if it is wanted, its gradient."""
        whole = as_rows(logits.detach())
        grad = None
        if needs_grad:
            grad = whole if inplace else torch.empty(whole.shape, dtype=whole.dtype, device=whole.device)
        ref = rows_like(ref_logits.detach(), whole)
        pair = Pair(
            whole[..., :V],
            ref[..., :V],
            tokens.target.where(tokens.live, IGNORE),
            terms.temperature,
            terms.ref_temperature,
            terms.which,
        )
        pair_ops(impl_name).pair_loss(pair, score, None if grad is None else grad[..., :V], compact=False)
        if grad is not None and whole.shape[-1] > V:
            grad[..., V:] = 0.0
        return fields[0].sum() * terms.scale, (None if grad is None else grad.view(logits.shape),)

    if needs_grad:
        loss: Tensor = Terminal.apply(compute, impl_name, False, logits)
    else:
        with torch.autocast(logits.device.type, enabled=False):
            loss = compute()[0]
    return result(loss, fields, tokens.live, targets)
