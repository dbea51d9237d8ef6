"""The row operations in torch, a few rows at a time: impl="torch", on any device.

The same mathematics as the Triton kernels, see kernels/primitives.py and `sums`: one pass over the logits for
the sums, another for the gradient. All that is held are a few buffers of a strip. On the CPU masked rows are
not touched at all; elsewhere finding them would wait for the device, so they are computed, and zeros written
over their gradients.

In a strip d counts powers of 2, d = (y - m) / (τ log 2): on a CPU exp2 takes two thirds of the time of exp.

Sizes: N = O · I tokens, V vocabulary entries, n rows that are computed, r rows of a strip.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aer_fast._policy_loss import PolicyLoss
from aer_fast._rows import sums
from aer_fast._rows.strips import (
    LN_2,
    LOG2_E,
    Rows,
    Strip,
    Targets,
    exp2_of,
    factor_of,
    largest,
    relative,
    sum_of,
    zero_masked,
)
from aer_fast._rows.sums import UNREACHABLE
from aer_fast.kernels.layout import IGNORE, SUMS


def row_sums(logits: Tensor, target: Tensor, temperature: Tensor, softcap: float | None) -> Tensor:
    if logits.shape[-1] == 0:
        return sums.of_nothing(target, temperature)
    live = target != IGNORE
    found, _ = _sums(Rows.live(logits, live), target, temperature, softcap)
    return found.where(live, 0.0)


def _sums(rows: Rows, target: Tensor, temperature: Tensor, softcap: float | None) -> tuple[Tensor, bool]:
    """[SUMS, N], 0 in other rows; and whether an entry may be banned."""
    found, bans = temperature.new_zeros(len(SUMS), target.numel()), not rows.on_cpu
    if rows.n:
        at_target = Targets.of(rows, rows.of(target), temperature.dtype, softcap)
        factor, parts = factor_of(rows.of(temperature), LOG2_E), []
        for strip in rows.strips(*rows.buffers(temperature.dtype, 2 if softcap is None else 3)):
            part = _strip_sums(strip, factor, softcap, at_target, bans=bans)
            if not bans and math.isnan(part[-1].sum().item()):  # 0 · -inf: from here on it is looked for
                bans = True
                part = _strip_sums(strip, factor, softcap, at_target, bans=bans)
            parts.append(part)
        m, s, t = (torch.cat(column) for column in zip(*parts))
        t = t * LN_2
        s = s + rounding(factor, rows.of(temperature)) * t
        found[:, rows.chosen] = torch.stack((m[:, 0], s, t, at_target.y))
    return found, bans


def rounding(factor: Tensor | float | None, temperature: Tensor) -> Tensor | float:
    """δ [n] of a factor that was rounded from (1 + δ) factor. Σ exp(d) was made with it for Σ exp(d + δ d).

    That is Σ exp(d) + δ Σ exp(d) d. A confident token's log-probability keeps its digits so.
    """
    if isinstance(factor, float):
        return LOG2_E / torch.tensor(factor, dtype=temperature.dtype).item() - 1
    assert factor is not None
    return (LOG2_E / (temperature.double() * factor[:, 0]) - 1).to(temperature.dtype)


def _strip_sums(
    strip: Strip, factor: Tensor | float | None, softcap: float | None, at_target: Targets, *, bans: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """m [r, 1], s and t / log 2 [r] of a strip; where an entry is banned, t is NaN unless expected."""
    y, d, e = strip.softcapped(softcap), strip.d, strip.e
    m = largest(y, d.dtype) if bans else y.amax(-1, keepdim=True)
    relative(y, m, strip.part(factor), d)
    if bans:
        d.clamp_(min=UNREACHABLE)
    exp2_of(d, e)
    at_target.zero(e, strip.at)  # the target is left out of its own sum
    return m, sum_of(e), sum_of(d.mul_(e))


def token_stats_fwd(
    logits: Tensor, target: Tensor, temperature: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    live = target != IGNORE
    found, _ = _sums(Rows.live(logits, live), target, temperature, softcap)
    logprob, entropy, state = (x.where(live, 0.0) for x in sums.finish(found, temperature))
    return logprob, entropy, state


def token_stats_bwd(
    logits: Tensor,
    target: Tensor,
    temperature: Tensor,
    softcap: float | None,
    state: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor,
    grad: Tensor,
    picked: Tensor | None = None,
) -> None:
    if logits.shape[-1] == 0:
        return
    live = target != IGNORE
    rows = Rows.live(logits, live, picked)
    _grads(rows, target, temperature, softcap, state, grad_logprob, grad_entropy, grad)
    if picked is None:
        zero_masked(grad, live)


def _grads(
    rows: Rows,
    target: Tensor,
    temperature: Tensor,
    softcap: float | None,
    state: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor,
    grad: Tensor,
    *,
    bans: bool = True,
) -> None:
    """Write the gradients of these rows to grad [O, I, V], as `token_stats_bwd`; ``bans``: as of `_sums`."""
    if rows.n == 0:
        return
    state, tau, g, h = (rows.of(x) for x in (state, temperature, grad_logprob, grad_entropy))
    m, inv_s, mean_d, _ = state
    at_target = Targets.of(rows, rows.of(target), tau.dtype, softcap)
    exact = at_target.grads(state, g, h, tau)
    g, h = g / tau, h / tau
    a, b, m = (x.unsqueeze(-1) for x in (inv_s * (h * mean_d - g), -inv_s * h * LN_2, m))
    factor, bonus = factor_of(tau, LOG2_E), not rows.on_cpu or bool((h != 0).any())
    bans = bans or bool((b.abs() > 1).any())  # a huge d times such a b would not be finite where e is 0
    buffers = rows.buffers(tau.dtype, 2 if softcap is None else 3)
    for strip in rows.strips(*buffers):
        y = strip.softcapped(softcap)
        relative(y, m[strip.at], strip.part(factor), strip.d)
        dz = strip.place(grad, softcap)
        if bonus:  # e (a + b d)
            exp2_of(strip.d.clamp_(min=UNREACHABLE) if bans else strip.d, strip.e)
            torch.mul(strip.e, strip.d.mul_(b[strip.at]).add_(a[strip.at]), out=dz)
        else:
            exp2_of(strip.d, strip.d)
            torch.mul(strip.d, a[strip.at], out=dz)
        strip.store(grad, dz, softcap)
    at_target.put(rows, grad, exact)


def ppo_loss_fwd(
    logits: Tensor,
    target: Tensor,
    temperature: Tensor,
    softcap: float | None,
    loss: PolicyLoss,
    grad: Tensor | None,
) -> Tensor:
    return _ppo_loss(logits, target, temperature, softcap, loss, grad, compact=False)


def ppo_loss_compact(
    logits: Tensor,
    target: Tensor,
    temperature: Tensor,
    softcap: float | None,
    loss: PolicyLoss,
    grad: Tensor,
) -> tuple[Tensor, Tensor]:
    fields = _ppo_loss(logits, target, temperature, softcap, loss, grad, compact=True)
    return fields, fields[-1].nonzero()[:, 0]


def _ppo_loss(
    logits: Tensor,
    target: Tensor,
    temperature: Tensor,
    softcap: float | None,
    loss: PolicyLoss,
    grad: Tensor | None,
    compact: bool,
) -> Tensor:
    live = (target != IGNORE) & (loss.of("mask") != 0)
    found, bans = _sums(Rows.live(logits, live), target, temperature, softcap)
    logprob, entropy, state = sums.finish(found, temperature)
    fields = loss.fields(logprob, entropy, state[1]).where(live, 0.0)
    if grad is None:
        return fields
    g, h = loss.grads(logprob)
    if compact:
        rows = Rows(logits, fields[-1].nonzero()[:, 0], packs=True)
        _grads(rows, target, temperature, softcap, state, g, h, grad, bans=bans)
    else:
        live = live & ((g != 0) | (h != 0)) if logits.device.type == "cpu" else live
        _grads(Rows.live(logits, live), target, temperature, softcap, state, g, h, grad, bans=bans)
        zero_masked(grad, live)
    return fields


def scale_grad(grad: Tensor, factor: Tensor) -> None:
    if torch.compiler.is_compiling() or grad.device.type != "cpu" or factor.item() != 1.0:
        grad.mul_(factor)
