"""Public operation: the clipped PPO loss with an entropy bonus, from logits."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aer_fast import _compiled, _rows, reference
from aer_fast._terminal import Terminal
from aer_fast._validation import (
    Impl,
    check_logits,
    check_number,
    check_softcap,
    check_values,
    denominator_scale,
    is_number,
    per_token,
    poison,
    readable,
    resolve_impl,
    row_ops,
    savable,
)
from aer_fast.reference import FIELDS, IGNORE, PPOLoss, PPOTerms


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
        dual_clip: > 1, or None.
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

    Returns:
        PPOLoss(loss, logprob, entropy, metrics): the 0-d loss; logprob and entropy [...], detached, 0 where
        masked; metrics, a dict of 0-d tensors described in `reference.ppo_metrics`. All float32 (float64
        for float64 logits). Nothing waits for the device.

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
    check_logits(logits, target)
    softcap = check_softcap(softcap)
    if not isinstance(inplace, bool):
        raise ValueError(f"inplace must be True or False, got {inplace!r}")
    impl_name = resolve_impl(impl, logits)
    settings = check_settings(clip, dual_clip, ref_logprob, kl_coef)
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
        settings,
        V=logits.shape[-1],
        dtype=torch.promote_types(logits.dtype, torch.float32),
        impl=impl_name,
    )
    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    if inplace and needs_grad:
        _check_inplace(logits)
    if impl_name == "reference":
        return _reference(logits, target, tokens, denominator, softcap, inplace=inplace and needs_grad)
    if torch.compiler.is_compiling():
        loss, fields = _compiled.ppo_loss(
            logits,
            tokens.target,
            tokens.weight,
            tokens.temperature,
            tokens.terms,
            tokens.scale,
            softcap,
            impl_name,
            needs_grad=needs_grad,
            inplace=inplace,
        )
        return _result(loss, fields, target)

    fields = tokens.weight

    def compute() -> tuple[Tensor, tuple[Tensor | None]]:
        """Fill the fields; return the loss and, if it is wanted, its gradient."""
        nonlocal fields
        rows = _rows.as_rows(logits.detach())
        grad = None
        if needs_grad:
            grad = rows if inplace else torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        fields = row_ops(impl_name).ppo_loss_fwd(
            rows,
            tokens.target,
            tokens.weight,
            tokens.temperature,
            tokens.terms,
            tokens.scale,
            softcap,
            grad,
        )
        return fields[0].sum() * tokens.scale, (None if grad is None else grad.view(logits.shape),)

    if needs_grad:
        loss = Terminal.apply(compute, impl_name, False, logits)
    else:
        with torch.autocast(logits.device.type, enabled=False):
            loss = compute()[0]
    return _result(loss, fields, target)


def _result(loss: Tensor, fields: Tensor, target: Tensor) -> PPOLoss:
    """fields [FIELDS, N] as the caller gets them."""
    logprob, entropy = (fields[FIELDS.index(name)].view(target.shape) for name in ("logprob", "entropy"))
    return PPOLoss(loss, logprob, entropy, reference.ppo_metrics(fields))


class PPOTokens(NamedTuple):
    """The checked arguments of the loss, per token [N]."""

    target: Tensor
    weight: Tensor  # the mask
    temperature: Tensor
    live: Tensor  # bool: unmasked
    terms: PPOTerms
    scale: Tensor  # [], 1 / denominator


def ppo_tokens(
    target: Tensor,
    old_logprob: Tensor | float | None,
    advantage: Tensor | float,
    mask: Tensor | float | None,
    entropy_coef: Tensor | float,
    ref_logprob: Tensor | float | None,
    importance_weight: Tensor | float | None,
    temperature: Tensor | float,
    denominator: Tensor | float | None,
    settings: dict[str, Any],
    *,
    V: int,
    dtype: torch.dtype,
    impl: str,
) -> PPOTokens:
    """Check the arguments per token and flatten them; ``settings`` are those of `check_settings`."""
    if denominator is not None and not isinstance(denominator, Tensor):
        check_number("denominator", denominator)

    def optional(name: str, value: Tensor | float | None) -> Tensor | None:
        return None if value is None else per_token(name, value, target, dtype)

    flat_target = savable(target).reshape(-1)
    weight = per_token("mask", True if mask is None else mask, target, dtype)
    temperatures = per_token("temperature", temperature, target, dtype)
    importance = 1.0 if importance_weight is None else importance_weight
    reference_logprob = optional("ref_logprob", ref_logprob)
    terms = PPOTerms(
        old_logprob=optional("old_logprob", old_logprob),
        advantage=per_token("advantage", advantage, target, dtype),
        entropy_coef=per_token("entropy_coef", entropy_coef, target, dtype),
        importance_weight=per_token("importance_weight", importance, target, dtype),
        ref_logprob=reference_logprob if settings["kl_coef"] > 0 else None,
        **settings,
    )
    live = (flat_target != IGNORE) & (weight != 0)
    check_values(flat_target, temperatures, V, live, weight)
    if impl != "triton" and not readable(target):
        flat_target, temperatures = poison(flat_target, temperatures, V)
        weight = weight.where(weight >= 0, torch.nan)
    scale = denominator_scale(denominator, weight.where(live, 0.0), live)
    return PPOTokens(flat_target, weight, temperatures, live, terms, scale)


def _reference(
    logits: Tensor,  # [..., V]
    target: Tensor,  # [...]
    tokens: PPOTokens,
    denominator: Tensor | float | None,
    softcap: float | None,
    *,
    inplace: bool,
) -> PPOLoss:
    """The specification on checked arguments; its gradient comes from autograd."""
    leaf = logits.detach().clone().requires_grad_() if inplace else logits
    options = reference_options(target, tokens, denominator, softcap)
    result = reference.ppo_loss(leaf, **options)
    if not inplace:
        return result
    (grad,) = torch.autograd.grad(result.loss, leaf)
    value = result.loss.detach()
    loss = Terminal.apply(lambda: (value, (logits.detach().copy_(grad),)), "reference", False, logits)
    return result._replace(loss=loss)


def reference_options(
    target: Tensor, tokens: PPOTokens, denominator: Tensor | float | None, softcap: float | None
) -> dict[str, Any]:
    """Checked arguments as the specification takes them, in the shape of target."""
    shaped = {
        name: x.view(target.shape) if isinstance(x, Tensor) else x
        for name, x in tokens.terms._asdict().items()
    }
    return shaped | {
        "target": tokens.target.view(target.shape),
        "mask": tokens.weight.view(target.shape),
        "temperature": tokens.temperature.view(target.shape),
        "denominator": denominator,
        "softcap": softcap,
    }


def check_settings(
    clip: tuple[float, float],
    dual_clip: float | None,
    ref_logprob: Tensor | float | None,
    kl_coef: float,
) -> dict[str, Any]:
    """The settings of `PPOTerms`, checked."""
    valid = isinstance(clip, (tuple, list)) and len(clip) == 2
    if not valid or not all(c == math.inf or (is_number(c) and c >= 0) for c in clip):
        raise ValueError(f"clip must be two numbers (low, high), each >= 0, got {clip!r}")
    if dual_clip is not None:
        check_number("dual_clip", dual_clip)
        if dual_clip <= 1:
            raise ValueError(f"dual_clip must be greater than 1 or None, got {dual_clip}")
    check_number("kl_coef", kl_coef)
    if kl_coef < 0:
        raise ValueError(f"kl_coef must be >= 0, got {kl_coef}")
    if kl_coef > 0 and ref_logprob is None:
        raise ValueError(f"kl_coef={kl_coef} needs ref_logprob, got None")
    return {
        "clip": (float(clip[0]), float(clip[1])),
        "dual_clip": None if dual_clip is None else float(dual_clip),
        "kl_coef": float(kl_coef),
    }


def _check_inplace(logits: Tensor) -> None:
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
    if _rows.as_rows(logits).data_ptr() != logits.data_ptr():
        raise ValueError(
            "inplace=True needs logits whose vocabulary is contiguous and whose rows are two strides"
            f" apart, got strides {logits.stride()} of shape {tuple(logits.shape)}"
        )
