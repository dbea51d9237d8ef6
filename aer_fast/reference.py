"""The specification: every public operation in plain PyTorch, a few lines each.

These functions define what the fast implementations must compute, and are the oracle of the tests. They run
on any device and differentiate through autograd. They follow the dtype of the logits: float64 stays float64,
anything narrower than float32 becomes float32. They hold several tensors of the size of the logits and make
no attempt at speed. Arguments are taken as valid: the public functions check them.

Sizes: N tokens, V vocabulary entries; [...] is the shape of ``target``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

IGNORE = -100  # target of a token that is masked whatever the mask says


class TokenStats(NamedTuple):
    """What `token_stats` and `linear_token_stats` return. Float32, or float64 for float64 inputs.

    Attributes:
        logprob: [...], log-probability of the target; 0 where the target is -100.
        entropy: [...], entropy of the policy over the whole vocabulary, in nats; 0 where the target is -100.
    """

    logprob: Tensor
    entropy: Tensor


class PPOLoss(NamedTuple):
    """What `ppo_loss`, `linear_ppo_loss` and `linear_token_loss` return: a loss, and what it was made of.

    Float32, or float64 for float64 inputs. Only the loss carries gradients; the rest is detached.

    Attributes:
        loss: 0-d, to call backward on.
        logprob: [...], log-probability of the target; 0 where masked.
        entropy: [...], entropy of the policy over the whole vocabulary, in nats; 0 where masked.
        metrics: dict of 0-d tensors, see `reference.ppo_metrics`.
    """

    loss: Tensor
    logprob: Tensor
    entropy: Tensor
    metrics: dict[str, Tensor]


class DistillLoss(NamedTuple):
    """What `distill_loss` and `linear_distill_loss` return: a loss, and what it was made of.

    Float32, or float64 for float64 inputs. Only the loss carries gradients; the rest is detached.

    Attributes:
        loss: 0-d, to call backward on.
        divergence: [...], divergence of the student from the teacher, in nats; 0 where masked.
        entropy: [...], entropy of the student, in nats; 0 where masked.
        logprob: [...], the student's log-probability of the target; 0 where masked, -inf for a target that
            only one of the vocabularies has, None without target.
        ref_logprob: [...], the teacher's, likewise.
        metrics: dict of 0-d tensors, see `reference.distill_metrics`.
    """

    loss: Tensor
    divergence: Tensor
    entropy: Tensor
    logprob: Tensor | None
    ref_logprob: Tensor | None
    metrics: dict[str, Tensor]


class PPOTerms(NamedTuple):
    """What `ppo_token_loss` needs beside a token's statistics: constants, each [N] or 0-d, and settings.

    Attributes:
        old_logprob: log-probability under the policy that is clipped against; None for on-policy.
        advantage: the advantage, A.
        entropy_coef: weight of the entropy bonus.
        importance_weight: weight of the surrogate.
        ref_logprob: log-probability under the reference policy; None for no KL.
        clip: (ε_low, ε_high).
        dual_clip: above 1; None for no dual clip.
        kl_coef: weight of the KL estimate.
    """

    old_logprob: Tensor | None
    advantage: Tensor
    entropy_coef: Tensor
    importance_weight: Tensor
    ref_logprob: Tensor | None
    clip: tuple[float, float]
    dual_clip: float | None
    kl_coef: float


def token_stats(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
) -> TokenStats:
    """Log-probability of the target and entropy of the policy; both 0 where the target is -100.

        logp = log_softmax(softcap · tanh(logits / softcap) / temperature)
        logprob = logp[target],   entropy = -Σᵥ exp(logpᵥ) logpᵥ

    Arguments and result are as in `aer_fast.token_stats`.
    """
    live = target != IGNORE
    logp = log_softmax(logits, live, temperature, softcap)
    logprob = logp.gather(-1, target.where(live, 0).unsqueeze(-1)).squeeze(-1)
    entropy = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)  # 0 log 0 = 0
    return TokenStats(logprob.where(live, 0.0), entropy.where(live, 0.0))


def log_softmax(logits: Tensor, live: Tensor, temperature: Tensor | float, softcap: float | None) -> Tensor:
    """log softmax(softcap · tanh(logits / softcap) / temperature), [..., V]; uniform where not ``live``."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits.masked_fill(~live.unsqueeze(-1), 0.0)
    # a banned entry contributes 0 and receives 0, also where it is the target
    logits = logits.masked_fill(logits == -torch.inf, -torch.inf)
    if softcap is not None:
        logits = torch.where(logits.isinf(), logits, softcap * torch.tanh(logits / softcap))
    if isinstance(temperature, Tensor):
        temperature = temperature.to(logits.dtype).where(live, 1.0).unsqueeze(-1)
    largest = logits.detach().amax(-1, keepdim=True)  # first: the quotient alone may overflow
    return ((logits - largest) / temperature).log_softmax(-1)


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
) -> PPOLoss:
    """loss = Σ mask L / denominator, with L of `ppo_token_loss`.

    Arguments and result are as in `aer_fast.ppo_loss`.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    mask = 1.0 if mask is None else mask
    live = (target != IGNORE) & (mask != 0)

    def constant(value: Tensor | float) -> Tensor:
        """A per-token constant [...] in the working dtype, 0 where masked."""
        if not isinstance(value, Tensor):
            value = torch.tensor(value, dtype=dtype)  # never by way of float32
        value = value.detach().to(target.device, dtype)
        return value.expand(target.shape).where(live, 0.0)

    weight = constant(mask)
    terms = PPOTerms(
        old_logprob=None if old_logprob is None else constant(old_logprob),
        advantage=constant(advantage),
        entropy_coef=constant(entropy_coef),
        importance_weight=constant(1.0 if importance_weight is None else importance_weight),
        ref_logprob=constant(ref_logprob) if ref_logprob is not None and kl_coef > 0 else None,
        clip=clip,
        dual_clip=dual_clip,
        kl_coef=kl_coef,
    )
    target = target.where(live, IGNORE)
    logprob, entropy = token_stats(logits, target, temperature=temperature, softcap=softcap)
    total = weight.sum() if denominator is None else denominator
    total = total.detach() if isinstance(total, Tensor) else total
    loss = (weight * ppo_token_loss(logprob, entropy, terms)).sum()
    # 0 when there is nothing to average
    loss = loss / (loss.new_ones(()) * total).where(live.any(), 1.0)

    logprob, entropy = logprob.detach(), entropy.detach()
    top1_prob = log_softmax(logits.detach(), live, temperature, softcap).amax(-1).exp()
    fields = ppo_fields(logprob, entropy, top1_prob, weight, terms)
    rows = torch.stack([x.flatten() for x in fields.values()])
    return PPOLoss(loss, logprob, entropy, ppo_metrics(rows, list(fields)))


def linear_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, live: Tensor) -> Tensor:
    """hidden · weightᵀ + bias, [..., V], in float32 at least, whatever the dtype of the factors.

    Rows where ``live`` [...] is false are not read: their logits come from zeros.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    hidden = hidden.masked_fill(~live.unsqueeze(-1), 0.0)  # their NaN would reach the weight's gradient
    logits = hidden.to(dtype) @ weight.to(dtype).T
    return logits if bias is None else logits + bias.to(dtype)


def linear_token_stats(
    hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = None, **options: Any
) -> TokenStats:
    """`token_stats` of `linear_logits`. ``options`` are those of `token_stats`."""
    return token_stats(linear_logits(hidden, weight, bias, target != IGNORE), target, **options)


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    old_logprob: Tensor | float | None,
    advantage: Tensor | float,
    mask: Tensor | float | None = None,
    *,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    **options: Any,
) -> PPOLoss:
    """`ppo_loss` of `linear_logits`. ``options`` are those of `ppo_loss`.

    With ref_hidden and ref_weight, of the reference policy, kl_coef weighs the exact KL(π‖π_ref) of the whole
    vocabulary. ref_logprob then only adds the metric ``ref_kl_k3``.
    """
    live = (target != IGNORE) & ((1.0 if mask is None else mask) != 0)
    logits = linear_logits(hidden, weight, bias, live)
    if ref_hidden is None or ref_weight is None:
        return ppo_loss(logits, target, old_logprob, advantage, mask, **options)
    kl_coef, ref_logprob = options.pop("kl_coef", 0.0), options.pop("ref_logprob", None)
    out = ppo_loss(logits, target, old_logprob, advantage, mask, **options)
    V = logits.shape[-1]
    ref_bias = None if ref_bias is None else ref_bias[:V]
    shared = {k: x for k, x in options.items() if k in ("denominator", "temperature", "softcap")}
    kl = distill_loss(
        logits,
        linear_logits(ref_hidden, ref_weight[:V], ref_bias, live),
        target,
        mask,
        coef=kl_coef,
        ref_softcap=shared.get("softcap"),
        **shared,
    )
    metrics = out.metrics | {"ref_kl": kl.metrics["divergence"]}
    if kl_coef > 0:
        metrics["active_fraction"] = (metrics["tokens"] > 0).to(kl.divergence.dtype)
    if ref_logprob is not None:
        metrics["ref_kl_k3"] = k3(ref_logprob, out.logprob, live)
    return out._replace(loss=out.loss + kl.loss, metrics=metrics)


def k3(ref_logprob: Tensor | float, logprob: Tensor, live: Tensor) -> Tensor:
    """Schulman's estimate of KL(π‖π_ref): mean exp(d) - 1 - d of live tokens, d = ref_logprob - logprob."""
    d = (ref_logprob - logprob).where(live, 0.0)
    return (torch.expm1(d) - d).sum() / live.sum().clamp(min=1)


def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    objective: Callable[..., Tensor],
    *token_tensors: Tensor,
    mask: Tensor | None = None,
    denominator: Tensor | float | None = None,
    bias: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
) -> PPOLoss:
    """loss = Σ mask · objective(logprob, entropy, *token_tensors) / denominator, over the unmasked tokens.

    Arguments and result are as in `aer_fast.linear_token_loss`.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    weights = (torch.ones_like(target, dtype=dtype) if mask is None else mask.to(dtype)).expand(target.shape)
    live = (target != IGNORE) & (weights != 0)
    logits = linear_logits(hidden, weight, bias, live)
    logprob, entropy = token_stats(
        logits, target.where(live, IGNORE), temperature=temperature, softcap=softcap
    )
    constants = [x.detach().expand(target.shape)[live] for x in token_tensors]
    loss = logits[..., :0].sum()  # 0, and in the graph whatever the objective makes of it
    active = live[live]
    if live.any():
        inputs = (weights[live], logprob[live], entropy[live], constants)
        _, grad_logprob, grad_entropy = objective_grads(objective, *inputs)
        active = (grad_logprob != 0) | (grad_entropy != 0)
        token_loss = weights[live] * objective(logprob[live], entropy[live], *constants)
        total = weights[live].sum() if denominator is None else denominator
        loss = loss + token_loss.sum() / (token_loss.new_ones(()) * total)
    metrics = objective_metrics(live, entropy.detach(), active)
    return PPOLoss(loss, logprob.detach(), entropy.detach(), metrics)


def distill_loss(
    logits: Tensor,
    ref_logits: Tensor,
    target: Tensor | None = None,
    mask: Tensor | float | None = None,
    *,
    divergence: str = "reverse_kl",
    jsd_beta: float = 0.5,
    coef: Tensor | float = 1.0,
    entropy_coef: Tensor | float = 0.0,
    temperature: Tensor | float = 1.0,
    ref_temperature: Tensor | float | None = None,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    ref_logprob_floor: float | None = None,
    denominator: Tensor | float | None = None,
    vocab_size: int | None = None,
) -> DistillLoss:
    """loss = Σ mask (coef D - entropy_coef H) / denominator, with D of `divergence_of`.

    It computes in float64, because float32 loses what nearly equal policies differ by. Arguments and result
    are as in `aer_fast.distill_loss`.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    V = min(logits.shape[-1], ref_logits.shape[-1], vocab_size or logits.shape[-1])
    logits, ref_logits = logits[..., :V].double(), ref_logits[..., :V].detach().double()
    given = target is not None
    target = (
        torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device) if target is None else target
    )
    weight = (
        torch.as_tensor(1.0 if mask is None else mask, device=target.device).double().expand(target.shape)
    )
    live = (target != IGNORE) & (weight != 0)
    weight, coef, entropy_coef = (
        torch.as_tensor(x, device=target.device).detach().double().expand(target.shape).where(live, 0.0)
        for x in (weight, coef, entropy_coef)
    )

    logp = log_softmax(logits, live, temperature, softcap)
    ref_temperature = temperature if ref_temperature is None else ref_temperature
    logq = log_softmax(ref_logits, live, ref_temperature, ref_softcap)
    D = divergence_of(logp, logq, divergence, jsd_beta, ref_logprob_floor).where(live, 0.0)
    H = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1).where(live, 0.0)
    # a coefficient of 0 is no divergence, also where that is infinite
    token_loss = weight * ((coef * D).where(coef != 0, 0.0) - entropy_coef * H)
    total = weight.sum() if denominator is None else denominator
    total = total.detach() if isinstance(total, Tensor) else total
    loss = token_loss.sum() / (token_loss.new_ones(()) * total).where(live.any(), 1.0)

    found = {"divergence": D, "entropy": H}
    for name, x in (("logprob", logp), ("ref_logprob", logq)) if given else ():
        there = live & (target < V)  # the rest of either vocabulary is banned
        taken = x.gather(-1, target.where(there, 0).unsqueeze(-1)).squeeze(-1)
        found[name] = taken.masked_fill(~there, -torch.inf).where(live, 0.0)
    active = live & (weight * coef != 0) | (weight * entropy_coef != 0)
    stats = {name: x.detach().to(dtype) for name, x in found.items()}
    metrics = distill_metrics(live, stats["divergence"], stats["entropy"], active)
    return DistillLoss(
        loss.to(dtype),
        stats["divergence"],
        stats["entropy"],
        stats.get("logprob"),
        stats.get("ref_logprob"),
        metrics,
    )


def divergence_of(
    logp: Tensor, logq: Tensor, divergence: str, jsd_beta: float, floor: float | None
) -> Tensor:
    """Divergence of the student p from the teacher q, [...], from their log-probabilities [..., V].

        reverse_kl   Σ p (log p - max(log q, floor))
        forward_kl   Σ q (log q - log p)
        jsd          β KL(q‖m) + (1 - β) KL(p‖m),   m = β q + (1 - β) p

    An entry whose first factor is 0 adds 0. jsd is the generalised one of Agarwal et al. (2306.13649): β = 0
    gives forward_kl and β = 1 gives reverse_kl.
    """
    if divergence == "jsd" and jsd_beta in (0, 1):
        divergence = "reverse_kl" if jsd_beta == 1 else "forward_kl"
    if divergence == "reverse_kl":
        return _kl(logp, logq if floor is None else logq.clamp(min=floor))
    if divergence == "forward_kl":
        return _kl(logq, logp)
    banned = (logp == -torch.inf) & (logq == -torch.inf)  # in both: no gradient could pass logaddexp
    logm = torch.logaddexp(
        logq.masked_fill(banned, 0.0) + math.log(jsd_beta),
        logp.masked_fill(banned, 0.0) + math.log(1 - jsd_beta),
    )
    return jsd_beta * _kl(logq, logm) + (1 - jsd_beta) * _kl(logp, logm)


def _kl(loga: Tensor, logb: Tensor) -> Tensor:
    """Σ a (log a - log b), [...]; infinite where b bans what a does not, however small a is."""
    banned = loga == -torch.inf
    terms = loga.exp() * (loga.masked_fill(banned, 0.0) - logb.masked_fill(banned, 0.0))
    return terms.masked_fill((logb == -torch.inf) & ~banned & (loga.exp() == 0), torch.inf).sum(-1)


def linear_distill_loss(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    target: Tensor | None = None,
    mask: Tensor | float | None = None,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    **options: Any,
) -> DistillLoss:
    """`distill_loss` of the `linear_logits` of both. ``options`` are those of `distill_loss`."""
    live = torch.as_tensor(1.0 if mask is None else mask, device=hidden.device).expand(hidden.shape[:-1]) != 0
    live = live if target is None else live & (target != IGNORE)
    logits = linear_logits(hidden, weight, bias, live)
    ref_logits = linear_logits(ref_hidden, ref_weight, ref_bias, live)
    return distill_loss(logits, ref_logits, target, mask, **options)


def ppo_token_loss(logprob: Tensor, entropy: Tensor, terms: PPOTerms) -> Tensor:
    """The loss L of each token, from its statistics, with A the advantage and H the entropy.

        r = exp(logprob - old_logprob)
        S = min(r A, clip(r, 1 - clip[0], 1 + clip[1]) A)
        S ← max(S, dual_clip A)    where A < 0, if dual_clip is given
        d = ref_logprob - logprob
        L = -importance_weight S - entropy_coef H + kl_coef (exp(d) - d - 1)

    Where S is constant, because r is clipped or A = 0, its gradient is 0, even if r overflows. The clipped
    surrogate is that of Schulman et al. 2017 (1707.06347), the dual clip that of Ye et al. 2020 (1912.09729),
    the KL estimate Schulman's k3.
    """
    log_ratio = ppo_log_ratio(logprob, terms)
    bound, idle = ppo_bound(log_ratio.detach(), terms)
    ratio = log_ratio.masked_fill(idle, 0.0).exp()  # what does not matter is cut out: it may have overflowed
    surrogate = torch.where(bound.isnan(), ratio, bound) * terms.advantage

    loss = -terms.importance_weight * surrogate - terms.entropy_coef * entropy
    if terms.ref_logprob is not None:
        ref_log_ratio = terms.ref_logprob - logprob
        loss = loss + terms.kl_coef * (torch.expm1(ref_log_ratio) - ref_log_ratio)
    return loss


def ppo_token_grad(logprob: Tensor, terms: PPOTerms) -> tuple[Tensor, Tensor]:
    """The derivatives of `ppo_token_loss` by logprob and by entropy, written out.

        ∂L/∂logprob = -importance_weight A r [S is not clipped] - kl_coef (exp(d) - 1)
        ∂L/∂entropy = -entropy_coef

    Here d = ref_logprob - logprob, and [...] is 1 where it holds, else 0.
    """
    log_ratio = ppo_log_ratio(logprob, terms)
    bound, idle = ppo_bound(log_ratio, terms)
    slope = -terms.importance_weight * terms.advantage * log_ratio.masked_fill(idle, 0.0).exp()
    slope = slope.where(bound.isnan(), 0.0)
    if terms.ref_logprob is not None:
        slope = slope - terms.kl_coef * torch.expm1(terms.ref_logprob - logprob)
    return slope, -terms.entropy_coef


def ppo_log_ratio(logprob: Tensor, terms: PPOTerms) -> Tensor:
    """log r; on-policy it is 0, with a gradient."""
    return logprob - (logprob.detach() if terms.old_logprob is None else terms.old_logprob)


def ppo_clipped(log_ratio: Tensor, terms: PPOTerms) -> tuple[Tensor, Tensor]:
    """Where r is clipped at the lower bound, and where at the upper: there S is its clipped branch."""
    ratio = log_ratio.exp()
    low, high = 1 - terms.clip[0], 1 + terms.clip[1]
    return (terms.advantage < 0) & (ratio < low), (terms.advantage > 0) & (ratio > high)


def ppo_bound(log_ratio: Tensor, terms: PPOTerms) -> tuple[Tensor, Tensor]:
    """(what takes the place of r, NaN where nothing does; where the value of r does not matter)."""
    low, high = ppo_clipped(log_ratio, terms)
    bound = torch.full_like(log_ratio, torch.nan)
    bound = bound.masked_fill(low, 1 - terms.clip[0]).masked_fill(high, 1 + terms.clip[1])
    if terms.dual_clip is not None:
        dual = (terms.advantage < 0) & (log_ratio.exp() > terms.dual_clip)
        bound = bound.masked_fill(dual, terms.dual_clip)
    overflowed = (terms.advantage == 0) & log_ratio.exp().isposinf()
    return bound, ~bound.isnan() | overflowed


def ppo_fields(
    logprob: Tensor, entropy: Tensor, top1_prob: Tensor, weight: Tensor, terms: PPOTerms
) -> dict[str, Tensor]:
    """What each token contributes to the loss and to the metrics; 0 where masked."""
    log_ratio = ppo_log_ratio(logprob, terms)
    clipped_low, clipped_high = ppo_clipped(log_ratio, terms)
    grad_logprob, grad_entropy = ppo_token_grad(logprob, terms)
    token = weight != 0
    fields = {
        "loss": weight * ppo_token_loss(logprob, entropy, terms),
        "logprob": logprob,
        "entropy": entropy,
        "token": token,
        "clip_fraction_low": clipped_low,
        "clip_fraction_high": clipped_high,
        "approx_kl": torch.expm1(log_ratio) - log_ratio,
        "ratio": log_ratio.exp(),
        "top1_prob": top1_prob,
        "active_fraction": (weight * grad_logprob != 0) | (weight * grad_entropy != 0),
    }
    return {name: x.to(logprob.dtype).where(token, 0.0) for name, x in fields.items()}


def objective_grads(
    objective: Callable[..., Tensor],
    weight: Tensor,
    logprob: Tensor,
    entropy: Tensor,
    constants: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return weight · objective [n], and the gradients of its sum by logprob and by entropy, all detached."""
    # Taken here and now, whatever mode surrounds it. Nothing that it saves is for the hooks of the graph
    # around it: activation checkpointing would compute everything there again to have it back.
    own_graph = saved_tensors_hooks(lambda x: x, lambda x: x)
    with torch.inference_mode(False), torch.enable_grad(), own_graph:
        logprob, entropy, weight = (x.detach().clone() for x in (logprob, entropy, weight))
        logprob.requires_grad_()
        entropy.requires_grad_()
        loss = objective(logprob, entropy, *(x.clone() if x.is_inference() else x for x in constants))
        if not isinstance(loss, Tensor) or loss.shape != logprob.shape or not loss.is_floating_point():
            got = f"{tuple(loss.shape)} {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
            n = tuple(logprob.shape)
            raise ValueError(f"objective must return a floating-point loss per token, {n}, got {got}")
        loss = weight * loss
        grads: list[Tensor | None] = [None, None]
        if loss.requires_grad:
            grads = list(torch.autograd.grad(loss.sum(), (logprob, entropy), allow_unused=True))
    grad_logprob, grad_entropy = (torch.zeros_like(weight) if g is None else g for g in grads)
    return loss.detach().to(weight.dtype), grad_logprob, grad_entropy


def objective_metrics(live: Tensor, entropy: Tensor, active: Tensor) -> dict[str, Tensor]:
    """The metrics of any objective: ``tokens``, ``entropy`` and ``active_fraction``, as in `ppo_metrics`."""
    tokens = live.sum().to(entropy.dtype)
    count = tokens.clamp(min=1.0)
    return {"tokens": tokens, "entropy": entropy.sum() / count, "active_fraction": active.sum() / count}


def distill_metrics(live: Tensor, divergence: Tensor, entropy: Tensor, active: Tensor) -> dict[str, Tensor]:
    """The metrics of the distillation losses: 0-d tensors, over the tokens with mask > 0.

        tokens            number of these tokens
        divergence        mean divergence from the teacher
        entropy           mean entropy of the student
        active_fraction   share of these tokens that have a gradient

    Without a token all are 0.
    """
    tokens = live.sum().to(entropy.dtype)
    count = tokens.clamp(min=1.0)
    return {
        "tokens": tokens,
        "divergence": divergence.sum() / count,
        "entropy": entropy.sum() / count,
        "active_fraction": active.sum() / count,
    }


def ppo_metrics(fields: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """The metrics of the policy losses: 0-d tensors, over the tokens with mask > 0, each with weight 1.

        tokens               number of these tokens
        entropy              mean entropy
        clip_fraction_low    share with A < 0 and r < 1 - clip[0]
        clip_fraction_high   share with A > 0 and r > 1 + clip[1]
        clip_fraction        sum of these two
        approx_kl            mean of r - 1 - log r
        ratio_max            largest r
        top1_prob            mean of max p, of each token's distribution
        active_fraction      share that have a gradient

    Without a token all are 0. They are made of `ppo_fields`, given as rows [len(names), N]; the host does not
    wait for the device.
    """
    sums = fields.sum(-1)
    tokens = sums[names.index("token")]
    mean = dict(zip(names, (sums / tokens.clamp(min=1.0)).unbind()))  # few kernels, not a few for each
    return {
        "tokens": tokens,
        "entropy": mean["entropy"],
        "clip_fraction_low": mean["clip_fraction_low"],
        "clip_fraction_high": mean["clip_fraction_high"],
        "clip_fraction": mean["clip_fraction_low"] + mean["clip_fraction_high"],
        "approx_kl": mean["approx_kl"],
        "ratio_max": fields[names.index("ratio")].amax() if fields.shape[-1] else tokens,
        "top1_prob": mean["top1_prob"],
        "active_fraction": mean["active_fraction"],
    }
