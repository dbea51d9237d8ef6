"""PPO on a tiny model: each trap of the algorithm."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from aer_fast.integrations.transformers import fuse_lm_head, unfuse_lm_head
from tests.helpers.models import FAMILIES, NAMES, adapted, build, refused
from tests.helpers.trainers import response, small, trainer, weights
from training.batch import Rollout, make_batch
from training.engine import VLLM
from training.policy import Objective, Policy, Tokens, check_model
from training.scratch import build_tokenizer
from training.tasks import Problem
from training.train import Trainer

pytestmark = pytest.mark.needs("training", "peft")


@pytest.fixture
def make(cache: Path, tmp_path: Path) -> Any:
    return lambda **changes: trainer(small(cache, tmp_path / "run", **changes))


def ids(made: Trainer, tokens: list[int]) -> Tensor:
    """One sequence [1, T], where the model is."""
    return torch.tensor([tokens], device=made.policy.device)


def right_and_wrong(made: Trainer, monkeypatch: pytest.MonkeyPatch, groups: list[list[int]]) -> None:
    """Let the sampler give right (1), wrong (0) or cut (-1) responses, the same groups in each step."""

    def sample(prompts: list[list[int]], seed: int) -> list[Rollout]:
        outcomes = [outcome for group in groups for outcome in group]
        rollouts = []
        for k, prompt in enumerate(prompts):
            text = made.tokenizer.decode(prompt)
            a, b = map(int, text[:-1].split("+"))
            answer = f"{a + b:03d}"[::-1]
            wrong = str((int(answer[0]) + 1 + k % 5) % 10) + answer[1:]
            kind = outcomes[k % len(outcomes)]
            written = made.tokenizer.encode({1: answer, 0: wrong, -1: wrong + "9"}[kind])
            end = [] if kind == -1 else [made.tokenizer.eos_token_id]
            rollouts.append(Rollout(prompt, written + end, kind == -1))
        return rollouts

    monkeypatch.setattr(made.sampler, "sample", sample)


def record_updates(made: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What every update is called with."""
    calls: list[Any] = []
    update = made.learner.update

    def recorded(rollouts: Any, old: Any, rows: Any, *rest: Any) -> Any:
        calls.append(SimpleNamespace(rollouts=rollouts, old=old, rows=rows))
        return update(rollouts, old, rows, *rest)

    monkeypatch.setattr(made.learner, "update", recorded)
    return calls


def test_sampling_ignores_the_generation_defaults_of_a_model(make: Any) -> None:
    made = make(max_new_tokens=1)
    defaults = made.policy.model.generation_config
    defaults.top_k, defaults.repetition_penalty, defaults.min_new_tokens = 1, 5.0, 7
    prompts = [made.tokenizer.encode("01+02=")] * 4000
    sampled = made.sampler.sample(prompts, 0)
    assert made.policy.model.generation_config is defaults  # as it was, for the checkpoint
    made.policy.train()
    made.sampler.sample(prompts[:1], 0)
    assert made.policy.model.training
    assert {len(r.response) for r in sampled} == {1}
    counts = torch.bincount(torch.tensor([r.response[0] for r in sampled]), minlength=14) / 4000
    with torch.no_grad():
        p = made.policy.model(ids(made, prompts[0])).logits[0, -1].softmax(-1).cpu()
    assert (counts - p).abs().max() < 0.04  # five standard errors
    assert counts.count_nonzero() > 5


def test_sampling_applies_the_temperature(make: Any) -> None:
    made = make(max_new_tokens=1, temperature=0.5)
    prompts = [made.tokenizer.encode("01+02=")] * 4000
    sampled = made.sampler.sample(prompts, 0)
    counts = torch.bincount(torch.tensor([r.response[0] for r in sampled]), minlength=14) / 4000
    with torch.no_grad():
        p = (made.policy.model(ids(made, prompts[0])).logits[0, -1] / 0.5).softmax(-1).cpu()
    assert (counts - p).abs().max() < 0.04


def test_sampling_is_a_function_of_seed_step_and_batch(make: Any) -> None:
    def responses(made: Trainer, stream: str) -> list[Any]:
        problems = [made.task.training(0)] * 2
        return [r.response for r in made.collect(problems, 8, stream).rollouts]

    made = make(rollout_batch=4)
    first = responses(made, "step 1")
    assert responses(made, "step 1") == first
    assert responses(made, "step 2") != first
    assert (
        responses(
            make(rollout_batch=4, seed=1, model="carry(digits=2, steps=20, batch=32, seed=0)"), "step 1"
        )
        != first
    )
    assert first[:4] != first[4:8]  # the batches of one call do not repeat each other


def test_each_step_has_problems_of_its_own(make: Any, monkeypatch: Any) -> None:
    made = make()
    asked: list[int] = []
    training: Any = made.task.training

    def recorded(k: int) -> Problem:
        asked.append(k)
        problem: Problem = training(k)
        return problem

    monkeypatch.setattr(made.task, "training", recorded)
    made.step(1)
    made.step(2)
    assert asked == list(range(8))


def test_all_end_tokens_of_a_model_end_a_response(make: Any) -> None:
    made = make()
    made.policy.model.generation_config.eos_token_id = [1, 5]
    from training.models import end_tokens

    assert end_tokens(made.policy.model, made.tokenizer) == [1, 5]
    made.policy.model.generation_config.eos_token_id = None
    assert end_tokens(made.policy.model, made.tokenizer) == [1]
    made.sampler.ends = [1, 5]
    sampled = made.sampler.sample([made.tokenizer.encode("01+02=")] * 200, 0)
    assert {r.response[-1] for r in sampled if not r.truncated} == {1, 5}
    assert all(token not in (1, 5) for r in sampled for token in r.response[:-1])


def test_prompts_beyond_the_models_positions_are_named(make: Any) -> None:
    message = "a prompt of 6 tokens and max_new_tokens 27 exceed the model's 32 positions: '"
    with pytest.raises(ValueError, match=message):
        make(max_new_tokens=27)  # before a folder is claimed


def test_weights_that_are_not_finite_stop_the_run(make: Any, monkeypatch: Any) -> None:
    made = make()
    step = made.learner.optimizer.step

    def diverge() -> None:
        step()
        next(made.policy.parameters()).data[0, 0] = float("inf")

    monkeypatch.setattr(made.learner.optimizer, "step", diverge)
    with pytest.raises(FloatingPointError, match="step 1: its update made weights that are not finite"):
        made.step(1)


def test_prompts_of_different_lengths_are_padded_on_the_left(make: Any) -> None:
    made = make(max_new_tokens=4)
    short, long = made.tokenizer.encode("1+2="), made.tokenizer.encode("111+222=")
    made.policy.model.generation_config.do_sample = False
    greedy = made.sampler._settings

    def settings() -> Any:
        chosen = greedy()
        chosen.do_sample, chosen.temperature, chosen.top_k, chosen.top_p = False, None, None, None
        return chosen

    made.sampler._settings = settings
    together = made.sampler.sample([short, long], 0)
    apart = [made.sampler.sample([prompt], 0)[0] for prompt in (short, long)]
    assert together == apart


def test_the_first_minibatch_is_on_policy_and_later_ones_are_not(make: Any, monkeypatch: Any) -> None:
    made = make(epochs=2, minibatches=2, lr=1e-2, micro_tokens=40, packing=True)
    right_and_wrong(made, monkeypatch, [[1, 0, 0, 1]])
    metrics = []
    update = made.learner.update

    def recorded(*arguments: Any) -> Any:
        metrics.append(update(*arguments))
        return metrics[-1]

    monkeypatch.setattr(made.learner, "update", recorded)
    made.step(1)
    assert len(metrics) == 4
    assert metrics[0]["ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert metrics[0]["clip_fraction"] == 0.0
    assert abs(metrics[0]["approx_kl"]) < 1e-6
    assert metrics[3]["ratio_max"] > 1.01
    assert metrics[3]["approx_kl"] > 1e-4


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "dr_grpo"])
@pytest.mark.parametrize("packing", [True, False])
def test_the_result_does_not_depend_on_micro_batches(make: Any, aggregation: Any, packing: bool) -> None:
    results = []
    for micro_tokens in (10_000, 30, 1):
        made = make(
            micro_tokens=micro_tokens,
            aggregation=aggregation,
            packing=packing,
            entropy="fixed",
            alpha_init=0.05,
            advantage="gae",
            lr=1e-2,
        )
        metrics = made.step(1)
        results.append((metrics["loss"], metrics["grad_norm"], metrics["value_loss"], weights(made)))
    for other in results[1:]:
        assert other[:3] == pytest.approx(results[0][:3], rel=1e-4)
        # Adam divides by the gradient's size: where it is rounding error alone, so is its sign
        close = (other[3] - results[0][3]).abs() < 1e-4
        assert close.double().mean() > 0.999


def test_packed_and_padded_are_the_same_loss(make: Any) -> None:
    """Sequences of unequal lengths, prompts too: loss and gradients of both layouts."""
    found = []
    for packing in (True, False):
        made = make(packing=packing)
        pairs = [([2, 3, 4, 5], [6, 7, 1]), ([3, 4], [8]), ([5, 6, 7, 8, 9, 10], [2, 3, 4, 5, 6, 1])]
        rollouts = [Rollout(prompt, answer, False) for prompt, answer in pairs]
        batch = made.learner.batch(rollouts, [0, 1, 2])
        torch.manual_seed(1)
        old, advantage = torch.randn(10) - 2, torch.randn(10)
        constants = (old, advantage, torch.ones(10), torch.full((10,), 0.1))
        old, advantage, mask, coefficient = (x.to(made.policy.device) for x in constants)
        tokens = Tokens(old, advantage, mask, coefficient, None, None, None, None)
        loss, out, _ = made.policy(batch, tokens, Objective((0.2, 0.2), None, 0.0, 0.5, 0.2), 10.0)
        loss.backward()
        grads = torch.cat([p.grad.flatten() for p in made.policy.parameters()])
        found.append((loss.detach(), out.logprob, out.entropy, grads))
        reference = [made.policy.model(ids(made, p + a)).logits[0].log_softmax(-1) for p, a in pairs]
        expected = [
            logp[len(p) - 1 + k, token] for (p, a), logp in zip(pairs, reference) for k, token in enumerate(a)
        ]
        torch.testing.assert_close(out.logprob, torch.stack(expected).detach(), rtol=1e-4, atol=1e-5)
    for packed, padded in zip(*found):
        torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-5)


def test_the_controller_hears_all_tokens_before_anything_is_dropped(make: Any, monkeypatch: Any) -> None:
    groups = [[1, 0, 0, -1], [1, 1, 1, 1], [0, 0, 0, 0], [-1, -1, 1, 0]]
    made = make(degenerate="drop", truncated="mask", entropy="target", target_entropy=0.1, epochs=2, lr=1e-2)
    right_and_wrong(made, monkeypatch, groups)
    calls = record_updates(made, monkeypatch)
    heard = []
    move = made.controller.update

    def listen(*arguments: Any, **weights: Any) -> None:
        heard.append((*arguments, weights))
        move(*arguments, **weights)

    monkeypatch.setattr(made.controller, "update", listen)
    problems = [made.task.training(k) for k in range(4)]
    rollouts = made.collect(problems, 4, "any").rollouts
    total, tokens = 0.0, 0
    with torch.no_grad():
        for r in rollouts:
            logp = made.policy.model(ids(made, r.prompt + r.response)).logits[0].log_softmax(-1)
            entropies = -(logp.exp() * logp).sum(-1)[len(r.prompt) - 1 : -1]
            total, tokens = total + entropies.sum().item(), tokens + len(r.response)
    metrics = made.step(1)
    ((entropy, count, weight),) = heard
    assert weight == {"weight": 1.0, "prompts": 4.0}
    assert count == tokens == metrics["tokens"]
    assert entropy == pytest.approx(total / tokens, rel=1e-5)
    assert metrics["entropy"] == entropy
    # dropped: the second and third group; masked: what was cut
    assert sorted(calls[0].rows) == [0, 1, 2, 14, 15]
    assert metrics["truncated"] == 3 / 16
    assert (metrics["all_right"], metrics["all_wrong"]) == (0.25, 0.25)


def test_degenerate_groups_keep_or_lose_their_bonus(make: Any, monkeypatch: Any) -> None:
    groups = [[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0]]
    for degenerate, expected in (("keep", [0.1] * 4), ("advantage_only", [0.1, 0.0, 0.0, 0.1])):
        made = make(degenerate=degenerate, entropy="fixed", alpha_init=0.1)
        right_and_wrong(made, monkeypatch, groups)
        (call,) = (calls := record_updates(made, monkeypatch)) or ([made.step(1)] and calls)
        assert sorted(call.rows) == list(range(16))
        coefficient = [call.old[4 * g]["entropy_coef"][0].item() for g in range(4)]
        assert coefficient == pytest.approx(expected)
        advantage = [call.old[4 * g]["advantage"][0].item() for g in range(4)]
        assert advantage == pytest.approx([3**0.5, 0.0, 0.0, 1.0], rel=1e-4)


def test_a_step_of_degenerate_groups_alone_can_be_dropped(make: Any, monkeypatch: Any) -> None:
    made = make(degenerate="drop", entropy="fixed")
    right_and_wrong(made, monkeypatch, [[1, 1, 1, 1], [0, 0, 0, 0]])
    before = weights(made)
    metrics = made.step(1)
    assert torch.equal(weights(made), before)
    assert metrics["entropy"] > 0.0
    assert (metrics["loss"], metrics["grad_norm"], metrics["ratio_max"]) == (0.0, 0.0, 1.0)


def test_clip_cov_drops_tokens_from_the_loss(make: Any, monkeypatch: Any) -> None:
    def stepped(**settings: Any) -> tuple[Tensor, Tensor]:
        made = make(**settings)
        right_and_wrong(made, monkeypatch, [[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0]])
        before = weights(made).clone()
        made.step(1)
        return before, weights(made)

    before, plain = stepped()
    assert not torch.equal(before, plain)
    assert torch.equal(stepped(clip_cov=1.0, clip_cov_range=(1e8, 1e9))[1], plain)  # none is so large
    assert torch.equal(stepped(clip_cov=1.0, clip_cov_range=(-1e9, 1e9))[1], before)  # all are dropped
    some = stepped(clip_cov=0.2, clip_cov_range=(-1e9, 1e9))[1]
    assert not torch.equal(some, plain)
    assert not torch.equal(some, before)


def test_coefficients_follow_the_difficulty_of_their_prompt(make: Any, monkeypatch: Any) -> None:
    made = make(entropy="difficulty", alpha_init=0.1)
    right_and_wrong(made, monkeypatch, [[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0]])
    calls = record_updates(made, monkeypatch)
    metrics = made.step(1)
    coefficient = [calls[0].old[4 * g]["entropy_coef"][0].item() for g in range(4)]
    weight = [0.5, 0.0, 1.0, 0.0]  # accuracies 1/4, 1, 0, 1/2; ρ = 1/2
    assert coefficient == pytest.approx([0.1 * w / 0.375 for w in weight])
    assert metrics["coefficient"] == pytest.approx(0.1)
    labels = [made.task.training(k).label for k in range(4)]
    for label in set(labels):
        mine = [c for c, name in zip(coefficient, labels) if name == label]
        assert metrics[f"coefficient/{label}"] == pytest.approx(sum(mine) / len(mine))


def test_a_score_below_the_threshold_is_not_right(make: Any, monkeypatch: Any) -> None:
    made = make(threshold=0.9)
    right_and_wrong(made, monkeypatch, [[1, 0, 0, 0]])
    monkeypatch.setattr(made.rewards, "scorer", lambda p, r: 1.0 if r == p.answer else 0.5)
    metrics = made.step(1)
    assert metrics["accuracy"] == 0.25
    assert metrics["score"] == pytest.approx(0.625)


@pytest.mark.parametrize(("truncated", "reward"), [("score", 0.25), ("mask", 0.25), ("penalise", 0.125)])
def test_truncated_responses_by_the_field(make: Any, monkeypatch: Any, truncated: Any, reward: float) -> None:
    made = make(truncated=truncated, truncation_penalty=0.5, advantage="group_mean", whiten=False)
    right_and_wrong(made, monkeypatch, [[1, 0, 0, -1]])
    calls = record_updates(made, monkeypatch)
    metrics = made.step(1)
    assert metrics["reward"] == pytest.approx(reward)
    assert metrics["truncated"] == 0.25
    assert metrics["accuracy"] == 0.25
    advantage = [calls[0].old[k]["advantage"][0].item() for k in range(4)]
    last = -0.5 if truncated == "penalise" else 0.0
    assert advantage == pytest.approx([1 - reward, -reward, -reward, last - reward])
    assert (3 in calls[0].rows) == (truncated != "mask")


def test_gae_bootstraps_where_a_response_was_cut_and_only_there(make: Any, monkeypatch: Any) -> None:
    made = make(advantage="gae", gae_lambda=0.5, gamma=0.9, packing=True)
    monkeypatch.setattr("training.learner.learning_rate", lambda config, step: 0.0)  # the policy stays
    torch.manual_seed(3)
    torch.nn.init.normal_(made.policy.value_head.weight)
    right_and_wrong(made, monkeypatch, [[1, 0, 0, -1]])
    calls = record_updates(made, monkeypatch)
    made.step(1)
    for i, r in enumerate(calls[0].rollouts):
        with torch.no_grad():
            hidden = made.policy.model.model(ids(made, r.prompt + r.response)).last_hidden_state[0]
            value = made.policy.value_head(hidden)[:, 0].to(calls[0].old[i]["value"].device)
        old = calls[0].old[i]
        torch.testing.assert_close(old["value"], value[len(r.prompt) - 1 : -1], rtol=1e-4, atol=1e-5)
        reward = 1.0 if i % 4 == 0 else 0.0
        following = [*old["value"].tolist()[1:], value[-1].item() if r.truncated else 0.0]
        rewards = [0.0] * (len(r.response) - 1) + [reward]
        expected: list[float] = []
        running = 0.0
        for t in reversed(range(len(r.response))):
            delta = rewards[t] + 0.9 * following[t] - old["value"][t].item()
            running = delta + 0.45 * running
            expected.insert(0, running)
        assert old["advantage"].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
        torch.testing.assert_close(old["returns"], old["advantage"] + old["value"])
        assert r.truncated == (i % 4 == 3)


def test_importance_weights_are_capped_ratios(make: Any, monkeypatch: Any) -> None:
    made = make(importance_cap=2.0, entropy="none")
    sample = made.sampler.sample
    off = [0.0, 0.5, -0.7, 3.0]

    def with_logprob(prompts: Any, seed: int) -> list[Rollout]:
        rollouts = sample(prompts, seed)
        old = made.learner.measure(rollouts, [list(range(len(rollouts)))])
        return [
            r._replace(logprob=(stats["logprob"] - off[k % 4]).tolist())
            for k, (r, stats) in enumerate(zip(rollouts, old))
        ]

    monkeypatch.setattr(made.sampler, "sample", with_logprob)
    calls = record_updates(made, monkeypatch)
    metrics = made.step(1)
    weight = [calls[0].old[k]["importance_weight"][0].item() for k in range(4)]
    expected = torch.tensor(off).exp().clamp(max=2.0)
    assert weight == pytest.approx(expected.tolist(), rel=1e-5)
    tokens = [len(r.response) for r in calls[0].rollouts]
    mean = sum(expected[k % 4].item() * n for k, n in enumerate(tokens)) / sum(tokens)
    assert metrics["importance_weight"] == pytest.approx(mean, rel=1e-4)


def test_the_importance_weight_scales_the_gradient(make: Any, monkeypatch: Any) -> None:
    norms = []
    for off in (0.0, 0.5):
        made = make(entropy="none", max_grad_norm=1e9)
        right_and_wrong(made, monkeypatch, [[1, 0, 0, 1]])
        answer = made.sampler.sample

        def with_logprob(
            prompts: Any, seed: int, made: Any = made, answer: Any = answer, off: float = off
        ) -> Any:
            rollouts = answer(prompts, seed)
            old = made.learner.measure(rollouts, [list(range(len(rollouts)))])
            return [r._replace(logprob=(stats["logprob"] - off).tolist()) for r, stats in zip(rollouts, old)]

        monkeypatch.setattr(made.sampler, "sample", with_logprob)
        norms.append(made.step(1)["grad_norm"])
    assert norms[1] / norms[0] == pytest.approx(torch.tensor(0.5).exp().item(), rel=1e-3)


def test_the_reference_is_the_initial_model_at_the_same_temperature(make: Any, monkeypatch: Any) -> None:
    made = make(kl_coef=0.1, lr=1e-2, temperature=0.7)
    right_and_wrong(made, monkeypatch, [[1, 0, 0, 1]])
    first = made.step(1)
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)
    calls = record_updates(made, monkeypatch)
    second = made.step(2)
    assert second["kl"] > 1e-4
    fresh = make(temperature=0.7)
    expected = fresh.learner.measure(calls[0].rollouts, [list(range(16))])
    for stats, initial in zip(calls[0].old, expected):
        torch.testing.assert_close(stats["ref_logprob"], initial["logprob"], rtol=1e-4, atol=1e-5)


def test_no_reference_is_loaded_without_kl(make: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("training.train.load_reference", lambda *a: pytest.fail("loaded"))
    assert make().learner.reference is None
    assert make(kl_coef=0.1, lora_rank=2).learner.reference is None


def test_lora_trains_adapters_and_its_reference_is_the_model_without_them(
    make: Any, monkeypatch: Any
) -> None:
    made = make(lora_rank=2, kl_coef=0.1, lr=5e-2, epochs=2)
    right_and_wrong(made, monkeypatch, [[1, 0, 0, 1]])
    base = make()
    names = [name for name, p in made.policy.named_parameters() if p.requires_grad]
    assert names
    assert all("lora_" in name for name in names)
    assert not made.policy.causal_lm.get_output_embeddings().weight.requires_grad
    first, second = made.step(1), made.step(2)
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)
    assert second["kl"] > 1e-4
    rollouts = [response(made, made.task.training(0), "123")]
    with torch.no_grad():
        off = made.policy(made.learner.batch(rollouts, [0]), adapter=False).logprob
        on = made.policy(made.learner.batch(rollouts, [0])).logprob
        initial = base.policy(base.learner.batch(rollouts, [0])).logprob
    torch.testing.assert_close(off, initial, rtol=1e-4, atol=1e-5)
    assert (on - off).abs().max() > 1e-3


def test_a_bonus_raises_entropy_and_its_absence_does_not(make: Any, monkeypatch: Any) -> None:
    """Without any right answer the bonus is the only gradient."""
    change = {}
    for alpha in (0.0, 1.0):
        made = make(entropy="fixed", alpha_init=alpha, alpha_max=1.0, epochs=4, lr=1e-3)
        right_and_wrong(made, monkeypatch, [[0, 0, 0, 0]])
        before = made.step(1)["entropy"]
        change[alpha] = made.step(1)["entropy"] - before
    assert change[0.0] == 0.0
    assert change[1.0] > 0.02


def test_the_initial_entropy_is_measured_on_enough_tokens(make: Any, monkeypatch: Any) -> None:
    made = make(initial_tokens=150)
    seen: list[tuple[int, float]] = []
    measure = made.learner.measure

    def recorded(rollouts: Any, parts: Any) -> Any:
        stats = measure(rollouts, parts)
        seen.append((sum(len(r.response) for r in rollouts), sum(s["entropy"].sum().item() for s in stats)))
        return stats

    monkeypatch.setattr(made.learner, "measure", recorded)
    entropy = made.measure_initial_entropy()
    tokens = [count for count, _ in seen]
    assert sum(tokens) >= 150 > sum(tokens[:-1])
    assert entropy == pytest.approx(sum(total for _, total in seen) / sum(tokens), rel=1e-6)


def test_a_gradient_that_is_not_finite_stops_before_the_update(make: Any, monkeypatch: Any) -> None:
    made = make(minibatches=2)
    before = weights(made)
    right_and_wrong(made, monkeypatch, [[1, 0, 0, 1]])
    measure = made.learner.measure

    def poisoned(*arguments: Any, **options: Any) -> Any:
        stats = measure(*arguments, **options)
        for one in stats:
            one["logprob"] = one["logprob"] * float("nan")
        return stats

    monkeypatch.setattr(made.learner, "measure", poisoned)
    message = r"step 3, epoch 1, minibatch 1: loss nan, .* prompts: '\d\d\+\d\d='"
    with pytest.raises(FloatingPointError, match=message):
        made.step(3)
    assert torch.equal(weights(made), before)


def test_dual_clip_and_clip_higher_reach_the_loss(make: Any, monkeypatch: Any) -> None:
    made = make(clip_low=0.1, clip_high=0.28, dual_clip=3.0, kl_coef=0.2, value_coef=0.7, value_clip=0.4)
    assert made.learner.objective == Objective((0.1, 0.28), 3.0, 0.2, 0.7, 0.4)


def test_activation_checkpointing_changes_nothing(make: Any) -> None:
    results = []
    for on in (False, True):
        made = make(activation_checkpointing=on, advantage="gae")
        metrics = made.step(1)
        results.append((metrics["loss"], metrics["grad_norm"], metrics["entropy"]))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_bfloat16_keeps_float32_weights(make: Any) -> None:
    made = make(dtype="bfloat16", lr=1e-3)
    exact = make(lr=1e-3)
    low, high = made.step(1), exact.step(1)
    assert {p.dtype for p in made.policy.parameters()} == {torch.float32}
    assert low["entropy"] != high["entropy"]
    assert low["entropy"] == pytest.approx(high["entropy"], rel=0.2)
    assert low["ratio_max"] == pytest.approx(1.0, abs=1e-3)


def test_evaluation_is_repeatable_and_leaves_training_alone(make: Any) -> None:
    alone, watched = make(), make()
    alone.step(1)
    watched.step(1)
    strict = make(threshold=2.0)
    assert sum(strict.evaluate(2, 4, (1,))["overall"]["right"]) == 0
    lenient = make(threshold=0.0)
    assert lenient.evaluate(2, 4, (1,))["overall"]["pass@1"] == 1.0
    first = watched.evaluate(3, 4, (1, 2))
    again = watched.evaluate(3, 4, (1, 2))
    assert first == again
    assert alone.step(2) == watched.step(2)
    assert [row["prompts"] for row in first["classes"].values()] == [3, 3, 3]
    overall = first["overall"]
    assert overall["pass@1"] == pytest.approx(sum(overall["right"]) / (9 * 4))
    questions = {p.question for p in watched.task.held_out(3)}
    assert not questions & {watched.task.training(k).question for k in range(2000)}


class FakeVLLM:
    """As far as training.rollout knows vLLM: each token is sampled uniformly."""

    def __init__(self, **options: Any) -> None:
        self.options, self.resets = options, 0
        self.loaded: dict[str, Tensor] = {}
        self.packed = 0

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        assert method == "reload_weights"
        self.loaded.update(kwargs["weights_iterator"])

    def apply_model(self, prepare: Any) -> None:
        """A model with a tied head."""
        embedding, head = torch.nn.Embedding(2, 2), torch.nn.Linear(2, 2)
        head.weight = embedding.weight
        for module, share in ((embedding, 100), (head, 1)):
            cast(Any, module).quant_method = SimpleNamespace(process_weights_after_loading=self.pack(share))
        prepare(torch.nn.ModuleList([embedding, head]))

    def pack(self, share: int) -> Any:
        def process(_: Any) -> None:
            self.packed += share

        return process

    def reset_prefix_cache(self) -> bool:
        self.resets += 1
        return True

    def generate(self, requests: Any, settings: Any, use_tqdm: bool) -> Any:
        self.settings = settings
        outputs = []
        for request, chosen in zip(requests, settings):
            generator = torch.Generator().manual_seed(chosen.seed)
            tokens = torch.randint(14, (chosen.max_tokens,), generator=generator).tolist()
            if 1 in tokens:
                tokens = tokens[: tokens.index(1) + 1]
            logprobs = [{token: SimpleNamespace(logprob=-2.639057)} for token in tokens]
            outputs.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens, logprobs=logprobs)]))
            assert request["prompt_token_ids"]
        return outputs


def test_vllm_gets_the_weights_and_its_logprobs_are_used(make: Any, monkeypatch: Any) -> None:
    module = SimpleNamespace(LLM=FakeVLLM, SamplingParams=lambda **s: SimpleNamespace(**s))
    monkeypatch.setitem(__import__("sys").modules, "vllm", module)
    made = make(rollout="vllm", lr=1e-2, temperature=0.8)
    assert isinstance(made.sampler, VLLM)
    engine: Any = made.sampler.engine
    assert engine.options["logprobs_mode"] == "processed_logprobs"
    calls = record_updates(made, monkeypatch)
    made.step(1)
    made.step(2)
    assert engine.resets == 2
    assert engine.packed == 2  # the tied head alone, in each
    assert all(
        (s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty) == (0.8, 0, 1.0, 0.0, 1.0)
        for s in engine.settings
    )
    assert len({s.seed for s in engine.settings}) == len(engine.settings)
    stats = calls[0].old[0]
    expected = (stats["logprob"] + 2.639057).exp().clamp(max=2.0)
    torch.testing.assert_close(stats["importance_weight"], expected)
    made.sampler.sync()
    for name, parameter in made.policy.model.named_parameters():
        assert torch.equal(engine.loaded[name], parameter)


def test_vllm_that_is_not_there_is_named(make: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    with pytest.raises(ValueError, match="rollout 'vllm' needs vLLM: pip install vllm"):
        make(rollout="vllm")


ADAPTED: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "LoRA on the head": ("scale untied", ["q_proj", "lm_head"], {}),
    "LoRA with a bias": ("scale with bias", ["lm_head"], {"lora_bias": True}),
    "a trained copy of the head": ("softcap untied", ["v_proj"], {"modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("kind", [*FAMILIES, *ADAPTED])
def test_a_head_that_can_be_fused_can_be_trained(kind: str) -> None:
    """Log-probabilities, entropies and the gradient of a loss, against the model's own logits."""
    model = build(kind) if kind in FAMILIES else adapted(*ADAPTED[kind][:2], **ADAPTED[kind][2])
    fuse_lm_head(model)
    unfuse_lm_head(model)
    packing = kind != "a softcap by another name"  # its recurrence goes on from sequence to sequence
    policy = Policy(model, temperature=0.8, dtype="float32", value_head=False)
    check_model(policy, row=64 if packing else None, pad=0, name=kind)
    rollouts = [Rollout([3, 4], [5, 6, 7], False), Rollout([8, 9, 10], [11, 2], False)]
    logp: list[Tensor] = []
    for r in rollouts:
        logits = model(torch.tensor([r.prompt + r.response])).logits[0, len(r.prompt) - 1 : -1]
        logp.append((logits / 0.8).log_softmax(-1))
    flat, target = torch.cat(logp), torch.tensor([5, 6, 7, 11, 2])
    entropy = -(flat.exp() * flat).sum(-1)
    logprob = flat.gather(1, target[:, None])[:, 0]
    loss = -(logprob + 0.1 * entropy).mean()  # the gradient of PPO at ratio 1 and advantage 1
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(loss, trained, allow_unused=True)
    batch = make_batch(rollouts, packing=packing, pad=0, device=torch.device("cpu"))
    ones = torch.ones(5)
    tokens = Tokens(logprob.detach(), ones, ones, 0.1 * ones, None, None, None, None)
    total, out, _ = policy(batch, tokens, Objective((0.2, 0.2), None, 0.0, 0.5, 0.2), 5.0)
    torch.testing.assert_close(out.logprob, logprob.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out.entropy, entropy.detach(), rtol=1e-4, atol=1e-4)
    measured = policy(batch)
    torch.testing.assert_close(measured.logprob, out.logprob)
    torch.testing.assert_close(measured.entropy, out.entropy)
    total.backward()
    for parameter, grad in zip(trained, expected):
        if grad is not None:
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", [family for family in FAMILIES if "scale with" not in family])
def test_a_run_trains_every_family(make: Any, tmp_path: Path, family: str) -> None:
    """A whole step, from a folder that from_pretrained loads."""
    tokenizer = build_tokenizer("0123456789+=")
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    build(family, vocab_size=len(tokenizer), **ends).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    made = make(model=str(tmp_path / "model"), lr=1e-3, entropy="fixed", alpha_init=0.1)
    before = weights(made)
    metrics = made.step(1)
    assert metrics["ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["grad_norm"] > 0.0
    assert not torch.equal(weights(made), before)


@pytest.mark.parametrize("name", [*NAMES, "unknown logits"])
def test_what_cannot_be_fused_is_refused_for_the_same_reason(name: str) -> None:
    model, reason = refused(name)
    with pytest.raises(ValueError, match=reason) as fused:
        fuse_lm_head(model)
    policy = Policy(model, temperature=1.0, dtype="float32", value_head=False)
    with pytest.raises(ValueError, match="model odd: ") as trained:
        check_model(policy, row=None, pad=0, name="odd")
    assert str(trained.value) == f"model odd: {fused.value}"


def test_a_model_is_tried_under_the_autocast_of_its_training() -> None:
    model = build()
    model.register_forward_pre_hook(lambda *_: None if torch.is_autocast_enabled("cpu") else 1 / 0)
    check_model(Policy(model, temperature=1.0, dtype="bfloat16", value_head=False), row=64, pad=0, name="a")
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        check_model(
            Policy(model, temperature=1.0, dtype="float32", value_head=False), row=64, pad=0, name="a"
        )


def test_a_head_that_is_not_understood_is_refused(make: Any) -> None:
    made = make()
    made.policy.causal_lm.get_output_embeddings().register_forward_hook(lambda m, a, out: 2 * out)
    with pytest.raises(ValueError, match="model odd: Qwen3ForCausalLM does more to its logits than softcap"):
        check_model(made.policy, row=None, pad=0, name="odd")


def test_attention_that_mixes_packed_sequences_is_refused(make: Any, monkeypatch: Any) -> None:
    made = make()
    forward = made.policy.model.model.forward

    def blind(*args: Any, position_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        if attention_mask is None:  # one long sequence
            position_ids = torch.arange(kwargs["input_ids"].shape[1], device=made.policy.device)[None]
        return forward(*args, position_ids=position_ids, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(made.policy.model.model, "forward", blind)
    with pytest.raises(ValueError, match="does not keep packed sequences apart; use --no-packing"):
        check_model(made.policy, row=64, pad=0, name="odd")


@pytest.mark.parametrize("block", [4, 128])
def test_attention_that_sums_blocks_up_across_sequences_is_refused(
    make: Any, monkeypatch: Any, block: int
) -> None:
    """As compressed attention does: a token reads the mean of whole blocks of what is before it."""
    made = make()
    body = made.policy.model.model
    forward = body.norm.forward

    def blocks(x: Tensor) -> Tensor:
        count = x.shape[1] // block
        means = x[:, : count * block].unflatten(1, (count, block)).mean(2).cumsum(1)
        before = torch.nn.functional.pad(means, (0, 0, 1, 0)).repeat_interleave(block, 1)
        found: Tensor = forward(x + before[:, : x.shape[1]])
        return found

    monkeypatch.setattr(body.norm, "forward", blocks)
    with pytest.raises(ValueError, match="does not keep packed sequences apart"):
        check_model(made.policy, row=256, pad=0, name="odd")


def test_a_reward_that_always_fails_stops_a_step_but_no_evaluation(make: Any) -> None:
    made = make()
    made.rewards.scorer = lambda problem, response: 1 / 0
    with pytest.raises(ValueError, match="the reward failed on every response of step 1; first: reward"):
        made.step(1)
    result = made.evaluate(2, 2, (1,), goes_on=True)
    assert result["overall"]["pass@1"] == 0.0
    assert result["failed_rewards"] == 2 * result["overall"]["prompts"]
    assert result["warnings"][0].startswith(f"{result['failed_rewards']} rewards counted as 0; first: reward")
    with pytest.raises(ValueError, match="the reward failed on every response of evaluation"):
        made.evaluate(2, 2, (1,))
    problems = [made.task.training(0)]
    with pytest.raises(ValueError, match="the reward failed on every response of evaluation"):
        made.collect(problems, 2, "evaluation")  # whatever the stream is called
    _, score, _, failures = made.collect(problems, 2, "step 1", goes_on=True)
    assert (score.tolist(), len(failures)) == ([[0.0, 0.0]], 2)
