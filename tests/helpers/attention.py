"""Small models with every kind of attention, and what packed batches must give as padded ones do."""

import copy
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.helpers.trainers import BASE
from training.attention import settle
from training.batch import Batch
from training.config import Config
from training.policy import Objective, Policy, Tokens

CPU = torch.device("cpu")
PACKS = replace(BASE, packing=True)
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "head_dim": 8,
}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
SIZES |= {"initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WINDOWS = {"sliding_window": 4}
SOME_LAYERS = WINDOWS | {"use_sliding_window": True, "max_window_layers": 2}
MOE = SOME_LAYERS | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# GQA throughout; in Qwen2Moe only the mask says that there is a window, its attention is not told
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen2 windows": ("Qwen2", SOME_LAYERS),
    "qwen2 moe windows": ("Qwen2Moe", MOE | {"shared_expert_intermediate_size": 16}),
    "qwen3": ("Qwen3", {}),
    "qwen3 windows": ("Qwen3", SOME_LAYERS),
    "mistral": ("Mistral", WINDOWS),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", WINDOWS | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3", WINDOWS | {"layer_types": ["sliding_attention", "full_attention"] * 2}),
    "phi": ("Phi", {}),
    "learned positions": ("GPT2", {"n_positions": 64}),
}
EAGER = {"gemma2"}  # SDPA has no softcap


def build(family: str = "qwen3", **settings: Any) -> Any:
    name, own = FAMILIES[family]
    torch.manual_seed(3)
    config = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config"))(
        **SIZES | own | settings
    )
    for key, value in vars(config).items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    kind = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    return getattr(transformers, kind)(config)


def settled(model: Any, config: Config = PACKS) -> Any:
    model = copy.deepcopy(model)
    settle(model, config, CPU)
    return model


def gradients(model: Any, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities, and the gradients of a loss in which each token has a weight of its own."""
    policy = Policy(model, temperature=0.8, dtype="float32", value_head=False)
    n = len(batch.target)
    ones = torch.ones(n)
    constants = Tokens(-3 * ones, torch.linspace(-1, 1, n), ones, 0.1 * ones, None, None, None, None)
    loss, out, _ = policy(batch, constants, Objective((0.2, 0.2), None, 0.0, 0.5, 0.2), float(n))
    loss.backward()
    trained = [p for p in policy.parameters() if p.requires_grad]
    return out.logprob, [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]


def assert_same(found: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    scale = max(grad.abs().max().item() for grad in expected[1])
    assert scale > 1e-3
    for grad, other in zip(found[1], expected[1], strict=True):
        assert (grad - other).abs().max() <= 1e-5 * scale
