"""Who compares a student with a teacher, from hidden states and heads of both: ours, plain PyTorch, peers.

Each is a loss of hidden, weight and inputs: the mean divergence of the tokens that count. There is no bonus:
no peer's entropy has a gradient.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from bench.divergences import BETA, divergence
from bench.operations import Inputs, mean_over_tokens
from bench.packages import enter, stand_in

Loss = Callable[..., Tensor]
IGNORE = -100


def ours(function: Callable[..., Any], impl: str, kind: str) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
        settings = {"mask": inputs.mask, "divergence": kind, "jsd_beta": BETA["jsd"], "impl": impl}
        result: Tensor = function(hidden, weight, *inputs.teacher, **settings).loss
        return result

    return loss


def eager_divergence(kind: str) -> Callable[..., Tensor]:
    def per_token(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
        logp = (hidden @ weight.T).log_softmax(-1)
        logq = (ref_hidden @ ref_weight.T).log_softmax(-1)
        return divergence(kind, logp, logq)

    return per_token


def averaged(per_token: Callable[..., Tensor]) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
        return mean_over_tokens(per_token(hidden, weight, *inputs.teacher), inputs.mask)

    return loss


def trl(kind: str) -> Loss:
    """As its trainer does, of the rows that count."""
    enter("trl")
    stand_in("trl.trainer.utils", maybe_gather_lm_head_ctx=lambda *parameters: nullcontext())
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
        ref_hidden, ref_weight = inputs.teacher
        if inputs.mask is not None:
            hidden, ref_hidden = hidden[inputs.mask], ref_hidden[inputs.mask]
        student, teacher = (hidden, weight, None), (ref_hidden, ref_weight, None)
        per_token, _ = ChunkedDivergenceFunction.apply(*student, *teacher, BETA[kind])
        average: Tensor = per_token.mean()
        return average

    return loss


def liger(kind: str) -> Loss:
    """fused_linear_jsd: its Triton kernels."""
    from liger_kernel.ops import LigerFusedLinearJSDFunction

    def loss(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
        labels = None if inputs.mask is None else labels_of(inputs)
        result: Tensor = LigerFusedLinearJSDFunction.apply(
            hidden, weight, *inputs.teacher, labels, BETA[kind], IGNORE, 1.0
        )
        return result

    return loss


def liger_torch(kind: str) -> Loss:
    """LigerFusedLinearJSDLoss, without the cross-entropy that it can add."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    torch.compiler.reset()  # it compiles its chunks
    function = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA[kind])

    def loss(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
        result: Tensor = function(hidden, weight, *inputs.teacher, labels_of(inputs))
        return result

    return loss


def labels_of(inputs: Inputs) -> Tensor:
    return inputs.target if inputs.mask is None else inputs.target.masked_fill(~inputs.mask, IGNORE)
