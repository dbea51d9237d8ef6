"""Divergences of a student p from a teacher q, of log-probabilities [..., V], and their gradients.

reverse_kl   KL(p‖q) = Σ p (log p − log q)
forward_kl   KL(q‖p)
jsd          β KL(q‖m) + (1 − β) KL(p‖m),   m = β q + (1 − β) p
"""

import math

import torch
from torch import Tensor

DIVERGENCES = ("reverse_kl", "jsd", "forward_kl")
BETA = {"reverse_kl": 1.0, "jsd": 0.5, "forward_kl": 0.0}  # by which the peers choose among them


def divergence(kind: str, logp: Tensor, logq: Tensor) -> Tensor:
    """[...]"""
    if kind == "reverse_kl":
        return kl(logp, logq)
    if kind == "forward_kl":
        return kl(logq, logp)
    logm = log_mixture(logp, logq)
    return BETA[kind] * kl(logq, logm) + (1 - BETA[kind]) * kl(logp, logm)


def by_logits(kind: str, logp: Tensor, logq: Tensor) -> Tensor:
    """Its gradient by the student's logits, [..., V]."""
    p = logp.exp()
    if kind == "forward_kl":
        return p - logq.exp()
    gap = logp - logq if kind == "reverse_kl" else (1 - BETA[kind]) * (logp - log_mixture(logp, logq))
    return p * (gap - (p * gap).sum(-1, keepdim=True))


def kl(loga: Tensor, logb: Tensor) -> Tensor:
    return (loga.exp() * (loga - logb)).sum(-1)


def log_mixture(logp: Tensor, logq: Tensor) -> Tensor:
    beta = BETA["jsd"]
    return torch.logaddexp(logq + math.log(beta), logp + math.log(1 - beta))
