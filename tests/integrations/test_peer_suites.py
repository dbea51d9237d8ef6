"""The adapters behind which other projects' tests see us, where no checkout of those projects is needed."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aer_fast.integrations._grpo_losses import GRPOLoss
from tests import ROOT
from tests.helpers.peer_suites import by_ppo_loss, by_token_loss, kl_and_clipped, trl_function

pytestmark = pytest.mark.host

# what is in verl's file that the runner needs, and a test of each fate
FAKE_VERL = """
import torch

def logprobs_from_logits(logits, labels): ...

def linear_cross_entropy(*args):
    raise AssertionError("not replaced")

class TestLinearCrossEntropy:
    def __init__(self, k):
        self.k = k

    def generate_hyper(self):
        self.num_tokens, self.vocab_size = 64, 160

    def verify_correctness(self):
        self.generate_hyper()
        assert (self.num_tokens, self.vocab_size) == (4, 10)
        hidden = torch.zeros(1, 4, 8, device="cuda")
        logprob, entropy = linear_cross_entropy(hidden, hidden.new_ones(10, 8), torch.zeros(1, 4).long(), 1.5)
        assert torch.allclose(entropy, torch.tensor(10.0).log())
        assert self.k == 0

MAX_TEST_CASES = 2

def test_lce_non_divisible_vocab_padding():
    if torch.is_tensor(0):
        return linear_cross_entropy()
"""


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_trl_sees_its_own_numbers(bias: bool, softcap: float | None, scale: float) -> None:
    kernels = pytest.importorskip("trl.kernels.chunked_logprob")
    theirs = kernels.ChunkedLogProbFunction
    target = torch.randint(50, (24,))
    upstream = torch.randn(2, 24)
    factors = [torch.randn(24, 16), torch.randn(50, 16) / 4, torch.randn(50)][: 3 if bias else 2]

    def numbers(apply: object) -> list[Tensor]:
        inputs = [x.clone().requires_grad_() for x in factors]
        options = (target, 0.7, 20, softcap, scale, ("entropy",))
        logprob, entropy, *others = apply(*inputs, *[None] * (3 - len(inputs)), *options)  # type: ignore[operator]
        assert others == [None, None, None]
        return [logprob, entropy, *torch.autograd.grad((logprob, entropy), inputs, list(upstream))]

    torch.testing.assert_close(numbers(trl_function(theirs)), numbers(theirs.apply))


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("delta", [None, 1.5])
@pytest.mark.parametrize("given", ["old_logprob", "old_logprob ref_logprob importance_weight", ""])
def test_clipped_losses_are_the_same_by_either_path(loss_type: str, delta: float | None, given: str) -> None:
    """Its own tests clip a few tokens at most; here the policy is far from the one that sampled."""
    B, T, D, V = 3, 10, 8, 20
    kl_coef = 0.2 if "ref_logprob" in given else 0.0
    loss = GRPOLoss(loss_type, (0.1, 0.3), delta, kl_coef=kl_coef, kl_ratio=False)
    assert loss.is_ppo
    keep = (torch.rand(B, T) < 0.7).float()
    constants = {
        "advantage": torch.tensor([[1.0], [-1.0], [-2.0]]),
        "entropy_coef": torch.rand(B, 1),
        "old_logprob": torch.randn(B, T) - 3,
        "ref_logprob": torch.randn(B, T) - 3,
        "importance_weight": torch.rand(B, T),
    }
    always = "advantage", "entropy_coef"
    constants = {name: x for name, x in constants.items() if name in (*always, *given.split())}
    mask, denominator = loss.aggregation(keep, window=2, tokens=keep.sum(), max_length=T)
    head = {"mask": mask, "denominator": denominator, "temperature": 0.9}
    factors = torch.randn(B, T, D), torch.randn(V, D)
    target = torch.randint(V, (B, T))

    def numbers(path: Callable[..., Any]) -> list[Tensor]:
        hidden, weight = (x.clone().requires_grad_() for x in factors)
        out = path(loss, (hidden, weight, target), dict(constants), head)
        _, clipped = kl_and_clipped(loss, out.logprob, constants, keep)
        share = (clipped * keep).sum() / keep.sum()
        assert share > 0.2 or "old_logprob" not in given
        return [out.loss, *torch.autograd.grad(out.loss, (hidden, weight))]

    torch.testing.assert_close(numbers(by_ppo_loss), numbers(by_token_loss))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the file is for a machine without a GPU")
def test_the_runner_replaces_shrinks_and_sees_who_did_not_call_us(tmp_path: Path) -> None:
    file = tmp_path / "tests" / "utils" / "test_linear_cross_entropy.py"
    file.parent.mkdir(parents=True)
    file.write_text(FAKE_VERL)
    command = [sys.executable, "-m", "tests.helpers.peer_suites", "verl", str(tmp_path), "-q", "--tb=line"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "2 calls of ours" in run.stdout
    assert "     1 passed" in run.stdout
    assert "     2 failed" in run.stdout
    assert "passed without calling us" in run.stdout
    assert [path.name for path in tmp_path.rglob("*")] == ["tests", "utils", file.name]
