"""What the README shows is what runs and what was measured."""

import re
from pathlib import Path
from typing import Any

import torch

from bench import from_logits

README = Path(__file__).parent.parent / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_complete_step_runs_as_printed() -> None:
    (snippet,) = [code for code in SNIPPETS if "import torch" in code]
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert torch.isfinite(names["out"].loss)
    assert names["controller"].target > 0


def test_before_and_after_are_the_same_loss() -> None:
    before, after = [code for code in SNIPPETS if code.startswith(("# before", "# after"))]
    leaf = torch.randn(2, 3, 50, requires_grad=True)
    names: dict[str, Any] = {
        "torch": torch,
        "target": torch.randint(50, (2, 3)),
        "old_logprob": -4 + torch.randn(2, 3),
        "advantage": torch.randn(2, 3),
        "mask": torch.tensor([[True, True, False], [True, True, True]]),
        "entropy_coef": 0.01,
        "temperature": 0.8,
    }
    eager = names | {"logits": leaf * 1}
    exec(before, eager)
    (expected,) = torch.autograd.grad(eager["loss"], leaf)
    fused = names | {"logits": leaf * 1}
    exec(after, fused)
    torch.testing.assert_close(fused["out"].loss, eager["loss"])
    torch.testing.assert_close(leaf.grad, expected)


def test_the_table_is_the_recorded_one() -> None:
    rows = from_logits.recorded()
    assert [row["provider"] for row in rows] == list(from_logits.PROVIDERS)
    text = README.read_text()
    assert from_logits.markdown(rows) in text
    for key in ("device", "torch", "commit", "date"):
        assert rows[0][key] in text
