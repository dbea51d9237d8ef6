"""Sample responses from the policy with transformers' generate, and score them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from aer_fast.reference import IGNORE
from training.tasks import Problem


@dataclass(frozen=True)
class Rollouts:
    """Sampled sequences, B = prompts x group_size, the rollouts of a prompt next to each other.

    ``target`` is ``ids`` shifted by one, -100 except where a token was sampled: the logits of position t
    predict target[t], and no slice of the logits is needed.
    """

    ids: Tensor  # [B, T]
    target: Tensor  # [B, T]
    reward: Tensor  # [prompts, group_size]

    @property
    def tokens(self) -> int:
        return int((self.target != IGNORE).sum())


@torch.no_grad()
def sample(
    model: Any,
    tokenizer: Any,
    problems: list[Problem],
    group_size: int,
    temperature: float,
    score: Callable[[Problem, str], float],
) -> Rollouts:
    """Sample group_size responses to each problem. All prompts have one length, so nothing is padded left."""
    prompts = torch.tensor([tokenizer.encode(p.prompt) for p in problems]).repeat_interleave(group_size, 0)
    # The defaults of a model's generation config (top-k, top-p, penalties) would sample from another policy
    # than the one whose log-probabilities and entropy the loss sees.
    settings = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=max(len(p.answer) for p in problems) + 1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    ids = model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=settings)

    response = ids[:, prompts.shape[1] :]
    ended = (response == tokenizer.eos_token_id).cumsum(-1)
    sampled = ended - (response == tokenizer.eos_token_id).long() == 0  # up to and including the first EOS
    target = torch.full_like(ids, IGNORE)
    target[:, prompts.shape[1] - 1 : -1] = response.masked_fill(~sampled, IGNORE)

    texts = []
    for row, kept in zip(response, sampled):
        tokens = row[kept].tolist()
        complete = tokens[-1] == tokenizer.eos_token_id
        texts.append(tokenizer.decode(tokens[:-1]).replace(" ", "") if complete else "")
    rewards = [score(problems[k // group_size], text) for k, text in enumerate(texts)]
    return Rollouts(ids, target, torch.tensor(rewards).view(len(problems), group_size))
