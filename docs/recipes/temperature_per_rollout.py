"""A temperature per rollout, as in prime-rl, with the sampler's own log-probabilities.

Log-probabilities and entropy are those of the distribution that a rollout was sampled from. The sampler's
log-probabilities serve as `old_logprob`.

Run it:
    python docs/recipes/temperature_per_rollout.py

For a real model: replace `causal_lm(...)` by `AutoModelForCausalLM.from_pretrained(...)`, and `generate` by
your sampler if it is another one. A temperature may also be one per token, [B, T]. It stands where the
target stands: position t has the one that token t + 1 was sampled at. Entropy grows with the temperature:
if the temperatures of a step change, so does the mean that a controller is fed with.

Shapes: P prompts, B = 3 · P rollouts, T tokens of prompt and response together.
"""

from typing import Any

import torch
from torch.nn.functional import pad

from aer_fast.integrations.transformers import fuse_lm_head, next_token_target
from tiny import VOCABULARY, causal_lm

torch.manual_seed(0)
# yours: AutoModelForCausalLM.from_pretrained(...)
model = causal_lm(eos_token_id=None, initializer_range=0.3)
fuse_lm_head(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
prompts = torch.randint(3, VOCABULARY, (4, 5))
temperatures = [0.6, 1.0, 1.4]

sequences, logprobs = [], []
for tau in temperatures:
    options = {"do_sample": True, "temperature": tau, "top_k": 0, "max_new_tokens": 8}
    sampled = model.generate(prompts, return_dict_in_generate=True, output_scores=True, **options)
    scores = model.compute_transition_scores(sampled.sequences, sampled.scores, normalize_logits=True)
    sequences.append(sampled.sequences)
    logprobs.append(pad(scores, (4, 1)))  # [P, T]: each where its target stands
ids, old_logprob = torch.cat(sequences), torch.cat(logprobs)
temperature = torch.tensor(temperatures).repeat_interleave(len(prompts)).view(-1, 1)  # [B, 1]; or [B, T]
target = next_token_target(ids, torch.arange(13).expand_as(ids) >= 5)
advantage = torch.randn(len(ids), 1)


def step() -> Any:
    return model(
        ids,
        target=target,
        old_logprob=old_logprob,
        advantage=advantage,
        entropy_coef=0.01,
        temperature=temperature,
    )


out = step()
print(torch.allclose(out.logprob, old_logprob, atol=1e-4))  # True
coldest, _, hottest = out.entropy.sum(1).split(len(prompts))
assert coldest.mean() < hottest.mean()
out.loss.backward()
optimizer.step()
