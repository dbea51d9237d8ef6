"""PPO with verl and adaptive entropy: ``python -m aer_fast.integrations.verl.main <verl's overrides>``."""

from __future__ import annotations

from typing import Any

import hydra
import ray
from omegaconf import DictConfig
from verl.trainer.main_ppo import TaskRunnerV1, run_ppo
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config
from verl.utils.device import auto_set_device

from aer_fast.integrations.verl.settings import read_settings

MODES = ("aer_sync", "aer_colocate_async", "aer_separate_async")


@ray.remote
class AERTaskRunner(TaskRunnerV1.__ray_actor_class__):
    """verl's task runner. Our trainers are registered in its process."""

    def run(self, config: DictConfig) -> Any:
        """Train, as verl's task runner does.

        Args:
            config: verl's.
        """
        from aer_fast.integrations.verl import trainer  # noqa: F401  registers them

        return super().run(config)


def check(config: DictConfig) -> None:
    """Check what verl's own entry checks, and that the entropy bonus will be there, before Ray starts.

    Args:
        config: verl's.

    Raises:
        ValueError: naming the key.
    """
    auto_set_device(config)
    if not config.trainer.use_v1:
        raise ValueError("trainer.use_v1 must be true: the legacy trainer has no entropy controller")
    mode = config.trainer.v1.trainer_mode
    if mode not in MODES:
        raise ValueError(f"trainer.v1.trainer_mode must be one of {', '.join(MODES)}, got {mode!r}")
    read_settings(config)
    validate_config(
        config=config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config)
    )


@hydra.main(config_path=".", config_name="aer_ppo_trainer", version_base=None)
def main(config: DictConfig) -> None:
    """Train, with verl's configuration as aer_ppo_trainer.yaml extends it.

    Args:
        config: composed by hydra, which takes the overrides from the command line.
    """
    check(config)
    run_ppo(config, task_runner_class=AERTaskRunner)


if __name__ == "__main__":
    main()
