import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aer_fast import token_stats
from training import demo, rollout, train
from training.config import Config
from training.evaluate import pass_at_k
from training.files import write_folder, write_text
from training.model import build_model, build_tokenizer
from training.tasks import ALPHABET, Problem, demonstration, reward, sample_problem

TINY: dict[str, Any] = {
    "warmup_steps": 2,
    "warmup_batch": 8,
    "steps": 2,
    "prompts": 4,
    "group_size": 4,
    "eval_prompts": 2,
    "eval_samples": 4,
    "k": 2,
}


def test_problems_by_hand() -> None:
    problem = Problem(47, 85)
    assert problem.prompt == "47+85="
    assert problem.answer == "231"  # 132, least significant digit first
    assert problem.shortcut == "220"  # 7 + 5 -> 2, 4 + 8 -> 2, no carry out
    assert problem.difficulty == 2
    assert [Problem(a, b).difficulty for a, b in ((11, 22), (19, 1), (90, 10), (99, 1))] == [0, 1, 1, 2]
    assert reward(problem, "231") == 1.0
    assert reward(problem, "220") == 0.0


def test_training_and_held_out_problems_are_apart() -> None:
    rng = random.Random(0)
    training = {sample_problem(rng) for _ in range(2000)}
    held_out = {sample_problem(rng, held_out=True, difficulty=1) for _ in range(200)}
    assert not training & held_out
    assert not {Problem(p.b, p.a) for p in training} & held_out
    assert {p.difficulty for p in held_out} == {1}
    assert 0.05 < sum(Problem(a, 7).held_out for a in range(100)) / 100 < 0.2


def test_demonstrations_mix_right_and_wrong() -> None:
    rng = random.Random(0)
    pairs = [demonstration(rng, right=0.25, noise=0.0) for _ in range(2000)]
    problems = {Problem(a, b).prompt: Problem(a, b) for a in range(100) for b in range(100)}
    hard = [(problems[p], r) for p, r in pairs if problems[p].difficulty]
    right = sum(r == p.answer for p, r in hard)
    assert all(r in (p.answer, p.shortcut) for p, r in hard)
    assert right / len(hard) == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize(("samples", "right", "k"), [(5, 0, 2), (5, 2, 2), (6, 1, 3), (4, 4, 1), (5, 4, 3)])
def test_pass_at_k_counts_all_draws(samples: int, right: int, k: int) -> None:
    outcomes = [True] * right + [False] * (samples - right)
    draws = list(itertools.combinations(outcomes, k))
    assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_group_relative_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    expected = torch.tensor([[3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)], [0.0] * 4])
    torch.testing.assert_close(train.group_relative(rewards), expected, rtol=1e-4, atol=1e-6)


class Scripted:
    """A model whose generate returns given responses."""

    def __init__(self, responses: Tensor) -> None:
        self.responses = responses
        self.settings: Any = None

    def generate(self, prompts: Tensor, attention_mask: Tensor, generation_config: Any) -> Tensor:
        self.settings = generation_config
        return torch.cat([prompts, self.responses], dim=-1)


def test_the_mask_ends_at_the_first_end_token() -> None:
    tokenizer = build_tokenizer(ALPHABET)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    one, two, three = tokenizer.encode("123")
    responses = torch.tensor(
        [
            [two, three, one, end],  # right
            [two, three, one, two],  # never ends
            [two, end, pad, pad],  # ends early
            [end, end, two, end],  # an end token after the end is not sampled
        ]
    )
    problems = [Problem(47, 85), Problem(47, 85)]
    model = Scripted(responses)
    rollouts = rollout.sample(model, tokenizer, problems, 2, 0.7, reward)
    assert rollouts.reward.tolist() == [[1.0, 0.0], [0.0, 0.0]]
    expected = torch.full((4, 10), -100)
    for row, length in enumerate((4, 4, 2, 1)):
        expected[row, 5 : 5 + length] = responses[row, :length]
    assert torch.equal(rollouts.target, expected)
    assert rollouts.tokens == 11
    assert torch.equal(rollouts.ids[:, 1:][expected[:, :-1] != -100], expected[expected != -100])


def test_sampling_ignores_the_generation_defaults_of_a_model() -> None:
    tokenizer = build_tokenizer(ALPHABET)
    model = build_model(tokenizer, seed=0)
    model.generation_config.top_k = 1
    model.generation_config.repetition_penalty = 5.0
    rollouts = rollout.sample(model, tokenizer, [Problem(1, 2)], 64, 1.0, reward)
    first = rollouts.target[:, 5]
    assert len(first.unique()) > 8  # of 14 tokens; top-k of the model's defaults would leave one


def test_the_first_minibatch_is_on_policy_and_later_ones_are_not() -> None:
    tokenizer = build_tokenizer(ALPHABET)
    model = build_model(tokenizer, seed=0)
    config = Config(**TINY, epochs=1, minibatches=1, lr=1e-2)
    problems = [Problem(1, 2), Problem(30, 4), Problem(5, 60), Problem(7, 8)]
    rollouts = rollout.sample(model, tokenizer, problems, 4, config.temperature, reward)
    with torch.no_grad():
        old = token_stats(model(rollouts.ids).logits, rollouts.target)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    advantage, coefficient = torch.randn(16), torch.zeros(16)
    first, second = (
        train.optimise(model, optimizer, rollouts, old.logprob, advantage, coefficient, config)
        for _ in range(2)
    )
    assert first["ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert first["clip_fraction"] == 0.0
    assert abs(first["approx_kl"]) < 1e-6
    assert second["ratio_max"] > 1.01
    assert second["approx_kl"] > 1e-4


def test_a_bonus_raises_entropy_and_its_absence_does_not() -> None:
    """Without any reward the bonus is the only gradient; a fresh model is peaked enough to gain entropy."""
    tokenizer = build_tokenizer(ALPHABET)
    change = {}
    for bonus in (0.0, 1.0):
        model = build_model(tokenizer, seed=0)
        config = Config(**TINY, epochs=4, lr=1e-3)
        rollouts = rollout.sample(model, tokenizer, [Problem(1, 2)] * 4, 4, 1.0, reward)
        with torch.no_grad():
            before = token_stats(model(rollouts.ids).logits, rollouts.target)
        train.optimise(
            model,
            torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0),
            rollouts,
            before.logprob,
            torch.zeros(16),
            torch.full((16,), bonus),
            config,
        )
        with torch.no_grad():
            after = token_stats(model(rollouts.ids).logits, rollouts.target)
        change[bonus] = (after.entropy - before.entropy).sum().item() / rollouts.tokens
    assert change[0.0] == 0.0
    assert change[1.0] > 0.05


def test_the_demo_runs_and_writes_whole_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo.main(Config(output=tmp_path, **TINY))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"initial", "none.jsonl", "aer.jsonl", "scores.json", "entropy.png"}
    runs = {
        mode: [json.loads(x) for x in (tmp_path / f"{mode}.jsonl").read_text().splitlines()]
        for mode in ("none", "aer")
    }
    for mode, history in runs.items():
        assert [row["step"] for row in history] == [1, 2]
        assert history[0]["target"] == pytest.approx(0.4 * history[0]["entropy"])
        assert (mode == "aer") or all(row["coefficient"] == 0 for row in history)
    assert runs["none"][0]["entropy"] == runs["aer"][0]["entropy"]  # one start, one seed
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores.keys() == {"initial", "no bonus", "AER"}
    assert all(0 <= v <= 1 for s in scores.values() for k, v in s.items() if k != "entropy")
    assert (tmp_path / "entropy.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "pass@1 / pass@2" in printed
    assert "no bonus" in printed
    model, tokenizer = demo.load(tmp_path / "initial")
    assert tokenizer.decode(tokenizer.encode("12+34=")).replace(" ", "") == "12+34="
    assert model.config.model_type == "qwen3"


def test_an_interruption_leaves_only_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "aer.jsonl", "of an earlier run\n")

    def interrupted(*args: Any) -> None:
        args[-1]({"step": 1, "reward": 0.0, "entropy": 1.0})
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "ppo", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.main(Config(output=tmp_path, **TINY))
    assert {path.name for path in tmp_path.iterdir()} == {"initial"}  # nothing half, nothing stale
    demo.load(tmp_path / "initial")


def test_an_interrupted_replacement_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    rename = Path.rename

    def second_fails(self: Path, target: Path) -> Path:
        if target == tmp_path / "model" and self.name == "model":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "model", Path.mkdir)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_write_keeps_what_was_there(tmp_path: Path) -> None:
    def half(path: Path) -> None:
        path.mkdir()
        (path / "weights").write_text("ha")
        raise KeyboardInterrupt

    def whole(path: Path) -> None:
        path.mkdir()
        (path / "weights").write_text("whole")

    for _ in range(2):
        write_folder(tmp_path / "model", whole)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "model", half)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "weights").read_text() == "whole"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 100}, "k must be at most eval_samples=64, got 100"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"group_size": 1}, "group_size must be at least 2"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm must be positive"),
        ({"right": 2.0}, "right must be from 0 to 1"),
        ({"clip_low": -0.5}, "clip_low must be at least 0"),
        ({"output": Path("/dev/null/demo")}, "output /dev/null/demo is no folder to write to"),
        ({"minibatches": 0}, "minibatches must be"),
    ],
)
def test_bad_settings_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        demo.check(Config(**({"output": tmp_path} | change)))
