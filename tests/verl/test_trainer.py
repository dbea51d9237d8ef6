"""verl's real trainer, worker and queue: what a step reads, moves, writes and logs."""

import json
import logging
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transfer_queue as tq
from tensordict import TensorDict
from transformers import Qwen2ForCausalLM
from verl.trainer.ppo.v1 import PPOTrainer, PPOTrainerSeparateAsync, PPOTrainerSync, get_trainer_cls
from verl.trainer.ppo.v1.trainer_separate_async import HybridEngineMode

from aer_fast import AdaptiveEntropy
from aer_fast.integrations.aer import Bookkeeping
from aer_fast.integrations.verl import kernel, rollouts
from aer_fast.integrations.verl.kernel import use_aer_kernel
from aer_fast.integrations.verl.loss import aer_ppo_loss
from aer_fast.integrations.verl.settings import KERNEL_MODULE
from aer_fast.integrations.verl.trainer import (
    AERTrainerColocateAsync,
    AERTrainerSeparateAsync,
    AERTrainerSync,
)
from tests.verl.driver import (
    Rollout,
    build_trainer,
    column,
    configuration,
    logprob_and_entropy,
    put,
    save_model,
    step,
)

pytestmark = pytest.mark.usefixtures("queue", "process_group")

# Three prompts: `hard` is never right, `half` once, `easy` always. The second session of `half` has two
# outputs, of which the first carries another score; a tool wrote the first tokens of one response. verl fills
# seven rows up to eight.
STEP = [
    Rollout("half_0_0", 1.0, prompt=4, response=6, info={"acc": 0.0}),
    Rollout("hard_0_0", 0.5, prompt=3, response=3, info={"acc": 1.0}),
    Rollout("easy_0_0", 1.0, prompt=5, response=2, info={"acc": 1.0}),
    Rollout("half_1_0", 1.0, prompt=2, response=4, info={"acc": 1.0}),
    Rollout("half_1_1", 0.0, prompt=6, response=5, masked=2, info={"acc": 0.0}),
    Rollout("easy_1_0", 1.0, prompt=5, response=9, info={"acc": 1.0}),
    Rollout("hard_1_0", 0.0, prompt=3, response=1, info={"acc": 1.0}),
]
ACCURACY = {"hard": 0.0, "half": 0.5, "easy": 1.0}
SETTINGS = ("aer.alpha_init=0.1", "aer.rho=1.0", "aer.law=proportional")  # the default starts at 0


@pytest.fixture(autouse=True)
def _empty_queue() -> Iterator[None]:
    yield
    for partition, keys in (tq.kv_list() or {}).items():
        if keys:
            tq.kv_clear(keys=list(keys), partition_id=partition)


@pytest.fixture
def run_folder(tmp_path: Path) -> str:
    return f"trainer.default_local_dir={tmp_path}"


def entropies(model_path: Path) -> dict[str, torch.Tensor]:
    """By key, over the policy's tokens of each response, in float64 and without verl."""
    model = Qwen2ForCausalLM.from_pretrained(model_path).double()
    with torch.no_grad():
        return {r.key: logprob_and_entropy(model, r)[1][r.mask().bool()] for r in STEP}


def test_a_step_follows_the_entropy_and_pays_by_difficulty(model_path: Path, run_folder: str) -> None:
    trainer = build_trainer(AERTrainerSync, configuration(*SETTINGS, run_folder, model=model_path))
    batch, metrics = step(trainer, STEP)

    assert len(batch) == 8  # one row of padding, and verl has sorted them by length
    assert batch.keys[:7] != [r.key for r in STEP]
    assert sum(tag.get("is_padding", False) for tag in batch.tags) == 1

    token_entropy = torch.cat(list(entropies(model_path).values()))
    mean = token_entropy.mean().item()
    assert metrics["aer/entropy"] == pytest.approx(mean, rel=1e-5)
    assert metrics["aer/target"] == pytest.approx(0.4 * mean, rel=1e-5)
    alpha = 0.1 + 0.02 * (1 - 1 / 0.4)
    assert metrics["aer/alpha"] == pytest.approx(alpha, rel=1e-6)
    assert trainer.controller.initial_entropy == metrics["aer/entropy"]
    assert metrics["aer/accuracy"] == pytest.approx(0.5)
    assert metrics["aer/coefficient/hard"] == pytest.approx(alpha)
    assert metrics["aer/coefficient/medium"] == pytest.approx(alpha / 2)
    assert metrics["aer/coefficient/easy"] == 0.0

    written, lengths = column(batch, "entropy_coef"), column(batch, "response_mask")
    for key, tag in zip(batch.keys, batch.tags):
        uid = key.rsplit("_", 2)[0]
        value = 0.0 if tag.get("is_padding") else alpha * (1 - ACCURACY[uid])
        assert written[key].shape == lengths[key].shape
        torch.testing.assert_close(written[key], torch.full((len(lengths[key]),), value))


def test_the_gradient_of_the_step_is_that_of_the_objective(model_path: Path, run_folder: str) -> None:
    loud = (run_folder, "aer.law=proportional", "aer.rho=1.0", "aer.alpha_init=2.0", "aer.alpha_max=10.0")
    trainer = build_trainer(AERTrainerSync, configuration(*loud, model=model_path))
    batch, metrics = step(trainer, STEP)

    advantages = column(batch, "advantages")
    model = Qwen2ForCausalLM.from_pretrained(model_path).double()
    alpha, tokens = 2.0 + 0.02 * (1 - 1 / 0.4), sum(int(r.mask().sum()) for r in STEP)
    loss, bonus = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for rollout in STEP:
        logprob, entropy = logprob_and_entropy(model, rollout)
        mask = rollout.mask().double() / tokens
        ratio = (logprob - logprob.detach()).exp()
        loss = loss - (mask * ratio * advantages[rollout.key]).sum()
        bonus = bonus + (mask * alpha * (1 - ACCURACY[rollout.uid]) * entropy).sum()
    (loss - bonus).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert metrics["actor/aer_bonus"] == pytest.approx(bonus.item(), rel=1e-5)
    assert metrics["actor/loss"] == pytest.approx((loss - bonus).item(), rel=1e-4, abs=1e-6)
    assert metrics["actor/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)

    plain = configuration(run_folder, "aer.law=fixed", model=model_path)  # alpha 0: no bonus
    _, without = step(build_trainer(AERTrainerSync, plain), STEP)
    assert without["actor/aer_bonus"] == 0.0
    assert abs(without["actor/grad_norm"] - norm.item()) > 0.05 * norm.item()


def test_accuracy_may_come_from_the_reward_functions_extra_information(
    model_path: Path, run_folder: str
) -> None:
    config = configuration(*SETTINGS, run_folder, "aer.accuracy_key=acc", model=model_path)
    trainer = build_trainer(AERTrainerSync, config)
    batch, metrics = step(trainer, STEP)  # acc: half 0 and 0, hard 1 and 1, easy 1 and 1
    assert metrics["aer/accuracy"] == pytest.approx(2 / 3)
    written = column(batch, "entropy_coef")
    assert written["half_0_0"][0] > 0
    assert written["hard_0_0"][0] == 0
    assert "aer/coefficient/medium" not in metrics


def test_accuracy_may_come_from_a_field_of_a_reward_model(model_path: Path, run_folder: str) -> None:
    config = configuration(*SETTINGS, run_folder, "aer.accuracy_key=verdict", model=model_path)
    trainer = build_trainer(AERTrainerSync, config)
    with pytest.raises(ValueError, match="'verdict'"):
        step(trainer, STEP)

    def judge(batch: Any, metrics: Any) -> Any:  # where verl asks a reward model that shares the GPUs
        import numpy as np
        from verl.utils import tensordict_utils as tu

        verdicts = np.array([key.startswith("hard") for key in batch.keys], dtype=object)
        return tq.kv_batch_put(
            keys=batch.keys, partition_id="train", fields=tu.get_tensordict({"verdict": verdicts})
        )

    trainer.reward_loop_manager.reward_loop_worker_handles = None
    trainer._compute_reward_colocate = judge
    trainer.local_trigger_step = 0
    batch, _ = step(trainer, STEP)
    written = column(batch, "entropy_coef")
    assert written["half_0_0"][0] > 0
    assert written["hard_0_0"][0] == 0


def test_the_threshold_tells_right_from_wrong(model_path: Path, run_folder: str) -> None:
    trainer = build_trainer(
        AERTrainerSync, configuration(*SETTINGS, run_folder, "aer.threshold=0.5", model=model_path)
    )
    _, metrics = step(trainer, STEP)  # `hard` has one score of 0.5
    assert metrics["aer/accuracy"] == pytest.approx((0.5 + 0.5 + 1.0) / 3)


def test_scores_and_threshold_are_compared_in_float32() -> None:
    uids, rounded = ["a", "b", "a", "c", "a"], torch.tensor(0.7).item()  # less than 0.7
    scores = {0: rounded, 1: 0.7, 2: 0.69, 3: math.nan, 4: 0.0}
    prompts, score = rollouts.by_prompt(uids, scores)
    accuracy = Bookkeeping(AdaptiveEntropy(), 0.7).accuracy(score, torch.float64)
    assert prompts == ["a", "b", "c"]
    assert accuracy[:2].tolist() == [1 / 3, 1.0]
    assert accuracy[2].isnan()
    assert rollouts.by_prompt(uids, {})[1].shape == (0, 0)


def test_the_controller_rests_while_the_actor_does(run_folder: str) -> None:
    config = configuration(*SETTINGS, run_folder, "trainer.critic_warmup=3")
    worker = Worker()
    worker.answers = [1.0, 1.0, 2.0]
    trainer = build_trainer(AERTrainerSync, config, worker)
    for warming in (True, True, False):  # steps 1, 2 and 3
        _, metrics = step(trainer, STEP)
        tq.kv_clear(keys=list(tq.kv_list("train")["train"]), partition_id="train")
        assert (trainer.controller.target is None) == warming
        assert ("aer/entropy" in metrics) != warming
    assert trainer.controller.initial_entropy == pytest.approx(2.0)


def test_the_second_step_moves_from_the_first(model_path: Path, run_folder: str) -> None:
    trainer = build_trainer(AERTrainerSync, configuration(*SETTINGS, run_folder, model=model_path))
    _, first = step(trainer, STEP)
    tq.kv_clear(keys=list(tq.kv_list("train")["train"]), partition_id="train")
    _, second = step(trainer, STEP)
    assert second["aer/target"] == first["aer/target"]
    assert second["aer/entropy"] != first["aer/entropy"]
    alpha = first["aer/alpha"] + 0.02 * (1 - second["aer/entropy"] / first["aer/target"])
    assert second["aer/alpha"] == pytest.approx(alpha, rel=1e-9)
    # the weights of the first step's prompts, by their mean: 1, 1/2 and 0
    assert trainer.controller.state_dict()["mean_weight"] == pytest.approx(0.5)
    assert second["aer/coefficient/hard"] == pytest.approx(alpha / 0.5)


def test_the_workers_get_our_loss_after_verl_gave_them_its_own(model_path: Path, run_folder: str) -> None:
    trainer = build_trainer(
        AERTrainerSync,
        configuration(run_folder, "actor_rollout_ref.actor.loss_agg_mode=token-sum", model=model_path),
    )
    loss_fn = trainer.actor_rollout_wg.worker.actor.loss_fn
    assert loss_fn.func is aer_ppo_loss
    assert loss_fn.keywords["config"].loss_agg_mode == "token-sum"


FUSED = ("actor_rollout_ref.model.use_fused_kernels=true",)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_kernel_switch_reaches_the_worker(
    backend: str, tmp_path: Path, run_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # verl replaces the forward of the class, for good
    monkeypatch.setattr(Qwen2ForCausalLM, "forward", Qwen2ForCausalLM.forward)
    model = save_model(tmp_path / "tied", tied=True)
    _, expected = step(build_trainer(AERTrainerSync, configuration(*SETTINGS, run_folder, model=model)), STEP)
    tq.kv_clear(keys=list(tq.kv_list("train")["train"]), partition_id="train")
    sys.modules.pop(KERNEL_MODULE, None)  # as in a worker's new process
    fused = (*FUSED, "aer.fused_kernel=true")
    config = configuration(
        *SETTINGS,
        *fused,
        f"actor_rollout_ref.model.fused_kernel_options.impl_backend={backend}",
        run_folder,
        model=model,
    )
    try:
        trainer = build_trainer(AERTrainerSync, config)
        assert kernel._switch is not None
        _, metrics = step(trainer, STEP)
    finally:
        use_aer_kernel().undo()
    for name in ("aer/entropy", "aer/alpha", "actor/aer_bonus", "actor/entropy", "actor/grad_norm"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-4), name


@pytest.mark.parametrize("ours", [False, True], ids=["verl", "aer_fast"])
def test_the_sharded_head_of_fsdp2_is_no_head_for_a_fused_forward(
    ours: bool, model_path: Path, run_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an untied head verl never gathers it there: its own backend fails, and ours says why."""
    monkeypatch.setattr(Qwen2ForCausalLM, "forward", Qwen2ForCausalLM.forward)
    sys.modules.pop(KERNEL_MODULE, None)
    setting = ("aer.fused_kernel=true",) if ours else ()
    trainer = build_trainer(AERTrainerSync, configuration(*FUSED, *setting, run_folder, model=model_path))
    try:
        with pytest.raises((ValueError, RuntimeError), match="DTensor"):
            step(trainer, STEP)
    finally:
        use_aer_kernel().undo()


# What follows needs no model: a worker that answers with an entropy of its own choice.


class Worker:
    """compute_log_prob writes the next of `self.answers`, or 1, as the entropy of every token."""

    def __init__(self) -> None:
        self.answers: list[float] = []
        self.calls: list[str] = []

    def compute_log_prob(self, batch: Any) -> Any:
        entropy = self.answers.pop(0) if self.answers else 1.0
        data = tq.kv_batch_get(keys=batch.keys, partition_id="train", select_fields=["input_ids"])
        rows = [torch.full((len(ids),), entropy) for ids in data["input_ids"].unbind()]
        nested = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
        fields = TensorDict({"entropy": nested, "log_probs": -nested}, batch_size=len(rows))
        written = tq.kv_batch_put(keys=batch.keys, partition_id="train", fields=fields)
        written.extra_info = batch.extra_info
        return written

    def update_actor(self, batch: Any) -> Any:
        self.calls.append("update_actor")
        assert "entropy_coef" in batch.fields
        return {"metrics": {"mfu": [0.0]}}

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self.calls.append(name)


def test_one_update_a_global_step_however_verl_cuts_it(
    run_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(
        *SETTINGS,
        run_folder,
        "trainer.v1.trainer_mode=aer_separate_async",
        "trainer.v1.separate_async.parameter_sync_step=2",
        "data.train_batch_size=4",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        "actor_rollout_ref.rollout.nnodes=1",
        "actor_rollout_ref.rollout.n_gpus_per_node=1",
        "actor_rollout_ref.rollout.checkpoint_engine.backend=nccl",
    )

    def setup(self: Any) -> None:  # verl's, without the servers of its own
        PPOTrainer._setup(self)
        self.current_mode = HybridEngineMode.TRAINER

    monkeypatch.setattr(PPOTrainerSeparateAsync, "_setup", setup)
    worker = Worker()
    trainer = build_trainer(AERTrainerSeparateAsync, config, worker)
    assert (trainer.trainer_mode, trainer.parameter_sync_step) == ("separate_async", 2)
    halves = STEP[:3], STEP[3:]
    counts = [sum(int(r.mask().sum()) for r in half) for half in halves]

    worker.answers = [3.0, 1.0, 2.0, 2.0]
    updates: list[tuple[float, int]] = []
    update = trainer.controller.update

    def spy(mean: float, count: int, **weights: Any) -> None:
        updates.append((mean, count))
        update(mean, count, **weights)

    monkeypatch.setattr(trainer.controller, "update", spy)
    batch, metrics = step(trainer, *halves)
    mean = (3.0 * counts[0] + 1.0 * counts[1]) / sum(counts)
    assert len(updates) == 1
    assert updates[0] == pytest.approx((mean, sum(counts)))
    assert metrics["aer/alpha"] == pytest.approx(0.1 + 0.02 * (1 - 1 / 0.4))
    # verl's own: the second half under the old policy
    assert worker.calls.count("restore_model_from_cpu") == 2
    written = column(batch, "entropy_coef")
    assert written["hard_0_0"][0] == pytest.approx(0.1)  # the first half: alpha of the step before
    # half_1 alone: accuracy 0; the weights of the first half's prompts, 1, 0 and 0, are known by now
    assert written["half_1_1"][0] == pytest.approx(3 * metrics["aer/alpha"])
    tq.kv_clear(keys=list(tq.kv_list("train")["train"]), partition_id="train")
    step(trainer, *halves)
    assert updates[1:] == [pytest.approx((2.0, sum(counts)))]


@pytest.mark.parametrize(
    ("cls", "mode"),
    [(AERTrainerSync, "sync"), (AERTrainerColocateAsync, "colocate_async")],
)
def test_verl_sees_the_mode_that_is_extended(cls: Any, mode: str) -> None:
    trainer = cls(configuration(f"trainer.v1.trainer_mode=aer_{mode}"))
    plain = get_trainer_cls(mode)(configuration(f"trainer.v1.trainer_mode={mode}"))
    assert get_trainer_cls(f"aer_{mode}") is cls
    assert trainer.trainer_mode == plain.trainer_mode == mode
    assert type(trainer.replay_buffer) is type(plain.replay_buffer)
    assert trainer.replay_buffer.trainer_mode == mode


def test_validation_does_not_move_the_controller(run_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build_trainer(AERTrainerSync, configuration(*SETTINGS, run_folder), Worker())
    step(trainer, STEP)
    before = trainer.controller.state_dict()
    trainer.val_dataloader = [
        {"raw_prompt": [["?"], ["?"]], "data_source": ["t", "t"], "uid": None, "index": [0, 1]}
    ]
    trainer.agent_loop_manager = SimpleNamespace(generate_sequences=lambda batch: None)
    trainer.tokenizer = SimpleNamespace(pad_token_id=0, decode=lambda ids, **_: "text")

    def sample(**_: Any) -> Any:
        rows = [Rollout(f"v{i}_0_0", 1.0, 3, 2) for i in range(2)]
        fields = [dict(r.fields(), reward_model={"ground_truth": 1}, data_source="t") for r in rows]
        from verl.utils.tensordict_utils import list_of_dict_to_tensordict

        return (
            tq.kv_batch_put(
                keys=[r.key for r in rows],
                partition_id="val",
                fields=list_of_dict_to_tensordict(fields),
                tags=[{}, {}],
            ),
            {},
        )

    trainer.replay_buffer = SimpleNamespace(sample=sample)
    metrics = trainer._validate()
    assert any(name.startswith("val-core/t/reward") for name in metrics)
    assert trainer.controller.state_dict() == before


def test_a_checkpoint_restores_the_controller_exactly(run_folder: str, tmp_path: Path) -> None:
    trainer = build_trainer(AERTrainerSync, configuration(*SETTINGS, run_folder), Worker())
    trainer.controller.update(1 / 3)
    trainer.controller.update(0.1)
    trainer.global_steps = 7
    trainer._save_checkpoint()
    folder = tmp_path / "global_step_7"
    assert sorted(p.name for p in folder.glob("aer*")) == ["aer.json"]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "7"

    resumed = build_trainer(AERTrainerSync, configuration(*SETTINGS, run_folder), Worker())
    assert resumed.global_steps == 7
    assert resumed.controller.state_dict() == trainer.controller.state_dict()

    shutil.copytree(folder, tmp_path / "elsewhere" / "global_step_3")
    (folder / "aer.json").write_text(json.dumps({"alpha": 0.0}))
    by_path = build_trainer(
        AERTrainerSync,
        configuration(
            *SETTINGS,
            run_folder,
            "trainer.resume_mode=resume_path",
            f"trainer.resume_from_path={tmp_path / 'elsewhere' / 'global_step_3'}",
        ),
        Worker(),
    )
    assert by_path.global_steps == 3
    assert by_path.controller.state_dict() == trainer.controller.state_dict()

    anew = build_trainer(
        AERTrainerSync, configuration(*SETTINGS, run_folder, "trainer.resume_mode=disable"), Worker()
    )
    assert anew.controller.state_dict() == {"alpha": 0.1}


def test_the_state_is_there_before_verl_names_the_checkpoint(
    run_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build_trainer(AERTrainerSync, configuration(*SETTINGS, run_folder), Worker())
    trainer.controller.update(1.0)
    trainer.global_steps = 2
    seen = []
    monkeypatch.setattr(
        PPOTrainer,
        "_save_checkpoint",
        lambda self: seen.append((tmp_path / "global_step_2" / "aer.json").exists()),
    )
    trainer._save_checkpoint()
    assert seen == [True]


def test_an_interrupted_save_leaves_the_old_state(
    run_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build_trainer(AERTrainerSync, configuration(*SETTINGS, run_folder), Worker())
    trainer.global_steps = 2
    trainer._save_checkpoint()
    before = (tmp_path / "global_step_2" / "aer.json").read_text()
    trainer.controller.update(1.0)

    def killed(state: Any, file: Any, **_: Any) -> None:
        file.write('{"alp')
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "dump", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer._save_checkpoint()
    assert (tmp_path / "global_step_2" / "aer.json").read_text() == before


def test_a_checkpoint_without_the_state_is_a_warning(
    run_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = build_trainer(AERTrainerSync, configuration(*SETTINGS, run_folder), Worker())
    trainer.global_steps = 4
    PPOTrainerSync._save_checkpoint(trainer)
    with caplog.at_level(logging.WARNING):
        resumed = build_trainer(AERTrainerSync, configuration(*SETTINGS, run_folder), Worker())
    assert any("aer.json is missing" in record.message for record in caplog.records)
    assert (resumed.global_steps, resumed.controller.state_dict()) == (4, {"alpha": 0.1})


def test_a_checkpoint_that_contradicts_the_settings_is_refused(run_folder: str, tmp_path: Path) -> None:
    trainer = build_trainer(AERTrainerSync, configuration(*SETTINGS, run_folder), Worker())
    trainer.global_steps = 4
    trainer._save_checkpoint()
    with pytest.raises(ValueError, match=r"aer\.json does not fit the section aer: .*alpha"):
        build_trainer(AERTrainerSync, configuration("aer.alpha_max=0.05", run_folder), Worker())


def test_a_batch_of_padding_changes_nothing(run_folder: str) -> None:
    trainer = build_trainer(AERTrainerSync, configuration(*SETTINGS, run_folder), Worker())
    batch = put(STEP)
    for tag in batch.tags:
        tag["is_padding"] = True
    tq.kv_batch_put(keys=batch.keys, partition_id="train", tags=batch.tags)
    metrics: dict[str, Any] = {}
    batch = trainer._compute_old_log_prob(batch, metrics)
    batch = trainer._compute_advantage(batch, metrics)
    assert trainer.controller.state_dict() == {"alpha": 0.1}
    assert not any(name.startswith("aer/") for name in metrics if name != "aer/alpha")
    assert all((row == 0).all() for row in column(batch, "entropy_coef").values())


def test_the_last_output_of_a_session_stands_for_it() -> None:
    keys = ["a_0_1", "a_0_0", "a_0_10", "a_0_9", "a_1_0", "b_c_0_0", "solo", "pad_0_0"]
    assert rollouts.final_rows(keys, [False] * 7 + [True]) == [2, 4, 5, 6]
