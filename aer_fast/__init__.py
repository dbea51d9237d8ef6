"""Entropy and policy losses for reinforcement learning on language models, fused with Triton."""

from __future__ import annotations

from aer_fast import reference
from aer_fast._adaptive_entropy import AdaptiveEntropy
from aer_fast._distill_loss import distill_loss
from aer_fast._linear.distill_loss import linear_distill_loss
from aer_fast._linear.plan import Plan, plan
from aer_fast._linear.ppo_loss import linear_ppo_loss
from aer_fast._linear.token_loss import linear_token_loss
from aer_fast._linear.token_stats import linear_token_stats
from aer_fast._metrics import merge_metrics
from aer_fast._ppo_loss import ppo_loss
from aer_fast._token_stats import token_stats
from aer_fast.reference import DistillLoss, PPOLoss, TokenStats

__version__ = "0.1.0"
__all__ = [
    "AdaptiveEntropy",
    "DistillLoss",
    "PPOLoss",
    "Plan",
    "TokenStats",
    "distill_loss",
    "linear_distill_loss",
    "linear_ppo_loss",
    "linear_token_loss",
    "linear_token_stats",
    "merge_metrics",
    "plan",
    "ppo_loss",
    "reference",
    "token_stats",
]
