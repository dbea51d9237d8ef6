"""Tiny models for the tasks of `temptations`, made from scratch by a supervised warm-up."""

import math
import random
from collections.abc import Callable
from typing import Any

import torch

from training.tasks import is_held_out, parse
from training.temptations import DOMAINS, demonstration, draw

PAD, EOS = "<pad>", "<eos>"
WARMUP: dict[str, Any] = {
    "steps": 1500,
    "batch": 256,
    "lr": 1e-3,  # peak; linear warm-up over 5% of the steps, cosine decay to 0
    "right": 0.05,  # share of demonstrations with the right answer; the others show the shortcut
    "noise": 0.1,  # probability with which a symbol of a demonstration is replaced
    "seed": 0,
}


def is_one(model: str) -> bool:
    """Whether a model's name is that of a task, with settings or without."""
    return model.partition("(")[0] in DOMAINS


def settings_of(model: str, usual: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The task and all settings of a model named "carry(...)". Raises ValueError that names what is wrong."""
    calls = parse(model)
    if len(calls) != 1 or calls[0].weight != 1:
        raise ValueError(f"model {model}: one model, not a sum")
    name, asked = calls[0].name, calls[0].settings
    domain = DOMAINS[name]
    defaults = {domain.setting: domain.usual} | WARMUP
    settings = defaults | usual | asked
    if unknown := set(settings) - set(defaults):
        raise ValueError(f"model {model}: unknown setting {min(unknown)}")
    limits: dict[str, tuple[float, float]] = {
        domain.setting: (1, domain.largest),
        "steps": (1, 10**6),
        "batch": (1, 10**6),
        "seed": (0, 2**63 - 1),
    }
    limits |= {"lr": (1e-9, 1), "right": (0, 1), "noise": (0, 1)}
    for setting, (low, high) in limits.items():
        value, kind = settings[setting], type(defaults[setting])
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or not low <= value <= high:
            raise ValueError(f"model {model}: {setting} must be from {low} to {high}, got {value!r}")
    return name, settings


def build_tokenizer(alphabet: str) -> Any:
    """One token per character; saved and loaded like any tokenizer of transformers."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([PAD, EOS, *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)


def build_model(tokenizer: Any, seed: int) -> Any:
    """A Qwen3 of 0.4 million parameters."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=24,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        initializer_range=0.1,  # the default 0.02 is for models a hundred times as wide
    )
    return Qwen3ForCausalLM(config)


def make(task: str, settings: dict[str, Any], report: Callable[[int, int, float], None]) -> tuple[Any, Any]:
    """(model, tokenizer) of a task after its warm-up; ``report`` hears step, steps and loss."""
    domain, steps, lr = DOMAINS[task], settings["steps"], settings["lr"]
    tokenizer = build_tokenizer(domain.alphabet)
    model = build_model(tokenizer, settings["seed"])
    rng = random.Random(settings["seed"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    rise = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    model.train()
    for step in range(steps):
        pairs = [_demonstration(rng, task, settings) for _ in range(settings["batch"])]
        ids = torch.tensor([[*tokenizer.encode(q + r), tokenizer.eos_token_id] for q, r in pairs])
        prompt = len(pairs[0][0])
        logits = model(ids[:, :-1]).logits[:, prompt - 1 :]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, prompt:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        report(step + 1, steps, loss.item())
    return model, tokenizer


def _demonstration(rng: random.Random, task: str, settings: dict[str, Any]) -> tuple[str, str]:
    domain = DOMAINS[task]
    while True:
        example = draw(domain, rng, settings[domain.setting])
        if not is_held_out(example.key):
            shares = {name: settings[name] for name in ("right", "noise")}
            return example.question, demonstration(domain, rng, example, **shares)
