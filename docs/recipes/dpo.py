"""DPO: a loss of pairs of responses, which is no sum over tokens.

So it is written outside. The fused model returns `logprob` with its gradient, and 0 where nothing is to be
predicted. Chosen and rejected responses go through the model in one batch.

Run it:
    python docs/recipes/dpo.py

For a real model: replace `causal_lm()` by `AutoModelForCausalLM.from_pretrained(...)`, and the pairs by
yours. When all weights are trained and not an adapter, compute `reference` for the whole data set before
the first step, or keep a frozen copy, `copy.deepcopy(model).requires_grad_(False)`.

Shapes: B responses, first all the chosen ones, then all the rejected ones.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import logsigmoid

from aer_fast.integrations.transformers import fuse_lm_head, next_token_target
from tiny import LENGTH, PROMPT, VOCABULARY, causal_lm

torch.manual_seed(0)
base = causal_lm()  # yours: AutoModelForCausalLM.from_pretrained(...)
model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
fuse_lm_head(model)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

prompt = torch.randint(3, VOCABULARY, (4, PROMPT))
chosen, rejected = torch.randint(3, VOCABULARY, (2, 4, LENGTH - PROMPT))
ids = torch.cat((torch.cat((prompt, chosen), 1), torch.cat((prompt, rejected), 1)))
target = next_token_target(ids, torch.arange(LENGTH).expand_as(ids) >= PROMPT)  # responses only
with torch.no_grad(), model.disable_adapter():
    reference = model(ids, target=target).logprob.sum(-1)  # [B], once and for all


def dpo(beta: float = 0.1) -> Tensor:
    gain = model(ids, target=target).logprob.sum(-1) - reference
    chosen, rejected = gain.chunk(2)
    return -logsigmoid(beta * (chosen - rejected)).mean()


first = dpo().item()  # log 2: an adapter begins as the reference
for _ in range(10):
    loss = dpo()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

print(f"{first:.4f}")  # 0.6931
assert loss < first
