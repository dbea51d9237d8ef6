"""Peak memory of one optimiser step of the trainer, with logits and without.

    python -m bench.step_memory            # print the table
    python -m bench.step_memory --save     # and append to bench/results/step_memory.jsonl

A model of SmolLM2-135M's shape (random weights; neither memory nor time depends on them), with its own
vocabulary and with one of 151,936 words: forward, loss, backward and AdamW on packed sequences, through
`training.policy` ("aer_fast") and through the model's logits ("eager"). See bench/measure.py for what is
measured; weights and optimiser states are in what was there before, gradients are not.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import tyro
from torch import Tensor

from bench import measure
from bench.linear import eager_loss
from training.batch import Batch, Rollout, make_batch
from training.policy import Objective, Policy, Tokens

OP = "one optimiser step, V = {V:,}"
RESULTS = measure.RESULTS / "step_memory.jsonl"
VOCABULARIES = (49_152, 151_936)
SEQUENCES, PROMPT, RESPONSE = 4, 32, 224
REPETITIONS = 2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def eager(policy: Policy, batch: Batch, tokens: Tokens) -> Tensor:
    """The loss as most trainers write it: logits of the whole batch."""
    logits = policy.model(input_ids=batch.ids, position_ids=batch.position_ids, use_cache=False).logits
    logp = logits.flatten(0, 1)[batch.where].log_softmax(-1)
    logprob = logp.gather(-1, batch.target[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    return eager_loss(logprob, entropy, tokens.old_logprob, tokens.advantage, tokens.entropy_coef)


def ours(policy: Policy, batch: Batch, tokens: Tokens) -> Tensor:
    objective = Objective((0.2, 0.2), None, 0.0, 0.0, 0.2)
    loss: Tensor = policy(batch, tokens, objective, float(batch.target.numel()))[0]
    return loss


PROVIDERS: dict[str, Callable[[Policy, Batch, Tokens], Tensor]] = {"eager": eager, "aer_fast": ours}


def build(V: int) -> Policy:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        tie_word_embeddings=True,
    )
    policy = Policy(LlamaForCausalLM(config), temperature=1.0, dtype="float32", value_head=False)
    return policy.to(DEVICE)


def inputs(V: int) -> tuple[Batch, Tokens]:
    torch.manual_seed(1)
    ids = torch.randint(V, (SEQUENCES, PROMPT + RESPONSE)).tolist()
    rollouts = [Rollout(row[:PROMPT], row[PROMPT:], False) for row in ids]
    batch = make_batch(rollouts, packing=True, pad=0, device=torch.device(DEVICE))
    n = batch.target.numel()
    ones = torch.ones(n, device=DEVICE)
    old, advantage = -math.log(V) * ones, torch.randn(n).to(DEVICE)
    return batch, Tokens(old, advantage, ones, 0.01 * ones, None, None, None, None)


def measured(provider: str) -> measure.Measurement:
    """Of "<V> <name>"."""
    words, name = provider.split()
    V = int(words)
    policy, (batch, tokens) = build(V), inputs(V)
    error = agreement(policy, batch, tokens) if name == "aer_fast" else None
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)
    for parameter in policy.parameters():  # the states that a run has had since its first step
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()

    def step() -> None:
        torch.autograd.backward(PROVIDERS[name](policy, batch, tokens))
        optimizer.step()
        optimizer.zero_grad()

    optimizer.zero_grad()
    shape = {"N": batch.target.numel(), "V": V, "D": 576}
    return measure.measure(
        step,
        tuple,
        REPETITIONS,
        op=OP.format(V=V),
        provider=name,
        shape=shape,
        error=error,
        device=DEVICE,
    )


def agreement(policy: Policy, batch: Batch, tokens: Tokens) -> float:
    """The largest difference of both providers' head gradients, relative to the largest entry."""
    head = policy.model.get_output_embeddings().weight
    grads: list[Any] = []
    for provider in PROVIDERS.values():
        grads += torch.autograd.grad(provider(policy, batch, tokens), [head])
    error = float((grads[0] - grads[1]).abs().max() / grads[0].abs().max())
    assert error < 1e-3, error
    return error


def recorded() -> list[list[dict[str, Any]]]:
    """The rows of the last saved run, for each vocabulary."""
    return [measure.last_run(RESULTS, OP.format(V=V)) for V in VOCABULARIES]


def markdown(runs: list[list[dict[str, Any]]]) -> str:
    """The README's table."""
    lines = ["| vocabulary | eager, MiB | aer_fast, MiB | of eager's memory |", "|--:|--:|--:|--:|"]
    for rows in runs:
        by = {row["provider"]: row for row in rows}
        a, b = by["eager"], by["aer_fast"]
        ratio = f"{b['peak_mib'] / a['peak_mib']:.2f}"
        lines.append(f"| {a['shape']['V']:,} | {a['peak_mib']:.0f} | {b['peak_mib']:.0f} | {ratio} |")
    return "\n".join(lines)


def main(save: bool = False, provider: str | None = None) -> None:
    """Measure every provider, or one in this process.

    Args:
        save: append the rows to bench/results/step_memory.jsonl.
        provider: measure this one alone, "<V> <name>", and print its row as JSON.
    """
    if provider is not None:
        measure.print_row(measured(provider))
        return
    runs = [
        measure.run_each("bench.step_memory", [f"{V} {name}" for name in PROVIDERS]) for V in VOCABULARIES
    ]
    for rows in runs:
        measure.print_table(rows, rows[0])
    if save:
        measure.append(RESULTS, [row for rows in runs for row in rows])
        print(markdown(runs))


if __name__ == "__main__":
    tyro.cli(main)
