"""Lightning: the fused loss in a LightningModule, with gradient accumulation and checkpoints.

Training is on-policy here: `old_logprob` is left out, and the loss takes the current one without its
gradient. The controller of the entropy is fed by the training passes themselves.

Run it:
    python docs/recipes/lightning_loop.py

For a real model:
  * Replace `causal_lm()` by `AutoModelForCausalLM.from_pretrained(...)` and `scored_rollouts` by your own
    rollouts.
  * The number of tokens of a step is written into the data here, for steps of eight rollouts. So batch size
    × accumulation × devices has to be eight, and the sampler must not mix steps. On two devices that is
    `batch_size=2`. Otherwise count the tokens of a step where you deal it out.
  * Where weights are too large to be made on every process, build and fuse the model in `configure_model`.
    On the meta device `fuse_lm_head` skips its comparison with the model's own logits.
"""

from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from aer_fast import AdaptiveEntropy, merge_metrics
from aer_fast.integrations.transformers import fuse_lm_head, next_token_target
from tiny import causal_lm, scored_rollouts


class Policy(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = causal_lm()  # yours: AutoModelForCausalLM.from_pretrained(...)
        fuse_lm_head(self.model)
        self.controller = AdaptiveEntropy(target_ratio=0.9, alpha_init=0.1)
        self.forget_the_step()

    def forget_the_step(self) -> None:
        self.parts: list[dict[str, Tensor]] = []  # metrics and weights since the last optimiser step
        self.weights: list[Tensor] = []

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        # Lightning divides the loss by the accumulation steps, and DDP averages gradients.
        averaged = self.trainer.accumulate_grad_batches * self.trainer.world_size
        out = self.model(
            batch["ids"],
            target=next_token_target(batch["ids"], batch["mask"]),
            advantage=batch["advantage"],
            entropy_coef=self.controller.coefficient(batch["accuracy"]),
            denominator=batch["tokens_of_step"][0] / averaged,
        )
        self.parts.append(out.metrics)
        self.weights.append(self.controller.weight(batch["accuracy"]))
        loss: Tensor = out.loss
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        world = torch.distributed.group.WORLD  # None with one process
        metrics, weight = merge_metrics(self.parts), torch.cat(self.weights)  # of this process
        self.controller.update(
            metrics["entropy"], metrics["tokens"], world, weight=weight.mean(), prompts=len(weight)
        )
        self.forget_the_step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["controller"] = self.controller.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.controller.load_state_dict(checkpoint["controller"])


torch.manual_seed(0)
policy = Policy()
rollouts = scored_rollouts(16)
for step in (rollouts[:8], rollouts[8:]):
    tokens = torch.stack([rollout["mask"] for rollout in step]).sum()
    for rollout in step:
        rollout["tokens_of_step"] = tokens  # of all its micro-batches and processes

trainer = lightning.Trainer(
    max_epochs=1,
    accumulate_grad_batches=2,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(policy, DataLoader(rollouts, batch_size=4))
trainer.save_checkpoint("runs/recipes/lightning.ckpt")
restored = Policy.load_from_checkpoint("runs/recipes/lightning.ckpt", weights_only=True)
assert restored.controller.state_dict() == policy.controller.state_dict()
controller = restored.controller
print(f"alpha {controller.alpha:.3f}, target {controller.target:.2f}")  # alpha 0.084, target 3.74
