"""GSPO and CISPO: policy losses of your own, fused like the built-in one.

A loss per token or per sequence is an `objective`. It sees the tokens that count, [n], of one piece of the
batch after another. CISPO (arXiv 2506.13585) treats tokens one by one. The ratio of GSPO (arXiv 2507.18071)
is one per sequence: `cu_seqlens`, the bounds of the sequences in the flattened `target`, keeps each
sequence in one piece. Masked positions are counted in it.

Run it:
    python docs/recipes/gspo_cispo.py

For a real model: replace `causal_lm()` by `AutoModelForCausalLM.from_pretrained(...)`, and the rollouts by
yours. `linear_token_loss` takes the same objectives from hidden states. Its `target` may be packed, [N],
and `cu_seqlens` is then what flash-attention got. With `logits_to_keep=k` the positions are B · k. More
objectives: docs/linear.md.

Shapes: B rollouts, T tokens of each, n tokens of one piece.
"""

from typing import Any

import torch
from torch import Tensor

from aer_fast.integrations.transformers import fuse_lm_head, next_token_target
from tiny import causal_lm, rollouts

torch.manual_seed(0)
model = causal_lm()  # yours: AutoModelForCausalLM.from_pretrained(...)
fuse_lm_head(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)


def gspo(
    logprob: Tensor, entropy: Tensor, old_logprob: Tensor, advantage: Tensor, sequence: Tensor
) -> Tensor:
    _, s = sequence.unique_consecutive(return_inverse=True)  # [n], 0, 1, ... of this piece
    length = torch.bincount(s)
    mean_log_ratio = logprob.new_zeros(len(length)).index_add(0, s, logprob - old_logprob) / length
    ratio = mean_log_ratio.exp()[s]
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - 3e-4, 1 + 4e-4) * advantage)
    return -surrogate / length[s]  # the tokens of a sequence add up to its loss


def cispo(logprob: Tensor, entropy: Tensor, old_logprob: Tensor, advantage: Tensor) -> Tensor:
    ratio = (logprob.detach() - old_logprob).exp()  # a weight, without a gradient
    return -ratio.clamp(max=5.0) * advantage * logprob


ids, mask = rollouts(8)
B, T = ids.shape
mask &= torch.rand(B, T) < 0.8  # the rest stands for a tool's output, which is not trained on
target = next_token_target(ids, mask)
advantage = torch.randn(B, 1)
sequence = torch.arange(B).unsqueeze(1)  # [B, 1]: of each token, its sequence
cu_seqlens = torch.arange(0, B * T + 1, T)  # [B + 1]
with torch.no_grad():
    old_logprob = model(ids, target=target).logprob


def gspo_loss(**options: Any) -> Tensor:
    out = model(
        ids,
        target=target,
        objective=gspo,
        token_tensors=(old_logprob, advantage, sequence),
        cu_seqlens=cu_seqlens,
        denominator=B,  # the mean over sequences
        **options,
    )
    loss: Tensor = out.loss
    return loss


def cispo_loss(**options: Any) -> Tensor:
    tensors = (old_logprob, advantage)
    loss: Tensor = model(ids, target=target, objective=cispo, token_tensors=tensors, **options).loss
    return loss  # the mean over tokens


# Before the first update all ratios are 1.
print(torch.allclose(gspo_loss(), -advantage.mean()))  # True
for loss_of in (gspo_loss, cispo_loss):
    for _ in range(2):
        loss_of().backward()
        optimizer.step()
        optimizer.zero_grad()
