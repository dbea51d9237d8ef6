"""What an operation is: its inputs, the exact results, the errors of others, and the least that it costs.

An operation is its per-token gradients: with g = ∂L/∂logprob and h = ∂L/∂entropy of each row,

    dz = p · (−g − h (log p + H)) + g · [v = target]

so the exact gradients of a loss with entropy, of one without, and of a cross-entropy are one function of
g and h, computed in float64 a few rows at a time. What is compared is every row's logprob and entropy,
the loss, and the gradients, all entries at once: each gradient is multiplied by a random vector, and the
norm of what differs then estimates that of the whole difference. Ratios keep a distance from the clip's
edges: rounding never decides which branch a row takes.

A divergence of a student p from a teacher q has another dz and is otherwise alike:

    reverse_kl   KL(p‖q) = Σ p (log p − log q)
    forward_kl   KL(q‖p)
    jsd          β KL(q‖m) + (1 − β) KL(p‖m),   m = β q + (1 − β) p

Most of what the teacher knows is the student's: some 2 nats lie between the two.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bench.cases import FORWARD, STATS, Case, divergence_of

CLIP = 0.2
ENTROPY_COEF = 0.3  # so large that a bonus left out, or of the wrong sign, shows even in bfloat16
BETA = {"reverse_kl": 1.0, "jsd": 0.5, "forward_kl": 0.0}  # of jsd; and by which peers choose a divergence
SEQUENCES = 16
SPREAD = 4.0  # of the logits' standard deviation: entropies of some 4 nats
SHARED = 7 / 8  # of the variance of a teacher's logits is in the student's, too
OFFSETS = (-0.4, -0.1, 0.1, 0.4)  # of logprob from old_logprob; the edges are at log 0.8 and log 1.2
EXACT_ENTRIES = 1 << 25  # of float64 at a time

# Whatever is above these is called wrong: values in nats, gradients relative to their norm. bfloat16 logits,
# as most peers make them, are off by some 0.1 nats, and gradients made of them by 3%.
LOOSE_VALUE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
LOOSE_GRADIENT = {torch.float32: 1e-3, torch.bfloat16: 0.08}


@dataclass(frozen=True)
class Inputs:
    factors: tuple[Tensor, ...]  # logits [N, V], or hidden [N, D] and weight [V, D]; leaves
    target: Tensor  # [N], and so are the rest
    old_logprob: Tensor
    advantage: Tensor  # the same for the tokens of a sequence
    entropy_coef: Tensor | float
    mask: Tensor | None  # None: every row counts
    grad_logprob: Tensor  # upstream, where the operation is no loss
    grad_entropy: Tensor
    teacher: tuple[Tensor, ...] = ()  # its hidden [N, D_ref] and weight [V, D_ref]


@dataclass(frozen=True)
class Result:
    """What a step gives, as far as it gives it."""

    logprob: Tensor | None = None
    entropy: Tensor | None = None
    loss: Tensor | None = None
    gradient: tuple[Tensor, ...] = ()


Step = Callable[..., Result]
Fresh = Callable[[], tuple[Any, ...]]  # the arguments of a step


# ---- losses, and divergences of log-probabilities [..., V]


def loss_of(logprob: Tensor, entropy: Tensor | None, inputs: Inputs) -> Tensor:
    """The loss as most trainers write it, from log-probabilities; without an entropy there is no bonus."""
    ratio = (logprob - inputs.old_logprob).exp()
    advantage = inputs.advantage
    per_token = -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
    if entropy is not None:
        per_token = per_token - inputs.entropy_coef * entropy
    return mean_over_tokens(per_token, inputs.mask)


def mean_over_tokens(per_token: Tensor, mask: Tensor | None) -> Tensor:
    return per_token.mean() if mask is None else (per_token * mask).sum() / mask.sum()


def divergence(kind: str, logp: Tensor, logq: Tensor) -> Tensor:
    """[...]"""
    if kind == "reverse_kl":
        return kl(logp, logq)
    if kind == "forward_kl":
        return kl(logq, logp)
    logm = log_mixture(logp, logq)
    return BETA[kind] * kl(logq, logm) + (1 - BETA[kind]) * kl(logp, logm)


def divergence_by_logits(kind: str, logp: Tensor, logq: Tensor) -> Tensor:
    """Gradient of a divergence by the student's logits, [..., V]."""
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


# ---- the exact results


@dataclass
class Exact:
    """float64. Gradients are made when they are asked for."""

    inputs: Inputs
    normaliser: Tensor  # logsumexp of each row
    logprob: Tensor
    entropy: Tensor
    gradients: dict[tuple[str, str], tuple[Tensor, ...]] = field(default_factory=dict)
    divergences: dict[str, Tensor] = field(default_factory=dict)

    def tokens(self) -> Tensor:
        mask = self.inputs.mask
        return torch.ones_like(self.logprob) if mask is None else mask.double()

    def mean(self) -> Tensor:
        """The weight of each row in a mean over tokens."""
        return self.tokens() / self.tokens().sum()

    def upstream(self, op: str, work: str) -> tuple[Tensor, Tensor]:
        """g and h of every row."""
        mean = self.mean()
        zero = torch.zeros_like(mean)
        if work == "cross-entropy":
            return -mean, zero
        if op in STATS:
            return self.inputs.grad_logprob.double(), self.inputs.grad_entropy.double()
        ratio, advantage = (self.logprob - self.inputs.old_logprob).exp(), self.inputs.advantage.double()
        moves = ratio * advantage <= ratio.clamp(1 - CLIP, 1 + CLIP) * advantage
        entropy = -self.inputs.entropy_coef * mean if work == "all" else zero
        return -ratio * advantage * mean * moves, entropy

    def loss(self, op: str, work: str) -> Tensor:
        mean = self.mean()
        if kind := divergence_of(op):
            return (mean * self.divergence(kind)).sum()
        if work == "cross-entropy":
            return -(mean * self.logprob).sum()
        ratio, advantage = (self.logprob - self.inputs.old_logprob).exp(), self.inputs.advantage.double()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
        bonus = self.inputs.entropy_coef * self.entropy if work == "all" else 0.0
        return (mean * (-surrogate - bonus)).sum()

    def __post_init__(self) -> None:
        self.sums = self.sum_up()

    def sum_up(self) -> list[float]:
        """Of the factors, which no provider may change."""
        factors = (*self.inputs.factors, *self.inputs.teacher)
        return [float(x.detach().sum(dtype=torch.float64)) for x in factors]

    def divergence(self, kind: str) -> Tensor:
        """[N]"""
        if kind not in self.divergences:
            V, device = len(self.inputs.teacher[1]), self.logprob.device
            parts = torch.arange(len(self.logprob), device=device).split(rows_at_once(V))
            found = [divergence(kind, *self.log_softmaxes(rows)) for rows in parts]
            self.divergences[kind] = torch.cat(found)
        return self.divergences[kind]

    def log_softmaxes(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """[rows, V] of the student and of its teacher."""
        student = [x.detach() for x in self.inputs.factors]
        logp = exact_logits(student, rows).sub_(self.normaliser[rows, None])
        return logp, exact_logits(list(self.inputs.teacher), rows).log_softmax(-1)

    def gradient(self, op: str, work: str) -> tuple[Tensor, ...]:
        """(logits [N],) or (hidden [N], weight [V]): each gradient's product with a `direction`."""
        if (op, work) not in self.gradients:
            self.gradients[op, work] = self._gradient(op, work)
        return self.gradients[op, work]

    def by_logits(self, op: str, work: str) -> Callable[[Tensor], Tensor]:
        """What gives dz of some rows, [rows, V]."""
        if kind := divergence_of(op):
            mean = self.mean()
            return lambda rows: mean[rows, None] * divergence_by_logits(kind, *self.log_softmaxes(rows))
        factors = [x.detach() for x in self.inputs.factors]
        g, h = self.upstream(op, work)

        def dz_of(rows: Tensor) -> Tensor:
            logp = exact_logits(factors, rows).sub_(self.normaliser[rows, None])
            dz = -g[rows, None] - h[rows, None] * (logp + self.entropy[rows, None])
            dz *= logp.exp_()
            dz[torch.arange(len(rows), device=g.device), self.inputs.target[rows]] += g[rows]
            return dz

        return dz_of

    def _gradient(self, op: str, work: str) -> tuple[Tensor, ...]:
        factors, dz_of = [x.detach() for x in self.inputs.factors], self.by_logits(op, work)
        device = self.logprob.device
        N, V = len(self.logprob), factors[-1].shape[-1 if len(factors) == 1 else 0]
        onto_row = direction(factors[-1].shape[-1], device)
        if len(factors) == 2:  # dz · weight · direction
            onto_row = project(factors[1], onto_row)
            of_hidden = project(factors[0], direction(factors[0].shape[-1], device))
        by_row = torch.empty(N, device=device, dtype=torch.float64)
        by_word = torch.zeros(V, device=device, dtype=torch.float64)
        for rows in torch.arange(N, device=device).split(rows_at_once(V)):
            dz = dz_of(rows)
            by_row[rows] = dz @ onto_row
            if len(factors) == 2:
                by_word += of_hidden[rows] @ dz
        return (by_row,) if len(factors) == 1 else (by_row, by_word)


def direction(size: int, device: torch.device) -> Tensor:
    """A random vector, always the same."""
    return torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)


def project(matrix: Tensor, onto: Tensor) -> Tensor:
    """matrix · onto in float64, a few rows at a time."""
    parts = matrix.split(rows_at_once(matrix.shape[-1]))
    return torch.cat([part.double() @ onto for part in parts])


def rows_at_once(words: int) -> int:
    return max(1, EXACT_ENTRIES // words)


def exact_logits(factors: list[Tensor], rows: Tensor) -> Tensor:
    """[rows, V] in float64."""
    if len(factors) == 1:
        return factors[0][rows].double()
    hidden, weight = factors
    return hidden[rows].double() @ weight.double().T


# ---- inputs of a case


@lru_cache(maxsize=1)
def prepare(
    N: int, V: int, D: int, dtype: torch.dtype, rows: str, device: str, D_ref: int = 0
) -> tuple[Inputs, Exact]:
    """Random inputs of a case, the same at every call, and what they should give."""
    torch.manual_seed(0)
    teacher: list[Tensor] = []
    if D == 0:
        logits = torch.empty(N, V, device=device, dtype=dtype)
        for part in logits.split(rows_at_once(V)):
            part.copy_(SPREAD * torch.randn(part.shape, device=device))
        factors = [logits]
    else:
        hidden, weight = torch.randn(N, D, device=device), torch.randn(V, D, device=device)
        factors = spread(dtype, hidden, weight)
        if D_ref:
            teacher = spread(dtype, *teacher_of(hidden, weight, D_ref))
    factors = [x.requires_grad_() for x in factors]
    return judge(factors, torch.randint(V, (N,), device=device), rows, teacher)


def spread(dtype: torch.dtype, hidden: Tensor, weight: Tensor) -> list[Tensor]:
    return [(hidden * (SPREAD / hidden.shape[1] ** 0.5)).to(dtype), weight.to(dtype)]


def teacher_of(hidden: Tensor, weight: Tensor, D_ref: int) -> list[Tensor]:
    """Hidden states and head of a teacher of this width, which begin with the student's."""
    shared = int(SHARED * min(hidden.shape[1], D_ref))
    made = [torch.randn(len(x), D_ref, device=x.device) for x in (hidden, weight)]
    for own, known in zip(made, (hidden, weight)):
        own[:, :shared] = known[:, :shared]
    made[0][:, :shared] *= (SHARED * D_ref / shared) ** 0.5
    made[0][:, shared:] *= ((1 - SHARED) * D_ref / (D_ref - shared)) ** 0.5
    return made


def judge(
    factors: list[Tensor], target: Tensor, rows: str = "all", teacher: Sequence[Tensor] = ()
) -> tuple[Inputs, Exact]:
    """The other inputs of a loss of these logits, or of this hidden and weight, and the exact results."""
    device = target.device
    N, V = len(target), factors[-1].shape[-1 if len(factors) == 1 else 0]
    constants = [x.detach() for x in factors]
    normaliser, logprob, entropy = (torch.empty(N, device=device, dtype=torch.float64) for _ in range(3))
    for part in torch.arange(N, device=device).split(rows_at_once(V)):
        z = exact_logits(constants, part)
        normaliser[part] = z.logsumexp(-1)
        logp = z.sub_(normaliser[part, None])
        logprob[part] = logp.gather(-1, target[part, None])[:, 0]
        entropy[part] = -(logp.exp() * logp).sum(-1)

    tokens = N // SEQUENCES
    advantage = torch.randn(SEQUENCES, device=device)
    offset = torch.tensor(OFFSETS, device=device)[torch.randint(len(OFFSETS), (N,), device=device)]
    entropy_coef: Tensor | float = ENTROPY_COEF
    mask = None
    if (
        rows == "realistic"
    ):  # a quarter is prompts; of 40% of the sequences the whole group was right, or wrong
        told_apart = (torch.arange(SEQUENCES, device=device) * 7) % 10 >= 4
        advantage = advantage * told_apart
        harder = torch.rand(SEQUENCES, device=device) * told_apart
        entropy_coef = (ENTROPY_COEF * harder).repeat_interleave(tokens)
        mask = torch.arange(N, device=device) % tokens >= tokens // 4
    advantage = advantage.repeat_interleave(tokens)
    if rows.endswith("silent"):  # a share without a gradient, anywhere; no bonus
        share = int(rows.split("%")[0]) / 100
        advantage = advantage * (torch.rand(N, device=device) >= share)
        offset, entropy_coef = torch.zeros_like(offset), 0.0
    inputs = Inputs(
        factors=tuple(factors),
        target=target,
        old_logprob=(logprob + offset).float(),
        advantage=advantage,
        entropy_coef=entropy_coef,
        mask=mask,
        grad_logprob=torch.randn(N, device=device) / N,
        grad_entropy=torch.randn(N, device=device) / N,
        teacher=tuple(teacher),
    )
    return inputs, Exact(inputs, normaliser, logprob, entropy)


# ---- errors, and the least work


def errors(case: Case, work: str, exact: Exact, result: Result) -> dict[str, float]:
    """Of values in nats, of gradients relative to their Frobenius norm; nan where an entry is not finite."""
    found = {}
    counts = exact.tokens() > 0
    for name, actual, value in (
        ("logprob", result.logprob, exact.logprob),
        ("entropy", result.entropy, exact.entropy),
    ):
        if actual is not None:
            found[name] = float((actual.detach().double() - value)[counts].abs().max())
    if result.loss is not None:
        found["loss"] = float((result.loss.detach().double() - exact.loss(case.op, work)).abs())
    if result.gradient:
        names = ["grad_logits"] if len(result.gradient) == 1 else ["grad_hidden", "grad_weight"]
        expected = exact.gradient(case.op, work)
        for name, actual, factor, value in zip(
            names, result.gradient, exact.inputs.factors, expected, strict=True
        ):
            if actual.numel() != factor.numel():
                raise ValueError(f"{name} has the shape {list(actual.shape)}")
            rows = actual.detach().reshape(factor.shape) if actual.dim() == 3 else actual.detach()
            off = project(rows, direction(factor.shape[-1], factor.device)) - value
            found[name] = float(off.norm() / value.norm())
    if exact.sum_up() != exact.sums:
        prepare.cache_clear()
        found["inputs"] = float("inf")  # what the next providers would have got
    return {name: float(f"{error:.2g}") for name, error in found.items()}


def complaint(dtype: torch.dtype, found: dict[str, float]) -> str:
    """What is wrong, or nothing."""

    def limit(name: str) -> float:
        return (LOOSE_GRADIENT if name.startswith("grad_") else LOOSE_VALUE)[dtype]

    wrong = [f"{name} is off by {error:.2g}" for name, error in found.items() if not error < limit(name)]
    return ", ".join(wrong)


def least(case: Case, exact: Exact, work: str = "all") -> tuple[float, float]:
    """The bytes that must move and the operations that must be done, whoever does them.

    From logits: rows that count are read, for statistics again in a backward that could not know its upstream
    gradient, and a gradient is written; arithmetic is counted as 6 operations a logit forward and 5 backward.
    With a head: one product of the rows that count, two more of those with a gradient; factors and gradients
    are read and written once. A teacher's head takes one product, and its factors are read.
    """
    size = torch.finfo(case.dtype).bits // 8
    counted = float((exact.tokens() > 0).sum())
    forward = case.op.endswith(FORWARD)
    if case.D == 0:
        passes = counted if forward else (2 if case.op in STATS else 1) * counted + case.N
        return passes * case.V * size, (6.0 if forward else 11.0) * counted * case.V
    live = counted if case.D_ref else 0.0
    if not forward and not case.D_ref:
        g, h = exact.upstream(case.op, "all" if work == "products alone" else work)
        live = float(((g != 0) | (h != 0)).sum())
    moved = (case.N + case.V) * (case.D * (1 if forward else 2) + case.D_ref) * size
    return moved, 2.0 * case.V * (case.D * (counted + 2 * live) + case.D_ref * counted)
