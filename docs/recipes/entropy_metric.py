"""Entropy as a metric: exact, over the whole vocabulary, and without training on it.

It comes with every call. Without a coefficient it has no part in the gradient.

Run it:
    python docs/recipes/entropy_metric.py

For a real model: replace `causal_lm()` by `AutoModelForCausalLM.from_pretrained(...)`, and the rollouts by
yours. Never feed a controller from `stats="active"`, nor from the k largest entropies, nor from rollouts
that a filter has left: what it holds at a target is the plain mean over all response tokens.
"""

import torch

from aer_fast import AdaptiveEntropy
from aer_fast.integrations.transformers import fuse_lm_head, next_token_target
from tiny import causal_lm, rollouts

torch.manual_seed(0)
model = causal_lm()  # yours: AutoModelForCausalLM.from_pretrained(...)
fuse_lm_head(model)
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
controller = AdaptiveEntropy()

ids, mask = rollouts(8)
target = next_token_target(ids, mask)
advantage = torch.randn(8, 1)
advantage[:4] = 0.0  # groups that were all right or all wrong
tokens = (target != -100).sum()

# With the loss, entropy_coef=0: of all tokens, also those without an advantage.
total = torch.zeros(())
for rows in torch.arange(8).chunk(2):
    out = model(ids[rows], target=target[rows], advantage=advantage[rows], denominator=tokens)
    out.loss.backward()
    total += out.entropy.sum()
entropy = total / tokens

# Without a loss, at one matrix product: before the step, or on other data.
with torch.no_grad():
    stats = model(ids, target=target)
print(torch.allclose(entropy, stats.entropy.sum() / tokens))  # True

# Once a step. No coefficient is used here, but the target is anchored, and alpha shows what AER would do.
controller.update(entropy, tokens)
optimizer.step()

# stats="active" is cheaper. It leaves out tokens that cannot have a gradient: no metric of the policy.
out = model(ids, target=target, advantage=advantage, denominator=tokens, stats="active")
print(tokens.item(), (out.entropy != 0).sum().item())  # 64 32
