"""One optimiser step of a model: body, head, loss, backward and AdamW, with the logits and without.

A model of the shape of SmolLM2-135M in float32; on a GPU of that of Qwen3-0.6B in bfloat16 at 4k, 16k and 64k
packed tokens: sequences of 4096, an eighth of each the prompt, whose rows the head is not applied to. Its 28
layers would keep 0.08 MiB of activations a token each, 144 GiB at 64k: the body is recomputed layer by
layer in the backward, for all providers alike (bench/model.py), and what is left is what the head and its
loss need. Who runs out of memory gets a row that says so. What is compared with float64 is the step's loss
and, at the model's hidden states, the head's gradients; the learning rate is 0, so that all steps see the
same. Weights and optimiser states are in what was there before the step, gradients are not. On a CPU no
activations are recomputed.
"""

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import model, operations
from bench.conftest import DEVICE, RECORD, Run, Work, size
from bench.operations import STEP, Case, Result
from bench.peers import Provider, from_hidden, loss_function
from bench.shapes import QWEN, SMOLLM

TOKENS = {  # packed, of a step
    "cpu": ("SmolLM2-135M", SMOLLM, torch.float32, (1024,)),
    "gpu": ("Qwen3-0.6B", QWEN, torch.bfloat16, (4096, 16_384, 65_536)),
    "tiny": ("tiny", 1024, torch.float32, (512,)),
}
PROVIDERS = (
    ("eager", "TRL", "aer_fast") if DEVICE == "cuda" else ("eager", "aer_fast")
)  # a step takes seconds


def cases(chosen: str) -> list[tuple[str, int, Case]]:
    """(model, T, case)"""
    name, V, dtype, every = TOKENS[chosen]
    D = model.SHAPES[name].hidden
    return [(name, T, Case(STEP, model.rows_of(T), V, D, dtype)) for T in every]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parameters = [
        pytest.param(name, T, case, provider, id=f"{case.op}, {T=} {case}, {provider.name}")
        for name, T, case in cases(size(metafunc.config))
        for provider in from_hidden(case, metafunc.config.stash[RECORD].impl)
        if provider.name in PROVIDERS
    ]
    metafunc.parametrize(("name", "T", "case", "provider"), parameters)


@lru_cache(maxsize=1)
def prepare(name: str, T: int, case: Case) -> tuple[Any, Tensor, operations.Inputs, operations.Exact]:
    """A model, token ids [B, length], and the head's inputs and exact results at its hidden states."""
    torch.manual_seed(0)
    shape = model.SHAPES[name]
    policy = model.build(shape, case.V, case.dtype, DEVICE)
    ids = torch.randint(case.V, (T // shape.length, shape.length), device=DEVICE)
    with torch.no_grad():
        hidden = model.hidden_of(policy, ids)
    factors = [hidden.requires_grad_(), policy.lm_head.weight]
    return policy, ids, *operations.judge(factors, model.targets_of(ids))


def test_step(name: str, T: int, case: Case, provider: Provider, run: Run) -> None:
    def build() -> Work:
        policy, ids, inputs, exact = prepare(name, T, case)
        loss = loss_function(provider, provider.load(), inputs)
        optimizer = model.optimizer_of(policy)  # the weights stay what was judged

        def head(result: Result) -> dict[str, float]:
            gradient = torch.autograd.grad(loss(*inputs.factors), inputs.factors)
            return operations.errors(case, "all", exact, Result(loss=result.loss, gradient=gradient))

        def step() -> Result:
            return Result(loss=model.train(policy, optimizer, ids, loss))

        return Work(tuple, step, errors=head, least=None)

    who: dict[str, Any] = {
        "op": STEP,
        "shape": {"T": T, **case.shape},
        "rows": f"{name}'s",
        "provider": provider.name,
        "version": provider.version,
        "work": "all",
        "headline": False,
    }
    run(who, provider.missing(DEVICE), build, dtype=case.dtype, ours=provider.name == "aer_fast")
