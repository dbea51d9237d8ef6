"""Who does the work: ours, plain PyTorch, and what users would pick instead.

A peer is found when its package is installed. Some need a cluster of other packages to be imported: their
parent packages are entered without running them, and only what is measured is imported (packages.py). Those
beside a teacher stand in teachers.py.
What a peer leaves out is in its ``work``: a loss without entropy, or a cross-entropy, which bounds from below
what statistics and their gradient can cost.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from aer_fast import (
    Plan,
    linear_distill_loss,
    linear_ppo_loss,
    linear_token_stats,
    plan,
    ppo_loss,
    token_stats,
)
from bench import teachers
from bench.measure import version
from bench.operations import (
    CLIP,
    FORWARD,
    SEQUENCES,
    STATS,
    Case,
    Fresh,
    Inputs,
    Result,
    Step,
    Who,
    divergence_of,
    loss_of,
)
from bench.packages import enter, stand_in
from bench.planned import with_planner

Factors = tuple[Tensor, ...]
Stats = Callable[..., tuple[Tensor, Tensor]]  # (*factors, target) -> logprob, entropy
Loss = Callable[..., Tensor]  # (*factors, inputs) -> loss; of a cross-entropy likewise
Kind = Literal["stats", "loss", "products"]


@dataclass(frozen=True)
class Provider:
    name: str
    load: Callable[[], Callable[..., Any]]  # an ImportError says why it is not there
    kind: Kind = "stats"
    package: str = ""  # "" for ours and for torch
    work: str = "all"  # or "no entropy", "cross-entropy", "products alone"
    gpu: bool = False  # nothing but a GPU will do
    hopper: bool = False  # on anything but a Hopper GPU the same as another provider
    among: Who = "everyone"  # of whom it is one
    skips_masked: bool = False  # its own trainer leaves masked rows out before it calls it
    copy: Callable[[Tensor], Tensor] | None = None  # of the logits, where a step uses them up

    @property
    def version(self) -> str:
        return version(self.package) if self.package else ""

    def missing(self, device: str) -> str:
        """Why it cannot be measured here, or nothing."""
        if self.package and not self.version:
            return f"{self.package} is not installed"
        if self.gpu and device != "cuda" and "TRITON_INTERPRET" not in os.environ:
            return "needs a GPU"
        if self.hopper and not (device == "cuda" and torch.cuda.get_device_capability()[0] == 9):
            return "measured on a Hopper GPU only: elsewhere it is what Liger runs anyway"
        return ""


# ---- plain PyTorch


def eager_stats(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logp = logits.log_softmax(-1)
    logprob = logp.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return logprob, -(logp.exp() * logp).sum(-1)


def eager_linear_stats(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return eager_stats(hidden @ weight.T, target)


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


def by_sequence(*tensors: Tensor) -> list[Tensor]:
    return [x.view(SEQUENCES, -1) for x in tensors]


def cut_cross_entropy() -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, inputs: linear_cross_entropy(hidden, weight, inputs.target)


def quack_cross_entropy() -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda hidden, weight, inputs: chunked_linear_cross_entropy(hidden, weight, inputs.target)


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


# ---- who is measured at what


def from_logits(case: Case, impl: Any) -> list[Provider]:
    """Ours, plain PyTorch, peers."""
    if case.op == "ppo_loss":
        providers = [
            Provider("aer_fast", partial(ours, ppo_loss, impl), "loss", among="few"),
            Provider(
                "aer_fast, in place",
                partial(ours, ppo_loss, impl, inplace=True),
                "loss",
                among="few",
                copy=torch.clone,
            ),
        ]
    else:
        providers = [Provider("aer_fast", lambda: partial(token_stats, impl=impl), among="few")]
    providers += [
        Provider("eager", lambda: eager_stats, among="few"),
        Provider("torch.compile", partial(compiled, eager_stats), among="many"),
        Provider("TRL", trl_logits, package="trl", gpu=True, among="few"),
    ]
    if case.op == "ppo_loss":
        liger = Provider("Liger GRPO", liger_grpo_logits, "loss", "liger-kernel", "no entropy", gpu=True)
        flash = Provider("flash-attn", flash_cross_entropy, "loss", "flash-attn", "cross-entropy", gpu=True)
        providers += [replace(liger, among="many", copy=with_one_more), replace(flash, copy=torch.clone)]
    return providers


def from_hidden(case: Case, impl: Any, planner: Callable[..., Plan] | None = None) -> list[Provider]:
    """Ours (in the loops of ``planner``, if given), the floor, plain PyTorch, peers."""
    if case.D_ref:
        return beside_a_teacher(case, impl, planner)
    loss, stats = (
        f if planner is None else with_planner(f, planner) for f in (linear_ppo_loss, linear_token_stats)
    )
    gpu = torch.cuda.is_available()
    if case.op == "linear_ppo_loss":
        first = Provider("aer_fast", partial(ours, loss, impl), "loss", among="few")
    else:
        first = Provider("aer_fast", lambda: partial(stats, impl=impl), among="few")
    if case.rows.endswith("silent"):
        return [first]
    floor = "one product alone" if case.op.endswith(FORWARD) else "three products alone"
    providers = [
        first,
        Provider(floor, products, "products", work="products alone", among="few"),
        Provider("eager", lambda: eager_linear_stats, among="few"),
        Provider("torch.compile", partial(compiled, eager_linear_stats), among="many"),
        Provider("TRL", trl_linear, package="trl", among="few", skips_masked=True),
        # without a GPU it is what "verl torch" is
        Provider("Liger", liger_linear, package="liger-kernel", among="many" if gpu else "everyone"),
        Provider("Liger torch", liger_linear_fallback, package="liger-kernel", hopper=True),
        Provider("verl Triton", verl_triton, package="verl", gpu=True, among="many"),
        Provider("verl torch", verl_torch, package="verl"),
        Provider("unsloth-zoo", unsloth_linear, package="unsloth-zoo", skips_masked=True),
    ]
    if case.op == "linear_ppo_loss":
        providers.append(
            Provider("Liger GRPO", liger_grpo, "loss", "liger-kernel", "no entropy", among="many")
        )
    if case.op == "linear_token_stats":
        only: dict[str, Any] = {"kind": "loss", "work": "cross-entropy"}
        providers += [
            Provider("torch linear_cross_entropy", torch_cross_entropy, **only),
            Provider("CCE", cut_cross_entropy, package="cut-cross-entropy", gpu=True, **only),
            Provider("QuACK", quack_cross_entropy, package="quack-kernels", gpu=True, **only),
        ]
    return providers


def beside_a_teacher(case: Case, impl: Any, planner: Callable[..., Plan] | None) -> list[Provider]:
    """Likewise, where student and teacher are compared."""
    kind = divergence_of(case.op)
    function = linear_distill_loss if planner is None else with_planner(linear_distill_loss, planner)
    eager = partial(teachers.eager_divergence, kind)

    def liger(name: str, load: Callable[[str], Loss], gpu: bool) -> Provider:
        return Provider(name, partial(load, kind), "loss", "liger-kernel", gpu=gpu, among="many")

    return [
        Provider("aer_fast", partial(teachers.ours, function, impl, kind), "loss", among="few"),
        Provider("four products alone", products, "products", work="products alone", among="few"),
        Provider("eager", lambda: teachers.averaged(eager()), "loss", among="few"),
        Provider("torch.compile", lambda: teachers.averaged(compiled(eager())), "loss", among="many"),
        Provider("TRL", partial(teachers.trl, kind), "loss", "trl", among="few"),
        liger("Liger", teachers.liger, gpu=True),
        liger("Liger torch", teachers.liger_torch, gpu=False),
    ]


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


def providers_of(case: Case, impl: str) -> list[Provider]:
    every = from_hidden(case, impl) if case.D else from_logits(case, impl)
    circles = ("few", "many", "everyone")
    invited = circles[: circles.index(case.who) + 1]
    return [p for p in every if p.among in invited and (p.kind != "products" or case.rows == "all")]


# ---- what is timed


def step_of(case: Case, provider: Provider, inputs: Inputs) -> tuple[Fresh, Step]:
    """What is timed, and what makes its arguments before each round."""
    function = provider.load()
    forward = case.op.endswith(FORWARD)

    def fresh() -> Factors:
        return inputs.factors if provider.copy is None else tuple(map(provider.copy, inputs.factors))

    def products_step(hidden: Tensor, weight: Tensor) -> Result:
        with torch.no_grad():
            function(hidden, weight, *inputs.teacher, backward=not forward)
        return Result()

    def forward_step(*factors: Tensor) -> Result:
        with torch.no_grad():
            logprob, entropy = function(*factors, inputs.target)
        return Result(logprob, entropy)

    def stats_step(*factors: Tensor) -> Result:
        logprob, entropy = values = function(*factors, inputs.target)
        upstream = [x.to(y.dtype) for x, y in zip((inputs.grad_logprob, inputs.grad_entropy), values)]
        return Result(logprob, entropy, gradient=torch.autograd.grad(values, factors, upstream))

    def loss_step(*factors: Tensor) -> Result:
        value = loss(*factors)
        gradient = torch.autograd.grad(value, factors)
        return Result(loss=value, gradient=tuple(x[:, :-1] if x.dim() == 3 else x for x in gradient))

    if provider.kind == "products":
        return fresh, products_step
    if forward:
        return fresh, forward_step
    if provider.kind == "stats" and case.op in STATS:
        return fresh, stats_step
    loss = loss_function(provider, function, inputs)
    return fresh, loss_step


def loss_function(provider: Provider, function: Callable[..., Any], inputs: Inputs) -> Loss:
    """(*factors) -> loss."""
    if provider.kind == "loss":
        return lambda *factors: function(*factors, inputs)
    if provider.skips_masked and inputs.mask is not None:
        return lambda *factors: loss_of_counted(function, factors, inputs)

    def loss(*factors: Tensor) -> Tensor:
        logprob, entropy = function(*factors, inputs.target)
        return loss_of(logprob, entropy, inputs)

    return loss


def loss_of_counted(function: Stats, factors: Factors, inputs: Inputs) -> Tensor:
    """The rows that count are picked first."""
    mask = inputs.mask
    assert mask is not None
    coef = inputs.entropy_coef
    picked = replace(
        inputs,
        mask=None,
        target=inputs.target[mask],
        old_logprob=inputs.old_logprob[mask],
        advantage=inputs.advantage[mask],
        entropy_coef=coef[mask] if isinstance(coef, Tensor) else coef,
    )
    rows, *rest = factors
    logprob, entropy = function(rows[mask], *rest, picked.target)
    return loss_of(logprob, entropy, picked)
