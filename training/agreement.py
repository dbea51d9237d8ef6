"""Whether a sampler that reports log-probabilities samples from the policy: asked at the start of a run, and
watched from then on. A sampler that is off must never train.

At the start noise is added to every parameter of the policy, a fifth of its root mean square, and the sampler
takes that over. Of what it samples, δ = log-probability by the policy − by the sampler, for each token.

- *All of them.* r is the mean change of the policy's own log-probabilities when each weight moves at random
  by half a unit in the last place of the computation's dtype: the measure of what two programs may differ by.
  The mean of |δ| was 0.3 to 0.95 r where nothing was wrong. More than ``SHARP`` r is refused.
- *One of them.* In bfloat16, or where the mean is above ``SHARP`` r but below ``HARMLESS``, a small parameter
  that was not taken over may be hidden. For each, the policy says what leaving it out does: d, for each
  token. Σ δ d / Σ d² is 1 for one that was left out and 0 for the others, up to rounding. Above ½, and beyond
  ``DOUBT`` standard deviations √Σ δ² d², it is refused.

Then the real weights are taken over, and δ and r measured again. From then on the mean of |δ| over the tokens
of a step must stay below ``LOOSE`` times the larger r. Differences up to ``HARMLESS`` never count: they
change an importance weight by a thousandth.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from training.batch import Rollout
from training.learner import Learner
from training.policy import Policy
from training.rollout import seed_of

CHANGE = 0.2  # relative to the root mean square of a parameter
TOKENS = 512  # on each rank
LENGTH, SHOWN = 16, 8  # of a response, of its prompt while the weights are changed
SHARP, LOOSE, DOUBT, HARMLESS = 2.0, 4.0, 6.0, 1e-3


class Reporter(Protocol):
    """A `rollout.Sampler` whose rollouts have log-probabilities."""

    def sync(self) -> None: ...

    def sample(self, prompts: list[list[int]], seed: int, *, most: int | None = None) -> list[Rollout]:
        """One response to each prompt, of at most ``most`` tokens; None: max_new_tokens."""


def check(sampler: Reporter, learner: Learner, prompts: list[list[int]]) -> float:
    """Ask whether the sampler takes over every parameter; all ranks must call.

    Returns the bound of the mean of |δ| for `watch`. The policy's weights are afterwards what they were, bit
    for bit. Raises ValueError for a sampler that is off.
    """
    changed = Weights(learner.policy, seed_of(learner.config, "changed weights", learner.here.rank))
    short = [prompt[-SHOWN:] for prompt in prompts]
    with changed.restored():
        changed.change()
        sampled, measured = _sample(sampler, learner, short, "changed weights")
        rounding = _rounding(learner, changed, sampled, measured)
        off, bound = difference(sampled, measured, learner.here.size), max(SHARP * rounding, HARMLESS)
        doubtful = learner.policy.autocast is not None or off > SHARP * rounding
        names = _left_out(learner, changed, sampled, measured) if doubtful and off <= bound else {}
    if not off <= bound or names:
        left = f"; it does not get {max(names, key=lambda name: names[name])}" if names else ""
        raise ValueError(
            f"rollout {learner.config.rollout!r}: the sampler does not take over the policy's weights: after"
            f" all were changed, {_differ(off, bound)}{left}"
        )
    sampled, measured = _sample(sampler, learner, prompts, "real weights")
    with changed.restored():
        rounding = max(rounding, _rounding(learner, changed, sampled, measured))
    bound = max(LOOSE * rounding, HARMLESS)
    watch(sampled, measured, bound, learner, "the start")
    return bound


def watch(
    rollouts: list[Rollout],
    stats: list[dict[str, Tensor]],
    bound: float,
    learner: Learner,
    at: str,
    *,
    group: int = 1,
) -> None:
    """Raise ValueError where the sampler's log-probabilities are further from the policy's than the bound.

    The ranks have sampled the sequences in turn, ``group`` each.
    """
    off = difference(rollouts, stats, learner.here.size, group)
    if not off <= bound:
        raise ValueError(
            f"rollout {learner.config.rollout!r}: at {at} the sampler does not sample from the policy:"
            f" {_differ(off, bound)}; nothing was updated with it"
        )


def _differ(off: float, bound: float) -> str:
    if not math.isfinite(off):
        return "log-probabilities are not finite, by one of the two"
    return f"log-probabilities differ by {off:.2g} a token, bound {bound:.2g}"


def difference(rollouts: list[Rollout], stats: list[dict[str, Tensor]], ranks: int, group: int = 1) -> float:
    """Mean of |δ| over the tokens that a rank has sampled, where it is largest; 0 where none are reported."""
    shares = [d.abs().mean() for d in _by_rank(_delta(rollouts, stats), ranks, group)]
    return float(torch.stack(shares).max()) if shares else 0.0


def _delta(rollouts: list[Rollout], stats: list[dict[str, Tensor]]) -> list[Tensor]:
    """δ of each sequence."""
    return [
        found["logprob"].double() - torch.tensor(rollout.logprob, dtype=torch.float64)
        for rollout, found in zip(rollouts, stats)
        if rollout.logprob is not None
    ]


def _by_rank(values: list[Tensor], ranks: int, group: int = 1) -> list[Tensor]:
    """What the ranks have sampled, in turn, of those that have sampled anything."""
    parts = [[v for i, v in enumerate(values) if i // group % ranks == rank] for rank in range(ranks)]
    return [torch.cat(part) for part in parts if part]


def _sample(
    sampler: Reporter, learner: Learner, prompts: list[list[int]], stream: str
) -> tuple[list[Rollout], list[dict[str, Tensor]]]:
    """What the samplers of all ranks sample, in turn, with the weights as they are; what the policy says."""
    here, most = learner.here, min(LENGTH, learner.config.max_new_tokens)
    sampler.sync()
    count = -(-TOKENS // most)
    asked = [prompts[k % len(prompts)] for k in range(count)]
    rollouts = here.gather(sampler.sample(asked, seed_of(learner.config, stream, here.rank), most=most))
    return rollouts, _measure(learner, rollouts)


def _measure(learner: Learner, rollouts: list[Rollout]) -> list[dict[str, Tensor]]:
    stats = learner.measure(rollouts, [list(range(len(rollouts)))])
    _reshard(learner.policy)
    return stats


def _rounding(
    learner: Learner, weights: "Weights", rollouts: list[Rollout], stats: list[dict[str, Tensor]]
) -> float:
    """r: what the dtype's last place is worth in log-probabilities. The weights are then as they were."""
    dtype = learner.policy.autocast or torch.float32
    with weights.moved(torch.finfo(dtype).eps / 2):
        moved = _measure(learner, rollouts)
    parts = [(a["logprob"] - b["logprob"]).double().abs() for a, b in zip(moved, stats)]
    return float(torch.cat(parts).mean())


def _left_out(
    learner: Learner, weights: "Weights", rollouts: list[Rollout], stats: list[dict[str, Tensor]]
) -> dict[str, float]:
    """Parameters that a rank's sampler did not get, and how much of Σ δ² each explains."""
    ranks = learner.here.size
    found: dict[str, float] = {}
    delta = _by_rank(_delta(rollouts, stats), ranks)
    for name in weights.names:
        with weights.left_out(name):
            without = _measure(learner, rollouts)
        effect = [(a["logprob"] - b["logprob"]).double() for a, b in zip(stats, without)]
        for d, e in zip(delta, _by_rank(effect, ranks)):
            common, size = float((d * e).sum()), float(e.square().sum())
            doubt = float((d * e).square().sum().sqrt())
            if common > 0.5 * size and common > DOUBT * doubt:
                found[name] = max(found.get(name, 0.0), common**2 / size)
    return found


class Weights:
    """The parameters of a policy's model, to be changed and restored; under FSDP2 the shards of this rank."""

    def __init__(self, policy: Policy, seed: int) -> None:
        _reshard(policy)
        self.policy, self.seed = policy, seed
        self.parameters = dict(policy.model.named_parameters())
        self.names = list(self.parameters)

    def local(self, name: str) -> Tensor:
        parameter = self.parameters[name].detach()
        shard: Tensor = getattr(parameter, "to_local", lambda: parameter)()
        return shard

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Whatever is done in here, the weights are afterwards what they were."""
        self.kept = {name: self.local(name).clone() for name in self.names}
        try:
            yield
        finally:
            self._put(self.kept)
            del self.kept

    @torch.no_grad()
    def change(self) -> None:
        """Add noise to each parameter; of the usual size to one that is smaller, as a new bias is."""
        generator = torch.Generator(self.policy.device).manual_seed(self.seed)
        for name in self.names:
            shard, parameter = self.local(name), self.parameters[name]
            usual = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1.0
            size = max(float(shard.square().mean().sqrt()), usual) if len(shard) else usual
            shard.add_(torch.empty_like(shard).normal_(generator=generator), alpha=CHANGE * size)
        _reshard(self.policy)

    @contextmanager
    def moved(self, share: float) -> Iterator[None]:
        """Each weight by a random share of itself."""
        before = {name: self.local(name).clone() for name in self.names}
        generator = torch.Generator(self.policy.device).manual_seed(self.seed + 1)
        with torch.no_grad():
            for name in self.names:
                shard = self.local(name)
                shard.addcmul_(shard, torch.empty_like(shard).normal_(generator=generator), value=share)
        _reshard(self.policy)
        try:
            yield
        finally:
            self._put(before)

    @contextmanager
    def left_out(self, name: str) -> Iterator[None]:
        """One parameter as it was before the change."""
        before = self.local(name).clone()
        self._put({name: self.kept[name]})
        try:
            yield
        finally:
            self._put({name: before})

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.local(name).copy_(value)
        _reshard(self.policy)


def _reshard(policy: Policy) -> None:
    """FSDP2 keeps what it has gathered of the root after a forward without a backward: whoever changes the
    shards must have it dropped."""
    for module in policy.modules():
        reshard = getattr(module, "reshard", None)
        if reshard is not None:
            reshard()
