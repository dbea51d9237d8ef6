"""Whether the installed package works outside the tree: run it with a Python that has the wheel."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import torch

import aer_fast

TREE = Path(__file__).resolve().parent.parent
place = Path(aer_fast.__file__).resolve()
if TREE in place.parents and "site-packages" not in place.parts:
    sys.exit(f"aer_fast comes from the tree, {place}, not from the wheel")
if metadata.version("aer-fast") != aer_fast.__version__:
    sys.exit(f"the wheel says {metadata.version('aer-fast')}, the package {aer_fast.__version__}")
if "triton" in sys.modules:
    sys.exit("import aer_fast has imported triton")

hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
target = torch.randint(50, (4,))
logp = (hidden @ weight.T).log_softmax(-1)
expected = (logp.gather(-1, target[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1))
for impl in ("reference", "torch"):
    stats = aer_fast.linear_token_stats(hidden, weight, target, impl=impl)
    torch.testing.assert_close(tuple(stats), expected)
out = aer_fast.linear_ppo_loss(hidden, weight, target, stats.logprob.detach(), 1.0, entropy_coef=0.01)
out.loss.backward()
torch.testing.assert_close(out.loss.detach(), -1 - 0.01 * stats.entropy.mean())
print(f"aer_fast {aer_fast.__version__} from {place.parent}, torch {torch.__version__}: works")
