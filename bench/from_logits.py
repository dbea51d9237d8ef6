"""ppo_loss from logits on a CPU: time and memory of forward and backward, beside eager PyTorch.

    python -m bench.from_logits            # print the table
    python -m bench.from_logits --save     # and append to bench/results/from_logits.jsonl

See bench/measure.py for what is measured; the logits are included in what was there before.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import tyro
from torch import Tensor

from aer_fast import ppo_loss
from bench import measure

OP = "ppo_loss forward + backward"
RESULTS = measure.RESULTS / "from_logits.jsonl"
N, V = 1024, 151_936
REPETITIONS = 5


def eager(logits: Tensor, target: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """The loss as most trainers write it."""
    logp = logits.log_softmax(-1)
    logprob = logp.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    ratio = (logprob - old).exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    return (-surrogate - 0.01 * entropy).mean()


def fused(*inputs: Tensor, inplace: bool) -> Tensor:
    return ppo_loss(*inputs, entropy_coef=0.01, inplace=inplace, impl="torch").loss


PROVIDERS: dict[str, Callable[..., Tensor]] = {
    "eager": eager,
    "aer_fast": partial(fused, inplace=False),
    "aer_fast inplace": partial(fused, inplace=True),
}


def step(loss: Callable[..., Tensor], logits: Tensor, *constants: Tensor) -> Tensor:
    """Forward, and backward to the logits."""
    (grad,) = torch.autograd.grad(loss(logits, *constants), logits)
    return grad


def inputs(n: int) -> list[Tensor]:
    torch.manual_seed(0)
    logits = 2 * torch.randn(n, V)
    target = torch.randint(V, (n,))
    logprob = logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return [logits, target, logprob + 0.2 * torch.randn(n), torch.randn(n)]


def not_a_leaf(logits: Tensor) -> Tensor:
    return logits.requires_grad_().clone()


def gradient_error(loss: Callable[..., Tensor]) -> float:
    logits, *constants = inputs(8)
    exact = step(eager, not_a_leaf(logits.detach().double()), *constants)
    actual = step(loss, not_a_leaf(logits), *constants)
    return ((actual - exact).abs().max() / exact.abs().max()).item()


def measured(provider: str) -> measure.Measurement:
    loss = PROVIDERS[provider]
    error = gradient_error(loss)
    assert error < 1e-4, f"{provider} is wrong: relative error {error:.1e}"
    original, *constants = inputs(N)
    return measure.measure(
        partial(step, loss),
        lambda: [not_a_leaf(original), *constants],  # in place, a step uses its logits up
        REPETITIONS,
        op=OP,
        provider=provider,
        shape={"N": N, "V": V},
        error=error,
    )


def recorded() -> list[dict[str, Any]]:
    """The rows of the last saved run."""
    return measure.last_run(RESULTS, OP)


def markdown(rows: list[dict[str, Any]]) -> str:
    return measure.markdown(rows, rows[0])


def main(save: bool = False, provider: str | None = None) -> None:
    """Measure every provider, or one in this process.

    Args:
        save: append the rows to bench/results/from_logits.jsonl.
        provider: measure this one alone, and print its row as JSON.
    """
    if provider is not None:
        measure.print_row(measured(provider))
        return
    rows = measure.run_each("bench.from_logits", list(PROVIDERS))
    measure.print_table(rows, rows[0])
    if save:
        measure.append(RESULTS, rows)
        print(markdown(rows))


if __name__ == "__main__":
    tyro.cli(main)
