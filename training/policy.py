"""A causal language model of transformers with the fused loss: logits never exist.

`Policy.forward` runs the body on a batch and hands its hidden states to `head_loss`, which knows the model's
head, all inside one module's forward: there, under FSDP2, the head's weight is whole.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aer_fast.integrations.transformers import (
    FusedOutput,
    LossInputs,
    causal_lm,
    check_lm_head,
    head_loss,
    head_shape,
    lm_body,
)
from training.attention import PACKED, flash_arguments, name_of, row_of
from training.batch import Batch, Rollout, make_batch
from training.processes import naming

# Tokens of a packed row on trial: some models read others in blocks, of up to 128 so far.
PROBED = 160


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


class Distillation(NamedTuple):
    """The settings of the divergence from a teacher."""

    divergence: str
    jsd_beta: float
    coef: float
    alone: bool  # without the loss of the reward


class Objective(NamedTuple):
    """The settings of the loss."""

    clip: tuple[float, float]
    dual_clip: float | None
    kl_coef: float
    value_coef: float
    value_clip: float
    distillation: Distillation | None = None


class Stats(NamedTuple):
    """Of the response tokens of a batch, without gradients."""

    logprob: Tensor  # [n]
    entropy: Tensor  # [n]
    value: Tensor | None  # [n], before each token
    final_value: Tensor | None  # [b], after each sequence's last token


class Taught(NamedTuple):
    """What a teacher says of the response tokens of a batch: inputs of `linear_distill_loss`."""

    ref_hidden: Tensor  # [n, D]
    ref_weight: Tensor  # [V, D]
    ref_bias: Tensor | None  # [V]
    ref_softcap: float | None
    ref_temperature: float


class Policy(nn.Module):
    """The model, and a value head if asked for."""

    def __init__(self, model: Any, *, temperature: float, dtype: str, value_head: bool) -> None:
        super().__init__()
        self.model = model
        self.temperature = temperature
        self.autocast = torch.bfloat16 if dtype == "bfloat16" else None
        self.shares = False  # whether it can be run on packed rows with shared prompts: `check_model`
        self.value_head: nn.Linear | None = None
        if value_head:
            head = causal_lm(model).get_output_embeddings()
            # what the head reads: some models' last states are wider than their hidden_size
            width = model.config.get_text_config().hidden_size if head is None else head.weight.shape[1]
            self.value_head = nn.Linear(width, 1)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def causal_lm(self) -> Any:
        """The model of transformers itself, whether or not adapters are around it."""
        return causal_lm(self.model)

    def forward(
        self,
        batch: Batch,
        tokens: Tokens | None = None,
        objective: Objective | None = None,
        denominator: float = 1.0,
        adapter: bool = True,
        taught: Taught | None = None,
        teaches: bool = False,
    ) -> tuple[Tensor, FusedOutput, Tensor] | Stats | Taught:
        """(total loss, loss of the policy, value loss) of ``tokens``; without them the `Stats` of the batch.

        ``adapter=False`` switches LoRA adapters off: the initial model. ``taught`` is what the teacher says
        of the batch, which is what a policy that ``teaches`` returns.
        """
        off = contextlib.nullcontext() if adapter else self.model.disable_adapter()
        with off, torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            hidden = self.hidden(batch)  # [R · T, D]
            scored = hidden[batch.where]  # [n, D]
            if teaches:
                return self.taught(scored)
            if tokens is None:
                stats = head_loss(
                    self.model, scored, LossInputs(target=batch.target, temperature=self.temperature)
                )
                if self.value_head is None:
                    return Stats(stats.logprob, stats.entropy, None, None)
                value, final = (self.value_of(hidden[at]) for at in (batch.where, batch.last))
                return Stats(stats.logprob, stats.entropy, value, final)
            assert objective is not None
            out = self.loss(scored, batch.target, tokens, objective, denominator, taught)
            assert out.loss is not None
            if self.value_head is None:
                return out.loss, out, out.loss.new_zeros(())
            assert tokens.old_value is not None
            assert tokens.returns is not None
            value = self.value_of(scored)
            error = value_loss(value, tokens.old_value, tokens.returns, objective.value_clip)
            value_error = (tokens.mask * error).sum() / denominator
            return out.loss + objective.value_coef * value_error, out, value_error.detach()

    def loss(
        self,
        hidden: Tensor,
        target: Tensor,
        tokens: Tokens,
        objective: Objective,
        denominator: float,
        taught: Taught | None,
    ) -> FusedOutput:
        """The loss of the reward, the divergence from the teacher with the entropy bonus, or both added."""
        given: dict[str, Any] = {
            "target": target,
            "temperature": self.temperature,
            "mask": tokens.mask,
            "denominator": denominator,
        }
        bonus, distill = {"entropy_coef": tokens.entropy_coef}, objective.distillation
        lesson: dict[str, Any] = {}
        if distill is not None:
            assert taught is not None
            settings = distill._asdict()
            alone = settings.pop("alone")
            lesson = given | taught._asdict() | settings
            if alone:
                out = head_loss(self.model, hidden, LossInputs(**lesson, **bonus))
                return out._replace(metrics=out.metrics | moved(out, tokens))
        given |= bonus | {
            "old_logprob": tokens.old_logprob,
            "advantage": tokens.advantage,
            "importance_weight": tokens.importance_weight,
            "ref_logprob": tokens.ref_logprob,
            "kl_coef": objective.kl_coef,
            "clip": objective.clip,
            "dual_clip": objective.dual_clip,
        }
        out = head_loss(self.model, hidden, LossInputs(**given))
        if not lesson:
            return out
        beside = head_loss(self.model, hidden, LossInputs(**lesson))
        assert out.loss is not None
        assert beside.loss is not None
        metrics = out.metrics | {"divergence": beside.metrics["divergence"]}
        return out._replace(loss=out.loss + beside.loss, metrics=metrics)

    def taught(self, hidden: Tensor) -> Taught:
        """Of hidden states: what `linear_distill_loss` needs of a teacher, whose head has no adapter."""
        head, (softcap, scale) = self.causal_lm.get_output_embeddings(), head_shape(self.causal_lm.config)
        softcap = None if softcap is None else softcap / scale
        bias = getattr(head, "bias", None)
        return Taught(hidden, head.weight, bias, softcap, self.temperature / scale)

    def hidden(self, batch: Batch) -> Tensor:
        """Last hidden states [R · T, D] of the body."""
        body = lm_body(self.model)
        settings: dict[str, Any] = {"use_cache": False, "return_dict": True}
        if batch.attention_mask is None:
            settings |= flash_arguments(body, batch)
        else:
            settings["attention_mask"] = batch.attention_mask
        with row_of(batch):
            output = body(input_ids=batch.ids, position_ids=batch.position_ids, **settings)
        hidden: Tensor = output.last_hidden_state
        return hidden.flatten(0, 1)

    def value_of(self, hidden: Tensor) -> Tensor:
        assert self.value_head is not None
        head = self.value_head
        with torch.autocast(hidden.device.type, enabled=False):  # bfloat16 would round values to 8 bits
            value = nn.functional.linear(hidden.float(), head.weight.float(), head.bias.float())
        return value[:, 0]


def moved(out: FusedOutput, tokens: Tokens) -> dict[str, Tensor]:
    """How far the policy is from the one that sampled: what else the loss of the reward says, by its names.
    Nothing is clipped."""
    token = tokens.mask != 0
    log_ratio = (out.logprob - tokens.old_logprob).where(token, 0.0)
    approx_kl = (log_ratio.expm1() - log_ratio).sum() / token.sum().clamp(min=1)
    ratio = log_ratio.exp().where(token, 0.0)
    ratio_max = ratio.amax() if len(ratio) else ratio.sum()
    none = torch.zeros_like(approx_kl)
    clipped = dict.fromkeys(("clip_fraction_low", "clip_fraction_high", "clip_fraction"), none)
    return clipped | {"approx_kl": approx_kl, "ratio_max": ratio_max}


def value_loss(value: Tensor, old_value: Tensor, returns: Tensor, clip: float) -> Tensor:
    """½ max((V - R)², (clip(V, V_old ± ε) - R)²), per token (the clipped value loss of PPO's first code)."""
    clipped = old_value + (value - old_value).clamp(-clip, clip)
    return 0.5 * torch.maximum((value - returns) ** 2, (clipped - returns) ** 2)


@torch.no_grad()
def check_model(policy: Policy, *, row: int | None, pad: int, name: str) -> None:
    """Ask the model whether its logits are what the fused head computes, and whether packing is safe.

    ``row`` is the most tokens of a packed row; None: there is no packing. Whether prompts can be shared in it
    is left in ``policy.shares``.
    """
    try:
        check_lm_head(policy.model, autocast=policy.autocast)
    except ValueError as error:
        raise ValueError(f"model {name}: {error}") from error
    vocabulary = policy.causal_lm.get_input_embeddings().weight.shape[0]
    limit = positions(policy)
    second = max(3, min(PROBED, limit or PROBED, row or PROBED) - 6)  # tokens, behind the first one's 6
    tokens = [(7 * k + 3) % vocabulary for k in range(max(9, second + 5))]
    rollouts = [Rollout(tokens[:2], tokens[2:6], False), Rollout(tokens[5:7], tokens[7 : second + 5], False)]

    def logprob(rollouts: list[Rollout], *, packing: bool, share: bool = False) -> Tensor:
        batch = make_batch(rollouts, packing=packing, pad=pad, device=policy.device, share=share)
        found: Tensor = policy(batch).logprob
        return found

    def off(found: Tensor, expected: Tensor) -> float:
        return (found - expected).abs().max().item() / (1 + expected.abs().max().item())

    with naming(f"model {name} can't be run on padded sequences"):
        padded = logprob(rollouts, packing=False)
    if row is None:
        return
    other = "--no-packing"
    if name_of(policy.causal_lm) == PACKED:
        other += ", or try --attention sdpa"

    def keep_apart(packed: Tensor, padded: Tensor) -> None:
        if not off(packed, padded) < rounding(policy):
            raise ValueError(
                f"model {name}: its attention does not keep packed sequences apart; use {other}"
                f" (log-probabilities differ by {(packed - padded).abs().max().item():.2g})"
            )

    def depends(rollouts: list[Rollout], *, share: bool = False) -> bool:
        """Whether a packed row's other log-probabilities depend on the first response."""
        first, *rest = rollouts
        others = [first._replace(response=[(token + 1) % vocabulary for token in first.response]), *rest]
        own = len(first.response)

        def by(**layout: bool) -> float:
            return off(logprob(others, **layout)[own:], logprob(rollouts, **layout)[own:])

        # those of a mixture of experts may depend on it by rounding, or do so in a padded batch, too
        return not by(packing=True, share=share) <= 2e-6 + 10 * by(packing=False)

    with naming(f"model {name} takes no packed sequences; use {other}"):
        packed = logprob(rollouts, packing=True)
    keep_apart(packed, padded)
    with in_full(policy):
        if depends(rollouts):
            raise ValueError(f"model {name}: a packed sequence depends on the one before it; use {other}")
    if name_of(policy.causal_lm) == PACKED:
        # two that are short beside their prompt, and one that is not
        group = [Rollout(tokens[:6], tokens[start:end], False) for start, end in ((6, 8), (4, 6), (6, 9))]
        group += [Rollout(tokens[4:6], [tokens[k]], False) for k in (1, 7)]
        with contextlib.suppress(ValueError):  # a mask that is not the row's
            logprob(group, packing=True, share=True)  # in the dtype of the computation, too
            with in_full(policy):
                shared = logprob(group, packing=True, share=True)
                same = off(shared, logprob(group, packing=False)) < rounding(policy)
                policy.shares = same and not depends(group, share=True)
    # a whole row: some models look at a token's place in it, and some have no room for so many
    many = [rollouts[1]] * (row // second)
    if row % second > 2:
        many.append(Rollout(tokens[:2], tokens[2 : row % second], False))
    if not many:
        return
    fault = f"model {name} takes no packed row of {row} tokens; use {other}"
    if limit is not None and row > limit:  # its buffers may be as long as its longest sequence
        fault = f"model {name} takes no packed row of more than its {limit} positions"
        fault += f"; use micro_tokens up to {limit}, or --no-packing"
    with in_full(policy):
        with naming(fault):
            packed = logprob(many, packing=True)
        padded = logprob(many[-2:], packing=False)
        keep_apart(packed[-len(padded) :], padded)


@contextlib.contextmanager
def in_full(policy: Policy) -> Iterator[None]:
    """In the dtype of the parameters, where attention takes it: bfloat16 rounds what is looked for away, and
    a mixture of experts by other numbers of tokens otherwise."""
    kept = policy.autocast
    if "flash" not in (name_of(policy.causal_lm) or ""):
        policy.autocast = None
    try:
        yield
    finally:
        policy.autocast = kept


def rounding(policy: Policy) -> float:
    """How far log-probabilities may differ for rounding alone, relative to the largest."""
    dtype = policy.autocast or next(policy.causal_lm.parameters()).dtype
    return 1e-4 if dtype.itemsize >= 4 else 0.1


def positions(policy: Policy) -> int | None:
    """Tokens of the longest sequence, if the model has a limit."""
    limit = getattr(policy.causal_lm.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
