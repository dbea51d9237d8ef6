"""A training loop in plain PyTorch: sample, score, and train with the fused loss.

It shows PPO with group advantages. AER sets the entropy coefficient of each prompt. Each step takes two
epochs of four micro-batches.

Run it:
    python docs/recipes/plain_loop.py

For a real model:
  * Replace `causal_lm(...)` by `AutoModelForCausalLM.from_pretrained(...)`, `prompts` by your tokenized
    prompts and `reward` by yours.
  * Prompts of different lengths are padded on the left for `generate`. Then pass the `attention_mask`
    along, and count padding as prompt in `mask`. Give models with absolute positions (GPT-2) their
    `position_ids`: `(attention_mask.cumsum(1) - 1).clamp(min=0)`.
  * Keep groups whose answers are all right or all wrong. They have no advantage, but an all-wrong group
    still gets its entropy bonus, at full weight.

Shapes: P prompts, G rollouts of each, B = P · G rollouts, T tokens of prompt and response together.
"""

import torch
from torch import Tensor

from aer_fast import AdaptiveEntropy, merge_metrics
from aer_fast.integrations.transformers import fuse_lm_head, next_token_target
from tiny import VOCABULARY, causal_lm

torch.manual_seed(0)
G, EOS = 8, 2  # rollouts of a prompt; the token that ends one
model = causal_lm(eos_token_id=EOS, pad_token_id=0)  # yours: AutoModelForCausalLM.from_pretrained(...)
fuse_lm_head(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
# By default there is no bonus until entropy has fallen to 0.4 of its start; this toy shall see one at once.
controller = AdaptiveEntropy(target_ratio=0.9, alpha_init=0.1)
prompts = torch.randint(3, VOCABULARY, (4, 5))


def rollouts(prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts with responses [B, T], and which tokens belong to a response: up to its end, which counts."""
    # Some models bring a top_k: what is sampled must be what is trained.
    ids = model.generate(prompts.repeat_interleave(G, 0), do_sample=True, top_k=0, max_new_tokens=8)
    end = ids == EOS
    mask = end.cumsum(1) - end.long() == 0
    mask[:, : prompts.shape[1]] = False
    return ids, mask


def reward(ids: Tensor) -> Tensor:
    """1 where the answer is right, here: where the response begins with an even token."""
    return 1.0 - ids[:, prompts.shape[1]] % 2


accuracies = []
for _ in range(10):
    ids, mask = rollouts(prompts)
    target = next_token_target(ids, mask)
    tokens = mask.sum()
    right = reward(ids).view(-1, G)  # [P, G]
    accuracies.append(right.mean().item())
    advantage = (right - right.mean(1, keepdim=True)) / (right.std(1, keepdim=True) + 1e-6)
    advantage = advantage.view(-1, 1)  # [B, 1]

    with torch.no_grad():
        old = model(ids, target=target)  # logprob and entropy, before the first update
    accuracy = right.mean(1)  # [P]
    weight = controller.weight(accuracy).mean()
    # once a step, before anything is filtered
    controller.update(old.entropy.sum() / tokens, tokens, weight=weight)
    coefficient = controller.coefficient(accuracy).repeat_interleave(G).view(-1, 1)

    parts = []  # the metrics of each micro-batch
    for _ in range(2):
        for rows in torch.arange(len(ids)).chunk(4):
            out = model(
                ids[rows],
                target=target[rows],
                old_logprob=old.logprob[rows],
                advantage=advantage[rows],
                entropy_coef=coefficient[rows],
                clip=(0.2, 0.28),
                denominator=tokens,
            )
            out.loss.backward()
            parts.append(out.metrics)
        optimizer.step()
        optimizer.zero_grad()
    metrics = merge_metrics(parts)  # of the step, to log: clip_fraction, approx_kl, ratio_max, ...

print(f"right: {accuracies[0]:.2f} at first, {accuracies[-1]:.2f} at last")
assert accuracies[-1] > accuracies[0]
