"""What the README shows is what runs and what was measured."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aer_fast
from tests import ROOT

pytestmark = pytest.mark.host
README = (ROOT / "README.md").read_text()
LINEAR = (ROOT / "docs" / "linear.md").read_text()


def snippets(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def snippet(start: str) -> str:
    """The README's snippet whose first comment begins so."""
    (found,) = [code for code in snippets(README) if code.startswith(f"# {start}")]
    return found


def test_every_snippet_is_run_below() -> None:
    tested = re.findall(r'snippet\("(.+?)"\)', Path(__file__).read_text())
    assert len(snippets(README)) == len(set(tested))


def test_the_first_call_runs_in_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "first.py").write_text(snippet("first.py"))
    command = [sys.executable, "first.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    shapes, losses = done.stdout.splitlines()
    assert shapes == "torch.Size([4, 6]) torch.Size([4, 6])"
    loss, bonus = map(float, losses.split())
    assert loss == pytest.approx(bonus, abs=1e-6)
    assert loss < 0


def test_the_complete_step_runs_as_printed() -> None:
    names: dict[str, Any] = {}
    exec(snippet("one step with AER"), names)
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
    from tests.helpers.models import build

    ids = torch.randint(3, 60, (2, 3))
    names: dict[str, Any] = {"model": build(), "ids": ids, "old_logprob": -4 + torch.randn(2, 3)}
    names["advantage"] = torch.tensor([[1.0], [-1.0]])
    exec(snippet("any causal LM"), names)
    assert all(p.grad is not None for p in names["model"].parameters())


def test_before_and_after_are_the_same_loss() -> None:
    before, after = snippet("before"), snippet("after")
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


def measured(op: str) -> dict[str, tuple[float, float, float]]:
    """The README's table of an operation: provider -> (ms, MiB, of eager's time)."""
    (table,) = re.findall(rf"^{op}, .+:\n\n.*\n.*\n((?:\|.*\n)+)", README, re.MULTILINE)
    rows = [[cell.strip().replace(",", "") for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    # of "TRL 1.16.0" the name; "aer_fast, in place" has no version
    return {
        re.sub(r" \d.*", "", row[0]): (float(row[1].split()[0]), float(row[2]), float(row[3])) for row in rows
    }


def test_what_the_readme_says_of_its_tables_is_in_them() -> None:
    linear, logits = measured("linear_ppo_loss"), measured("ppo_loss")
    ours = linear.pop("aer_fast")
    assert ours[0] < min(ms for ms, _, _ in linear.values())  # the fastest
    assert 0.25 < ours[1] / linear["eager"][1] < 0.4  # a third of eager's memory
    assert {name for name, (_, mib, _) in linear.items() if mib < ours[1]} == {"unsloth-zoo", "verl Triton"}
    assert logits["aer_fast"][2] == pytest.approx(1 / 8, abs=0.02)
    assert logits["aer_fast"][0] == pytest.approx(logits["TRL"][0], rel=0.1)
    assert logits["aer_fast in place"][1] < 1
    steps = (ROOT / "docs" / "benchmarks.md").read_text().split("### In use")[1].split("\n### ")[0]
    assert re.search(r"^\| 16,384 \| aer_fast \| .* \| 0\.9\d \| 0\.19 \|$", steps, re.MULTILINE)
    assert re.search(r"^\| 16,384 \| TRL [\d.]+ \| .* \| 0\.12 \|$", steps, re.MULTILINE)
    assert "| 65,536 | eager | out of memory |" in steps


def test_the_evidence_in_short_is_that_of_its_page() -> None:
    short = README.split("## Does it help?")[1].split("\n## ")[0]
    page = (ROOT / "docs" / "evidence.md").read_text().split("## In short")[1].split("\n## ")[0]
    numbers = [float(number) for number in re.findall(r"\d\.\d+", page)]
    known = {f"{number:.{digits}f}" for number in numbers for digits in (2, 3)}
    quoted = set(re.findall(r"\d\.\d\d+", short))
    assert len(quoted) > 10
    assert quoted <= known


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
