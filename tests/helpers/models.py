"""Small causal LMs of many families, and some that fuse_lm_head refuses."""

from typing import Any

import torch
import transformers
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn

from aer_fast.integrations.transformers import (
    fuse_lm_head,
)

V = 60
SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"n_embd": 16, "n_head": 2, "n_layer": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
RECURRENT = {
    "num_hidden_layers": 3,
    "lru_width": 16,
    "attention_window_size": 8,
    "logits_soft_cap": 3.0,
    "head_dim": 8,
}
LLAMA4 = {"head_dim": 8, "intermediate_size_mlp": 32, "num_local_experts": 2, "use_qk_norm": False}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "untied": ("Llama", {}),
    "tied": ("Qwen3", {"tie_word_embeddings": True}),
    "bias": ("Phi", {"embd_pdrop": 0.0, "resid_pdrop": 0.0}),
    "softcap": ("Gemma2", {"final_logit_softcapping": 3.0, "head_dim": 8}),
    "softcap untied": (
        "Gemma2",
        {"final_logit_softcapping": 3.0, "head_dim": 8, "tie_word_embeddings": False},
    ),
    "scale": ("Cohere", {"logit_scale": 0.3}),
    "scale untied": ("Cohere", {"logit_scale": 0.3, "tie_word_embeddings": False}),
    "scale with bias": ("Cohere", {"logit_scale": 0.3, "tie_word_embeddings": False}),
    "scale with softcap": ("Capped", {"logit_scale": 0.3, "final_logit_softcapping": 2.0}),
    "divided": ("Granite", {"logits_scaling": 3.0}),
    "gpt2": ("GPT2", GPT2),
    "a softcap by another name": ("RecurrentGemma", RECURRENT),
    "a body by another name": ("Llama4", LLAMA4),
}


class Capped(transformers.CohereForCausalLM):
    """A scale below a softcap, which no one family has."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        cap = self.config.final_logit_softcapping
        output.logits = cap * (output.logits / cap).tanh()
        return output


def build(family: str = "untied", **settings: Any) -> Any:
    name, own = FAMILIES[family]
    torch.manual_seed(1)
    configs = {"Llama4": "Llama4TextConfig", "Capped": "CohereConfig"}
    config = getattr(transformers, configs.get(name, f"{name}Config"))(**SIZES | own | settings)
    if name == "Capped":
        return Capped(config)
    model = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(config)
    if family == "scale with bias":
        model.lm_head.bias = nn.Parameter(torch.zeros(V))
    if "bias" in family:
        nn.init.normal_(model.lm_head.bias)
    return model


def adapted(family: str, modules: list[str], **settings: Any) -> Any:
    config = LoraConfig(r=3, target_modules=modules, init_lora_weights=False, **settings)
    model = get_peft_model(build(family), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:  # it begins as what it is a copy of
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


class Bodiless(transformers.GPT2LMHeadModel):
    """A model that is its own base_model, and has no body by another name either."""

    base_model = property(lambda self: self)

    def get_output_embeddings(self) -> Any:
        return self.lm_head


def refused(name: str) -> tuple[Any, str]:
    if name == "no causal LM":
        return nn.Linear(2, 2), "must be a causal LM of transformers, got Linear"
    if name == "encoder-decoder":
        sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)), "encoder-decoder"
    if name == "no head":
        return transformers.LlamaModel(transformers.LlamaConfig(**SIZES)), "no LM head"
    if name == "no body":
        return Bodiless(transformers.GPT2Config(vocab_size=V, **GPT2)), "no body of its own"
    if name == "prompts":
        prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        return get_peft_model(build(), prompts), "learns prompts"
    if name == "prefix":
        prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        return get_peft_model(build(), prefix), "learns prompts"
    if name == "dora":
        return adapted("untied", ["lm_head"], use_dora=True), "not plain LoRA"
    if name == "quantised":
        model = build()
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.to(torch.int8), requires_grad=False)
        return model, "quantised"
    if name == "unknown logits":
        model = build()
        model.lm_head.register_forward_hook(lambda m, a, out: 1.5 * out)
        return model, "does more to its logits"
    model = build()
    fuse_lm_head(model)
    return model, "fused head already"


NAMES = "no causal LM", "encoder-decoder", "no head", "no body", "prompts", "prefix", "dora", "quantised"
