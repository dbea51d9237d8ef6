"""The recipes for several processes train as one process does, in plain torch, from logits, in float64."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from aer_fast import AdaptiveEntropy, reference
from tests.helpers.recipes import (
    ROUNDING,
    eager_ppo,
    eager_stats,
    movement,
    next_tokens,
    relative_error,
    sgd,
    state_of,
    torchrun,
)

pytestmark = [pytest.mark.needs("transformers"), pytest.mark.host]


@pytest.mark.parametrize(
    ("arguments", "budget"),
    [
        pytest.param((), 3 * torch.finfo(torch.bfloat16).eps, id="fsdp2 in bfloat16"),
        pytest.param(("ddp",), ROUNDING, id="ddp"),
    ],
)
def test_two_processes_are_one_eager_one(tmp_path: Path, arguments: tuple[str, ...], budget: float) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torchrun(tmp_path, "ddp_fsdp2", *arguments)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    twin = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).double()
    start = state_of(twin)
    torch.manual_seed(1)
    ids = torch.randint(3, 64, (8, 12))
    mask = torch.tensor([[4 <= t <= 4 + b for t in range(12)] for b in range(8)])
    advantage, accuracy = torch.randn(8, 1), torch.rand(8, 1) / 2
    target, live = next_tokens(ids, mask), mask.roll(-1, 1)
    with torch.no_grad():
        old_logprob, old_entropy = eager_stats(twin, ids, target)
    controller = AdaptiveEntropy(target_ratio=0.9, alpha_init=0.1)
    controller.update(old_entropy.sum().item() / 36, weight=(1 - 2 * accuracy.double()).mean())
    for _ in range(3):
        logprob, entropy = eager_stats(twin, ids, target)
        bonus = (controller.coefficient(accuracy) * entropy).sum()
        sgd(twin, (eager_ppo(logprob, old_logprob, advantage, live) - bonus) / 36)
    saved = torch.load(tmp_path / "runs/recipes/ddp_fsdp2.pt")
    assert saved["controller"] == pytest.approx(controller.state_dict(), rel=budget)
    expected = movement(twin.state_dict(), start)
    assert relative_error(movement(saved["model"], start), expected) < budget


def test_a_head_and_sequences_split_between_two_processes_are_whole_ones(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torchrun(tmp_path, "tensor_parallelism")
    saved = torch.load(tmp_path / "runs/recipes/tensor_parallelism.pt")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    twin = LlamaForCausalLM(LlamaConfig(vocab_size=65, **sizes)).double()
    start = state_of(twin)
    ids = torch.randint(3, 65, (8, 12))
    target = next_tokens(ids, torch.arange(12).expand(8, 12) >= 4)
    advantage, live = torch.randn(8, 1), target != -100

    def loss_of(logprob: Tensor, entropy: Tensor) -> Tensor:
        return (eager_ppo(logprob, logprob.detach(), advantage, live) - 0.01 * entropy.sum()) / live.sum()

    for _ in range(2):
        sgd(twin, loss_of(*eager_stats(twin, ids, target)))
    expected = movement(twin.state_dict(), start)
    assert relative_error(movement(saved["model"], start), expected) < ROUNDING
    hidden = saved["hidden"].double().requires_grad_()
    logits = hidden @ saved["model"]["lm_head.weight"].double().T
    stats = reference.token_stats(logits, target)
    loss_of(*stats).backward()
    assert hidden.grad is not None
    assert (saved["grad_hidden"] - hidden.grad).abs().max() < ROUNDING * hidden.grad.abs().max()
