"""LoRA by PEFT, on the body and on the LM head, with a KL to the model without adapters.

With the adapters switched off, the same model is the reference of the KL term: no second copy is needed.

Run it:
    python docs/recipes/lora.py

For a real model: replace `causal_lm()` by `AutoModelForCausalLM.from_pretrained(...)`, and the rollouts by
yours. Without `lm_head` among the modules the head is frozen, and a call takes two matrix products instead
of three. With it the head's gradient costs as much as training the head. DoRA and other variants on the
head are refused.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from aer_fast.integrations.transformers import fuse_lm_head, next_token_target
from tiny import causal_lm, rollouts

torch.manual_seed(0)
base = causal_lm()  # yours: AutoModelForCausalLM.from_pretrained(...)
model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"]))
fuse_lm_head(model)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

ids, mask = rollouts(8)
target = next_token_target(ids, mask)
advantage = torch.randn(8, 1)
with torch.no_grad():
    old_logprob = model(ids, target=target).logprob
    with model.disable_adapter():
        ref_logprob = model(ids, target=target).logprob


def loss() -> Tensor:
    out = model(
        ids,
        target=target,
        old_logprob=old_logprob,
        advantage=advantage,
        ref_logprob=ref_logprob,
        kl_coef=0.05,
        entropy_coef=0.01,
    )
    total: Tensor = out.loss
    return total


for _ in range(3):
    loss().backward()
    optimizer.step()
    optimizer.zero_grad()

trained = [name for name, p in model.named_parameters() if p.requires_grad]
print(len(trained), all("lora_" in name for name in trained))  # 10 True
