"""The check whether a sampler has the policy's weights, with a copy of the policy in the engine's place."""

import copy
from collections.abc import Callable
from functools import partial
from operator import eq
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.ranks import on_ranks
from tests.helpers.trainers import small, trainer
from training import agreement, scratch
from training.batch import Rollout, make_batch
from training.distributed import World, shard, whole
from training.learner import Learner
from training.policy import Policy
from training.temptations import DOMAINS
from training.train import Trainer

pytestmark = pytest.mark.needs("training")
TOKENIZER = scratch.build_tokenizer(DOMAINS["carry"].alphabet)


class Copy:
    """A sampler with weights of its own, which it takes over but for some; ``low``: in bfloat16 throughout,
    so that it rounds otherwise than the policy."""

    def __init__(self, policy: Policy, low: bool) -> None:
        self.policy = policy
        self.own = copy.deepcopy(policy).requires_grad_(False)
        if low:
            self.own.to(torch.bfloat16).autocast = None
        self.left_out: Callable[[str], bool] = lambda _: False
        self.syncs, self.broken = 0, False

    @torch.no_grad()
    def sync(self) -> None:
        self.syncs += 1
        if self.broken:
            raise ValueError("the engine is gone")
        own = dict(self.own.model.named_parameters())
        for name, parameter in self.policy.model.named_parameters():
            weight = whole(parameter)  # all ranks must ask
            if not self.left_out(name):
                own[name].copy_(weight)

    @torch.no_grad()
    def sample(self, prompts: list[list[int]], seed: int, *, most: int | None = None) -> list[Rollout]:
        generator = torch.Generator().manual_seed(seed)
        size, length = len(prompts[0]), most or 5
        ids = torch.tensor(prompts)
        for _ in range(length):
            logits = self.own.model(ids).logits[:, -1].float()
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, drawn], 1)
        rows = [Rollout(row[:size], row[size:], True) for row in ids.tolist()]
        batch = make_batch(rows, packing=False, pad=0, device=torch.device("cpu"))
        logprob = self.own(batch).logprob.float().split(length)
        return [row._replace(logprob=part.tolist()) for row, part in zip(rows, logprob)]


def made(cache: Path, folder: Path, dtype: str) -> tuple[Trainer, Copy, list[list[int]]]:
    run = trainer(small(cache, folder / "run", dtype=dtype))
    with torch.no_grad():  # one that the engine's rounding hides behind, as a zero bias or a norm would be
        run.policy.model.model.layers[3].self_attn.k_norm.weight.fill_(0.02)
    sampler = Copy(run.policy, dtype == "bfloat16")
    return run, sampler, [run.encoded(run.task.training(k)) for k in range(8)]


def bits(policy: Policy) -> list[Tensor]:
    return [p.detach().clone() for p in policy.parameters()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_parameter_that_is_left_out_is_caught(cache: Path, tmp_path: Path, dtype: str) -> None:
    run, sampler, prompts = made(cache, tmp_path, dtype)
    before = bits(run.policy)
    bound = agreement.check(sampler, run.learner, prompts)
    assert bound == agreement.HARMLESS if dtype == "float32" else 0.001 < bound < 0.2
    parts = ["embed_tokens", "layers.3.self_attn.k_norm"]  # the first is the head, too
    for name in (f"model.{part}.weight" for part in parts):
        assert name in dict(run.policy.model.named_parameters())
        sampler.left_out = partial(eq, name)
        with pytest.raises(ValueError, match="does not take over"):
            agreement.check(sampler, run.learner, prompts)
        sampler.left_out = lambda _: False
        sampler.sync()
    sampler.left_out = lambda name: ".layers.1." in name
    with pytest.raises(ValueError, match="rollout 'hf': the sampler does not take over the policy's weights"):
        agreement.check(sampler, run.learner, prompts)
    assert all(map(torch.equal, before, bits(run.policy)))


def test_a_parameter_that_rounding_may_hide_is_named(cache: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Whatever the mean may be."""
    run, sampler, prompts = made(cache, tmp_path, "bfloat16")
    monkeypatch.setattr(agreement, "SHARP", 1e9)
    monkeypatch.setattr(agreement, "TOKENS", 256)
    for part in ("norm", "layers.0.mlp.down_proj"):
        sampler.left_out = partial(eq, f"model.{part}.weight")
        with pytest.raises(
            ValueError, match=rf"does not take over .*; it does not get model\.{part}\.weight"
        ):
            agreement.check(sampler, run.learner, prompts)
        sampler.left_out = lambda _: False
        sampler.sync()


def test_the_weights_are_restored_where_the_sampler_fails(cache: Path, tmp_path: Path) -> None:
    run, sampler, prompts = made(cache, tmp_path, "float32")
    before = bits(run.policy)
    sampler.broken = True
    with pytest.raises(ValueError, match="the engine is gone"):
        agreement.check(sampler, run.learner, prompts)
    assert all(map(torch.equal, before, bits(run.policy)))


def test_a_sampler_that_goes_wrong_later_stops_the_run_before_an_update(cache: Path, tmp_path: Path) -> None:
    run, sampler, prompts = made(cache, tmp_path, "float32")
    run.sampler = sampler
    run.bound = agreement.check(sampler, run.learner, prompts)
    syncs = sampler.syncs
    assert run.step(1)["mismatch"] < 1e-5
    assert sampler.syncs == syncs + 1
    sampler.left_out = lambda _: True
    before = bits(run.policy)
    with torch.no_grad():
        run.policy.model.model.norm.weight.mul_(1.1)
    before = bits(run.policy)
    with pytest.raises(
        ValueError, match=r"at step 2 the sampler does not sample from the policy.*nothing was"
    ):
        run.step(2)
    with pytest.raises(ValueError, match="at an evaluation the sampler"):
        run.evaluate(2, 4, (1,))
    assert all(map(torch.equal, before, bits(run.policy)))


def test_the_difference_is_that_of_the_rank_which_is_off() -> None:
    rollouts = [Rollout([1], [2, 3], False, [-1.0, -1.0]) for _ in range(8)]
    stats = [{"logprob": torch.full((2,), -1.0 - 0.5 * (k // 2 % 2))} for k in range(8)]
    assert agreement.difference(rollouts, stats, 2, group=2) == pytest.approx(0.5)
    assert agreement.difference(rollouts, stats, 1) == pytest.approx(0.25)
    assert agreement.difference([r._replace(logprob=None) for r in rollouts], stats, 1) == 0.0


def sharded(folder: Path) -> None:
    """On each of two ranks: the sampler of one leaves a parameter out."""
    config = small(folder, folder / "run", dtype="float32")
    here = World()
    model: Any = scratch.build_model(TOKENIZER, 0)
    plain = Policy(model, temperature=1.0, dtype="float32", value_head=False)
    sampler = Copy(plain, False)
    policy = sampler.policy = shard(plain, here)
    learner = Learner(policy, None, None, config, here, pad=0, trains=True)
    before = [whole(p).clone() for p in policy.parameters()]
    prompts = [TOKENIZER.encode("01+02="), TOKENIZER.encode("11+32=")]
    assert agreement.check(sampler, learner, prompts) == agreement.HARMLESS
    if here.rank == 1:
        sampler.left_out = lambda name: name.endswith("layers.2.self_attn.q_norm.weight")
    with pytest.raises(ValueError, match="does not take over"):
        agreement.check(sampler, learner, prompts)
    assert all(map(torch.equal, before, [whole(p) for p in policy.parameters()]))
    rollouts = sampler.sample(prompts, 0)
    found = learner.measure(rollouts, [[0, 1]])  # what was gathered of the changed weights is gone
    own = model.get_input_embeddings().weight
    assert torch.equal(whole(own), before[0])
    sampler.left_out = lambda _: False
    sampler.sync()
    rollouts = sampler.sample(prompts, 0)
    found = learner.measure(here.same(rollouts), [[0, 1]])
    assert agreement.difference(here.same(rollouts), found, 1) < 1e-5


def test_two_ranks_refuse_a_sampler_together_and_restore_their_shards(tmp_path: Path) -> None:
    on_ranks(2, sharded, tmp_path, tmp_path)


def test_values_that_are_not_numbers_are_called_so() -> None:
    rollouts = [Rollout([1], [2, 3], False, [-1.0, float("nan")])]
    stats = [{"logprob": torch.full((2,), -1.0)}]
    learner: Any = SimpleNamespace(here=SimpleNamespace(size=1), config=SimpleNamespace(rollout="vllm"))
    with pytest.raises(ValueError, match=r"at step 3 .*: log-probabilities are not finite.*nothing was"):
        agreement.watch(rollouts, stats, 1.0, learner, "step 3")
