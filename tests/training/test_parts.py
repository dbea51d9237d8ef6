"""The pure parts of training/, against values computed by hand."""

import inspect
import itertools
import math
import typing
from typing import Any

import pytest
import torch

from aer_fast import AdaptiveEntropy
from training import entropy
from training.advantages import aggregation, clip_cov, gae, group_relative, leave_one_out, whiten
from training.batch import Part, Rollout, cut, make_batch, micro_batches, shares, stretches
from training.config import Config
from training.evaluation import maj_at_k, pass_at_k, variety
from training.learner import learning_rate
from training.policy import value_loss
from training.record import alarms
from training.rollout import seed_of

pytestmark = [pytest.mark.needs("training"), pytest.mark.host]


def test_group_relative_advantages_by_hand() -> None:
    reward = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    expected = torch.tensor([[3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)], [0.0] * 4])
    torch.testing.assert_close(group_relative(reward, scale=True), expected, rtol=1e-4, atol=1e-6)
    centred = torch.tensor([[0.75, -0.25, -0.25, -0.25], [0.0] * 4])
    torch.testing.assert_close(group_relative(reward, scale=False), centred)


def test_leave_one_out_by_hand() -> None:
    reward = torch.tensor([[1.0, 0.0, 0.5]])
    torch.testing.assert_close(leave_one_out(reward), torch.tensor([[0.75, -0.75, 0.0]]))


def test_gae_by_hand() -> None:
    value = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    # ended: δ = (γ·1 - .5, γ·2 - 1, 3 - 2) = (.4, .8, 1);   A₃ = 1, A₂ = .8 + .45 · 1, A₁ = .4 + .45 · 1.25
    ended = gae(value, 3.0, 0.0, gamma=0.9, lam=0.5)
    torch.testing.assert_close(ended, torch.tensor([0.4 + 0.45 * 1.25, 1.25, 1.0], dtype=torch.float64))
    # cut: the last δ bootstraps, 0 + .9 · 4 - 2 = 1.6
    truncated = gae(value, 0.0, 4.0, gamma=0.9, lam=0.5)
    last = torch.tensor([0.4 + 0.45 * 1.52, 0.8 + 0.45 * 1.6, 1.6], dtype=torch.float64)
    torch.testing.assert_close(truncated, last)
    # λ = 1 and γ = 1: the return minus the value
    torch.testing.assert_close(gae(value, 3.0, 0.0, gamma=1.0, lam=1.0), 3.0 - value)


def test_whitening_is_over_all_tokens() -> None:
    whitened = torch.cat(whiten([torch.tensor([1.0, 2.0]), torch.tensor([6.0])]))
    torch.testing.assert_close(whitened, torch.tensor([-2.0, -1.0, 3.0]) / (14 / 3) ** 0.5)
    same = [torch.tensor([0.1, 0.1, 0.1])]
    assert whiten(same) is same
    equal = torch.full((2, 6), 0.1, dtype=torch.float64)  # whose mean is not 0.1 to the last bit
    assert not group_relative(equal, scale=True).any()


def test_value_loss_by_hand() -> None:
    value, old, returns = torch.tensor([1.0, 1.0, 0.1]), torch.zeros(3), torch.tensor([2.0, 0.0, 1.0])
    # the larger of both errors: clipped to .2 (farther from 2), not clipped (farther from 0), within range
    expected = 0.5 * torch.tensor([1.8**2, 1.0, 0.9**2])
    torch.testing.assert_close(value_loss(value, old, returns, 0.2), expected)


@pytest.mark.parametrize(("samples", "right", "k"), [(5, 0, 2), (5, 2, 2), (6, 1, 3), (4, 4, 1), (5, 4, 3)])
def test_pass_at_k_counts_all_draws(samples: int, right: int, k: int) -> None:
    outcomes = [True] * right + [False] * (samples - right)
    draws = list(itertools.combinations(outcomes, k))
    assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_majority_votes_by_hand() -> None:
    answers = ["7", "7", "8", "9", "8", "8"]
    right = [True, True, False, False, False, False]
    assert maj_at_k(answers, right, 3) == 0.5  # (7, 7, 8) right, (9, 8, 8) wrong
    assert maj_at_k(answers, right, 1) == pytest.approx(2 / 6)
    assert maj_at_k(["7", "8"], [True, False], 2) == 0.5  # a tie
    assert maj_at_k(answers, right, 4) == 1.0  # one run of four, the rest is left over


def test_clip_cov_by_hand() -> None:
    advantage = torch.tensor([2.0, 2.0, 2.0, 2.0, -2.0, -2.0, -2.0, -2.0])  # mean 0
    logprob = torch.tensor([-0.1, -1.1, -3.1, -0.1, -0.1, -1.1, -3.1, -0.1])  # mean -1.1: ±1, 0, -2
    settings: Any = {"clip": (0.2, 0.2), "generator": torch.Generator().manual_seed(0)}
    # products 2, 0, -4, 2, -2, 0, 4, -2
    for low, high, expected in ((1.0, 3.0, [0, 3]), (1.0, 5.0, [0, 3, 6]), (3.0, 3.5, [])):
        found = clip_cov(advantage, logprob, logprob, share=1.0, between=(low, high), **settings)
        assert found.nonzero()[:, 0].tolist() == expected
    old = logprob.clone()
    old[0] -= 0.3  # a ratio of 1.35, and A > 0: clipped already
    old[3] += 0.3  # a ratio of 0.74 is not, for A > 0
    old[6] += 0.3  # but it is for A < 0
    found = clip_cov(advantage, logprob, old, share=1.0, between=(1.0, 5.0), **settings)
    assert found.nonzero()[:, 0].tolist() == [3]
    for share, count in ((0.001, 1), (0.25, 2), (0.3, 2)):  # one at least
        drawn = [
            clip_cov(advantage, logprob, logprob, share=share, between=(1.0, 5.0), **settings)
            for _ in range(20)
        ]
        assert {int(found.sum()) for found in drawn} == {count}
        assert torch.stack(drawn).any(0).nonzero()[:, 0].tolist() == [0, 3, 6]


def test_variety_of_answers_by_hand() -> None:
    distinct, entropy = variety(["7", "7", "7", "7", "7", "8", "9", "9"], 4)
    assert distinct.tolist() == [1.0, 3.0]
    assert entropy.tolist() == pytest.approx([0.0, 0.5 * math.log(4) + 0.5 * math.log(2)])


def test_the_response_ends_at_the_first_end_token() -> None:
    end = [1, 13]
    assert cut([5], [2, 3, 1, 0, 0], end) == Rollout([5], [2, 3, 1], False)
    assert cut([5], [13, 1, 2, 1], end) == Rollout([5], [13], False)
    assert cut([5], [2, 3, 4], end) == Rollout([5], [2, 3, 4], True)
    assert cut([5], [2, 0, 3], end) == Rollout([5], [2, 0, 3], True)  # a sampled pad token is a token


@pytest.mark.parametrize("packing", [True, False])
def test_a_batch_predicts_each_response_token(packing: bool) -> None:
    rollouts = [Rollout([3, 4], [5, 6, 7], False), Rollout([8], [9], False), Rollout([2, 2, 2], [1, 1], True)]
    batch = make_batch(rollouts, packing=packing, pad=0, device=torch.device("cpu"))
    flat = batch.ids.flatten()
    assert batch.target.tolist() == [5, 6, 7, 9, 1, 1]
    assert flat[batch.where + 1].tolist() == batch.target.tolist()
    assert flat[batch.where].tolist() == [4, 5, 6, 8, 2, 1]
    assert flat[batch.last].tolist() == [7, 9, 1]
    positions = batch.position_ids.flatten()
    assert positions[batch.where].tolist() == [1, 2, 3, 0, 2, 3]
    if packing:
        assert batch.ids.shape == (1, 12)
        assert batch.attention_mask is None
    else:
        assert batch.attention_mask is not None
        assert batch.attention_mask.sum(-1).tolist() == [5, 2, 5]


def test_a_shared_prompt_stands_in_a_packed_row_once() -> None:
    """Its longest response follows it; a prompt that comes again later, or alone, is laid out as ever."""
    a, b = [3, 4], [8, 9, 8]
    pairs = [(a, [5]), (a, [6, 7, 5]), (b, [2, 2]), (b, [1, 2]), (a, [7])]
    rollouts = [Rollout(prompt, response, False) for prompt, response in pairs]
    batch = make_batch(rollouts, packing=True, pad=0, device=torch.device("cpu"), share=True)
    assert batch.ids.tolist() == [[3, 4, 6, 7, 5, 5, 8, 9, 8, 2, 2, 1, 2, 3, 4, 7]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 0, 1, 2, 3, 4, 3, 4, 0, 1, 2]]
    parts = (Part(2), Part(3, 2), Part(1, 2), Part(3), Part(2, 3), Part(2, 3), Part(3))
    assert batch.parts == parts
    assert batch.target.tolist() == [5, 6, 7, 5, 2, 2, 1, 2, 7]
    assert batch.where.tolist() == [1, 1, 2, 3, 8, 9, 8, 11, 14]
    assert batch.last.tolist() == [5, 4, 10, 12, 15]
    assert stretches(parts) == [5, 1, 5, 2, 3]
    assert batch.boundaries.tolist() == [0, 5, 6, 11, 13, 16]
    assert batch.longest == 5


def test_micro_batches_hold_what_fits() -> None:
    def cut(lengths: list[int], tokens: int, *, packing: bool) -> list[list[int]]:
        rollouts = [Rollout([k], [0] * (length - 1), False) for k, length in enumerate(lengths)]
        return micro_batches(rollouts, tokens, packing=packing, share=True)

    assert cut([3, 3, 3, 9, 1], 6, packing=True) == [[0, 1], [2], [3], [4]]
    assert cut([1, 5, 1], 7, packing=True) == [[0, 1, 2]]
    assert cut([1, 5, 1], 10, packing=False) == [[0, 1], [2]]  # padding counts
    assert cut([9, 1], 8, packing=False) == [[0], [1]]
    assert cut([], 6, packing=True) == []


def test_micro_batches_count_a_shared_prompt_once() -> None:
    rollouts = [Rollout([7] * 5, [1] * n, False) for n in (2, 1, 3)] + [Rollout([8] * 5, [1], False)] * 2
    assert micro_batches(rollouts, 11, packing=True, share=True) == [[0, 1, 2], [3, 4]]
    assert micro_batches(rollouts, 10, packing=True, share=True) == [[0, 1], [2], [3, 4]]
    assert micro_batches(rollouts, 14, packing=True, share=True) == [[0, 1, 2], [3, 4]]
    assert micro_batches(rollouts, 17, packing=True, share=True) == [[0, 1, 2, 3], [4]]
    assert micro_batches(rollouts, 18, packing=True, share=True) == [[0, 1, 2, 3, 4]]
    assert micro_batches(rollouts, 18, packing=True) == [[0, 1], [2, 3], [4]]


def test_shares_are_whole_and_even() -> None:
    lengths = [9, 1, 1, 1, 5, 5, 2]
    dealt = shares(lengths, 2)
    assert sorted(dealt[0] + dealt[1]) == list(range(7))
    assert all(share == sorted(share) for share in dealt)
    loads = [sum(lengths[k] for k in share) for share in dealt]
    assert abs(loads[0] - loads[1]) <= 1
    assert shares([4], 3) == [[0], [], []]


def test_aggregations_by_hand() -> None:
    config = {
        name: Config(aggregation=name, max_new_tokens=10)
        for name in ("token_mean", "sequence_mean", "dr_grpo")
    }
    loss = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0])]

    def value(name: Any) -> float:
        weight, denominator = aggregation(config[name], [3, 1])
        return sum(w * x.sum().item() for w, x in zip(weight, loss)) / denominator

    assert value("token_mean") == pytest.approx(16 / 4)
    assert value("sequence_mean") == pytest.approx((2 + 10) / 2)
    assert value("dr_grpo") == pytest.approx(16 / 20)


def test_seeds_are_the_same_numbers_forever() -> None:
    """A run of an older version resumes with them."""
    seeds = [seed_of(Config(seed=3), stream, 1) for stream in ("step 7", "evaluation", "initial entropy 0")]
    assert seeds == [1_021_359_920, 3_218_107_042, 1_753_973_348]


def test_learning_rates_by_hand() -> None:
    config = Config(lr=1.0, lr_warmup=2, steps=6, lr_decay="linear")
    assert [learning_rate(config, k) for k in range(1, 7)] == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])
    constant = Config(lr=1.0, steps=3)
    assert [learning_rate(constant, k) for k in (1, 2, 3)] == [1.0] * 3
    cosine = Config(lr=1.0, steps=4, lr_decay="cosine")
    expected = [0.5 * (1 + math.cos(math.pi * x)) for x in (0, 0.25, 0.5, 0.75)]
    assert [learning_rate(cosine, k) for k in (1, 2, 3, 4)] == pytest.approx(expected)


def test_each_mode_is_its_controller() -> None:
    """Three updates at half the target, then two prompts: one never right, one half right."""

    def coefficients(mode: Any, level: float, weight: float | None = None, **changes: Any) -> list[float]:
        config = Config(entropy=mode, **changes)
        controller = entropy.build_controller(config)
        if controller.target is None:
            controller.anchor(1.0)  # the target is 0.4 then, else 0.2
        for _ in range(3):
            controller.update(level, weight=weight)
        return [round(x, 6) for x in controller.coefficient(torch.tensor([0.0, 0.25])).tolist()]

    assert coefficients("none", 0.2, alpha_init=0.5) == [0.0, 0.0]
    assert coefficients("fixed", 0.2) == [0.01, 0.01]
    assert coefficients("fixed", 0.9, alpha_init=0.03) == [0.03, 0.03]
    assert coefficients("difficulty", 0.9) == [0.01, 0.005]
    assert coefficients("anchor", 0.2) == [0.01, 0.01]
    assert coefficients("anchor", 0.9) == [0.0, 0.0]
    assert coefficients("dynamic", 0.1) == [0.087, 0.087]  # (K + 3 η) (1 - ½)
    assert coefficients("target", 0.2) == [0.087, 0.087]
    assert coefficients("target", 0.2, law="proportional") == [0.03, 0.03]  # 3 η (1 - ½)
    assert coefficients("target", 0.2, gain=0.0) == [0.012, 0.012]
    assert coefficients("target", 0.8, alpha_min=-0.01) == [0.0, 0.0]  # never met
    assert coefficients("aer", 0.2) == [0.087, 0.0435]
    assert coefficients("aer", 0.2, weight=0.25) == [0.348, 0.174]
    assert coefficients("aer", 0.2, weight=0.25, normalize=False) == [0.087, 0.0435]
    assert coefficients("aer", 0.2, eta=0.1, alpha_max=0.12) == [0.12, 0.06]
    assert coefficients("aer", 0.2, rho=1.0) == [0.087, 0.06525]
    assert coefficients("aer", 0.2, difficulty_weight="gate") == [0.087, 0.087]
    assert coefficients("aer", 0.4, target_ratio=0.8) == [0.087, 0.0435]
    assert coefficients("absolute", 0.1) == [0.087, 0.0435]
    assert coefficients("dynamic", 0.4, target_entropy=0.8) == [0.087, 0.087]
    assert coefficients("sac", 0.2) == [round(0.001 * math.exp(0.15), 6), round(0.0005 * math.exp(0.15), 6)]
    assert coefficients("aent", 0.2) == [0.00148, 0.00074]  # 0.001 + 3 · 0.001 · (0.36 - 0.2)
    assert coefficients("aent", 0.39) == [0.001, 0.0005]  # within the band
    assert coefficients("entropic", 0.2) == [0.204, 0.102]  # 0.2 + 0.01 · 2 · 0.2
    assert coefficients("skywork", 0.1) == [0.0003, 0.0003]
    assert coefficients("skywork", 0.3) == [0.0, 0.0]
    assert coefficients("trl", 0.1) == [0.015, 0.015]


def test_the_settings_of_the_controller_are_written_once() -> None:
    hints = typing.get_type_hints(Config)
    assert typing.get_args(hints["difficulty_weight"]) == ("linear", "gate", "complement")
    defaults = {name: p.default for name, p in inspect.signature(AdaptiveEntropy).parameters.items()}
    config = Config()
    names = ("rho", "target_ratio", "law", "gain", "normalize")
    assert {name: getattr(config, name) for name in names} == {name: defaults[name] for name in names}
    assert config.difficulty_weight == defaults["difficulty"]
    assert entropy.build_controller(config).alpha_range == (defaults["alpha_min"], defaults["alpha_max"])
    assert entropy.build_controller(Config(entropy="trl")).alpha_range == (0.0, 1.0)
    assert entropy.build_controller(Config(entropy="trl", alpha_max=0.3)).alpha_range == (0.0, 0.3)
    low, high = entropy.build_controller(Config(entropy="fixed")).alpha_range
    assert low == high


def row(step: int, **changes: float) -> dict[str, Any]:
    usual = {
        "entropy": 0.5,
        "initial_entropy": 1.0,
        "target": 0.4,
        "alpha": 0.01,
        "ratio_max": 1.2,
        "grad_norm": 1.0,
    }
    return {"step": step} | usual | changes


@pytest.mark.parametrize(
    ("calm", "failing", "name"),
    [
        ({"entropy": 1.19}, {"entropy": 1.21}, "above 1.2 times"),
        ({"entropy": 0.11}, {"entropy": 0.09}, "below a tenth"),
        ({"ratio_max": 9.9}, {"ratio_max": 10.1}, "a probability ratio of 10.1"),
        ({"grad_norm": 9.9}, {"grad_norm": 10.1}, "gradient norm 10.1, its median was 1"),
    ],
)
def test_alarms_go_off_at_their_limits(calm: Any, failing: Any, name: str) -> None:
    before = [row(k) for k in range(10)]
    assert alarms([*before, row(10, **calm)], (0.0, 0.2)) == []
    (alarm,) = alarms([*before, row(10, **failing)], (0.0, 0.2))
    assert name in alarm


def test_alarms_name_what_fails_once() -> None:
    calm = [row(k) for k in range(20)]
    limits = (0.0, 0.2)
    assert alarms(calm, limits) == []
    (explosion,) = alarms([*calm, row(20, entropy=1.3)], limits)
    assert "above 1.2 times" in explosion
    assert alarms([*calm, row(20, entropy=1.3), row(21, entropy=1.3)], limits) == []  # said already
    (collapse,) = alarms([*calm, row(20, entropy=0.05)], limits)
    assert "below a tenth" in collapse
    (ratio,) = alarms([*calm, row(20, ratio_max=11.0)], limits)
    assert "ratio of 11" in ratio
    (gradient,) = alarms([*calm, row(20, grad_norm=11.0)], limits)
    assert "norm 11, its median was 1" in gradient
    bound = [*calm, *(row(20 + k, alpha=0.2, entropy=0.3) for k in range(10))]
    (upper,) = alarms(bound, limits)
    assert "upper bound 0.2 for 10 steps" in upper
    assert alarms(bound[:-1], limits) == []
    lower = [*calm, *(row(20 + k, alpha=0.0) for k in range(10))]
    assert "lower bound 0" in alarms(lower, limits)[0]
    # α that never left 0, or that does not move at all, is no sign
    assert alarms([row(k, alpha=0.0) for k in range(30)], limits) == []
    assert alarms([row(k, alpha=0.0, entropy=0.3) for k in range(30)], (0.0, 0.0)) == []
