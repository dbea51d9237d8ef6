"""How the tests run docs/recipes, and plain torch to compare them with, from logits."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests import ROOT
from tests.helpers.oracle import EPS32

FOLDER = ROOT / "docs" / "recipes"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "tiny")

# float32 against float64, relative to all that moved: some tens of EPS32 after a few steps
ROUNDING = 100 * EPS32


class Ran(NamedTuple):
    """A recipe that has run: its names, and the model as it was before it was fused, in float64."""

    names: dict[str, Any]
    twin: Any


def execute(name: str, module: str) -> dict[str, Any]:
    """Run a recipe in this process as the module of that name; its names, which its functions look up, too.

    (What runpy returns is a copy of them: functions would not see what a test puts there.)
    """
    path = FOLDER / f"{name}.py"
    names: dict[str, Any] = {"__name__": module, "__file__": str(path)}
    before = list(sys.path)
    sys.path.insert(0, str(FOLDER))  # where a script's own folder stands
    try:
        exec(compile(path.read_text(), str(path), "exec"), names)
    finally:
        sys.path[:] = before
    return names


def commands(name: str) -> list[str]:
    """The commands under "Run it:" in a recipe's docstring."""
    text = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())) or ""
    return re.findall(r"^    (.+)$", text.partition("Run it:\n")[2].partition("\n\n")[0], re.MULTILINE)


def torchrun(folder: Path, name: str, *arguments: str) -> None:
    """Run a recipe on two processes of a CPU, by the command that its docstring has for these arguments."""
    script = f"docs/recipes/{name}.py"
    ending = " ".join((script, *arguments))
    (command,) = [c for c in commands(name) if "torchrun " in c and c.endswith(ending)]
    assert "--nproc-per-node 2 " in command
    variables, _, options = command.partition("torchrun ")
    words = [str(ROOT / word) if word == script else word for word in options.split()]
    ran = subprocess.run(
        (sys.executable, "-m", "torch.distributed.run", *words),
        cwd=folder,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
            **dict(variable.split("=") for variable in variables.split()),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    assert_printed(name, ran.stdout)


def assert_printed(name: str, printed: str) -> None:
    for comment in re.findall(r"print\(.*\)  # (.+)", (FOLDER / f"{name}.py").read_text()):
        assert comment in printed.splitlines()


def eager_stats(
    model: Any, ids: Tensor, target: Tensor, temperature: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """logprob and entropy [B, T], 0 where the target is -100."""
    logits = model(ids).logits
    tau = torch.as_tensor(temperature, dtype=logits.dtype).expand(target.shape).unsqueeze(-1)
    log_softmax = (logits / tau).log_softmax(-1)
    logprob = log_softmax.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    return torch.where(target == -100, 0.0, logprob), torch.where(target == -100, 0.0, entropy)


def eager_ppo(
    logprob: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    live: Tensor,
    clip: tuple[float, float] = (0.2, 0.2),
) -> Tensor:
    """The clipped surrogate, a sum over tokens."""
    ratio = (logprob - old_logprob).exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip[0], 1 + clip[1]) * advantage)
    return -(surrogate * live).sum()


def next_tokens(ids: Tensor, mask: Tensor) -> Tensor:
    """The target by hand."""
    target = torch.full_like(ids, -100)
    for b, t in mask[:, 1:].nonzero().tolist():
        target[b, t] = ids[b, t + 1]
    return target


def relative_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """‖actual - expected‖ / ‖expected‖ of all the tensors together."""
    assert len(actual) == len(expected) > 0
    difference = sum((a.detach().cpu().double() - e).square().sum() for a, e in zip(actual, expected))
    size = sum(e.detach().square().sum() for e in expected)
    assert isinstance(size, Tensor)
    assert size > 0
    return float((difference / size).sqrt())


def movement(state: dict[str, Tensor], start: dict[str, Tensor]) -> list[Tensor]:
    """What training changed."""
    assert state.keys() == start.keys()
    return [state[name].double().cpu() - start[name] for name in start]


def state_of(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def gradients(loss: Tensor, model: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


def sgd(model: Any, loss: Tensor) -> None:
    """A step with learning rate 1."""
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), gradients(loss, model)):
            parameter -= gradient
