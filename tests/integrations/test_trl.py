"""AERGRPOTrainer beside TRL's own: the same loss with the bonus off, AER's coefficients with it on."""

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import (
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

from aer_fast import AdaptiveEntropy
from aer_fast.integrations.trl import AERGRPOConfig, AERGRPOTrainer
from tests import ROOT
from tests.helpers.grpo import ALPHABET, PROMPTS, V, build, has_a_one, length, tokenizer, trainer

pytestmark = [
    pytest.mark.needs("trl", "datasets", "peft"),
    # of transformers and TRL, about themselves
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


# The loss of one micro-batch


def batch(**extra: Tensor) -> dict[str, Tensor]:
    """What TRL hands to the loss: 4 completions of 4, 6, 1 and 5 tokens."""
    torch.manual_seed(5)
    lengths = torch.tensor([4, 6, 1, 5])
    mask = (torch.arange(6) < lengths[:, None]).long()
    prompt_mask = torch.ones(4, 3, dtype=torch.long)
    prompt_mask[1, 0] = 0
    return {
        "prompt_ids": torch.randint(3, V, (4, 3)),
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(1, V, (4, 6)) * mask,
        "completion_mask": mask,
        "advantages": torch.tensor([1.0, -0.5, 0.0, -2.0]),
        "num_items_in_batch": torch.tensor(29),
        **extra,
    }


def old(scale: float = 0.3, temperature: float = 1.0) -> Tensor:
    """Log-probabilities near those of the model, so that ratios fall on both sides of every bound."""
    torch.manual_seed(6)
    model, inputs = build(), batch()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    with torch.no_grad():
        logits: Tensor = model(ids, attention_mask=mask).logits[:, 2:-1]
        logp = logits.div(temperature).log_softmax(-1)
    return logp.gather(-1, inputs["completion_ids"][..., None])[..., 0] + scale * torch.randn(4, 6)


def loss_of(
    cls: Any,
    folder: Path,
    inputs: dict[str, Tensor],
    attributes: dict[str, Any],
    mode: str = "train",
    **settings: Any,
) -> tuple[Tensor, dict[str, Tensor], dict[str, list[float]], Any]:
    """The loss, its gradients, what was logged, and the trainer."""
    off = {"use_aer": False} if cls is AERGRPOTrainer and "use_aer" not in settings else {}
    model = build(attributes.pop("kind", "llama"))
    made = trainer(cls, folder, model, **off | settings)
    made.model.train(mode == "train")
    made.current_gradient_accumulation_steps = 2
    for name, value in attributes.items():
        setattr(made, name, value)
    loss = made._compute_loss(made.model, dict(inputs))
    parameters = dict(made.model.named_parameters())
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return (
        loss.detach(),
        {k: g for k, g in zip(parameters, grads) if g is not None},
        made._metrics[mode],
        made,
    )


def assert_same_loss(
    folder: Path,
    inputs: dict[str, Tensor],
    attributes: dict[str, Any] | None = None,
    mode: str = "train",
    **settings: Any,
) -> None:
    results = [
        loss_of(cls, folder, inputs, dict(attributes or {}), mode, **settings)
        for cls in (GRPOTrainer, AERGRPOTrainer)
    ]
    (loss, grads, logged, _), (our_loss, our_grads, our_logged, ours) = results
    torch.testing.assert_close(our_loss, loss, atol=1e-6, rtol=1e-5)
    assert our_grads.keys() == grads.keys()
    assert any(g.abs().max() > 1e-4 for g in grads.values())
    for name, grad in our_grads.items():
        torch.testing.assert_close(grad, grads[name], atol=5e-6, rtol=1e-4)
    assert our_logged.keys() == logged.keys()
    for name, values in our_logged.items():
        assert values == pytest.approx(logged[name], abs=1e-5, nan_ok=True), name
    assert ours._loss_inputs is None


TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "asymmetric clip": {"epsilon": 0.1, "epsilon_high": 0.3},
    "temperature": {"temperature": 0.7},
    "sequence ratio": {"importance_sampling_level": "sequence", "epsilon": 0.02},
    "entropy_coef": {"entropy_coef": 0.3},
    "kl": {"beta": 0.2},
    "kl without ratio": {"beta": 0.2, "use_bias_correction_kl": False},
    "delta": {"delta": 1.4},
    "delta below the clip": {"delta": 1.1},
    "delta below one": {"delta": 0.9},
    "entropy quantile": {"top_entropy_quantile": 0.4, "entropy_coef": 0.3},
    "a generation of two steps": {"steps_per_generation": 4},
    "off-policy mask": {"off_policy_mask_threshold": 0.02},
}


@pytest.fixture(autouse=True)
def _no_reference_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL loads the reference model by its name; there is none, and its log-probabilities are given."""
    monkeypatch.setattr("trl.trainer.grpo_trainer.create_model_from_path", lambda *_, **__: build())


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("loss_type", TYPES)
def test_the_loss_is_trl_s(loss_type: str, name: str, tmp_path: Path) -> None:
    settings = SETTINGS[name]
    temperature = settings.get("temperature", 1.0)
    extra = {"old_per_token_logps": old(0.3, temperature), "sampling_per_token_logps": old(0.4, temperature)}
    if "beta" in settings:
        extra["ref_per_token_logps"] = old(0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same_loss(tmp_path, batch(**extra), loss_type=loss_type, **settings)


@pytest.mark.parametrize("loss_type", TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_on_policy_without_old_log_probabilities(loss_type: str, level: str, tmp_path: Path) -> None:
    assert_same_loss(tmp_path, batch(), loss_type=loss_type, importance_sampling_level=level)


@pytest.mark.parametrize("loss_type", TYPES)
@pytest.mark.parametrize("shape", [(4, 6), (4, 1)], ids=["per token", "per sequence"])
def test_importance_ratios_of_the_sampler(loss_type: str, shape: tuple[int, int], tmp_path: Path) -> None:
    if loss_type == "vespo" and shape[1] == 1:
        pytest.skip("TRL refuses it")
    torch.manual_seed(8)
    ratio = torch.rand(shape) + 0.5
    if shape[1] == 6:
        ratio = ratio.where(batch()["completion_mask"] != 0, 1.0)
        ratio[0, 1] = 0.0  # masked by TRL
    inputs = batch(old_per_token_logps=old(), importance_sampling_ratio=ratio, ref_per_token_logps=old(0.5))
    assert_same_loss(
        tmp_path, inputs, {"use_vllm": True}, loss_type=loss_type, beta=0.1, use_bias_correction_kl=False
    )


def test_importance_ratios_that_are_not_asked_for(tmp_path: Path) -> None:
    inputs = batch(old_per_token_logps=old(), importance_sampling_ratio=torch.rand(4, 6))
    assert_same_loss(tmp_path, inputs, {"use_vllm": True, "vllm_importance_sampling_correction": False})


@pytest.mark.parametrize("loss_type", TYPES)
def test_tools_advantages_per_token_and_empty_completions(loss_type: str, tmp_path: Path) -> None:
    torch.manual_seed(9)
    inputs = batch(old_per_token_logps=old())
    inputs["tool_mask"] = (torch.rand(4, 6) < 0.7).long()
    inputs["tool_mask"][2] = 0  # nothing left of it
    inputs["advantages"] = torch.randn(4, 6)
    assert_same_loss(tmp_path, inputs, loss_type=loss_type, entropy_coef=0.2)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "sapo", "vespo"])
def test_evaluation(loss_type: str, tmp_path: Path) -> None:
    inputs = batch(old_per_token_logps=old())
    assert_same_loss(tmp_path, inputs, mode="eval", loss_type=loss_type, entropy_coef=0.2)


@pytest.mark.parametrize("last", [0.1, 5.0], ids=["below the target", "gated"])
def test_trl_s_own_adaptive_entropy(last: float, tmp_path: Path) -> None:
    inputs, attributes = batch(old_per_token_logps=old()), {"_last_world_entropy": last}
    settings = {"entropy_coef": 0.2, "use_adaptive_entropy": True, "entropy_target": 1.0}
    assert_same_loss(tmp_path, inputs, attributes, **settings)


@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
def test_mixtures_of_experts(loss_type: str, tmp_path: Path) -> None:
    inputs = batch(old_per_token_logps=old())
    assert_same_loss(tmp_path, inputs, {"kind": "moe"}, loss_type=loss_type)


def test_a_head_in_float32_above_a_body_in_bfloat16(tmp_path: Path) -> None:
    inputs = batch()
    results = [
        loss_of(cls, tmp_path, inputs, {"kind": "half"}, cast_lm_head_to_fp32=True, entropy_coef=0.3)
        for cls in (GRPOTrainer, AERGRPOTrainer)
    ]
    (loss, grads, _, _), (our_loss, our_grads, _, _) = results
    torch.testing.assert_close(our_loss, loss, atol=1e-6, rtol=1e-6)
    assert our_grads["lm_head.weight"].dtype == torch.float32
    torch.testing.assert_close(our_grads["lm_head.weight"], grads["lm_head.weight"], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["llama", "half"])
def test_its_model_is_saved_as_an_object(kind: str, tied: bool, tmp_path: Path) -> None:
    """And is fused when it is loaded; TRL's own patches, functions within functions, are not in its way."""
    model = build(kind)
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    settings = {"cast_lm_head_to_fp32": True} if kind == "half" else {"beta": 0.1, "disable_dropout": True}
    made = trainer(AERGRPOTrainer, tmp_path, model, max_steps=1, **settings)
    made.train()
    model = made.model.eval()
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    ids = torch.arange(3, 9).view(2, 3)
    expected = model(ids, target=ids)
    assert model(ids).logits.dtype == expected.logprob.dtype == torch.float32
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(loaded(ids, target=ids).logprob, expected.logprob)
    with torch.no_grad():
        loaded.lm_head.weight.zero_()
    assert loaded(ids).logits.abs().max() == 0.0
    assert torch.equal(model(ids, target=ids).logprob, expected.logprob)


def with_images() -> dict[str, Any]:
    """A batch whose prompts begin with an image of four tokens."""
    inputs: dict[str, Any] = batch()
    image = torch.tensor([[V + 2] + 4 * [V] + [V + 3]] * 4)
    inputs["prompt_ids"] = torch.cat([image, inputs["prompt_ids"]], 1)
    inputs["prompt_mask"] = torch.cat([torch.ones_like(image), inputs["prompt_mask"]], 1)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    return inputs | {
        "pixel_values": torch.randn(4 * 16, 12),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 4),
        "num_images": [1] * 4,
        "mm_token_type_ids": (ids == V).long(),
    }


@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
def test_images(loss_type: str, tmp_path: Path) -> None:
    assert_same_loss(tmp_path, with_images(), {"kind": "vision"}, loss_type=loss_type)


def test_images_reach_the_loss(tmp_path: Path) -> None:
    *_, grads, _, _ = loss_of(AERGRPOTrainer, tmp_path, with_images(), {"kind": "vision"})
    assert grads["model.visual.patch_embed.proj.weight"].any()


# Whole runs


def history(made: Any, *names: str) -> list[tuple[float, ...]]:
    return [tuple(row[k] for k in names) for row in made.state.log_history if "loss" in row]


def test_a_run_is_trl_s_with_the_bonus_off(tmp_path: Path) -> None:
    theirs = trainer(GRPOTrainer, tmp_path / "a")
    theirs.train()
    ours = trainer(AERGRPOTrainer, tmp_path / "b", use_aer=False)  # whose constructor sets the seed again
    ours.train()
    names = "loss", "grad_norm", "entropy", "clip_ratio/region_mean"
    assert len(history(ours, *names)) == 4
    for mine, wanted in zip(history(ours, *names), history(theirs, *names)):
        assert mine == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    rewards = [[row["reward"] for row in x.state.log_history if "reward" in row] for x in (theirs, ours)]
    assert rewards[0] == rewards[1]
    assert len(rewards[0]) == 2
    for a, b in zip(theirs.model.parameters(), ours.model.parameters()):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-3)


class Watch(TrainerCallback):
    """What every call of the loss was given."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on(self, made: Any) -> "Watch":
        compute = made._compute_loss

        def watching(model: Any, inputs: dict[str, Any]) -> Tensor:
            before = None if made.controller is None else made.controller.alpha
            loss: Tensor = compute(model, inputs)
            self.seen.append({**inputs, "alpha": before, "result": made._last, "loss": loss.detach()})
            return loss

        made._compute_loss = watching
        return self


def right(ids: Tensor) -> Tensor:
    return (ids == 3 + ALPHABET.index("1")).any(-1)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "cispo"])
def test_coefficients_follow_their_prompts(loss_type: str, tmp_path: Path) -> None:
    """Through shuffling, splitting, two iterations and accumulation; the bonus is their mean over tokens."""
    settings = {
        "aer_eta": 0.5,
        "aer_target": 5.0,
        "aer_alpha_init": 0.1,
        "aer_alpha_max": 2.0,
        "aer_rho": 1.0,
    }
    made = trainer(AERGRPOTrainer, tmp_path, loss_type=loss_type, num_generations=2, **settings)
    watch = Watch().on(made)
    made.train()
    assert len(watch.seen) == 8
    spread = set()
    for start in (0, 4):  # two generation batches, each of two micro-batches, seen twice
        parts = watch.seen[start : start + 2]
        prompts = torch.cat([x["prompt_ids"] for x in parts])
        score = right(torch.cat([x["completion_ids"] for x in parts])).float()
        accuracy = torch.cat([x["accuracy"] for x in parts])
        for prompt in prompts.unique(dim=0):
            same = (prompts == prompt).all(-1)
            assert same.sum() == 2
            assert torch.equal(accuracy[same], score[same].mean().expand(2))
        spread |= set(accuracy.tolist())
        for again, first in zip(watch.seen[start + 2 : start + 4], parts):
            assert torch.equal(again["accuracy"], first["accuracy"])
            assert torch.equal(again["completion_ids"], first["completion_ids"])
    assert len(spread) > 1
    log = made.state.log_history
    assert [row["aer/alpha"] for row in log if "aer/alpha" in row] == sorted(
        row["aer/alpha"] for row in log if "aer/alpha" in row
    )
    plain = trainer(AERGRPOTrainer, tmp_path, loss_type=loss_type, use_aer=False)
    plain.model.train()
    plain.current_gradient_accumulation_steps = 2
    call = watch.seen[0]
    assert call["alpha"] == 0.1
    mask = call["completion_mask"]
    bonus = (0.1 * (1 - call["accuracy"]))[:, None] * call["result"].entropy * mask
    expected = plain._compute_loss(plain.model, dict(call)) - bonus.sum() / call["num_items_in_batch"]
    torch.testing.assert_close(call["loss"], expected.detach(), atol=1e-6, rtol=1e-5)


def test_gradient_of_the_bonus(tmp_path: Path) -> None:
    """A uniform AER with α fixed is an entropy bonus over the tokens of the optimizer step."""
    inputs = batch(old_per_token_logps=old(), accuracy=torch.tensor([0.0, 1.0, 0.5, torch.nan]))
    for extra in ({}, {"top_entropy_quantile": 0.5}, {"importance_sampling_level": "sequence"}):
        fixed = {"aer_law": "fixed", "aer_alpha_init": 0.1, "aer_rho": 1.0, "use_aer": True} | extra
        loss, grads, log, made = loss_of(AERGRPOTrainer, tmp_path, inputs, {}, **fixed)
        used = [log[f"aer/coefficient/{name}"] for name in ("hard", "medium", "easy")]
        assert used == [[pytest.approx(0.1)], [pytest.approx(0.05)], [0.0]]
        base, base_grads, _, _ = loss_of(AERGRPOTrainer, tmp_path, inputs, {}, **extra)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        model = build()
        logp = model(ids, attention_mask=mask).logits[:, 2:-1].log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1) * inputs["completion_mask"]
        coefficient = torch.tensor([0.1, 0.0, 0.05, 0.0])  # none where the accuracy is not known
        bonus = (coefficient[:, None] * entropy).sum() / 29
        wanted = torch.autograd.grad(-bonus, list(model.parameters()))
        torch.testing.assert_close(loss - base, -bonus.detach(), atol=1e-6, rtol=1e-4)
        for name, grad in zip(grads, wanted):
            torch.testing.assert_close(grads[name] - base_grads[name], grad, atol=2e-6, rtol=1e-3)
        assert made.controller.initial_entropy == pytest.approx((entropy.sum() / 16).item(), rel=1e-5)


def test_metrics_and_the_controller(tmp_path: Path) -> None:
    settings = {"aer_eta": 0.5, "aer_target_ratio": 1.5, "aer_alpha_max": 9.0, "aer_rho": 1.0}
    made = trainer(AERGRPOTrainer, tmp_path, **settings)
    watch = Watch().on(made)
    made.train()
    rows = [row for row in made.state.log_history if "loss" in row]
    twin = AdaptiveEntropy(eta=0.5, target_ratio=1.5, alpha_max=9.0, rho=1.0)
    for row, pair in zip(rows, zip(watch.seen[::2], watch.seen[1::2])):
        tokens = sum(x["completion_mask"].sum() for x in pair)
        entropy = sum((x["result"].entropy * x["completion_mask"]).sum() for x in pair) / tokens
        used = torch.cat([twin.coefficient(x["accuracy"]) for x in pair])
        accuracy = torch.cat([x["accuracy"] for x in pair])
        bins = {"hard": accuracy < 1 / 3, "easy": accuracy >= 2 / 3}
        bins["medium"] = ~bins["hard"] & ~bins["easy"]
        for name, inside in bins.items():
            assert (f"aer/coefficient/{name}" in row) == bool(inside.any())
            if inside.any():
                assert row[f"aer/coefficient/{name}"] == pytest.approx(used[inside].mean().item(), rel=1e-5)
        twin.update(entropy, weight=twin.weight(accuracy).mean())
        assert row["aer/entropy"] == pytest.approx(entropy.item(), rel=1e-5)
        assert row["aer/target"] == pytest.approx(twin.target, rel=1e-5)
        assert row["aer/alpha"] == pytest.approx(twin.alpha, rel=1e-4)
    assert twin.alpha > 0.1
    assert [row["aer/accuracy"] for row in rows if "aer/accuracy" in row] == [
        row["reward"] for row in rows if "reward" in row
    ]


def test_evaluation_leaves_the_controller_alone(tmp_path: Path) -> None:
    made = trainer(
        AERGRPOTrainer,
        tmp_path,
        eval_dataset=PROMPTS.select(range(4)),
        per_device_eval_batch_size=8,
        aer_eta=0.5,
    )
    made.train()
    logged = {name: list(values) for name, values in made._metrics["train"].items()}
    before, metrics = made.controller.state_dict(), made.evaluate()
    assert made._metrics["train"] == logged
    assert made.controller.state_dict() == before
    assert not any("aer" in k for k in metrics)
    assert made._aer._sums is None


def test_a_judge_that_abstains(tmp_path: Path) -> None:
    def sometimes(prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
        return [float("1" in c) if p.startswith("3") else None for p, c in zip(prompts, completions)]

    settings = {"aer_reward": "sometimes", "aer_alpha_init": 0.1, "max_steps": 6, "num_iterations": 1}
    made = trainer(AERGRPOTrainer, tmp_path, rewards=[length, sometimes], **settings)
    watch = Watch().on(made)
    made.train()
    three = 3 + ALPHABET.index("3")
    for call in watch.seen:
        known = call["prompt_ids"][:, 0] == three
        assert torch.equal(call["accuracy"].isnan(), ~known)
    assert {bool(x) for call in watch.seen for x in call["accuracy"].isnan()} == {True, False}
    for row in made.state.log_history:
        counted = [k for k in row if k.startswith("aer/coefficient")]
        assert not counted or row["aer/accuracy"] is not None
        assert all(row[k] == row[k] for k in row if k.startswith("aer/") and row[k] is not None)


def test_the_judge_is_one_reward_function(tmp_path: Path) -> None:
    rewards = [length, has_a_one]
    made = trainer(AERGRPOTrainer, tmp_path, rewards=rewards, aer_reward="has_a_one", max_steps=1)
    watch = Watch().on(made)
    made.train()
    parts = watch.seen
    score = right(torch.cat([x["completion_ids"] for x in parts])).float().mean()
    torch.testing.assert_close(torch.cat([x["accuracy"] for x in parts]).mean(), score)
    with pytest.raises(ValueError, match=r"aer_reward=None must name .*: one of length, has_a_one"):
        trainer(AERGRPOTrainer, tmp_path, rewards=rewards)
    with pytest.raises(ValueError, match=r"aer_reward='accuracy' must name"):
        trainer(AERGRPOTrainer, tmp_path, rewards=rewards, aer_reward="accuracy")
    with pytest.raises(ValueError, match=r"aer_reward='length' must name"):
        trainer(AERGRPOTrainer, tmp_path, rewards=[length, length], aer_reward="length")
    uniform = trainer(AERGRPOTrainer, tmp_path, rewards=rewards, aer_difficulty="uniform", aer_alpha_init=0.1)
    uniform.train()
    assert not any(
        "aer/coefficient" in k or "aer/accuracy" in k for x in uniform.state.log_history for k in x
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"entropy_coef": 0.1}, "entropy_coef=0.1 is TRL's own"),
        ({"use_adaptive_entropy": True}, "use_adaptive_entropy=True is TRL's own"),
        ({"aer_rho": 2.0}, "rho must be in"),
        ({"aer_threshold": float("nan")}, "aer_threshold must be a finite number, got nan"),
        ({"loss_type": "dpo"}, "loss_type must be one of grpo"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level must be"),
    ],
)
def test_refused_by_name(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(AERGRPOTrainer, tmp_path, **settings)


def test_refused_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="args must be an AERGRPOConfig, got GRPOConfig"):
        AERGRPOTrainer(build(), has_a_one, GRPOConfig(str(tmp_path), bf16=False))
    monkeypatch.setattr("aer_fast.integrations.trl.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="ZeRO-3"):
        trainer(AERGRPOTrainer, tmp_path)


# Checkpoints


def test_a_resumed_run_has_the_controller_s_state_to_the_bit(tmp_path: Path) -> None:
    settings = {"aer_eta": 0.3, "aer_target_ratio": 2.0, "save_strategy": "steps", "save_steps": 2}
    first = trainer(AERGRPOTrainer, tmp_path, **settings)
    states: dict[int, Any] = {}

    class Note(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            states[state.global_step] = first.controller.state_dict()

    first.add_callback(Note())
    first.train()
    begun: list[Any] = []

    class Begin(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            begun.append((state.global_step, second.controller.state_dict()))

    second = trainer(AERGRPOTrainer, tmp_path, callbacks=[Begin()], **settings)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert begun == [(2, states[2])]
    assert states[2]["alpha"] > 0.1
    assert second.state.global_step == 4
    assert second.controller.initial_entropy == first.controller.initial_entropy


class Leaky:
    """A law that remembers: α is a running mean of how far the entropy is below the target."""

    def __init__(self) -> None:
        self.mean = 0.0

    def __call__(self, alpha: float, entropy: float, target: float, eta: float) -> float:
        self.mean += 0.5 * (1 - entropy / target - self.mean)
        return alpha + eta * self.mean

    def state_dict(self) -> dict[str, float]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.mean = state["mean"]


def squared(accuracy: Tensor, rho: float) -> Tensor:
    return (1 - accuracy) ** 2


def test_functions_in_the_place_of_names(tmp_path: Path) -> None:
    """Through a checkpoint and a logger, which writes the arguments as JSON; the resumed law remembers."""
    own: dict[str, Any] = {"aer_law": Leaky(), "aer_difficulty": squared, "aer_eta": 0.3}
    settings = {
        "aer_target_ratio": 2.0,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "tensorboard",
    }
    first = trainer(AERGRPOTrainer, tmp_path, **own, **settings)
    assert "squared" in json.loads(first.args.to_json_string())["aer_difficulty"]
    first.train()
    twin = AdaptiveEntropy(law=Leaky(), difficulty=squared, eta=0.3, target_ratio=2.0)
    for row in first.state.log_history[:-1]:
        twin.update(row["aer/entropy"])
        assert row["aer/alpha"] == pytest.approx(twin.alpha)
    assert twin.alpha > 0.1
    assert first.controller.weight(0.5).item() == 0.25
    second = trainer(AERGRPOTrainer, tmp_path, **own | {"aer_law": Leaky()}, **settings)
    second._aer.load(tmp_path / "checkpoint-4", "these settings")
    assert second.controller.state_dict() == first.controller.state_dict()
    assert second.args.aer_law.mean == first.args.aer_law.mean != 0.0


def test_a_checkpoint_without_state_begins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = trainer(GRPOTrainer, tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    made.train()
    resumed = trainer(AERGRPOTrainer, tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert "has no aer.json" in caplog.text
    assert resumed.controller.target is not None


SCRIPT = """
import os
import signal
import sys

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
from tests.helpers.grpo import PROMPTS, build, has_a_one, tokenizer
from transformers import TrainerCallback


class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == int(os.environ.get("KILL", 99)):
            os.kill(os.getpid(), signal.SIGKILL)


config = GRPOConfig(
    output_dir=sys.argv[1],
    use_cpu=True,
    bf16=False,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    num_iterations=2,
    num_generations=4,
    max_completion_length=6,
    max_steps=4,
    save_steps=1,
    logging_steps=1,
    learning_rate=1e-2,
    report_to=[],
    top_k=0,
)
trainer = GRPOTrainer(
    build(), has_a_one, config, train_dataset=PROMPTS, processing_class=tokenizer(), callbacks=[Kill()]
)
trainer.train(resume_from_checkpoint="resume" in sys.argv)
if hasattr(trainer, "controller") and trainer.controller is not None:
    print("controller", trainer.controller.state_dict())
"""
CHANGED = SCRIPT.replace(
    "from trl import GRPOConfig, GRPOTrainer",
    "from aer_fast.integrations.trl import AERGRPOConfig as GRPOConfig, AERGRPOTrainer as GRPOTrainer",
)


def run(code: str, folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    (folder / "script.py").write_text(code)
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, str(folder / "script.py"), str(folder / "out"), *arguments]
    return subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=300)


def logged(folder: Path, step: int = 4) -> list[dict[str, Any]]:
    state = json.loads((folder / "out" / f"checkpoint-{step}" / "trainer_state.json").read_text())
    rows: list[dict[str, Any]] = state["log_history"]
    return rows


def test_a_script_changed_in_one_line(tmp_path: Path) -> None:
    """Its rewards and first loss stay (α begins at 0); killed and resumed, the controller goes on."""
    for name, code in (("trl", SCRIPT), ("aer", CHANGED)):
        done = run(code, tmp_path / name)
        assert done.returncode == 0, done.stderr[-2000:]
    ours, theirs = logged(tmp_path / "aer"), logged(tmp_path / "trl")
    assert [x.get("reward") for x in ours] == [x.get("reward") for x in theirs]
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], abs=1e-6)
    assert all("aer/alpha" in x for x in ours)

    killed = run(CHANGED, tmp_path / "killed", KILL="2")
    assert killed.returncode == -signal.SIGKILL
    kept = json.loads((tmp_path / "killed" / "out" / "checkpoint-2" / "aer.json").read_text())
    assert kept == json.loads((tmp_path / "aer" / "out" / "checkpoint-2" / "aer.json").read_text())
    resumed = run(CHANGED, tmp_path / "killed", "resume")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    rows = logged(tmp_path / "killed")
    assert [x["aer/target"] for x in rows] == [kept["target"]] * 4
    assert [x["step"] for x in rows] == [1, 2, 3, 4]
    assert not list((tmp_path / "killed").rglob("*.partial"))


# Models from a folder: the reference model, adapters, the command line


@pytest.fixture
def saved(tmp_path: Path) -> str:
    folder = tmp_path / "model"
    build().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("adapter", [False, True], ids=["reference model", "LoRA"])
def test_a_run_with_kl(adapter: bool, saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is a model of its own, or the policy without its adapter; activations are recomputed."""
    monkeypatch.undo()
    runs = []
    for cls, name in ((GRPOTrainer, "a"), (AERGRPOTrainer, "b")):
        off = {"use_aer": False} if cls is AERGRPOTrainer else {}
        made = trainer(
            cls,
            tmp_path / name,
            saved,
            beta=0.1,
            gradient_checkpointing=True,
            num_iterations=4,
            model_init_kwargs={"dtype": "float32"},
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if adapter else None,
            **off,
        )
        made.train()
        runs.append(history(made, "loss", "grad_norm", "entropy", "kl"))
    for theirs, ours in zip(*runs):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    assert runs[1][0][-1] == 0.0  # the first policy is the reference, to the bit
    assert runs[1][-1][-1] > 1e-6


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mixed_precision_with_a_reference_model(
    saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    settings = {"beta": 0.1, "bf16": True, "model_init_kwargs": {"dtype": "float32"}, "max_steps": 2}
    made = trainer(AERGRPOTrainer, tmp_path, saved, **settings)
    made.train()
    assert history(made, "kl")[0] == (0.0,)
    assert made.state.global_step == 2


def test_one_model_and_two_trainers(tmp_path: Path) -> None:
    model = build()
    trainer(AERGRPOTrainer, tmp_path, model, max_steps=1).train()
    second = trainer(AERGRPOTrainer, tmp_path, model, max_steps=1)
    second.train()
    assert second.state.global_step == 1


def test_a_state_that_does_not_fit_is_named(tmp_path: Path) -> None:
    trainer(AERGRPOTrainer, tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    for text in ("{", '{"alpha": 7.0}'):
        (tmp_path / "checkpoint-2" / "aer.json").write_text(text)
        with pytest.raises(ValueError, match=r"aer\.json does not fit the settings"):
            trainer(AERGRPOTrainer, tmp_path).train(resume_from_checkpoint=True)


def test_an_adapter_on_the_head_is_refused_by_trl(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lm_head"):
        trainer(AERGRPOTrainer, tmp_path, peft_config=LoraConfig(r=4, target_modules=["lm_head"]))


def test_the_command_line(saved: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    PROMPTS.to_json(data / "train.jsonl")
    command = [sys.executable, "-m", "aer_fast.integrations.trl"]
    settings = {
        "model_name_or_path": saved,
        "dataset_name": str(data),
        "reward_funcs": "tests.helpers.grpo.has_a_one",
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "bf16": False,
        "dtype": "float32",
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 4,
        "report_to": "none",
        "logging_steps": 1,
        "save_steps": 2,
        "aer_target_ratio": 2.0,
        "aer_eta": 0.25,
    }
    command += [x for k, v in settings.items() for x in (f"--{k}", str(v))]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "aer.json").read_text())
    assert state["target"] == pytest.approx(2 * state["initial_entropy"])
    assert state["alpha"] == 0.2  # the most; two steps of about 0.25 · (1 - 1/2)
    arguments = torch.load(tmp_path / "out" / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert type(arguments) is AERGRPOConfig
    assert "arxiv" in (tmp_path / "out" / "README.md").read_text().lower()


TWO = """
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tests.integrations.test_trl import *

torch.set_num_threads(1)
folder = Path(sys.argv[1])
sizes = {"per_device_train_batch_size": 2}
runs = []
for cls in (GRPOTrainer, AERGRPOTrainer):
    off = {"use_aer": False} if cls is AERGRPOTrainer else {}
    made = trainer(cls, folder / cls.__name__, **sizes, **off)
    made.train()
    runs.append(history(made, "loss", "grad_norm", "entropy"))
for theirs, ours in zip(*runs):
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
print("<ddp>", flush=True)

made = trainer(AERGRPOTrainer, folder / "aer", **sizes, aer_eta=0.5, aer_target=5.0, aer_alpha_max=9.0)
watch = Watch().on(made)
made.train()
parts = watch.seen[:2]
keys = "prompt_ids", "completion_ids", "accuracy"
width = made.accelerator.gather(torch.tensor([x["completion_ids"].shape[1] for x in parts])).max()
mine = [torch.cat([pad(x[k], width) if k == "completion_ids" else x[k] for x in parts]) for k in keys]
prompts, completions, accuracy = (made.accelerator.gather(x) for x in mine)
assert prompts.shape[0] == 8
score = right(completions).float()
assert 0 < score.mean() < 1
for prompt in prompts.unique(dim=0):
    same = (prompts == prompt).all(-1)
    assert torch.equal(accuracy[same], score[same].mean().expand(int(same.sum())))
states = [None, None]
dist.all_gather_object(states, made.controller.state_dict())
assert states[0] == states[1]
entropy = torch.stack([(x["result"].entropy * x["completion_mask"]).sum() for x in watch.seen[-2:]]).sum()
tokens = torch.stack([x["completion_mask"].sum() for x in watch.seen[-2:]]).sum()
total = made.accelerator.reduce(torch.stack([entropy, tokens.float()]))
assert states[0]["last_entropy"] == pytest.approx((total[0] / total[1]).item(), rel=1e-5)
print("<aer>", flush=True)

inputs = batch(old_per_token_logps=old(), accuracy=torch.tensor([0.0, 0.5, 0.25, 1.0]))
settings = {"aer_alpha_init": 0.1, "aer_rho": 1.0, "aer_law": "fixed"}
for kind, dtype in (("fsdp2", torch.float32), ("mixed", torch.bfloat16)):
    if kind == "mixed":
        del inputs["old_per_token_logps"]  # a rounded ratio may fall on the other side of a bound
    results = []
    for sharded in (False, True):
        made = trainer(AERGRPOTrainer, folder / "fsdp", **sizes, **settings)
        made.model.train()
        made.current_gradient_accumulation_steps = 2
        if sharded:
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=dtype)
            for layer in made.model.model.layers:
                fully_shard(layer, mp_policy=policy)
            fully_shard(made.model, mp_policy=policy)
        loss = made._compute_loss(made.model, inputs)
        loss.backward()
        grads = [p.grad for p in made.model.parameters()]
        grads = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]
        results.append((loss.detach(), made._last.logprob, grads))
    (wanted, _, wanted_grads), (found, logprob, grads) = results
    assert found.dtype == logprob.dtype == torch.float32
    near = 1e-5 if kind == "fsdp2" else 0.1  # the body's own rounding
    assert abs(found - wanted) < near * (1 + abs(wanted))
    flat, wanted_flat = (torch.cat([g.flatten().float() for g in x]) for x in (grads, wanted_grads))
    assert (flat - wanted_flat).norm() < near * wanted_flat.norm()
    print(f"<{kind}>", flush=True)
dist.barrier()
dist.destroy_process_group()
"""


def pad(ids: Tensor, width: Tensor) -> Tensor:
    return torch.nn.functional.pad(ids, (0, int(width) - ids.shape[1]))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("two")
    (folder / "two.py").write_text(TWO)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    variables |= {"CUDA_VISIBLE_DEVICES": ""}  # gloo: two processes do not share one GPU
    command = [*torchrun, str(folder / "two.py"), str(folder)]
    return subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("part", ["ddp", "aer", "fsdp2", "mixed"])
def test_two_processes(part: str, two_processes: Any) -> None:
    assert two_processes.stdout.count(f"<{part}>") == 2, two_processes.stderr[-3000:]
