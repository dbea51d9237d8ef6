"""verl's trainers with adaptive entropy coefficients. Importing this module registers them with verl.

One step of verl's trainer, and what is added to it:

    rollouts -> old log-probabilities   the entropy of the step moves the controller
             -> advantages              the accuracy of each prompt gives its coefficient: entropy_coef
             -> update of the actor     aer_ppo_loss, in the workers, reads it
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transfer_queue as tq
from omegaconf import DictConfig
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1 import (
    PPOTrainer,
    PPOTrainerColocateAsync,
    PPOTrainerSeparateAsync,
    PPOTrainerSync,
    register_trainer,
)
from verl.utils.checkpoint.checkpoint_manager import find_latest_ckpt_path
from verl.utils.config import omega_conf_to_dataclass

from aer_fast.integrations.aer import accuracy_metrics
from aer_fast.integrations.verl import rollouts
from aer_fast.integrations.verl.loss import aer_ppo_loss
from aer_fast.integrations.verl.settings import import_kernel_in_workers, read_settings


class AERTrainer(PPOTrainer):
    """The controller, mixed into one of verl's trainers.

    It moves once a global step, by the entropy of all response tokens of the step, under the policy that the
    step started from. Where verl cuts a step into several local updates (separate_async), that entropy is
    known with the last of them: the others take the coefficient of the step before. Validation does not move
    it.

    Args:
        config: verl's, with the section ``aer``.

    Raises:
        ValueError: as `read_settings`.
    """

    verl_mode: str
    """The trainer_mode of the trainer that is extended."""

    def __init__(self, config: DictConfig) -> None:
        self._settings = read_settings(config)
        self._aer = self._settings.aer
        self.controller = self._aer.controller
        if self._settings.fused_kernel:
            import_kernel_in_workers(config)
        # verl compares and looks up the mode in many places; there this is the trainer it extends
        config.trainer.v1.trainer_mode = self.verl_mode
        super().__init__(config)

    def _setup(self) -> None:
        super()._setup()
        # init_model has just given the workers verl's own loss
        actor_config = omega_conf_to_dataclass(self.config.actor_rollout_ref.actor)
        self.actor_rollout_wg.set_loss_fn(partial(aer_ppo_loss, config=actor_config))

    def _compute_old_log_prob(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        batch = super()._compute_old_log_prob(batch, metrics)
        data = _read(batch, "entropy", "response_mask")
        padding = rollouts.is_padding(batch.tags)
        self._aer.observe(*rollouts.entropy_sum(data["entropy"], data["response_mask"], padding))
        if self.local_trigger_step == self.parameter_sync_step - 1:
            if self.config.trainer.critic_warmup <= self.global_steps:
                metrics.update(self._aer.update())
            else:  # α would wind up unanswered
                self._aer.forget()
        return batch

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict[str, Any]) -> KVBatchMeta:
        batch = super()._compute_advantage(batch, metrics)
        key = self._settings.accuracy_key
        source = ("rm_scores",) if key is None else ("extra_fields", key)
        data = _read(batch, "uid", "response_mask", *source)
        uids, padding = _objects(data, "uid"), rollouts.is_padding(batch.tags)
        scores = self._scores(data, rollouts.final_rows(batch.keys, padding))
        prompts, score = rollouts.by_prompt(uids, scores)
        accuracy = self._aer.accuracy(score, torch.float64)
        coefficient = self._aer.coefficient(accuracy)
        self._aer.observe(0.0, 0, accuracy)  # α has moved already: their weights count from the next step on
        metrics.update(accuracy_metrics(accuracy, coefficient))

        of_prompt = dict(zip(prompts, coefficient.tolist()))
        rows = [0.0 if skip else of_prompt[uid] for uid, skip in zip(uids, padding, strict=True)]
        field = {"entropy_coef": rollouts.spread(rows, data["response_mask"])}
        return tq.kv_batch_put(
            keys=batch.keys, partition_id=batch.partition_id, fields=TensorDict(field, batch_size=len(batch))
        )

    def _save_checkpoint(self) -> None:
        # before verl names this folder the latest one: a checkpoint that is resumed from is complete
        folder = Path(self.config.trainer.default_local_dir, f"global_step_{self.global_steps}")
        folder.mkdir(parents=True, exist_ok=True)
        self._aer.save(folder)
        super()._save_checkpoint()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if (folder := self._resumed_folder()) is not None:
            self._aer.load(folder, "the section aer")

    def _scores(self, data: TensorDict, rows: Sequence[int]) -> dict[int, float]:
        """What is compared with the threshold, of these rows."""
        key = self._settings.accuracy_key
        if key is None:
            sums = [float(row.sum()) for row in data["rm_scores"].unbind()]
            return {row: sums[row] for row in rows}
        # a reward function leaves it in extra_fields; a reward model that shares the GPUs, in a field
        extra, direct = _objects(data, "extra_fields"), _objects(data, key)
        scores = {}
        for row in rows:
            info = (extra[row] or {}).get("reward_extra_info") or {}
            value = info.get(key, direct[row])
            if value is None:
                raise ValueError(
                    f"aer.accuracy_key is {key!r}, which the reward function did not return for every rollout"
                )
            try:
                scores[row] = float(value)
            except (TypeError, ValueError):
                raise ValueError(
                    f"aer.accuracy_key is {key!r}, for which the reward function returned {value!r}"
                ) from None
        return scores

    def _resumed_folder(self) -> Path | None:
        """The checkpoint that verl has loaded, by its own rules."""
        trainer = self.config.trainer
        if trainer.resume_mode == "resume_path":
            return Path(trainer.resume_from_path).absolute()
        if trainer.resume_mode == "auto":
            folder = find_latest_ckpt_path(str(Path(trainer.default_local_dir).absolute()))
            return None if folder is None else Path(folder)
        return None


@register_trainer("aer_sync")
class AERTrainerSync(AERTrainer, PPOTrainerSync):
    """verl's synchronous trainer with adaptive entropy coefficients."""

    verl_mode = "sync"


@register_trainer("aer_colocate_async")
class AERTrainerColocateAsync(AERTrainer, PPOTrainerColocateAsync):
    """verl's colocate_async trainer with adaptive entropy coefficients."""

    verl_mode = "colocate_async"


@register_trainer("aer_separate_async")
class AERTrainerSeparateAsync(AERTrainer, PPOTrainerSeparateAsync):
    """verl's separate_async trainer with adaptive entropy coefficients."""

    verl_mode = "separate_async"


def _read(batch: KVBatchMeta, *fields: str) -> TensorDict:
    return tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=list(fields))


def _objects(data: TensorDict, field: str) -> list[Any]:
    """A field of Python objects by row; None in every row where the field is missing."""
    if field not in data:
        return [None] * len(data)
    column = data[field]
    return list(column.tolist() if hasattr(column, "tolist") else column)
