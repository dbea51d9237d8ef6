"""A causal language model of transformers with the fused loss: logits never exist.

`Policy.forward` runs the body on a batch and hands hidden states and the LM head to aer_fast, all inside one
module's forward: there, under FSDP2, the head's weight is whole.
"""

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aer_fast import PPOLoss, linear_ppo_loss, linear_token_stats
from aer_fast.integrations.transformers import head_shape
from training.batch import Batch, Rollout, make_batch


class Tokens(NamedTuple):
    """What the loss needs besides the model: one entry for each response token [n], all float32."""

    old_logprob: Tensor
    advantage: Tensor
    mask: Tensor  # weights >= 0
    entropy_coef: Tensor
    importance_weight: Tensor | None
    ref_logprob: Tensor | None
    old_value: Tensor | None
    returns: Tensor | None


class Objective(NamedTuple):
    """The settings of the loss."""

    clip: tuple[float, float]
    dual_clip: float | None
    kl_coef: float
    value_coef: float
    value_clip: float


class Stats(NamedTuple):
    """Of the response tokens of a batch, without gradients."""

    logprob: Tensor  # [n]
    entropy: Tensor  # [n]
    value: Tensor | None  # [n], before each token
    final_value: Tensor | None  # [b], after each sequence's last token


class Policy(nn.Module):
    """The model, its head's peculiarities, and a value head if asked for."""

    def __init__(self, model: Any, *, temperature: float, dtype: str, value_head: bool) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.autocast = torch.bfloat16 if dtype == "bfloat16" else None
        self.value_head: nn.Linear | None = None
        self.softcap, self.scale = head_shape(model.config)
        if value_head:
            self.value_head = nn.Linear(model.config.get_text_config().hidden_size, 1)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def causal_lm(self) -> Any:
        """The model of transformers itself, whether or not adapters are around it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def forward(
        self,
        batch: Batch,
        tokens: Tokens | None = None,
        objective: Objective | None = None,
        denominator: float = 1.0,
        adapter: bool = True,
    ) -> tuple[Tensor, PPOLoss, Tensor] | Stats:
        """(total loss, policy loss, value loss) of ``tokens``; without them the `Stats` of the batch.

        ``adapter=False`` switches LoRA adapters off: the initial model.
        """
        off = contextlib.nullcontext() if adapter else self.model.disable_adapter()
        with off, torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            hidden = self.hidden(batch)  # [R · T, D]
            head = self.causal_lm.get_output_embeddings()
            bias = getattr(head, "bias", None)
            options: dict[str, Any] = {"temperature": self.temperature, "softcap": self.softcap, "bias": bias}
            scored = hidden[batch.where] * self.scale if self.scale != 1 else hidden[batch.where]
            if tokens is None:
                stats = linear_token_stats(scored, head.weight, batch.target, **options)
                if self.value_head is None:
                    return Stats(*stats, None, None)
                value, final = (self.value_of(hidden[at]) for at in (batch.where, batch.last))
                return Stats(*stats, value, final)
            assert objective is not None
            out = linear_ppo_loss(
                scored,
                head.weight,
                batch.target,
                tokens.old_logprob,
                tokens.advantage,
                tokens.mask,
                entropy_coef=tokens.entropy_coef,
                clip=objective.clip,
                dual_clip=objective.dual_clip,
                ref_logprob=tokens.ref_logprob,
                kl_coef=objective.kl_coef,
                importance_weight=tokens.importance_weight,
                denominator=denominator,
                **options,
            )
            if self.value_head is None:
                return out.loss, out, out.loss.new_zeros(())
            assert tokens.old_value is not None
            assert tokens.returns is not None
            value = self.value_of(hidden[batch.where])
            error = value_loss(value, tokens.old_value, tokens.returns, objective.value_clip)
            value_error = (tokens.mask * error).sum() / denominator
            return out.loss + objective.value_coef * value_error, out, value_error.detach()

    def hidden(self, batch: Batch) -> Tensor:
        """Last hidden states [R · T, D] of the body."""
        body = self.causal_lm.base_model
        settings = {} if batch.attention_mask is None else {"attention_mask": batch.attention_mask}
        output = body(input_ids=batch.ids, position_ids=batch.position_ids, use_cache=False, **settings)
        hidden: Tensor = output.last_hidden_state
        return hidden.flatten(0, 1)

    def value_of(self, hidden: Tensor) -> Tensor:
        assert self.value_head is not None
        head = self.value_head
        with torch.autocast(hidden.device.type, enabled=False):  # bfloat16 would round values to 8 bits
            value = nn.functional.linear(hidden.float(), head.weight.float(), head.bias.float())
        return value[:, 0]


def value_loss(value: Tensor, old_value: Tensor, returns: Tensor, clip: float) -> Tensor:
    """½ max((V - R)², (clip(V, V_old ± ε) - R)²), per token (the clipped value loss of PPO's first code)."""
    clipped = old_value + (value - old_value).clamp(-clip, clip)
    return 0.5 * torch.maximum((value - returns) ** 2, (clipped - returns) ** 2)


@torch.no_grad()
def check_model(policy: Policy, *, packing: bool, pad: int, name: str) -> None:
    """Ask the model whether its logits are what the fused head computes, and whether packing is safe."""
    vocabulary = policy.causal_lm.get_input_embeddings().weight.shape[0]
    tokens = [(7 * k + 3) % vocabulary for k in range(9)]
    rollouts = [Rollout(tokens[:2], tokens[2:6], False), Rollout(tokens[5:7], tokens[7:8], False)]
    batch = make_batch(rollouts, packing=False, pad=pad, device=policy.device)
    with torch.autocast(policy.device.type, policy.autocast, enabled=policy.autocast is not None):
        logits = policy.causal_lm(
            input_ids=batch.ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
        ).logits.flatten(0, 1)[batch.where]
    logp = (logits.float() / policy.temperature).log_softmax(-1)
    expected = logp.gather(-1, batch.target[:, None])[:, 0]
    tolerance = 1e-4 if policy.autocast is None else 0.1
    layouts = [(False, "logits are not softcap(scale · head(hidden)) as far as is known here")]
    layouts += [(True, "attention does not keep packed sequences apart; use --no-packing")] if packing else []
    for packed, fault in layouts:
        batch = make_batch(rollouts, packing=packed, pad=pad, device=policy.device)
        stats = policy(batch)
        off = (stats.logprob - expected).abs().max().item()
        if not off < tolerance * (1 + expected.abs().max().item()):
            raise ValueError(f"model {name}: its {fault} (log-probabilities differ by {off:.2g})")
