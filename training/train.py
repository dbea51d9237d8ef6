"""Train a causal language model by PPO with an adaptive entropy bonus.

    python -m training.train demo
    python -m training.train smollm2 --steps 3
    torchrun --nproc-per-node 8 -m training.train qwen3-8b --data math.jsonl --output runs/aer
    ... and the same command with --resume after whatever happened

`Trainer.step` is the whole algorithm, from prompts to the optimiser; what follows stands in the order in
which it is called.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports below: end, with no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import math
import random
import time
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import tyro
from torch import Tensor

from aer_fast.integrations.aer import Bookkeeping
from training import agreement
from training.advantages import token_advantages
from training.batch import Rollout
from training.checkpoint import Folder, check_data, claim, restore, save
from training.config import PRESETS, Config, check
from training.data import build_task
from training.distributed import World, shard, world
from training.engine import VLLM
from training.entropy import build_controller
from training.evaluation import Result, summarise, variety
from training.learner import Learner, finite, learning_rate, merge, mismatch
from training.models import check_tokens, load_policy, load_reference, load_teacher, load_tokenizer, resolve
from training.policy import check_model
from training.processes import command, naming
from training.record import Recorder, Warmup, alarms
from training.rewards import Rewards
from training.rollout import build_sampler, check_prompt, encode, seed_of
from training.tasks import Problem

Metrics = dict[str, Any]


def train(config: Config, *, quiet: bool = False) -> None:
    """A whole run, from the first step or from the last checkpoint. Raises ValueError for what cannot work,
    FloatingPointError where a loss or gradient is not finite, OSError where something can't be written."""
    check(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    build_controller(config)  # checks its settings before anything is loaded
    with world() as here:
        folder = claim(config, here)
        try:
            Trainer(config, here, folder, quiet=quiet).run()
        finally:
            if folder is not None:
                folder.release()


class Sampled(NamedTuple):
    """Responses to P problems, G each."""

    rollouts: list[Rollout]  # [P * G]
    score: Tensor  # [P, G]
    votes: list[str]  # [P * G], the answers in the responses as `Task.vote` finds them
    failures: list[str]  # rewards that failed


class Trainer:
    """A run: everything that is loaded once. One that does not train can but `evaluate`."""

    def __init__(
        self, config: Config, here: World, folder: Folder | None, *, quiet: bool, trains: bool = True
    ) -> None:
        self.config, self.here, self.folder, self.quiet = config, here, folder, quiet or not here.main
        last = here.same(folder.last() if folder is not None and config.resume else None)
        self.task = build_task(config)
        check_data(folder, self.task.digests, config, here)
        with Warmup(quiet=self.quiet) as report:
            path = resolve(config, report)
        self.tokenizer = load_tokenizer(path)
        self.shown = self.task.examples(config.shots)

        adapter = last / "model" if last is not None and config.lora_rank else None
        start = str(last / "model") if last is not None and not config.lora_rank else path
        policy = load_policy(start, config, here.device, adapter)
        check_tokens(policy.causal_lm, self.tokenizer, config.model)
        row = config.micro_tokens if config.packing else None
        check_model(policy, row=row, pad=self.tokenizer.pad_token_id, name=config.model)
        self.teacher = None
        if config.teacher is not None and trains:
            with Warmup(quiet=self.quiet) as report:
                self.teacher = load_teacher(policy, self.tokenizer, config, here.device, report)
            self.teacher = shard(self.teacher, here)
        self.policy = shard(policy, here)
        self.encoded(self.task.training(0))  # what no prompt survives is said before the folder is taken
        self.policy.train(config.activation_checkpointing)  # there is no dropout: it changes nothing else
        reference = None
        if config.kl_coef > 0 and not config.lora_rank:
            reference = shard(load_reference(path, config, here.device), here)
        self.sampler = build_sampler(self.policy, path, self.tokenizer, config, here)
        self.rewards = Rewards(
            config.reward or self.task.scorer, config.reward_workers, config.reward_timeout
        )

        pad = self.tokenizer.pad_token_id
        self.learner = Learner(self.policy, reference, self.teacher, config, here, pad=pad, trains=trains)
        self.controller = build_controller(config)
        self.aer = Bookkeeping(self.controller, config.threshold)
        self.done = 0
        if last is not None:
            self.done = restore(last, self.policy, self.learner.optimizer, self.controller, here)
        if config.eval_every and not self.task.held_out(1):
            raise ValueError("eval_every: the task has no held-out problems to evaluate on")
        if folder is not None:
            folder.begin(config, self.task.digests)
        self.history: list[Metrics] = folder.cut_back(self.done) if folder is not None else []
        self.initial_entropy = self.history[0]["initial_entropy"] if self.history else math.nan
        self.bound = math.inf  # of how far the sampler may be from the policy; `run` asks for it

    def run(self) -> None:
        config, recorder = self.config, None
        try:
            if self.folder is not None:
                recorder = Recorder(self.folder, config, self.done, quiet=self.quiet)
            if isinstance(self.sampler, VLLM):
                prompts = [self.encoded(self.task.training(k)) for k in range(config.prompts)]
                self.bound = agreement.check(self.sampler, self.learner, prompts)
            if self.done == 0:
                self.initial_entropy = self.measure_initial_entropy()
                if self.controller.target is None:  # else it is absolute
                    self.controller.anchor(self.initial_entropy)
            for step in range(self.done + 1, config.steps + 1):
                began = time.monotonic()
                metrics = self.step(step)
                if recorder is not None:
                    self.history.append(metrics)
                    metrics["warnings"] += alarms(self.history, self.controller.alpha_range)
                    seconds = time.monotonic() - began
                    speed = {"seconds": seconds, "tokens_per_second": metrics["tokens"] / seconds}
                    recorder.step(metrics, {"step": step} | speed)
                if config.eval_every and (step % config.eval_every == 0 or step == config.steps):
                    scores = self.evaluate(config.eval_prompts, config.eval_samples, config.k, goes_on=True)
                    if recorder is not None:
                        recorder.evaluation({"step": step} | scores)
                if step % config.checkpoint_every == 0 or step == config.steps:
                    self.checkpoint(step)
        finally:
            self.rewards.close()
            if recorder is not None:
                recorder.close()

    def step(self, step: int) -> Metrics:
        """One step of PPO."""
        config = self.config
        P, G = config.prompts, config.group_size

        # Sample G responses to each of P prompts, and score them. Every rank gets to know all of them.
        problems = [self.task.training((step - 1) * P + k) for k in range(P)]
        rollouts, score, votes, failures = self.collect(problems, G, f"step {step}")
        truncated = torch.tensor([rollout.truncated for rollout in rollouts])
        reward = score.clone()
        if config.truncated == "penalise":
            reward -= config.truncation_penalty * truncated.view(P, G)
        right = score >= config.threshold
        accuracy = self.aer.accuracy(score)  # [P]
        degenerate = right.all(-1) | ~right.any(-1)  # [P]

        # Which sequences are trained on, in which order.
        counted = torch.ones(P * G, dtype=torch.bool)
        if config.truncated == "mask":
            counted &= ~truncated
        if config.degenerate == "drop":
            counted &= ~degenerate.repeat_interleave(G)
        passes = [self.minibatches(counted, step, epoch) for epoch in range(config.epochs)]

        # The policy that sampled, measured once, in the micro-batches of the first pass: the first minibatch
        # has ratio 1. Sequences that are not trained on are measured, too.
        left_out = (~counted).nonzero()[:, 0].tolist()
        old = self.learner.measure(rollouts, [*passes[0], left_out], reference=config.kl_coef > 0)
        agreement.watch(rollouts, old, self.bound, self.learner, f"step {step}", group=G)

        # The controller follows the plain mean over all response tokens, before anything is left out.
        tokens = sum(len(rollout.response) for rollout in rollouts)
        self.aer.observe(torch.cat([stats["entropy"] for stats in old]).double().sum(), tokens, accuracy)
        moved = self.aer.update()
        coefficient = self.aer.coefficient(accuracy)  # [P]
        if config.degenerate == "advantage_only":
            coefficient = coefficient.masked_fill(degenerate, 0.0)

        # Advantages, one for each response token, and what weighs them.
        advantage = token_advantages(config, rollouts, reward, old)
        for i, stats in enumerate(old):
            stats["advantage"] = advantage[i]
            stats["entropy_coef"] = torch.full_like(stats["logprob"], coefficient[i // G].item())
            sampled = rollouts[i].logprob
            if sampled is not None:
                stats["mismatch"] = (stats["logprob"] - torch.tensor(sampled)).exp()
                stats["importance_weight"] = stats["mismatch"].clamp(max=config.importance_cap)

        # Several epochs of minibatches with the clipped objective, and the divergence from the teacher.
        self.learner.set_learning_rate(step)
        updates = [
            self.learner.update(
                rollouts, old, rows, f"step {step}, epoch {epoch + 1}, minibatch {number + 1}", problems
            )
            for epoch, minibatches in enumerate(passes)
            for number, rows in enumerate(minibatches)
        ]

        if not finite(self.policy, self.here):
            raise FloatingPointError(f"step {step}: its update made weights that are not finite")

        classes = [problem.label for problem in problems]
        distinct, spread = variety(votes, G)
        return {
            "step": step,
            "reward": reward.mean().item(),
            "score": score.mean().item(),
            "accuracy": accuracy.mean().item(),
            "entropy": moved["aer/entropy"],
            "target": moved["aer/target"],
            "initial_entropy": self.initial_entropy,
            "alpha": moved["aer/alpha"],
            "coefficient": coefficient.mean().item(),
            **by_class("accuracy", accuracy, classes),
            **by_class("coefficient", coefficient, classes),
            **by_class("any_right", right.any(-1).double(), classes),
            **by_class("distinct_answers", distinct, classes),
            **by_class("answer_entropy", spread, classes),
            "all_right": right.all(-1).double().mean().item(),
            "all_wrong": (~right.any(-1)).double().mean().item(),
            "truncated": truncated.double().mean().item(),
            "response_tokens": tokens / len(rollouts),
            "tokens": tokens,
            **mismatch(old),
            **merge(updates),
            "lr": learning_rate(config, step),
            **failed(failures),
        }

    def collect(self, problems: list[Problem], G: int, stream: str, *, goes_on: bool = False) -> Sampled:
        """Sample and score G responses to each problem.

        ``stream`` names the random stream. Where the reward fails on every response the run stops, unless it
        ``goes_on``, with zeros.
        """
        here = self.here
        mine = problems[here.rank :: here.size]
        self.sampler.sync()
        prompts = [prompt for prompt in map(self.encoded, mine) for _ in range(G)]
        rollouts = self.sampler.sample(prompts, seed_of(self.config, stream, here.rank)) if prompts else []
        texts = self.decoded(rollouts)
        scores = self.rewards.score([p for p in mine for _ in range(G)], texts)
        found = list(zip(rollouts, scores.values, map(self.task.vote, texts)))
        groups = [found[k : k + G] for k in range(0, len(found), G)]
        everything = [response for group in here.gather(groups) for response in group]
        failures = [
            text for part in here.gather_shares({here.rank: scores.failures}).values() for text in part
        ]
        if len(failures) == len(everything) and not goes_on:
            raise ValueError(f"the reward failed on every response of {stream}; first: {failures[0]}")
        score = torch.tensor([value for _, value, _ in everything], dtype=torch.float64)
        rollouts, votes = [rollout for rollout, _, _ in everything], [vote for _, _, vote in everything]
        return Sampled(rollouts, score.view(len(problems), G), votes, failures)

    def encoded(self, problem: Problem) -> list[int]:
        """The prompt of a problem: token ids that the model has."""
        prompt = encode(problem, self.shown, self.tokenizer, self.config)
        check_prompt(self.policy, self.teacher, problem, prompt, self.tokenizer, self.config)
        return prompt

    def decoded(self, rollouts: list[Rollout]) -> list[str]:
        with naming(f"model {self.config.model}: its tokenizer can't decode a response"):
            return [self.tokenizer.decode(r.response, skip_special_tokens=True) for r in rollouts]

    def minibatches(self, counted: Tensor, step: int, epoch: int) -> list[list[int]]:
        """Sequences that count, shuffled and cut into minibatches of nearly equal size."""
        rows = counted.nonzero()[:, 0].tolist()
        random.Random(f"minibatches {self.config.seed} {step} {epoch}").shuffle(rows)
        n, size = self.config.minibatches, len(rows)
        cuts = [size * k // n for k in range(n + 1)]
        return [rows[a:b] for a, b in pairwise(cuts) if b > a]

    @torch.no_grad()
    def evaluate(self, prompts: int, samples: int, ks: tuple[int, ...], *, goes_on: bool = False) -> Result:
        """pass@k, maj@k and entropy on held-out problems, overall and by class (`summarise`); failed rewards.

        Where all rewards fail it raises ValueError, unless it ``goes_on``: no run shall lose its last steps.

        The problems and the random stream are the evaluation's own: neither depends on the step, and training
        does not notice.
        """
        problems = self.task.held_out(prompts)
        if not problems:
            raise ValueError("the task has no held-out problems to evaluate on")
        rollouts, score, votes, failures = self.collect(problems, samples, "evaluation", goes_on=goes_on)
        stats = self.learner.measure(rollouts, [list(range(len(rollouts)))])
        agreement.watch(rollouts, stats, self.bound, self.learner, "an evaluation", group=samples)
        return failed(failures) | summarise(
            problems,
            self.task.classes,
            score,
            votes,
            [found["entropy"] for found in stats],
            threshold=self.config.threshold,
            ks=ks,
        )

    def measure_initial_entropy(self) -> float:
        """Token-mean entropy of the policy before the first step, on at least ``initial_tokens`` tokens."""
        total, tokens, batch = 0.0, 0, 0
        while tokens < self.config.initial_tokens:
            first = batch * self.config.prompts
            problems = [self.task.training(first + k) for k in range(self.config.prompts)]
            rollouts = self.collect(problems, self.config.group_size, f"initial entropy {batch}").rollouts
            stats = self.learner.measure(rollouts, [list(range(len(rollouts)))])
            total += torch.cat([s["entropy"] for s in stats]).double().sum().item()
            tokens += sum(len(rollout.response) for rollout in rollouts)
            batch += 1
        return total / tokens

    def checkpoint(self, step: int) -> None:
        path, here = self.config.output, self.here
        save(path, step, self.policy, self.tokenizer, self.learner.optimizer, self.controller, here)
        if self.folder is not None:
            self.folder.forget()


def failed(failures: list[str]) -> Metrics:
    """What is reported of rewards that failed."""
    first = [f"{len(failures)} rewards counted as 0; first: {failures[0]}"] if failures else []
    return {"failed_rewards": len(failures), "warnings": first}


def by_class(name: str, values: Tensor, classes: list[str]) -> Metrics:
    """{"name/class": mean over the prompts of the class}."""
    return {
        f"{name}/{label}": values[[k for k, c in enumerate(classes) if c == label]].mean().item()
        for label in sorted(set(classes))
    }


if __name__ == "__main__":
    command(
        lambda: tyro.extras.overridable_config_cli(PRESETS, description=train.__doc__),
        train,
        "the same command with --resume goes on",
        lambda chosen: chosen.output,
    )
