"""A teacher beside the reward, or instead of it: the trainer's distillation on its own samples."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.models import build
from tests.helpers.trainers import small, trainer
from training import evaluate, plot
from training.batch import Rollout
from training.config import PRESETS, Config, check
from training.files import read_rows
from training.models import check_same, resolve
from training.scratch import build_tokenizer
from training.train import Trainer, train

pytestmark = pytest.mark.needs("training", "peft", "safetensors")
TEACHER = "carry(digits=2, steps=40, batch=32, seed=1)"
KINDS = (("reverse_kl", 0.5), ("forward_kl", 0.5), ("jsd", 0.3))


@pytest.fixture
def config(cache: Path, tmp_path: Path) -> Config:
    return small(cache, tmp_path / "run", teacher=TEACHER, threads=1, lr=1e-2)


@pytest.fixture
def make(cache: Path, tmp_path: Path) -> Any:
    settings = {"teacher": TEACHER, "threads": 1}
    return lambda **changes: trainer(small(cache, tmp_path / "run", **settings | changes))


def sampled(made: Trainer) -> list[Rollout]:
    """What a step's sampling gives."""
    problems = [made.task.training(k) for k in range(made.config.prompts)]
    return made.collect(problems, made.config.group_size, "step 1").rollouts


def divergences(made: Trainer, rollouts: list[Rollout]) -> Tensor:
    """Of all response tokens, from the logits of both models."""
    config, found = made.config, []
    assert made.teacher is not None
    for r in rollouts:
        ids = torch.tensor([r.prompt + r.response], device=made.policy.device)
        at = slice(len(r.prompt) - 1, -1)
        logp, logq = (
            (x.model(ids).logits[0, at, :14] / config.temperature).log_softmax(-1)
            for x in (made.policy, made.teacher)
        )
        p, q = logp.exp(), logq.detach().exp()
        if config.divergence == "reverse_kl":
            d = p * (logp - q.log())
        elif config.divergence == "forward_kl":
            d = q * (q.log() - logp)
        else:
            b = config.jsd_beta
            m = (b * q + (1 - b) * p).log()
            d = b * q * (q.log() - m) + (1 - b) * p * (logp - m)
        found.append(d.sum(-1))
    return torch.cat(found)


def gradients(made: Trainer, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Of the one update of a step."""
    found: list[Tensor] = []

    def keep() -> None:
        found.append(torch.cat([p.grad.flatten() for p in made.policy.parameters() if p.grad is not None]))

    monkeypatch.setattr(made.learner.optimizer, "step", keep)
    made.step(1)
    (one,) = found
    return one


@pytest.mark.parametrize(("divergence", "jsd_beta"), KINDS)
def test_the_gradient_of_a_step_is_that_of_both_losses(
    make: Any, monkeypatch: Any, divergence: Any, jsd_beta: float
) -> None:
    """That of the reward's loss, computed without a teacher, and that of the divergence, from logits."""
    settings: dict[str, Any] = {"temperature": 0.7, "max_grad_norm": 1e9, "micro_tokens": 60, "packing": True}
    settings |= {"entropy": "fixed", "alpha_init": 0.1}
    taught = {"divergence": divergence, "jsd_beta": jsd_beta, "distill_coef": 0.4}
    alone = gradients(make(teacher=None, **settings), monkeypatch)
    made = make(**settings, **taught)
    rollouts = sampled(made)
    loss = 0.4 * divergences(made, rollouts).mean()
    lesson = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(made.policy.parameters()))])
    assert min(alone.norm(), lesson.norm()) > 0.02
    both = gradients(made, monkeypatch)
    torch.testing.assert_close(both, alone + lesson, rtol=1e-3, atol=1e-6)

    without = make(**settings, **taught, reward_loss=False)
    bonus: Any = 0.1 * torch.cat([entropies(without, r) for r in rollouts]).mean()
    expected = torch.autograd.grad(bonus, list(without.policy.parameters()))
    flat = torch.cat([g.flatten() for g in expected])
    torch.testing.assert_close(gradients(without, monkeypatch), lesson - flat, rtol=1e-3, atol=1e-6)


def entropies(made: Trainer, r: Rollout) -> Tensor:
    ids = torch.tensor([r.prompt + r.response], device=made.policy.device)
    logits = made.policy.model(ids).logits[0, len(r.prompt) - 1 : -1] / made.config.temperature
    logp: Tensor = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("settings", [{}, {"reward_loss": False, "packing": True}, {"lora_rank": 2}])
def test_the_divergence_is_the_mean_of_all_tokens(make: Any, settings: dict[str, Any]) -> None:
    """Of minibatches and micro-batches of unequal sizes; and the teacher stays as it is."""
    made = make(**settings, lr=1e-12, minibatches=3, micro_tokens=40, temperature=0.7)
    assert not made.teacher.training
    assert not any(p.requires_grad for p in made.teacher.parameters())
    before = [p.clone() for p in made.teacher.parameters()]
    with torch.no_grad():
        expected = divergences(made, sampled(made)).mean().item()
    metrics = made.step(1)
    assert metrics["divergence"] == pytest.approx(expected, rel=1e-4)
    assert metrics["ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["approx_kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["clip_fraction"] == 0.0
    assert all(map(torch.equal, before, made.teacher.parameters()))


def test_without_a_reward_the_policys_way_is_reported_all_the_same(make: Any, monkeypatch: Any) -> None:
    """Ratio and approx_kl of a second epoch, against the log-probabilities of before and after the first."""
    made = make(reward_loss=False, entropy="none", epochs=2, lr=1e-3)
    rollouts = sampled(made)
    rows = list(range(len(rollouts)))
    old = torch.cat([x["logprob"] for x in made.learner.measure(rollouts, [rows])])
    reports = []
    update = made.learner.update

    def recorded(*arguments: Any) -> Any:
        now = torch.cat([x["logprob"] for x in made.learner.measure(rollouts, [rows])]) - old
        reports.append((update(*arguments), now))
        return reports[-1][0]

    monkeypatch.setattr(made.learner, "update", recorded)
    made.step(1)
    report, moved = reports[1]
    assert report["ratio_max"] == pytest.approx(moved.exp().max().item(), rel=1e-4)
    assert report["ratio_max"] > 1.01
    assert report["approx_kl"] == pytest.approx((moved.expm1() - moved).mean().item(), rel=1e-3)


@pytest.mark.parametrize("reward_loss", [True, False])
def test_groups_without_a_reward_signal_are_taught(make: Any, monkeypatch: Any, reward_loss: bool) -> None:
    made = make(reward_loss=reward_loss, entropy="none", lr=3e-4)
    monkeypatch.setattr(made.rewards, "scorer", lambda problem, response: 0.0)
    calls, rollouts = [], sampled(made)
    with torch.no_grad():
        before = divergences(made, rollouts).mean()
    update = made.learner.update

    def recorded(rollouts: Any, old: Any, rows: Any, *rest: Any) -> Any:
        calls.append(rows)
        return update(rollouts, old, rows, *rest)

    monkeypatch.setattr(made.learner, "update", recorded)
    first = made.step(1)
    assert first["all_wrong"] == 1.0
    assert sorted(calls[0]) == list(range(16))
    with torch.no_grad():
        assert divergences(made, rollouts).mean() < before - 0.01


def test_one_response_a_prompt_is_enough_without_a_reward(make: Any) -> None:
    made = make(reward_loss=False, group_size=1, prompts=8, lr=1e-3)
    assert made.step(1)["divergence"] > 0.0


def test_a_teacher_in_bfloat16(make: Any) -> None:
    low, high = (make(dtype=dtype, reward_loss=False) for dtype in ("bfloat16", "float32"))
    assert {p.dtype for p in low.teacher.parameters()} == {torch.bfloat16}
    assert low.step(1)["divergence"] == pytest.approx(high.step(1)["divergence"], rel=0.2)


class Figures:
    """The last figure that was drawn."""

    figure: Any = None


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Figures:
    found, draw = Figures(), plot._draw

    def keep(figure: Any, path: Path) -> None:
        found.figure = figure
        draw(figure, path)

    monkeypatch.setattr(plot, "_draw", keep)
    return found


def test_a_distillation_falls_and_is_drawn(config: Config, tmp_path: Path, drawn: Figures) -> None:
    """The documented run, but for its size."""
    taught = replace(
        PRESETS["distill"][1],
        **{
            name: getattr(config, name)
            for name in (
                "output",
                "model",
                "model_cache",
                "teacher",
                "task",
                "prompts",
                "group_size",
                "logger",
            )
        },
    )
    train(replace(taught, steps=12, lr=3e-3, initial_tokens=32, eval_every=0), quiet=True)
    rows = read_rows(config.output / "metrics.jsonl")
    curve = [row["divergence"] for row in rows]
    assert len(curve) == 12
    assert curve[0] > 0.1
    assert sum(curve[-3:]) / 3 < 0.6 * curve[0]
    plain = tmp_path / "plain"
    train(replace(config, output=plain, teacher=None, steps=1), quiet=True)
    assert "divergence" not in read_rows(plain / "metrics.jsonl")[0]
    plot.main(plot.Plot((config.output, plain), tmp_path / "a.png"))
    (axis,) = (x for x in drawn.figure.axes if x.get_title() == "Divergence from the teacher")
    (line,) = axis.lines
    assert line.get_ydata() == pytest.approx(curve)
    assert list(line.get_xdata()) == list(range(1, 13))
    plot.main(plot.Plot((plain,), tmp_path / "b.png"))
    assert len(drawn.figure.axes) == 4
    with (config.output / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(rows[0] | {"divergence": None}) + "\n")
    with pytest.raises(ValueError, match="line 13: divergence is null"):
        plot.main(plot.Plot((config.output,), tmp_path / "a.png"))


@pytest.mark.parametrize("reward_loss", [True, False])
def test_a_resumed_run_is_taught_as_an_uninterrupted_one(config: Config, reward_loss: bool) -> None:
    config = replace(config, reward_loss=reward_loss, checkpoint_every=2, keep=2)
    train(config, quiet=True)
    metrics = config.output / "metrics.jsonl"
    whole, last = metrics.read_text(), config.output / "checkpoints" / "step-000004"
    model = load_file(last / "model" / "model.safetensors")
    shutil.rmtree(last)
    train(replace(config, resume=True), quiet=True)
    assert metrics.read_text() == whole
    again = load_file(last / "model" / "model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.items())
    with pytest.raises(ValueError, match=r"the run to resume has teacher 'carry.*, but None was asked for"):
        train(replace(config, resume=True, teacher=None, reward_loss=True), quiet=True)


def test_a_checkpoint_teaches_and_an_evaluation_needs_no_teacher(config: Config, monkeypatch: Any) -> None:
    train(replace(config, steps=1), quiet=True)
    first = config.output / "checkpoints" / "step-000001"
    adapted = replace(config, output=config.output / "b", steps=1, teacher=str(first), lora_rank=2)
    train(adapted, quiet=True)  # whose checkpoint holds adapters
    taught = replace(
        config, output=config.output / "c", steps=1, teacher=str(adapted.output / "checkpoints/step-000001")
    )
    train(taught, quiet=True)
    assert read_rows(taught.output / "metrics.jsonl")[0]["divergence"] > 0.0
    monkeypatch.setattr("training.train.load_teacher", lambda *a: pytest.fail("loaded"))
    evaluate.main(evaluate.Evaluation(taught.output))


def folder(path: Path, alphabet: str, family: str = "untied", **settings: Any) -> str:
    """A model, with a vocabulary of its tokenizer's size if no other is given."""
    tokenizer = build_tokenizer(alphabet)
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    build(family, **{"vocab_size": len(tokenizer)} | ends | settings).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def test_a_teacher_that_reads_other_tokens_is_refused(make: Any, tmp_path: Path) -> None:
    for alphabet, message in (
        ("0123456789=+", "2 tokens have other ids, for one '+' is 13 and 12"),
        ("0123456789+=-", "1 tokens have other ids, for one '-' is 14 and None"),
        ("0123456789+", "1 tokens have other ids, for one '=' is None and 13"),
    ):
        other = folder(tmp_path / str(len(alphabet)) / alphabet[-1], alphabet)
        line = f"teacher: its tokenizer is not the model's: {message}"
        with pytest.raises(ValueError, match=re.escape(line)):
            make(teacher=other)
    own, other = build_tokenizer("0123456789+="), build_tokenizer("0123456789+=")
    other.pad_token = "0"
    check_same(other, own)
    other.eos_token = "="
    with pytest.raises(ValueError, match="not the model's: its eos_token is '=', not '<eos>'"):
        check_same(other, own)


def test_a_teacher_that_can_not_read_a_sample_is_refused(make: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="teacher: model /nowhere: no such folder"):
        make(teacher="/nowhere")
    few = folder(tmp_path / "few", "0123456789+=", vocab_size=12)
    with pytest.raises(ValueError, match=r"few: its embedding has 12 rows, the model's 14"):
        make(teacher=few)
    short = folder(tmp_path / "short", "0123456789+=", max_position_embeddings=8)
    message = "a prompt of 6 tokens and max_new_tokens 4 exceed the teacher's 8 positions"
    with pytest.raises(ValueError, match=message):
        make(teacher=short, packing=False)


@pytest.mark.parametrize("family", ["tied", "bias", "softcap", "scale untied"])
def test_a_teacher_may_be_of_another_family_with_more_words(make: Any, tmp_path: Path, family: str) -> None:
    teacher = folder(tmp_path / "wide", "0123456789+=", family, vocab_size=20)
    made = make(teacher=teacher, reward_loss=False, lr=1e-12, temperature=0.7)
    with torch.no_grad():
        expected = divergences(made, sampled(made)).mean().item()
    assert made.step(1)["divergence"] == pytest.approx(expected, rel=1e-4)


def test_a_teacher_is_made_as_a_model_is(config: Config) -> None:
    made = resolve(replace(config, model=TEACHER))
    assert made == resolve(replace(config, model="carry(steps=40, digits=2, batch=32, seed=1)"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": None, "distill_coef": 0.5}, "distill_coef 0.5 needs a teacher"),
        ({"teacher": None, "divergence": "jsd"}, "divergence 'jsd' needs a teacher"),
        ({"teacher": None, "jsd_beta": 0.1}, "jsd_beta 0.1 needs a teacher"),
        ({"teacher": None, "reward_loss": False}, "reward_loss False needs a teacher"),
        ({"distill_coef": 0.0}, "distill_coef must be positive and finite, got 0.0"),
        ({"divergence": "kl"}, "divergence must be one of"),
        ({"divergence": "jsd", "jsd_beta": 1.5}, "jsd_beta must be from 0 to 1, got 1.5"),
        ({"jsd_beta": 0.1}, "jsd_beta belongs to divergence 'jsd', not to 'reverse_kl'"),
        ({"reward_loss": False, "kl_coef": 0.1}, "kl_coef is a part of the reward's loss"),
        ({"reward_loss": False, "clip_cov": 0.1}, "clip_cov is a part of the reward's loss"),
        ({"reward_loss": False, "advantage": "gae"}, "advantage 'gae' belongs to the reward's loss"),
        ({"reward_loss": False, "degenerate": "drop"}, "degenerate 'drop' belongs to the reward's loss"),
        ({"group_size": 1}, "group_size must be at least 2"),
    ],
)
def test_settings_of_a_teacher_that_can_not_work_are_named(
    config: Config, change: dict[str, Any], message: str
) -> None:
    check(config)
    with pytest.raises(ValueError, match=re.escape(message)):
        check(replace(config, **change))
