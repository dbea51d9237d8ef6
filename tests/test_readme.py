"""What the README shows is what runs and what was measured."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aer_fast

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
LINEAR = (ROOT / "docs" / "linear.md").read_text()


def snippets(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_complete_step_runs_as_printed() -> None:
    (snippet,) = [code for code in snippets(README) if "import torch" in code]
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert torch.isfinite(names["out"].loss)
    assert names["controller"].target > 0
    assert names["weight"].grad.any()


class Model(nn.Module):
    """As far as the README needs one of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lm_head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)

    def model(self, ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=torch.tanh(self.embedding(ids)))

    def forward(self, ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.lm_head(self.model(ids).last_hidden_state))


def test_a_causal_lm_returns_the_loss() -> None:
    for package in ("transformers", "peft"):
        pytest.importorskip(package)
    from tests.test_integrations_transformers import build

    (snippet,) = [code for code in snippets(README) if code.startswith("# any causal LM")]
    ids = torch.randint(3, 60, (2, 3))
    names: dict[str, Any] = {"model": build(), "ids": ids, "old_logprob": -4 + torch.randn(2, 3)}
    names["advantage"] = torch.tensor([[1.0], [-1.0]])
    exec(snippet, names)
    assert all(p.grad is not None for p in names["model"].parameters())


def test_before_and_after_are_the_same_loss() -> None:
    before, after = [code for code in snippets(README) if code.startswith(("# before", "# after"))]
    model = Model()
    names: dict[str, Any] = {
        "torch": torch,
        "model": model,
        "ids": torch.randint(50, (2, 3)),
        "target": torch.randint(50, (2, 3)),
        "old_logprob": -4 + torch.randn(2, 3),
        "advantage": torch.randn(2, 3),
        "mask": torch.tensor([[True, True, False], [True, True, True]]),
        "entropy_coef": 0.01,
        "temperature": 0.8,
    }
    eager = dict(names)
    exec(before, eager)
    expected = torch.autograd.grad(eager["loss"], list(model.parameters()))
    fused = dict(names)
    exec(after, fused)
    torch.testing.assert_close(fused["out"].loss, eager["loss"])
    torch.testing.assert_close([p.grad for p in model.parameters()], list(expected))


@pytest.mark.parametrize("code", snippets(LINEAR), ids=lambda code: code.split()[1])
def test_the_recipes_run_as_printed(code: str) -> None:
    hidden = torch.randn(4, 5, 8, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=True)
    names: dict[str, Any] = {
        "torch": torch,
        "linear_distill_loss": aer_fast.linear_distill_loss,
        "linear_token_loss": aer_fast.linear_token_loss,
        "linear_token_stats": aer_fast.linear_token_stats,
        "hidden": hidden,
        "weight": weight,
        "ref_hidden": torch.randn(4, 5, 12),
        "ref_weight": torch.randn(50, 12),
        "target": torch.randint(50, (4, 5)),
        "mask": torch.rand(4, 5) < 0.8,
        "old_logprob": torch.full((4, 5), -5.0),
        "teacher_logprob": torch.full((4, 5), -2.0),
        "advantage": torch.randn(4, 5),
    }
    exec(code, names)
    for leaf in (hidden, weight):
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all()
        assert leaf.grad.any()


def test_the_plan_is_printed_as_shown() -> None:
    printed = str(aer_fast.plan(65_536, 151_936, 4096)).replace("\n", "\n    ")
    assert f">>> print(aer_fast.plan(65_536, 151_936, 4096))\n    {printed}\n\n" in LINEAR
