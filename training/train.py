"""Train a causal language model by PPO with an adaptive entropy bonus.

    python -m training.train demo
    python -m training.train smollm2 --steps 3
    torchrun --nproc-per-node 8 -m training.train qwen3-8b --data math.jsonl --output runs/aer
    ... and the same command with --resume after whatever happened

`Trainer.step` is the whole algorithm, from prompts to the optimiser; what follows stands in the order in
which it is called.
"""

import math
import random
import time
import zlib
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from aer_fast.integrations.aer import Bookkeeping
from training.advantages import gae, group_relative, leave_one_out, whiten
from training.alarms import alarms
from training.batch import Rollout, make_batch, micro_batches, shares
from training.checkpoint import Folder, restore, save
from training.config import Config, check
from training.distributed import World, shard, world
from training.entropy import build_controller
from training.evaluate import EVALUATION, evaluate
from training.models import load_policy, load_reference, load_tokenizer, resolve
from training.policy import Objective, Tokens, check_model
from training.record import Recorder, Warmup
from training.rewards import Rewards
from training.rollout import build_sampler, encode
from training.tasks import Problem, build_task

Metrics = dict[str, Any]


def train(config: Config, *, quiet: bool = False) -> None:
    """A whole run, from the first step or from the last checkpoint. Raises ValueError for what cannot work,
    FloatingPointError where a loss or gradient is not finite, OSError where something can't be written."""
    check(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    build_controller(config)  # its settings are checked before anything is loaded
    with world() as here:
        folder = claim(config, here)
        try:
            Trainer(config, here, folder, quiet=quiet).run()
        finally:
            if folder is not None:
                folder.release()


def claim(config: Config, here: World) -> Folder | None:
    """The run's folder, on the first rank; what is wrong with it stops all."""
    folder, fault = None, None
    if here.main:
        try:
            folder = Folder(config)
        except ValueError as error:
            fault = str(error)
    if (fault := here.same(fault)) is not None:
        raise ValueError(fault) if here.main else SystemExit(1)
    return folder


class Trainer:
    """A run: everything that is loaded once."""

    def __init__(self, config: Config, here: World, folder: Folder | None, *, quiet: bool) -> None:
        self.config, self.here, self.folder, self.quiet = config, here, folder, quiet or not here.main
        last = here.same(folder.last() if folder is not None and config.resume else None)
        self.task = build_task(config)
        with Warmup(quiet=self.quiet) as report:
            path = resolve(config, report)
        self.tokenizer = load_tokenizer(path)
        self.shown = self.task.examples(config.shots)

        adapter = last / "model" if last is not None and config.lora_rank else None
        start = str(last / "model") if last is not None and not config.lora_rank else path
        policy = load_policy(start, config, here.device, adapter)
        check_model(policy, packing=config.packing, pad=self.tokenizer.pad_token_id, name=config.model)
        self.policy = shard(policy, here)
        self.policy.train(config.activation_checkpointing)  # there is no dropout: it changes nothing else
        self.reference = None
        if config.kl_coef > 0 and not config.lora_rank:
            self.reference = shard(load_reference(path, config, here.device), here)
        self.sampler = build_sampler(self.policy, path, self.tokenizer, config, here)
        self.rewards = Rewards(
            config.reward or self.task.scorer, config.reward_workers, config.reward_timeout
        )

        trained = [p for p in self.policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)
        self.controller = build_controller(config)
        self.aer = Bookkeeping(self.controller, config.threshold)
        self.objective = Objective(
            (config.clip_low, config.clip_high),
            config.dual_clip,
            config.kl_coef,
            config.value_coef,
            config.value_clip,
        )
        self.done = 0
        if last is not None:
            self.done = restore(last, self.policy, self.optimizer, self.controller, here)
        if config.eval_every and not self.task.held_out(1):
            raise ValueError("eval_every: the task has no held-out problems to evaluate on")
        if folder is not None:
            folder.begin(config)
        self.history: list[Metrics] = folder.cut_back(self.done) if folder is not None else []
        self.initial_entropy = self.history[0]["initial_entropy"] if self.history else math.nan

    def run(self) -> None:
        config, recorder = self.config, None
        try:
            if self.folder is not None:
                recorder = Recorder(self.folder, config, self.done, quiet=self.quiet)
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
                    scores = evaluate(self, config.eval_prompts, config.eval_samples, config.k)
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
        rollouts, score, failures = self.collect(problems, G, f"step {step}")
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
        old = self.measure(rollouts, [*passes[0], left_out], reference=config.kl_coef > 0)

        # The controller follows the plain mean over all response tokens, before anything is left out.
        tokens = sum(len(rollout.response) for rollout in rollouts)
        self.aer.observe(torch.cat([stats["entropy"] for stats in old]).double().sum(), tokens)
        moved = self.aer.update()
        coefficient = self.aer.coefficient(accuracy)  # [P]
        if config.degenerate == "advantage_only":
            coefficient = coefficient.masked_fill(degenerate, 0.0)

        # Advantages, one for each response token, and what weighs them.
        advantage = self.advantages(rollouts, reward, old)
        for i, stats in enumerate(old):
            stats["advantage"] = advantage[i]
            stats["entropy_coef"] = torch.full_like(stats["logprob"], coefficient[i // G].item())
            sampled = rollouts[i].logprob
            if sampled is not None:
                stats["mismatch"] = (stats["logprob"] - torch.tensor(sampled)).exp()
                stats["importance_weight"] = stats["mismatch"].clamp(max=config.importance_cap)

        # Several epochs of minibatches with the clipped objective.
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        updates = [
            self.update(
                rollouts, old, rows, f"step {step}, epoch {epoch + 1}, minibatch {number + 1}", problems
            )
            for epoch, minibatches in enumerate(passes)
            for number, rows in enumerate(minibatches)
        ]

        if not finite(self.policy, self.here):
            raise FloatingPointError(f"step {step}: its update made weights that are not finite")

        classes = [problem.label for problem in problems]
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
            "all_right": right.all(-1).double().mean().item(),
            "all_wrong": (~right.any(-1)).double().mean().item(),
            "truncated": truncated.double().mean().item(),
            "response_tokens": tokens / len(rollouts),
            "tokens": tokens,
            **self.mismatch(old),
            **merge(updates),
            "lr": learning_rate(config, step),
            "failed_rewards": len(failures),
            "warnings": [f"{len(failures)} rewards counted as 0; first: {failures[0]}"] if failures else [],
        }

    def collect(
        self, problems: list[Problem], G: int, stream: str
    ) -> tuple[list[Rollout], Tensor, list[str]]:
        """Sample and score G responses to each problem: (rollouts [P·G], scores [P, G], failed rewards)."""
        here = self.here
        mine = problems[here.rank :: here.size]
        self.sampler.sync()
        encoded = [encode(p, self.shown, self.tokenizer, self.config) for p in mine]
        for problem, prompt in zip(mine, encoded):
            self.check_length(problem, prompt)
        prompts = [prompt for prompt in encoded for _ in range(G)]
        rollouts = self.sampler.sample(prompts, seed_of(self.config, stream, here.rank)) if prompts else []
        texts = [self.tokenizer.decode(r.response, skip_special_tokens=True) for r in rollouts]
        scores = self.rewards.score([p for p in mine for _ in range(G)], texts)
        groups = [
            list(zip(rollouts[k : k + G], scores.values[k : k + G])) for k in range(0, len(rollouts), G)
        ]
        everything = [pair for group in here.gather(groups) for pair in group]
        failures = [
            text for part in here.gather_shares({here.rank: scores.failures}).values() for text in part
        ]
        # an evaluation goes on, with zeros: it must not cost a run its last steps
        if len(failures) == len(everything) and stream != EVALUATION:
            raise ValueError(f"the reward failed on every response of {stream}; first: {failures[0]}")
        score = torch.tensor([value for _, value in everything], dtype=torch.float64)
        return [rollout for rollout, _ in everything], score.view(len(problems), G), failures

    def check_length(self, problem: Problem, prompt: list[int]) -> None:
        shape = self.policy.causal_lm.config.get_text_config()
        positions = getattr(shape, "max_position_embeddings", None)
        length = len(prompt) + self.config.max_new_tokens
        if positions is not None and length > positions:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and max_new_tokens {self.config.max_new_tokens} exceed the"
                f" model's {positions} positions: {problem.question[:80]!r}"
            )

    def minibatches(self, counted: Tensor, step: int, epoch: int) -> list[list[int]]:
        """Sequences that count, shuffled and cut into minibatches of nearly equal size."""
        rows = counted.nonzero()[:, 0].tolist()
        random.Random(f"minibatches {self.config.seed} {step} {epoch}").shuffle(rows)
        n, size = self.config.minibatches, len(rows)
        cuts = [size * k // n for k in range(n + 1)]
        return [rows[a:b] for a, b in pairwise(cuts) if b > a]

    def micro_batches(self, rollouts: list[Rollout], rows: list[int]) -> list[list[int]]:
        """This rank's part of a minibatch; all ranks get as many micro-batches, empty ones if need be."""
        share = shares([rollouts[i].length for i in rows], self.here.size)[self.here.rank]
        mine = [rows[k] for k in share]
        cut = micro_batches(
            [rollouts[i].length for i in mine], self.config.micro_tokens, packing=self.config.packing
        )
        batches = [[mine[k] for k in batch] for batch in cut]
        return batches + [[]] * (self.here.most(len(batches)) - len(batches))

    def advantages(
        self, rollouts: list[Rollout], reward: Tensor, old: list[dict[str, Tensor]]
    ) -> list[Tensor]:
        """Of each response token; with GAE the returns are noted in ``old``, too."""
        config = self.config
        if config.advantage == "gae":
            found = []
            for rollout, total, stats in zip(rollouts, reward.flatten().tolist(), old):
                after = stats["final_value"].item() if rollout.truncated else 0.0
                a = gae(stats["value"], total, after, gamma=config.gamma, lam=config.gae_lambda)
                stats["returns"] = a + stats["value"]
                found.append(a)
        else:
            if config.advantage == "leave_one_out":
                relative = leave_one_out(reward)
            else:
                relative = group_relative(reward, scale=config.advantage == "group")
            found = [
                torch.full_like(stats["logprob"], a) for stats, a in zip(old, relative.flatten().tolist())
            ]
        return whiten(found) if config.whiten else found

    @torch.no_grad()
    def measure(
        self, rollouts: list[Rollout], parts: list[list[int]], *, reference: bool = False
    ) -> list[dict[str, Tensor]]:
        """Of each sequence, by the policy as it is: logprob and entropy; value and final_value where there is
        a value head; ref_logprob if asked for. On the CPU; all ranks get all."""
        found: dict[int, dict[str, Tensor]] = {}
        for rows in parts:
            for micro in self.micro_batches(rollouts, rows):
                batch = self.batch(rollouts, micro)
                stats = self.policy(batch)
                fields = {"logprob": stats.logprob, "entropy": stats.entropy, "value": stats.value}
                if reference:
                    initial = self.reference or self.policy
                    fields["ref_logprob"] = initial(batch, adapter=self.reference is not None).logprob
                sizes = [len(rollouts[i].response) for i in micro]
                # clones: a view would be sent to the other ranks with all that it is a part of
                split = {
                    name: [part.clone() for part in values.float().cpu().split(sizes)]
                    for name, values in fields.items()
                    if values is not None and sizes
                }
                for place, i in enumerate(micro):
                    found[i] = {name: values[place] for name, values in split.items()}
                    if stats.final_value is not None:
                        found[i]["final_value"] = stats.final_value[place].float().cpu().clone()
        found = self.here.gather_shares(found)
        return [found[i] for i in sorted(found)]

    def update(
        self,
        rollouts: list[Rollout],
        old: list[dict[str, Tensor]],
        rows: list[int],
        name: str,
        problems: list[Problem],
    ) -> Metrics:
        """One step of the optimiser on a minibatch, in micro-batches of which the result does not depend."""
        lengths = [len(rollouts[i].response) for i in rows]
        weight, denominator = aggregation(self.config, lengths)
        weights = dict(zip(rows, weight))
        sums, largest = torch.zeros(len(SUMMED), dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        for micro in self.micro_batches(rollouts, rows):
            batch = self.batch(rollouts, micro)
            tokens = self.tokens(old, micro, weights)
            # FSDP2 averages the gradients of the ranks; what is wanted is their sum
            loss, out, value_loss = self.policy(batch, tokens, self.objective, denominator / self.here.size)
            loss.backward()
            count = out.metrics["tokens"]
            means = [out.metrics[key] * count for key in SUMMED[3:]]
            losses = [loss.detach() / self.here.size, value_loss / self.here.size]
            sums += torch.stack([x.double().cpu() for x in (*losses, count, *means)])
            largest = torch.maximum(largest, out.metrics["ratio_max"].double().cpu())
        sums, largest = self.here.total(sums), self.here.largest(largest)
        norm = clip_gradients(self.policy, self.config.max_grad_norm)
        if not (math.isfinite(norm) and torch.isfinite(sums).all()):
            asked = sorted({i // self.config.group_size for i in rows})
            raise FloatingPointError(
                f"{name}: loss {sums[0].item():g}, gradient norm {norm:g}; nothing was updated with it."
                f" The first of its {len(asked)} prompts: {problems[asked[0]].question!r}"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        totals = dict(zip(SUMMED, sums.tolist()))
        count = max(totals.pop("tokens"), 1.0)
        metrics = {key: value if key in SUMMED[:2] else value / count for key, value in totals.items()}
        return metrics | {"ratio_max": largest.item(), "grad_norm": norm}

    def batch(self, rollouts: list[Rollout], rows: list[int]) -> Any:
        return make_batch(
            [rollouts[i] for i in rows],
            packing=self.config.packing,
            pad=self.tokenizer.pad_token_id,
            device=self.here.device,
        )

    def tokens(self, old: list[dict[str, Tensor]], rows: list[int], weights: dict[int, float]) -> Tokens:
        """What the loss needs of some sequences."""

        def flat(name: str) -> Tensor | None:
            if name not in old[0]:
                return None
            return torch.cat([old[i][name] for i in rows] or [torch.zeros(0)]).to(self.here.device)

        mask = [torch.full_like(old[i]["logprob"], weights[i]) for i in rows]
        names = ("importance_weight", "ref_logprob", "value", "returns")
        constants = (
            flat("logprob"),
            flat("advantage"),
            torch.cat(mask or [torch.zeros(0)]),
            flat("entropy_coef"),
        )
        return Tokens(*(x.to(self.here.device) for x in constants if x is not None), *map(flat, names))

    def mismatch(self, old: list[dict[str, Tensor]]) -> Metrics:
        """How far the sampler, the reference and the value head are from the policy."""
        found: Metrics = {}
        names = [name for name in old[0] if name != "final_value"]
        columns = {name: torch.cat([stats[name] for stats in old]) for name in names}
        if "importance_weight" in columns:
            found["importance_weight"] = columns["importance_weight"].mean().item()
            found["mismatch_max"] = columns["mismatch"].max().item()
        if "ref_logprob" in columns:
            d = columns["ref_logprob"] - columns["logprob"]
            found["kl"] = (d.exp() - d - 1).mean().item()
        if "returns" in columns:
            spread = columns["returns"].var(unbiased=False)
            unexplained = (columns["returns"] - columns["value"]).var(unbiased=False)
            found["explained_variance"] = (1 - unexplained / spread).item() if spread > 0 else 0.0
        return found

    def measure_initial_entropy(self) -> float:
        """Token-mean entropy of the policy before the first step, on at least ``initial_tokens`` tokens."""
        total, tokens, batch = 0.0, 0, 0
        while tokens < self.config.initial_tokens:
            first = batch * self.config.prompts
            problems = [self.task.training(first + k) for k in range(self.config.prompts)]
            rollouts, _, _ = self.collect(problems, self.config.group_size, f"initial entropy {batch}")
            stats = self.measure(rollouts, [list(range(len(rollouts)))])
            total += torch.cat([s["entropy"] for s in stats]).double().sum().item()
            tokens += sum(len(rollout.response) for rollout in rollouts)
            batch += 1
        return total / tokens

    def checkpoint(self, step: int) -> None:
        path, here = self.config.output, self.here
        save(path, step, self.policy, self.tokenizer, self.optimizer, self.controller, here)
        if self.folder is not None:
            self.folder.forget()


# Sums over tokens and ranks that an update reports; the first two are sums already.
SUMMED: tuple[str, ...] = ("loss", "value_loss", "tokens")
SUMMED += ("clip_fraction_low", "clip_fraction_high", "clip_fraction", "approx_kl")


def aggregation(config: Config, lengths: list[int]) -> tuple[list[float], float]:
    """(a weight for each sequence's tokens, denominator) of a minibatch with responses of these lengths."""
    if config.aggregation == "token_mean":
        return [1.0] * len(lengths), float(sum(lengths))
    if config.aggregation == "sequence_mean":
        return [1.0 / length for length in lengths], float(len(lengths))
    return [1.0] * len(lengths), float(len(lengths) * config.max_new_tokens)


def finite(policy: Any, here: World) -> bool:
    """Whether all weights are finite, on all ranks."""
    local = [getattr(p, "to_local", lambda p=p: p)() for p in policy.parameters() if p.requires_grad]
    bad = torch.stack([~p.detach().isfinite().all() for p in local]).any()
    return here.most(int(bad)) == 0


def clip_gradients(policy: Any, norm: float) -> float:
    """Clip to a norm over all ranks; returns the norm before."""
    total = torch.nn.utils.clip_grad_norm_(policy.parameters(), norm)
    full = getattr(total, "full_tensor", None)
    return float(total if full is None else full())


def learning_rate(config: Config, step: int) -> float:
    """Of a step, counted from 1: a linear rise to the peak, then constant, linear or cosine to 0."""
    if step <= config.lr_warmup:
        return config.lr * step / config.lr_warmup
    left = 1.0 - (step - 1 - config.lr_warmup) / max(config.steps - config.lr_warmup, 1)
    if config.lr_decay == "linear":
        return config.lr * left
    if config.lr_decay == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * (1 - left)))
    return config.lr


def seed_of(config: Config, stream: str, rank: int) -> int:
    """The seed of a random stream: a function of the run's seed, its purpose and the rank alone."""
    return zlib.crc32(f"{config.seed} {stream} {rank}".encode())


def by_class(name: str, values: Tensor, classes: list[str]) -> Metrics:
    """{"name/class": mean over the prompts of the class}."""
    return {
        f"{name}/{label}": values[[k for k, c in enumerate(classes) if c == label]].mean().item()
        for label in sorted(set(classes))
    }


def merge(updates: list[Metrics]) -> Metrics:
    """Means over the updates of a step; the largest of ratio_max and grad_norm."""
    names = [name for name in SUMMED if name != "tokens"]
    means = {name: sum(u[name] for u in updates) / max(len(updates), 1) for name in names}
    largest = {"grad_norm": 0.0, "ratio_max": 1.0}
    return means | {name: max((u[name] for u in updates), default=x) for name, x in largest.items()}


if __name__ == "__main__":
    from training.cli import main

    main(train)
