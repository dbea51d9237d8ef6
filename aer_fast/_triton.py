"""impl="triton": the kernels behind the three functions of _rows. Imported only when it is chosen."""

import math

import torch
from torch import Tensor

from aer_fast import _rows
from aer_fast.kernels import ppo_loss, token_stats
from aer_fast.reference import PPOTerms

STATE = _rows.STATE[:4]  # the kernel reads the target's logit again


def token_stats_fwd(
    logits: Tensor, target: Tensor, temperature: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    return token_stats.token_stats_fwd(logits, target, temperature, softcap or 0.0)


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
    token_stats.token_stats_bwd(
        logits, target, temperature, softcap or 0.0, state, grad_logprob, grad_entropy, grad, picked
    )


def ppo_loss_fwd(
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    temperature: Tensor,
    terms: PPOTerms,
    scale: Tensor,
    softcap: float | None,
    grad: Tensor | None,
) -> Tensor:
    fields = ppo_loss.ppo_loss_fwd(
        logits,
        target,
        weight,
        temperature,
        terms.old_logprob,
        terms.advantage,
        terms.entropy_coef,
        terms.importance_weight,
        terms.ref_logprob,
        scale,
        softcap=softcap or 0.0,
        ratio_low=1 - terms.clip[0],
        ratio_high=1 + terms.clip[1],
        dual_clip=math.inf if terms.dual_clip is None else terms.dual_clip,
        kl_coef=terms.kl_coef,
        grad=grad,
    )
    if grad is not None:
        torch.autograd.graph.increment_version(grad)  # autograd does not see the kernel's write
    return fields


def scale_grad(grad: Tensor, factor: Tensor) -> None:
    """Multiply grad [O, I, V] by factor [] in place; nothing is read or written where it is 1."""
    ppo_loss.scale_grad(grad, factor)
    torch.autograd.graph.increment_version(grad)
