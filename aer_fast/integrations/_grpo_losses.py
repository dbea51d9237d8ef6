"""GRPO's family of losses as inputs of `linear_ppo_loss` and `linear_token_loss`.

Each is a loss per token, a weight per token and one denominator; what differs between the types is written
here once. The formulas are those of TRL 1.16's documentation; each type names its paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")  # min(r A, clip(r) A)
LOSS_TYPES = (*CLIPPED, "cispo", "sapo", "vespo")
PER_SEQUENCE = ("grpo", "sapo")  # the mean of the sequences' means


@dataclass(frozen=True)
class GRPOLoss:
    """The settings of a loss.

    loss_type: grpo (2402.03300), bnpo, dr_grpo (2503.20783), dapo (2503.14476), luspo (2602.05261), cispo
        (2506.13585), sapo (2511.20347) or vespo (2602.10693).
    clip: (ε_low, ε_high) of r ∈ [1 - ε_low, 1 + ε_high]; cispo clamps r to at most ε_high.
    delta: the upper bound of r before the minimum (2505.07291), or None.
    sequence_ratio: r = exp(mean of log r over a sequence's tokens), of GSPO (2507.18071), instead of one a
        token.
    kl_coef: β of β · KL (k3) to the reference; times r if ``kl_ratio`` (2512.02556).
    sapo_temperature: (for A > 0, for A <= 0). vespo: (k, λ) for A >= 0 and for A < 0.
    """

    loss_type: str
    clip: tuple[float, float]
    delta: float | None = None
    sequence_ratio: bool = False
    kl_coef: float = 0.0
    kl_ratio: bool = True
    sapo_temperature: tuple[float, float] = (1.0, 1.05)
    vespo: tuple[tuple[float, float], tuple[float, float]] = ((2.0, 3.0), (3.0, 2.0))

    def __post_init__(self) -> None:
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type must be one of {', '.join(LOSS_TYPES)}, got {self.loss_type!r}")

    @property
    def is_ppo(self) -> bool:
        """Whether `linear_ppo_loss` computes it; ``delta`` is then its dual_clip."""
        bound = 1 + max(0.0, self.clip[1])
        return (
            self.loss_type in CLIPPED
            and not self.sequence_ratio
            and not (self.kl_coef and self.kl_ratio)
            and (self.delta is None or (self.delta > 1 and self.delta >= bound))
        )

    @property
    def whole_sequences(self) -> bool:
        """Whether a token's loss depends on the other tokens of its sequence."""
        return self.sequence_ratio or self.loss_type == "vespo"

    def aggregation(
        self, mask: Tensor, *, window: float, tokens: Tensor, max_length: int | None
    ) -> tuple[Tensor, Tensor | float]:
        """(weight per token [B, T], denominator) of this micro-batch.

        ``mask`` [B, T] is 0 or 1; ``window`` the number of micro-batches of an optimiser step; ``tokens``
        the number of tokens of such a step divided by the number of processes, for dapo, cispo and vespo.
        """
        mask = mask.float()
        B = mask.shape[0]
        if self.loss_type in PER_SEQUENCE:
            return mask / mask.sum(-1, keepdim=True).clamp(min=1.0), B * window
        if self.loss_type == "bnpo":
            return mask, mask.sum().clamp(min=1.0) * window
        if self.loss_type == "dr_grpo":
            assert max_length is not None
            return mask, B * max_length * window
        if self.loss_type == "luspo":
            return mask, B * window
        return mask, tokens

    def objective(self, names: list[str]) -> Callable[..., Tensor]:
        """The loss per token, for `linear_token_loss`, of token tensors with these names.

        They are advantage, entropy_coef and, where there are such, old_logprob, importance_weight and
        ref_logprob; with `whole_sequences` also sequence (a number that the tokens of a sequence share).
        """

        def loss(logprob: Tensor, entropy: Tensor, *tensors: Tensor) -> Tensor:
            given = dict(zip(names, tensors))
            log_ratio = logprob - given.get("old_logprob", logprob.detach())
            advantage = given["advantage"]
            sequence = given.get("sequence")
            if self.sequence_ratio:
                assert sequence is not None
                ratio = _per_sequence(log_ratio, sequence, mean=True).exp()
            else:
                ratio = log_ratio.exp()
            weight = given.get("importance_weight")
            if self.loss_type == "cispo":
                value = -ratio.clamp(max=self.clip[1]).detach() * advantage * logprob
            elif self.loss_type == "sapo":
                τ = torch.where(advantage > 0, *self.sapo_temperature)
                value = -torch.sigmoid(τ * (ratio - 1)) * 4 / τ * advantage
            elif self.loss_type == "vespo":
                assert sequence is not None
                value = -self._gamma(log_ratio, advantage, weight, sequence) * advantage * logprob
            else:
                clipped = ratio.clamp(1 - self.clip[0], 1 + self.clip[1])
                bounded = ratio if self.delta is None else ratio.clamp(max=self.delta)
                value = -torch.minimum(bounded * advantage, clipped * advantage)
            if weight is not None and self.loss_type != "vespo":
                value = value * weight
            if self.kl_coef:
                difference = given["ref_logprob"] - logprob
                kl = difference.exp() - difference - 1
                value = value + self.kl_coef * (kl * ratio if self.kl_ratio else kl)
            return value - given["entropy_coef"] * entropy

        return loss

    @torch.no_grad()
    def _gamma(self, log_ratio: Tensor, advantage: Tensor, weight: Tensor | None, sequence: Tensor) -> Tensor:
        """φ(w) = e^λ w^k e^(-λ w) of w, the product of a sequence's ratios, within [1e-8, e^20]."""
        low = math.log(1e-8)
        log_w = _per_sequence(log_ratio.clamp(-20.0, 20.0), sequence)
        if weight is not None:
            log_w = log_w + _per_sequence(weight.log().clamp(low, 20.0), sequence)
        log_w = log_w.clamp(low, 20.0)
        (k, λ), (k_negative, λ_negative) = self.vespo
        k_of, λ_of = (torch.where(advantage >= 0, a, b) for a, b in ((k, k_negative), (λ, λ_negative)))
        λ_of = λ_of.clamp(min=1e-4)
        log_gamma = λ_of + k_of * log_w - λ_of * log_w.exp()
        return log_gamma.exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _per_sequence(values: Tensor, sequence: Tensor, mean: bool = False) -> Tensor:
    """[n], for each token the sum or the mean of the values of its sequence."""
    _, s = sequence.unique_consecutive(return_inverse=True)
    count = torch.bincount(s)
    total = values.new_zeros(len(count)).index_add(0, s, values)
    return (total / count if mean else total)[s]
