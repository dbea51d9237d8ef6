"""Which providers are measured at a case, and what is timed of each.

A provider is ours, plain PyTorch, or a peer, which is there when its package is installed. What it leaves
out is in its ``work``: a loss without entropy, or a cross-entropy, which bounds from below what
statistics and their gradient can cost.
"""

import os
from collections.abc import Callable
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
    ppo_loss,
    token_stats,
)
from bench.cases import COVERAGES, FORWARD, STATS, Case, Coverage, divergence_of
from bench.measure import version
from bench.operations import Fresh, Inputs, Result, Step, loss_of
from bench.peers import calls
from bench.peers.calls import Factors, Loss, Stats
from bench.peers.planned import with_planner

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
    coverage: Coverage = "full"  # the least of a case at which it is measured
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


# ---- the providers of a case


def providers_of(case: Case, impl: str) -> list[Provider]:
    """Those that the coverage of a case takes in."""
    every = from_hidden(case, impl) if case.D else from_logits(case, impl)
    covered = COVERAGES[: COVERAGES.index(case.coverage) + 1]
    return [p for p in every if p.coverage in covered and (p.kind != "products" or case.rows == "all")]


def from_logits(case: Case, impl: Any) -> list[Provider]:
    """Ours, plain PyTorch, peers."""
    if case.op == "ppo_loss":
        providers = [
            Provider("aer_fast", partial(calls.ours, ppo_loss, impl), "loss", coverage="basic"),
            Provider(
                "aer_fast, in place",
                partial(calls.ours, ppo_loss, impl, inplace=True),
                "loss",
                coverage="basic",
                copy=torch.clone,
            ),
        ]
    else:
        providers = [Provider("aer_fast", lambda: partial(token_stats, impl=impl), coverage="basic")]
    providers += [
        Provider("eager", lambda: calls.eager_stats, coverage="basic"),
        Provider("torch.compile", partial(calls.compiled, calls.eager_stats), coverage="wide"),
        Provider("TRL", calls.trl_logits, package="trl", gpu=True, coverage="basic"),
    ]
    if case.op == "ppo_loss":
        liger = Provider(
            "Liger GRPO", calls.liger_grpo_logits, "loss", "liger-kernel", "no entropy", gpu=True
        )
        flash = Provider(
            "flash-attn", calls.flash_cross_entropy, "loss", "flash-attn", "cross-entropy", gpu=True
        )
        providers += [
            replace(liger, coverage="wide", copy=calls.with_one_more),
            replace(flash, copy=torch.clone),
        ]
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
        first = Provider("aer_fast", partial(calls.ours, loss, impl), "loss", coverage="basic")
    else:
        first = Provider("aer_fast", lambda: partial(stats, impl=impl), coverage="basic")
    if case.rows.endswith("silent"):
        return [first]
    floor = "one product alone" if case.op.endswith(FORWARD) else "three products alone"
    providers = [
        first,
        Provider(floor, calls.products, "products", work="products alone", coverage="basic"),
        Provider("eager", lambda: calls.eager_linear_stats, coverage="basic"),
        Provider("torch.compile", partial(calls.compiled, calls.eager_linear_stats), coverage="wide"),
        Provider("TRL", calls.trl_linear, package="trl", coverage="basic", skips_masked=True),
        # without a GPU it is what "verl torch" is
        Provider("Liger", calls.liger_linear, package="liger-kernel", coverage="wide" if gpu else "full"),
        Provider("Liger torch", calls.liger_linear_fallback, package="liger-kernel", hopper=True),
        Provider("verl Triton", calls.verl_triton, package="verl", gpu=True, coverage="wide"),
        Provider("verl torch", calls.verl_torch, package="verl"),
        Provider("unsloth-zoo", calls.unsloth_linear, package="unsloth-zoo", skips_masked=True),
    ]
    if case.op == "linear_ppo_loss":
        providers.append(
            Provider("Liger GRPO", calls.liger_grpo, "loss", "liger-kernel", "no entropy", coverage="wide")
        )
    if case.op == "linear_token_stats":
        only: dict[str, Any] = {"kind": "loss", "work": "cross-entropy"}
        providers += [
            Provider("torch linear_cross_entropy", calls.torch_cross_entropy, **only),
            Provider("CCE", calls.cut_cross_entropy, package="cut-cross-entropy", gpu=True, **only),
            Provider("QuACK", calls.quack_cross_entropy, package="quack-kernels", gpu=True, **only),
        ]
    return providers


def beside_a_teacher(case: Case, impl: Any, planner: Callable[..., Plan] | None) -> list[Provider]:
    """Likewise, where student and teacher are compared."""
    kind = divergence_of(case.op)
    function = linear_distill_loss if planner is None else with_planner(linear_distill_loss, planner)
    eager = partial(calls.eager_divergence, kind)

    def liger(name: str, load: Callable[[str], Loss], gpu: bool) -> Provider:
        return Provider(name, partial(load, kind), "loss", "liger-kernel", gpu=gpu, coverage="wide")

    return [
        Provider(
            "aer_fast", partial(calls.ours_beside_a_teacher, function, impl, kind), "loss", coverage="basic"
        ),
        Provider("four products alone", calls.products, "products", work="products alone", coverage="basic"),
        Provider("eager", lambda: calls.averaged(eager()), "loss", coverage="basic"),
        Provider("torch.compile", lambda: calls.averaged(calls.compiled(eager())), "loss", coverage="wide"),
        Provider("TRL", partial(calls.trl_divergence, kind), "loss", "trl", coverage="basic"),
        liger("Liger", calls.liger_jsd, gpu=True),
        liger("Liger torch", calls.liger_jsd_torch, gpu=False),
    ]


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
