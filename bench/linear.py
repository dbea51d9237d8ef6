"""linear_ppo_loss on a CPU: time and memory of forward and backward, beside the peers.

    python -m bench.linear            # print the tables
    python -m bench.linear --save     # and append to bench/results/linear.jsonl

Two tables. The first sets the loss with a differentiable entropy beside eager PyTorch, TRL's chunked
log-probabilities, Liger's fused GRPO loss (without an entropy bonus, which it lacks) and the floor: the
three matrix products alone, at our chunk size. The second is ours on-policy when a share of the rows has no
gradient (advantage 0, no bonus), and without any gradient. See bench/measure.py for what is measured; hidden
and weight are in what was there before. Peers are found when they are installed
(`pip install trl==1.16.0 liger-kernel==0.8.5`).
"""

from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any

import torch
import tyro
from torch import Tensor

from aer_fast import linear_ppo_loss, plan
from bench import measure

OP = "linear_ppo_loss forward + backward"
OP_SILENT = "linear_ppo_loss, share of rows without a gradient"
RESULTS = measure.RESULTS / "linear.jsonl"
N, D, V = 2048, 512, 151_936
SEQUENCES = 8
REPETITIONS = 3
SILENT = (0, 30, 60, 90)

Loss = Callable[..., Tensor]


def eager_loss(
    logprob: Tensor, entropy: Tensor, old: Tensor, advantage: Tensor, coef: Tensor | float
) -> Tensor:
    """The loss as most trainers write it."""
    ratio = (logprob - old).exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return (-surrogate - coef * entropy).mean()


def eager(
    hidden: Tensor, weight: Tensor, target: Tensor, old: Tensor, advantage: Tensor, coef: float
) -> Tensor:
    logp = (hidden @ weight.T).log_softmax(-1)
    logprob = logp.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return eager_loss(logprob, -(logp.exp() * logp).sum(-1), old, advantage, coef)


def ours(
    hidden: Tensor, weight: Tensor, target: Tensor, old: Tensor | None, advantage: Tensor, coef: float
) -> Tensor:
    return linear_ppo_loss(hidden, weight, target, old, advantage, entropy_coef=coef, impl="torch").loss


def trl(
    hidden: Tensor, weight: Tensor, target: Tensor, old: Tensor, advantage: Tensor, coef: float
) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    settings = (1.0, 32768, None, 1.0, ("entropy",))  # temperature, chunk, softcap, scale, outputs
    logprob, entropy, *_ = ChunkedLogProbFunction.apply(hidden, weight, None, target, *settings)
    return eager_loss(logprob, entropy, old, advantage, coef)


def liger(
    hidden: Tensor, weight: Tensor, target: Tensor, old: Tensor, advantage: Tensor, coef: float
) -> Tensor:
    """Advantages of a sequence each, and no entropy."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, epsilon_low=0.2, epsilon_high=0.2, loss_type="dapo", temperature=1.0
    )
    sequences = min(SEQUENCES, len(target))
    ids, old, advantage = (x.view(sequences, -1) for x in (target, old, advantage))
    hidden = hidden.view(sequences, -1, hidden.shape[-1])
    mask = torch.ones_like(old)
    result: Tensor = loss(hidden, weight, ids, mask, advantage[:, 0], old_per_token_logps=old)[0]
    return result


def products(hidden: Tensor, weight: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """The floor: the three matrix products, a chunk of rows at a time, and nothing else."""
    z = torch.empty(chunk, V)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)
    with torch.no_grad():
        for start in range(0, len(hidden), chunk):
            rows = hidden[start : start + chunk]
            dz = torch.mm(rows, weight.T, out=z[: len(rows)])
            torch.mm(dz, weight, out=grad_hidden[start : start + chunk])
            if start == 0:
                torch.mm(dz.T, rows, out=grad_weight)
            else:
                torch.addmm(grad_weight, dz.T, rows, out=grad_weight)
    return grad_hidden, grad_weight


PEERS: dict[str, tuple[Loss, str, float]] = {  # how, the package it needs, the entropy coefficient
    "eager": (eager, "torch", 0.01),
    "aer_fast": (ours, "torch", 0.01),
    "TRL": (trl, "trl", 0.01),
    "Liger": (liger, "liger-kernel", 0.0),
}
FLOOR = "three products alone"
NO_GRAD = "no_grad"


def inputs(n: int) -> list[Tensor]:
    """hidden, weight, target, old logprob and advantage; about a third of the ratios are clipped."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(n, D) / D**0.5, torch.randn(V, D)
    target = torch.randint(V, (n,))
    logprob = torch.empty(n)
    for start in range(0, n, 256):
        rows = slice(start, start + 256)
        logp = (hidden[rows] @ weight.T).log_softmax(-1)
        logprob[rows] = logp.gather(-1, target[rows].unsqueeze(-1)).squeeze(-1)
    sequences = min(SEQUENCES, n)
    advantage = torch.randn(sequences).repeat_interleave(n // sequences)
    return [hidden, weight, target, logprob + 0.3 * torch.randn(n), advantage]


def step(loss: Loss, coef: float, *arguments: Any) -> tuple[Tensor, ...]:
    """Forward, and backward to hidden and weight."""
    return torch.autograd.grad(loss(*arguments, coef), arguments[:2])


def no_grad(hidden: Tensor, weight: Tensor, target: Tensor, old: None, advantage: Tensor) -> Tensor:
    """The forward alone."""
    with torch.no_grad():
        return ours(hidden, weight, target, old, advantage, 0.0)


def gradient_error(loss: Loss, coef: float) -> float:
    """The largest relative error of both gradients against float64."""
    arguments = inputs(8)
    leaves = [x.requires_grad_() for x in arguments[:2]]
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    exact = step(eager, coef, *doubles, *arguments[2:])
    actual = step(loss, coef, *leaves, *arguments[2:])
    errors = [((a - x).abs().max() / x.abs().max()).item() for a, x in zip(actual, exact)]
    return max(errors)


def measured(provider: str) -> measure.Measurement:
    shape = {"N": N, "D": D, "V": V}
    common: dict[str, Any] = {"provider": provider, "shape": shape}
    arguments: list[Any] = inputs(N)
    if provider == FLOOR:
        chunk = plan(N, V, D, dtype=torch.float32, device="cpu").chunk
        factors = [*arguments[:2], chunk]
        return measure.measure(products, lambda: factors, REPETITIONS, op=OP, error=None, **common)
    for x in arguments[:2]:
        x.requires_grad_()
    if provider == NO_GRAD or provider.endswith("%"):
        share = 1.0 if provider == NO_GRAD else int(provider.rstrip("%")) / 100
        hidden, weight, target, _, advantage = arguments
        advantage = advantage.where(torch.rand(N) >= share, 0.0)
        arguments = [hidden, weight, target, None, advantage]
        run: Callable[..., object] = no_grad if provider == NO_GRAD else partial(step, ours, 0.0)
        return measure.measure(run, lambda: arguments, REPETITIONS, op=OP_SILENT, error=None, **common)
    loss, package, coef = PEERS[provider]
    error = gradient_error(loss, coef)
    assert error < 1e-4, f"{provider} is wrong: relative error {error:.1e}"
    row = measure.measure(
        partial(step, loss, coef), lambda: arguments, REPETITIONS, op=OP, error=error, **common
    )
    if package == "torch":
        return row
    return measure.with_provider(row, f"{provider} {metadata.version(package)}")


def installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def recorded() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of the last saved run: beside the peers, and by share of silent rows."""
    return measure.last_run(RESULTS, OP), measure.last_run(RESULTS, OP_SILENT)


def markdown(rows: list[dict[str, Any]]) -> str:
    (baseline,) = [row for row in rows if row["provider"] == "eager"]
    return measure.markdown(rows, baseline)


def silent_markdown(rows: list[dict[str, Any]]) -> str:
    """The documentation's table: the time of the gradient is what the forward alone does not take."""
    forward = rows[-1]["ms"]
    lines = ["| rows without a gradient | ms | for the gradient |", "|---|--:|--:|"]
    for row in rows[:-1]:
        share = (row["ms"] - forward) / (rows[0]["ms"] - forward)
        lines.append(f"| {row['provider']} | {row['ms']:.0f} ± {row['ms_iqr']:.0f} | {share:.2f} |")
    return "\n".join([*lines, f"| forward alone | {forward:.0f} ± {rows[-1]['ms_iqr']:.0f} | 0 |"])


MODELS = {"Llama-3": (128_256, 4096), "Qwen3": (151_936, 4096), "Gemma-3": (262_144, 3840)}


def plan_markdown() -> str:
    """The documentation's table of plans."""
    lines = ["| V × D | tokens | loop | products | memory, GiB | predicted |", "|---|--:|---|--:|--:|--:|"]
    for model, (V, D) in MODELS.items():
        for rows in (4096, 16_384, 65_536):
            made = plan(rows, V, D)
            chunks = "1 chunk" if made.chunks == 1 else f"{made.chunks} chunks of {made.chunk:,}"
            cells = (f"{made.products}", f"{made.memory / 2**30:.1f}", made.duration)
            lines.append(f"| {model}: {V:,} × {D:,} | {rows:,} | {chunks} | " + " | ".join(cells) + " |")
        less = plan(8192, V, D, memory_budget=5 << 29)
        lines.append(
            f"| {model}, memory_budget 2.5 GiB | 8,192 | {less.slice:,} words at a time | {less.products} |"
            f" {less.memory / 2**30:.1f} | {less.duration} |"
        )
    return "\n".join(lines)


def main(save: bool = False, provider: str | None = None) -> None:
    """Measure every provider, or one in this process.

    Args:
        save: append the rows to bench/results/linear.jsonl.
        provider: measure this one alone, and print its row as JSON.
    """
    if provider is not None:
        measure.print_row(measured(provider))
        return
    found = [name for name, (_, package, _) in PEERS.items() if installed(package)]
    for name in PEERS.keys() - set(found):
        print(f"{name}: not installed")
    rows = measure.run_each("bench.linear", [FLOOR, *found])
    (baseline,) = [row for row in rows if row["provider"] == "eager"]
    measure.print_table(rows, baseline)
    silent = measure.run_each("bench.linear", [*(f"{share}%" for share in SILENT), NO_GRAD])
    measure.print_table(silent, silent[0])
    if save:
        measure.append(RESULTS, [*rows, *silent])
        print(markdown(rows))


if __name__ == "__main__":
    tyro.cli(main)
