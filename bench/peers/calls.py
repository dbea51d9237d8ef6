"""How each provider is called: plain PyTorch, ours, and what users would pick instead.

A function here imports a peer and returns what is measured of it:

    statistics   (*factors, target) -> logprob, entropy
    a loss       (*factors, inputs) -> the mean over the tokens that count; of a cross-entropy likewise

where the factors are logits [N, V], or hidden [N, D] and weight [V, D]. Beside a teacher, whose hidden
states and head are among the inputs, it is the mean divergence, without a bonus: no peer's entropy has a
gradient. Some peers need a cluster of other packages to be imported: their parent packages are entered
without running them, and only what is measured is imported.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from aer_fast import plan
from bench.operations import BETA, CLIP, SEQUENCES, Inputs, divergence, mean_over_tokens

Factors = tuple[Tensor, ...]
Stats = Callable[..., tuple[Tensor, Tensor]]
Loss = Callable[..., Tensor]
IGNORE = -100  # a target that does not count


# ---- plain PyTorch


def eager_stats(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logp = logits.log_softmax(-1)
    logprob = logp.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return logprob, -(logp.exp() * logp).sum(-1)


def eager_linear_stats(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return eager_stats(hidden @ weight.T, target)


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


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch.compiler.reset()  # or the eighth shape would run uncompiled
    return torch.compile(function, dynamic=False)


def torch_cross_entropy() -> Loss:
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy")
    function = torch.nn.functional.linear_cross_entropy
    return lambda hidden, weight, inputs: function(hidden, weight, inputs.target)


def products() -> Callable[..., Factors]:
    """The floor: the matrix products, a chunk of rows at a time, and nothing else."""

    def run(hidden: Tensor, weight: Tensor, *teacher: Tensor, backward: bool) -> Factors:
        (N, D), V = hidden.shape, len(weight)
        ref_D = teacher[0].shape[1] if teacher else None
        chunk = plan(N, V, D, dtype=hidden.dtype, device=hidden.device.type, ref_D=ref_D).chunk
        z = hidden.new_empty(chunk, V)
        grad_hidden, grad_weight = (torch.empty_like(x) if backward else None for x in (hidden, weight))
        for start in range(0, N, chunk):
            rows = hidden[start : start + chunk]
            if teacher:
                ref_hidden, ref_weight = teacher
                torch.mm(ref_hidden[start : start + chunk], ref_weight.T, out=z[: len(rows)])
            dz = torch.mm(rows, weight.T, out=z[: len(rows)])
            if grad_hidden is None or grad_weight is None:
                continue
            torch.mm(dz, weight, out=grad_hidden[start : start + chunk])
            if start == 0:
                torch.mm(dz.T, rows, out=grad_weight)
            else:
                torch.addmm(grad_weight, dz.T, rows, out=grad_weight)
        return () if grad_hidden is None or grad_weight is None else (grad_hidden, grad_weight)

    return run


# ---- ours


def ours(function: Callable[..., Any], impl: str, **more: Any) -> Loss:
    def loss(*arguments: Any) -> Tensor:
        *factors, inputs = arguments
        result: Tensor = function(
            *factors,
            inputs.target,
            inputs.old_logprob,
            inputs.advantage,
            inputs.mask,
            entropy_coef=inputs.entropy_coef,
            clip=(CLIP, CLIP),
            impl=impl,
            **more,
        ).loss
        return result

    return loss


def ours_beside_a_teacher(function: Callable[..., Any], impl: str, kind: str) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
        settings = {"mask": inputs.mask, "divergence": kind, "jsd_beta": BETA["jsd"], "impl": impl}
        result: Tensor = function(hidden, weight, *inputs.teacher, **settings).loss
        return result

    return loss


# ---- peers whose packages are hard to import


def enter(package: str) -> None:
    """Make a package's submodules importable without running its own code, unless that has run already."""
    parent, _, _ = package.rpartition(".")
    if parent:
        enter(parent)
    if package in sys.modules:
        return
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ImportError(f"no module {package}")
    sys.modules[package] = importlib.util.module_from_spec(spec)


def stand_in(module: str, **names: Any) -> None:
    """What a peer imports from a module when it runs, where that module is there and can't be imported.

    TRL's backward asks a module that imports datasets how to gather a head that DeepSpeed has sharded.
    """
    parent = module.rpartition(".")[0]
    if importlib.util.find_spec(parent) is None:
        return
    try:
        importlib.import_module(module)
    except ImportError:
        enter(parent)
        made = sys.modules[module] = ModuleType(module)
        vars(made).update(names)


# ---- peers: from logits


def trl_logits() -> Stats:
    enter("trl")
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy

    def stats(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logprob, entropy = selective_log_softmax_and_entropy(logits[None], target[None], temperature=1.0)
        return logprob[0], entropy[0]

    return stats


def liger_grpo_logits() -> Loss:
    """From logits [B, T + 1, V], whose last position it ignores; without entropy."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    def loss(logits: Tensor, inputs: Inputs) -> Tensor:
        ids, old, advantage = by_sequence(inputs.target, inputs.old_logprob, inputs.advantage)
        mask = torch.ones_like(old) if inputs.mask is None else inputs.mask.view_as(old).float()
        settings = {"temperature": 1.0, "beta": 0.0, "eps_low": CLIP, "eps_high": CLIP, "inplace": True}
        arguments = (logits, old, None, ids, advantage[:, 0].contiguous(), mask)
        result: Tensor = triton_grpo_loss(*arguments, **settings, loss_type="dapo", reduce=True)[0]
        return result

    return loss


def by_sequence(*tensors: Tensor) -> list[Tensor]:
    return [x.view(SEQUENCES, -1) for x in tensors]


def with_one_more(logits: Tensor) -> Tensor:
    """[N, V] -> [B, T + 1, V]"""
    parts = logits.detach().unflatten(0, (SEQUENCES, -1))
    return torch.cat([parts, parts[:, -1:]], dim=1).requires_grad_()


def flash_cross_entropy() -> Loss:
    enter("flash_attn.ops.triton")
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    def loss(logits: Tensor, inputs: Inputs) -> Tensor:
        nll: Tensor = cross_entropy_loss(logits, inputs.target, inplace_backward=True)[0]
        return nll.mean()

    return loss


# ---- peers: statistics from hidden states and a head


def trl_linear() -> Stats:
    enter("trl")
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    stand_in("trl.trainer.utils", maybe_gather_lm_head_ctx=lambda *parameters: nullcontext())

    def stats(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        settings = (1.0, 32_768, None, 1.0, ("entropy",))  # temperature, words, softcap, scale, outputs
        logprob, entropy, *_ = ChunkedLogProbFunction.apply(hidden, weight, None, target, *settings)
        return logprob, entropy

    return stats


def liger_linear() -> Stats:
    """On a Hopper GPU with nvidia-cutlass-dsl its own kernels, elsewhere its torch path."""
    os.environ.setdefault("LIGER_SCALED_CE_SM90_VALIDATE_TARGETS", "0")  # a host synchronisation
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    def stats(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        function = LigerFusedLinearScaledCrossEntropyFunction
        nll, entropy = function.apply(hidden, weight, target, 1.0, -100, 1, True)[:2]
        return -nll, entropy

    return stats


def liger_linear_fallback() -> Stats:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import _FusedLinearPPOFallbackFunction

    def stats(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        nll, entropy = _FusedLinearPPOFallbackFunction.apply(hidden, weight, target, 1.0, -100, True)[:2]
        return -nll, entropy

    return stats


def verl_triton() -> Stats:
    enter("verl.utils.kernel")
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, target: linear_cross_entropy(hidden, weight, target, 1.0, "none", None)


def verl_torch() -> Stats:
    enter("verl.utils.experimental")
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    function = FusedLinearForPPO(chunk_size=512, impl_backend="torch")
    return lambda hidden, weight, target: function(hidden, weight, target, 1.0)


def unsloth_linear() -> Stats:
    enter("unsloth_zoo.fused_losses")
    from unsloth_zoo.fused_losses.fused_linear import fused_linear_logprobs

    def stats(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logprob, entropy = fused_linear_logprobs(hidden, weight, target, return_entropy=True)
        return logprob, entropy

    return stats


# ---- peers: losses from hidden states and a head


def liger_grpo() -> Loss:
    """Advantages of a sequence each, and no entropy."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    function = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, epsilon_low=CLIP, epsilon_high=CLIP, loss_type="dapo", temperature=1.0
    )

    def loss(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
        ids, old, advantage = by_sequence(inputs.target, inputs.old_logprob, inputs.advantage)
        mask = torch.ones_like(old) if inputs.mask is None else inputs.mask.view_as(old).float()
        hidden = hidden.unflatten(0, (SEQUENCES, -1))
        result: Tensor = function(hidden, weight, ids, mask, advantage[:, 0], old_per_token_logps=old)[0]
        return result

    return loss


def cut_cross_entropy() -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, inputs: linear_cross_entropy(hidden, weight, inputs.target)


def quack_cross_entropy() -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda hidden, weight, inputs: chunked_linear_cross_entropy(hidden, weight, inputs.target)


# ---- peers: beside a teacher


def trl_divergence(kind: str) -> Loss:
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


def liger_jsd(kind: str) -> Loss:
    """fused_linear_jsd: its Triton kernels."""
    from liger_kernel.ops import LigerFusedLinearJSDFunction

    def loss(hidden: Tensor, weight: Tensor, inputs: Inputs) -> Tensor:
        labels = None if inputs.mask is None else labels_of(inputs)
        result: Tensor = LigerFusedLinearJSDFunction.apply(
            hidden, weight, *inputs.teacher, labels, BETA[kind], IGNORE, 1.0
        )
        return result

    return loss


def liger_jsd_torch(kind: str) -> Loss:
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
