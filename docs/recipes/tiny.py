"""What the recipes share: a tiny random model and made-up rollouts, so that they run in seconds on a CPU.

This is the part to replace. With a model of your own, a recipe's first lines become

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B", dtype=torch.bfloat16)
    fuse_lm_head(model)

and `ids`, `mask` and `advantage` come from your sampler and your rewards.

Shapes: B rollouts, T tokens of prompt and response together.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, PROMPT, LENGTH = 64, 4, 12  # entries; tokens of a prompt; tokens of a rollout, prompt included


def causal_lm(vocab_size: int = VOCABULARY, **settings: Any) -> Any:
    """A model of transformers with random weights; `settings` are those of its LlamaConfig."""
    settings |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **settings))


def rollouts(count: int, vocab_size: int = VOCABULARY) -> tuple[Tensor, Tensor]:
    """ids [B, T], int64, and mask [B, T], bool: which tokens belong to a response."""
    ids = torch.randint(3, vocab_size, (count, LENGTH))
    return ids, (torch.arange(LENGTH) >= PROMPT).repeat(count, 1)


def scored_rollouts(count: int) -> Any:
    """A list of rollouts, with responses of different lengths, each a dict of tensors.

    ids [T], int64; mask [T], bool; advantage [1]; accuracy [1], the share of right answers to its prompt. The
    result is typed Any because torch's DataLoader takes a list, but its annotation says otherwise.
    """
    place = torch.arange(LENGTH)
    return [
        {
            "ids": torch.randint(3, VOCABULARY, (LENGTH,)),
            "mask": (place >= PROMPT) & (place < PROMPT + 2 + k % 7),
            "advantage": torch.randn(1),
            "accuracy": torch.rand(1) / 2,
        }
        for k in range(count)
    ]
