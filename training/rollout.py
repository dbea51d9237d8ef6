"""Prompts, and who samples responses to them: transformers' generate, or vLLM in this process."""

import zlib
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, GenerationMixin
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from aer_fast.integrations.transformers import lm_body
from training.batch import Rollout, cut
from training.config import Config
from training.distributed import World, whole
from training.engine import VLLM
from training.models import end_tokens, load_policy
from training.policy import Policy, positions
from training.processes import naming
from training.tasks import Problem

# what transformers calls keys and values; older ones say past_key_values
PREPARED = signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in PREPARED else "past_key_values"


class Sampler(Protocol):
    """Samples from the policy's distribution at the training temperature, with nothing cut off it."""

    def sync(self) -> None:
        """Take over the policy's weights; all ranks must call."""

    def sample(self, prompts: list[list[int]], seed: int) -> list[Rollout]:
        """One response to each prompt."""


def build_sampler(policy: Policy, path: str, tokenizer: Any, config: Config, here: World) -> Sampler:
    if config.rollout == "vllm":
        return VLLM(policy, path, tokenizer, config, here)
    return Generate(policy, path, tokenizer, config, here)


def encode(problem: Problem, shown: list[Problem], tokenizer: Any, config: Config) -> list[int]:
    """The token ids of a prompt."""
    fault = f"model {config.model}: its tokenizer can't encode {problem.question[:80]!r}"
    if config.chat or problem.before is not None:
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError(f"chat: the tokenizer of model {config.model} has no chat template")
        asked = _turns(problem, config)
        system = asked[:1] if asked[0]["role"] == "system" else []
        examples = [
            turn
            for example in shown
            for turn in (*_turns(example, config), {"role": "assistant", "content": example.answer})
            if turn["role"] != "system"
        ]
        turns = [*system, *examples, *asked[len(system) :]]
        with naming(f"chat: the chat template of model {config.model} fails"):
            text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        with naming(fault):
            return list(tokenizer.encode(text, add_special_tokens=False))
    lines = [config.prompt.format(question=e.question) + " " + e.answer + "\n\n" for e in shown]
    text = "".join(lines) + config.prompt.format(question=problem.question)
    with naming(fault):
        return list(tokenizer.encode(text))


def _turns(problem: Problem, config: Config) -> list[dict[str, Any]]:
    question = config.prompt.format(question=problem.question)
    return [*(problem.before or ()), {"role": "user", "content": question}]


def check_prompt(
    policy: Policy,
    teacher: Policy | None,
    problem: Problem,
    prompt: list[int],
    tokenizer: Any,
    config: Config,
) -> None:
    """What a model can't read is said before it is asked: a GPU would say it with a broken device."""
    rows = policy.causal_lm.get_input_embeddings().weight.shape[0]
    if not prompt:
        raise ValueError(f"model {config.model}: its tokenizer makes no token of {problem.question[:80]!r}")
    if beyond := [index for index in prompt if not 0 <= index < rows]:
        raise ValueError(
            f"model {config.model}: its embedding has {rows} rows, and its tokenizer gives"
            f" {tokenizer.convert_ids_to_tokens(beyond[0])!r} the id {beyond[0]}: {problem.question[:80]!r}"
        )
    for who, reader in (("model", policy), ("teacher", teacher)):
        limit = None if reader is None else positions(reader)
        if limit is not None and len(prompt) + config.max_new_tokens > limit:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and max_new_tokens {config.max_new_tokens} exceed the"
                f" {who}'s {limit} positions: {problem.question[:80]!r}"
            )


def seed_of(config: Config, stream: str, rank: int) -> int:
    """The seed of a random stream: a function of the run's seed, its purpose and the rank alone."""
    return zlib.crc32(f"{config.seed} {stream} {rank}".encode())


class Generate:
    """transformers' generate. With one process it runs the policy itself; with many each rank has a whole
    copy of the weights in the computation's dtype, so that no rank waits for another token by token."""

    def __init__(self, policy: Policy, path: str, tokenizer: Any, config: Config, here: World) -> None:
        self.policy, self.tokenizer, self.config, self.here = policy, tokenizer, config, here
        self.ends = end_tokens(policy.causal_lm, tokenizer)
        self.sampled = policy
        if here.size > 1:
            dtype = policy.autocast or torch.float32
            self.sampled = load_policy(path, config, here.device, dtype=dtype).requires_grad_(False)

    @torch.no_grad()
    def sync(self) -> None:
        if self.here.size > 1:
            copies = dict(self.sampled.model.named_parameters())
            for name, parameter in self.policy.model.named_parameters():
                copies[name].copy_(whole(parameter))

    @torch.no_grad()
    def sample(self, prompts: list[list[int]], seed: int) -> list[Rollout]:
        torch.manual_seed(seed)
        model = self.sampled.causal_lm
        training, defaults = model.training, model.generation_config
        model.eval()  # activation checkpointing would switch the cache off
        # What generate is not told it takes from the model's own generation config: top-k, penalties, ...
        # would make it sample from another policy than the one whose entropy the loss sees.
        model.generation_config = self._settings()
        try:
            size = self.config.rollout_batch
            batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
            return [rollout for batch in batches for rollout in self._batch(model, batch)]
        finally:
            model.generation_config = defaults
            model.train(training)

    def _settings(self) -> Any:
        return GenerationConfig(
            do_sample=True,
            temperature=self.config.temperature,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            max_new_tokens=self.config.max_new_tokens,
            eos_token_id=self.ends,
            pad_token_id=self.tokenizer.pad_token_id,
        )

    def _batch(self, model: Any, prompts: list[list[int]]) -> list[Rollout]:
        width = max(map(len, prompts))
        rows = [[self.tokenizer.pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts]
        attended = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        autocast, device = self.policy.autocast, self.here.device
        ids, mask = (torch.tensor(x, device=device) for x in (rows, attended))
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            generated: Tensor = model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=self._settings(),
                **read_once(model, prompts, ids, mask),
            )
        return [cut(prompt, row, self.ends) for prompt, row in zip(prompts, generated[:, width:].tolist())]


def read_once(model: Any, prompts: list[list[int]], ids: Tensor, mask: Tensor) -> dict[str, Any]:
    """What generate takes so that a prompt of several rows is read once: keys and values of all but its last
    token.

    Nothing where no prompt is shared, nor for models that remember anything else.

    Args:
        prompts: one for each of B rows.
        ids: [B, T], the prompts, padded on the left.
        mask: [B, T], 1 at their tokens.
    """
    number: dict[tuple[int, ...], int] = {}
    same = [number.setdefault(tuple(prompt), len(number)) for prompt in prompts]
    if len(number) == len(prompts) or ids.shape[1] == 1 or not model._supports_default_dynamic_cache():
        return {}
    cache = DynamicCache(config=model.config)
    if not {type(layer) for layer in cache.layers} <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return {}
    alone = [same.index(k) for k in range(len(number))]
    before = mask[alone, :-1]
    positions = (before.cumsum(1) - 1).clamp(min=0)
    lm_body(model)(
        input_ids=ids[alone, :-1],
        attention_mask=before,
        position_ids=positions,
        use_cache=True,
        **{CACHE: cache},
    )
    if cache.get_seq_length() != ids.shape[1] - 1:  # the model has a cache of its own
        return {}
    cache.batch_select_indices(torch.tensor(same, device=ids.device))
    return {CACHE: cache}
