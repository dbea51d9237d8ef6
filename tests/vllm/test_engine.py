"""`--rollout vllm` on a real engine: one for all tests, it takes long to start. Its model has a tied head."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from training import agreement, scratch
from training.config import PRESETS
from training.distributed import World
from training.engine import VLLM
from training.temptations import DOMAINS
from training.train import Trainer


def save_model(folder: Path) -> Path:
    """Qwen3 with a tied head and heads of 32, which vLLM's attention has on a CPU; random."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = scratch.build_tokenizer(DOMAINS["carry"].alphabet)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        initializer_range=0.1,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A trainer with an engine."""
    folder = tmp_path_factory.mktemp("run")
    config = replace(
        PRESETS["demo"][1],
        model=str(save_model(folder / "model")),
        model_cache=folder / "models",
        task="carry(digits=2)",
        output=folder / "run",
        rollout="vllm",
        temperature=0.8,
        max_new_tokens=8,
        steps=3,
        prompts=4,
        group_size=4,
        epochs=1,
        minibatches=1,
        initial_tokens=32,
        eval_prompts=2,
        eval_samples=4,
        k=(1, 2),
        lr=1e-2,
        entropy="fixed",  # which moves the weights whatever the rewards are
        logger=(),
    )
    return Trainer(config, World(), None, quiet=True)


def engine(run: Trainer) -> VLLM:
    assert isinstance(run.sampler, VLLM)
    return run.sampler


def prompts(run: Trainer) -> list[list[int]]:
    return [run.encoded(run.task.training(k)) for k in range(8)]


def named(sampler: VLLM, kept: Any) -> Any:
    """Its weights, of which some are left out."""
    every = VLLM._named
    return lambda: ((name, weight) for name, weight in every(sampler) if kept(name))


def test_the_tied_head_is_taken_over_and_the_weights_come_back(run: Trainer) -> None:
    before = [p.detach().clone() for p in run.policy.parameters()]
    bound = agreement.check(engine(run), run.learner, prompts(run))
    assert bound == agreement.HARMLESS
    assert all(map(torch.equal, before, run.policy.parameters()))
    rollouts = engine(run).sample(prompts(run), 3)
    stats = run.learner.measure(rollouts, [list(range(len(rollouts)))])
    assert agreement.difference(rollouts, stats, 1) < 1e-5


def test_samples_are_a_function_of_the_seed(run: Trainer) -> None:
    first, again, other = (engine(run).sample(prompts(run), seed) for seed in (3, 3, 4))
    assert [r.response for r in first] == [r.response for r in again] != [r.response for r in other]
    assert {r.truncated for r in first} <= {True, False}
    end = run.tokenizer.eos_token_id
    assert all(r.truncated == (r.response[-1] != end) and end not in r.response[:-1] for r in first)
    short = engine(run).sample(prompts(run), 3, most=2)
    assert [r.response for r in short] == [r.response[:2] for r in first]


@pytest.mark.parametrize(
    "left",
    [
        "model.embed_tokens.weight",  # which is the head
        "model.norm.weight",
        "model.layers.1.self_attn.k_norm.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.0.",
        "",
    ],
)
def test_what_is_left_out_of_a_sync_is_refused(run: Trainer, left: str, monkeypatch: Any) -> None:
    sampler = engine(run)
    before = [p.detach().clone() for p in run.policy.parameters()]
    monkeypatch.setattr(sampler, "_named", named(sampler, lambda name: not name.startswith(left)))
    with pytest.raises(ValueError, match="rollout 'vllm': the sampler does not take over"):
        agreement.check(sampler, run.learner, prompts(run))
    assert all(map(torch.equal, before, run.policy.parameters()))
    monkeypatch.undo()
    sampler.sync()


def test_a_tied_head_that_keeps_its_packed_weight_is_refused(run: Trainer, monkeypatch: Any) -> None:
    monkeypatch.setattr("training.engine.pack_tied", lambda model: None)
    with pytest.raises(ValueError, match="does not take over"):
        agreement.check(engine(run), run.learner, prompts(run))
    monkeypatch.undo()
    engine(run).sync()


def test_names_that_the_engine_does_not_know_are_said_in_one_line(run: Trainer, monkeypatch: Any) -> None:
    sampler = engine(run)
    every = VLLM._named
    monkeypatch.setattr(sampler, "_named", lambda: ((f"x.{name}", w) for name, w in every(sampler)))
    with pytest.raises(ValueError, match="rollout 'vllm': its engine does not take the policy's weights: "):
        sampler.sync()
    monkeypatch.undo()
    sampler.sync()


def test_a_run_trains_on_what_the_engine_samples(run: Trainer) -> None:
    """Steps with a high learning rate, an evaluation, and a sampler that stops taking over the weights."""
    run.bound, run.initial_entropy = agreement.check(engine(run), run.learner, prompts(run)), 1.0
    first, second = run.step(1), run.step(2)
    for metrics in (first, second):
        assert metrics["mismatch"] < 1e-5
        assert metrics["importance_weight"] == pytest.approx(1.0, abs=1e-5)
        assert math.isfinite(metrics["loss"])
    assert run.evaluate(2, 4, (1, 2))["overall"]["samples"]
    run.sampler.sync = lambda: None  # type: ignore[method-assign]
    run.step(3)  # it has these weights, of the evaluation
    with pytest.raises(ValueError, match=r"at step 4 the sampler does not sample from the policy"):
        run.step(4)
