"""GRPO trainers of four steps, TRL's own and ours, and what they train."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from trl import GRPOConfig

from aer_fast.integrations.trl import AERGRPOConfig, AERGRPOTrainer

ALPHABET = "0123456789+="
V = len(ALPHABET) + 3


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {c: i + 3 for i, c in enumerate(ALPHABET)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "initializer_range": 0.5,
}


def build(kind: str = "llama") -> Any:
    torch.manual_seed(0)
    if kind == "moe":
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
        return MixtralForCausalLM(MixtralConfig(**SIZES, **experts, router_aux_loss_coef=0.5))
    if kind == "vision":
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
        patches = {"patch_size": 2, "spatial_merge_size": 2, "temporal_patch_size": 1, "in_channels": 3}
        sizes = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2}
        words = {"image_token_id": V, "video_token_id": V + 1}
        words |= {"vision_start_token_id": V + 2, "vision_end_token_id": V + 3}
        text = SIZES | {"vocab_size": V + 4, "rope_parameters": rope}
        config = Qwen2VLConfig(text_config=text, vision_config=sizes | patches, **words)
        return Qwen2VLForConditionalGeneration(config)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    return model.to(torch.bfloat16) if kind == "half" else model


def has_a_one(completions: list[str], **_: Any) -> list[float]:
    return [float("1" in c) for c in completions]


def length(completions: list[str], **_: Any) -> list[float]:
    return [len(c) / 10 for c in completions]


PROMPTS = Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(8) for b in range(4)])


def trainer(
    cls: Any,
    folder: Path,
    model: Any = None,
    rewards: Any = has_a_one,
    callbacks: Any = None,
    eval_dataset: Any = None,
    peft_config: Any = None,
    **settings: Any,
) -> Any:
    """A trainer of four steps, two iterations a batch, accumulating two micro-batches."""
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_iterations": 2,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "top_k": 0,
        "seed": 1,
    }
    config = AERGRPOConfig if cls is AERGRPOTrainer else GRPOConfig
    return cls(
        build() if model is None else model,
        rewards,
        config(**defaults | settings),
        train_dataset=PROMPTS,
        eval_dataset=eval_dataset,
        processing_class=tokenizer(),
        callbacks=callbacks,
        peft_config=peft_config,
    )
