"""One optimiser step of a model: body, head, loss, backward and AdamW, with the logits and without.

A model of the shape of SmolLM2-135M in float32, on a GPU of that of Qwen3-0.6B in bfloat16. Its weights are
random: neither memory nor time depends on them. What is compared with float64 is the step's loss and, at the
model's hidden states, the head's gradients; the learning rate is 0, so that all steps see the same. Weights
and optimiser states are in what was there before the step, gradients are not. No activations are recomputed.
"""

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import operations
from bench.conftest import DEVICE, RECORD, Run, Work, size
from bench.operations import STEP, Case, Result
from bench.peers import Provider, from_hidden, loss_function
from bench.shapes import QWEN, SMOLLM

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, head dimension
    "SmolLM2-135M": (576, 1536, 30, 9, 3, 64),
    "Qwen3-0.6B": (1024, 3072, 28, 16, 8, 128),
    "tiny": (128, 128, 2, 2, 2, 64),
}
CASES = {
    "cpu": [("SmolLM2-135M", Case(STEP, 896, SMOLLM, 576))],
    "gpu": [("Qwen3-0.6B", Case(STEP, N, QWEN, 1024, torch.bfloat16)) for N in (3584, 14_336)],
    "tiny": [("tiny", Case(STEP, 448, 1024, 128))],
}
SEQUENCES, PROMPT_SHARE = 4, 8  # one token in eight is the prompt's
PROVIDERS = (
    ("eager", "TRL", "aer_fast") if DEVICE == "cuda" else ("eager", "aer_fast")
)  # a step takes seconds


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parameters = [
        pytest.param(model, case, provider, id=f"{case.op}, {case}, {provider.name}")
        for model, case in CASES[size(metafunc.config)]
        for provider in from_hidden(case, metafunc.config.stash[RECORD].impl)
        if provider.name in PROVIDERS
    ]
    metafunc.parametrize(("model", "case", "provider"), parameters)


@lru_cache(maxsize=1)
def prepare(model: str, case: Case) -> tuple[Any, Tensor, operations.Inputs, operations.Exact]:
    """A model, token ids [B, T], and the head's inputs and exact results at its hidden states."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    hidden_size, intermediate, layers, heads, kv_heads, head_dim = SHAPES[model]
    config = LlamaConfig(
        vocab_size=case.V,
        hidden_size=hidden_size,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=True,
    )
    policy: Any = LlamaForCausalLM(config)
    policy.to(device=DEVICE, dtype=case.dtype)
    tokens = case.N * PROMPT_SHARE // (PROMPT_SHARE - 1) // SEQUENCES
    ids = torch.randint(case.V, (SEQUENCES, tokens), device=DEVICE)
    with torch.no_grad():
        hidden = hidden_of(policy, ids)
    factors = [hidden.requires_grad_(), policy.lm_head.weight]
    return policy, ids, *operations.judge(factors, ids[:, tokens // PROMPT_SHARE :].flatten())


def hidden_of(policy: Any, ids: Tensor) -> Tensor:
    """Of the positions that predict a response token."""
    prompt = ids.shape[1] // PROMPT_SHARE
    hidden: Tensor = policy.model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden[:, prompt - 1 : -1].flatten(0, 1)


def test_step(model: str, case: Case, provider: Provider, run: Run) -> None:
    def build() -> Work:
        policy, ids, inputs, exact = prepare(model, case)
        loss = loss_function(provider, provider.load(), inputs)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0)  # the weights stay what was judged
        for parameter in policy.parameters():  # the states that a run has had since its first step
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()

        def head(result: Result) -> dict[str, float]:
            gradient = torch.autograd.grad(loss(*inputs.factors), inputs.factors)
            return operations.errors(case, "all", exact, Result(loss=result.loss, gradient=gradient))

        def step() -> Result:
            value = loss(hidden_of(policy, ids), policy.lm_head.weight)
            torch.autograd.backward(value)
            optimizer.step()
            optimizer.zero_grad()
            return Result(loss=value.detach())

        return Work(tuple, step, errors=head, least=None)

    who: dict[str, Any] = {
        "op": STEP,
        "shape": case.shape,
        "rows": f"{model}'s",
        "provider": provider.name,
        "version": provider.version,
        "work": "all",
        "headline": False,
    }
    run(who, provider.missing(DEVICE), build, dtype=case.dtype, ours=provider.name == "aer_fast")
