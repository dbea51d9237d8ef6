"""verl's PPO loss with an entropy coefficient of its own for every token."""

from __future__ import annotations

from typing import Any

from tensordict import TensorDict
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss
from verl.utils.metric import Metric
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import no_padding_2_padding


def aer_ppo_loss(
    config: Any, model_output: dict[str, Tensor], data: TensorDict, dp_group: Any = None
) -> tuple[Tensor, dict[str, Any]]:
    """verl's `ppo_loss` minus an entropy bonus, with a coefficient for every token.

        loss = ppo_loss - mean(entropy_coef · entropy)

    The mean is taken as verl aggregates its own entropy. Everything else is verl's: the loss modes, KL,
    importance weights, and the scalar ``entropy_coeff``, to which the coefficients add.

    Args:
        config: verl's ActorConfig. verl's `ppo_loss` writes its ``global_batch_info``.
        model_output: ``log_probs`` and ``entropy`` of the micro-batch, as verl's engines return them.
        data: the micro-batch: what verl's `ppo_loss` reads, and ``entropy_coef``, laid out like
            ``advantages``.
        dp_group: as in verl's `ppo_loss`.

    Returns:
        The loss, and verl's metrics with ``actor/aer_bonus``, which is summed or averaged over micro-batches
        like ``actor/entropy_loss``.

    Raises:
        ValueError: if the entropy or the coefficients are missing.
    """
    entropy = model_output.get("entropy")
    if entropy is None:
        raise ValueError(
            "model_output must have 'entropy' for the entropy bonus: set "
            "actor_rollout_ref.actor.calculate_entropy=True"
        )
    if "entropy_coef" not in data:
        raise ValueError(
            "data must have 'entropy_coef', one number per response token, which the trainers of "
            "aer_fast.integrations.verl write: set trainer.v1.trainer_mode=aer_sync"
        )
    loss, metrics = ppo_loss(config, model_output, data, dp_group)
    padded = data.select("response_mask", "entropy_coef").to_padded_tensor()
    bonus = agg_loss(
        loss_mat=padded["entropy_coef"] * no_padding_2_padding(entropy, data),
        loss_mask=padded["response_mask"].to(bool),
        loss_agg_mode=config.loss_agg_mode,
        **config.global_batch_info,
    )
    aggregation = metrics["actor/entropy_loss"].aggregation
    metrics["actor/aer_bonus"] = Metric(value=bonus, aggregation=aggregation)
    return loss - bonus, metrics
