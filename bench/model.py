"""A causal language model with random weights, and an optimiser step: body, head, loss, backward, AdamW.

Neither time nor memory depends on what the weights are. Models are built on the device, in the dtype they
are trained in: weights, gradients and AdamW's states alike. Where ``recompute`` is set, the body's
activations are not kept: each layer's are computed again in the backward, as trainers do at these lengths.
It is the same for all that are compared, and the head is outside of it. Packed tokens are sequences of one
length, a row of the batch each: attention is causal without a mask, so that PyTorch takes its flash kernel
and no [T, T] exists.

Sizes: T packed tokens, N of them predict a response token, V words.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PROMPT_SHARE = 8  # one token in eight is the prompt's


@dataclass(frozen=True)
class Shape:
    """What a model is made of."""

    family: str  # of transformers
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    length: int  # tokens of a sequence
    recompute: bool


SHAPES = {
    "SmolLM2-135M": Shape("llama", 576, 1536, 30, 9, 3, 64, length=256, recompute=False),
    "Qwen3-0.6B": Shape("qwen3", 1024, 3072, 28, 16, 8, 128, length=4096, recompute=True),
    "tiny": Shape("qwen3", 128, 128, 2, 2, 2, 64, length=128, recompute=True),
}


def rows_of(tokens: int) -> int:
    """N of T: a response's tokens, each predicted by the position before it."""
    return tokens - tokens // PROMPT_SHARE


def build(shape: Shape, V: int, dtype: torch.dtype, device: str) -> Any:
    """A model in training mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        shape.family,
        vocab_size=V,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=True,
    )
    with torch.device(device):
        policy: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    if shape.recompute:
        enable = getattr(policy, "activation_checkpointing_enable", None)  # its name since transformers 5.2x
        (enable or policy.gradient_checkpointing_enable)({"use_reentrant": False})
    return policy.train()


def hidden_of(policy: Any, ids: Tensor) -> Tensor:
    """[N, D] at the positions that predict a response token."""
    prompt = ids.shape[1] // PROMPT_SHARE
    hidden: Tensor = policy.model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden[:, prompt - 1 : -1].flatten(0, 1)


def targets_of(ids: Tensor) -> Tensor:
    """[N]: the response tokens."""
    return ids[:, ids.shape[1] // PROMPT_SHARE :].flatten()


def optimizer_of(policy: Any) -> torch.optim.Optimizer:
    """AdamW with the states that a run has had since its first step; its learning rate is 0."""
    fused = next(policy.parameters()).is_cuda  # as trainers have it there: no copies of the weights
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, fused=fused)
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def train(policy: Any, optimizer: torch.optim.Optimizer, ids: Tensor, loss: Callable[..., Tensor]) -> Tensor:
    """One step; ``loss`` is a function of hidden [N, D] and the head's weight [V, D]."""
    value = loss(hidden_of(policy, ids), policy.lm_head.weight)
    torch.autograd.backward(value)
    optimizer.step()
    optimizer.zero_grad()
    return value.detach()
