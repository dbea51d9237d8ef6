"""The kernels as row operations. Imported only when impl="triton" is chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from aer_fast._policy_loss import PolicyLoss
from aer_fast._rows import sums
from aer_fast.kernels import ppo_loss, token_stats


def row_sums(logits: Tensor, target: Tensor, temperature: Tensor, softcap: float | None) -> Tensor:
    if logits.shape[-1] == 0:
        return sums.of_nothing(target, temperature)
    return token_stats.row_sums_fwd(logits, target, temperature, softcap or 0.0)


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
    if logits.shape[-1] > 0:
        token_stats.token_stats_bwd(
            logits, target, temperature, softcap or 0.0, state, grad_logprob, grad_entropy, grad, picked
        )


def ppo_loss_fwd(
    logits: Tensor,
    target: Tensor,
    temperature: Tensor,
    softcap: float | None,
    loss: PolicyLoss,
    grad: Tensor | None,
) -> Tensor:
    fields = ppo_loss.ppo_loss_fwd(
        logits,
        target,
        temperature,
        softcap or 0.0,
        loss.constants.T.contiguous(),
        loss.scale,
        grad,
        **loss.settings._asdict(),
    )
    if grad is not None:
        torch.autograd.graph.increment_version(grad)  # autograd does not see the kernel's write
    return fields


def ppo_loss_compact(
    logits: Tensor,
    target: Tensor,
    temperature: Tensor,
    softcap: float | None,
    loss: PolicyLoss,
    grad: Tensor,
) -> tuple[Tensor, Tensor]:
    """Two kernels, and between them the host learns which rows have a gradient."""
    logprob, entropy, state = token_stats_fwd(logits, target, temperature, softcap)
    fields = loss.fields(logprob, entropy, state[1])
    rows = fields[-1].nonzero()[:, 0]
    token_stats_bwd(logits, target, temperature, softcap, state, *loss.grads(logprob), grad, rows)
    return fields, rows


def scale_grad(grad: Tensor, factor: Tensor) -> None:
    ppo_loss.scale_grad(grad, factor)
    torch.autograd.graph.increment_version(grad)
