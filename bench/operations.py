"""What is measured: the operations, their inputs, the exact results, and the least that they can cost.

An operation is its per-token gradients: with g = ∂L/∂logprob and h = ∂L/∂entropy of each row,

    dz = p · (−g − h (log p + H)) + g · [v = target]

so the exact gradients of a loss with entropy, of one without, and of a cross-entropy are one function of g
and h, computed in float64 a few rows at a time. What is compared is every row's logprob and entropy, the
loss, the gradients of some rows, and the weight's gradient at some words, which sums over all rows. Ratios
keep a distance from the clip's edges: rounding never decides which branch a row takes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

CLIP = 0.2
ENTROPY_COEF = 0.01
SEQUENCES = 16
SPREAD = 4.0  # of the logits' standard deviation: entropies of some 4 nats
OFFSETS = (-0.4, -0.1, 0.1, 0.4)  # of logprob from old_logprob; the edges are at log 0.8 and log 1.2
SAMPLED_ROWS, SAMPLED_WORDS = 64, 256
EXACT_ENTRIES = 1 << 25  # of float64 at a time

# Whatever is above these is called wrong: values in nats, gradients relative to their norm. They are loose:
# bfloat16 logits, as most peers make them, are off by some 0.1 nats.
LOOSE = {torch.float32: 1e-3, torch.bfloat16: 0.25}


Who = Literal["few", "many", "everyone"]


@dataclass(frozen=True)
class Case:
    """An operation at a shape."""

    op: str
    N: int
    V: int
    D: int = 0  # 0: from logits
    dtype: torch.dtype = torch.float32
    rows: str = "all"  # "realistic"; "30% silent"
    who: Who = "few"  # is measured
    headline: bool = False  # of the README and the bars

    def __str__(self) -> str:
        sizes = [f"{name}={size}" for name, size in self.shape.items()]
        kind = [str(self.dtype).removeprefix("torch.")] + ([] if self.rows == "all" else [self.rows])
        return " ".join([*sizes, *kind])

    @property
    def shape(self) -> dict[str, int]:
        return {"N": self.N, "V": self.V} | ({"D": self.D} if self.D else {})


FORWARD = "forward"
STEP = "optimiser step"
STATS = ("token_stats", "linear_token_stats")


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


@dataclass
class Exact:
    """float64. Gradients are made when they are asked for."""

    inputs: Inputs
    normaliser: Tensor  # logsumexp of each row
    logprob: Tensor
    entropy: Tensor
    rows: Tensor  # whose gradients are compared
    words: Tensor
    gradients: dict[tuple[str, str], tuple[Tensor, ...]] = field(default_factory=dict)

    def tokens(self) -> Tensor:
        mask = self.inputs.mask
        return torch.ones_like(self.logprob) if mask is None else mask.double()

    def upstream(self, op: str, work: str) -> tuple[Tensor, Tensor]:
        """g and h of every row."""
        mean = self.tokens() / self.tokens().sum()
        zero = torch.zeros_like(mean)
        if work == "cross-entropy":
            return -mean, zero
        if op in STATS:
            return self.inputs.grad_logprob.double(), self.inputs.grad_entropy.double()
        ratio, advantage = (self.logprob - self.inputs.old_logprob).exp(), self.inputs.advantage.double()
        moves = ratio * advantage <= ratio.clamp(1 - CLIP, 1 + CLIP) * advantage
        entropy = -self.inputs.entropy_coef * mean if work == "all" else zero
        return -ratio * advantage * mean * moves, entropy

    def loss(self, work: str) -> Tensor:
        mean = self.tokens() / self.tokens().sum()
        if work == "cross-entropy":
            return -(mean * self.logprob).sum()
        ratio, advantage = (self.logprob - self.inputs.old_logprob).exp(), self.inputs.advantage.double()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
        bonus = self.inputs.entropy_coef * self.entropy if work == "all" else 0.0
        return (mean * (-surrogate - bonus)).sum()

    def gradient(self, op: str, work: str) -> tuple[Tensor, ...]:
        """(logits[rows],) or (hidden[rows], weight[words])."""
        if (op, work) not in self.gradients:
            self.gradients[op, work] = self._gradient(*self.upstream(op, work))
        return self.gradients[op, work]

    def _gradient(self, g: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        factors = [x.detach() for x in self.inputs.factors]
        target = self.inputs.target

        def dz(rows: Tensor, words: Tensor | None) -> Tensor:
            """[rows, words]"""
            logp = exact_logits(factors, rows, words) - self.normaliser[rows, None]
            grad = logp.exp() * (-g[rows, None] - h[rows, None] * (logp + self.entropy[rows, None]))
            columns = torch.arange(logp.shape[-1], device=logp.device) if words is None else words
            return grad + g[rows, None] * (columns == target[rows, None])

        by_row = [dz(rows, None) for rows in self.rows.split(rows_at_once(self.vocabulary))]
        if len(factors) == 1:
            return (torch.cat(by_row),)
        hidden, weight = factors
        at_words = torch.zeros(len(self.words), hidden.shape[-1], device=hidden.device, dtype=torch.float64)
        every = torch.arange(len(hidden), device=hidden.device)
        for rows in every.split(rows_at_once(len(self.words))):
            at_words += dz(rows, self.words).T @ hidden[rows].double()
        return torch.cat([x @ weight.double() for x in by_row]), at_words

    @property
    def vocabulary(self) -> int:
        return self.inputs.factors[-1].shape[-1 if len(self.inputs.factors) == 1 else 0]


def rows_at_once(words: int) -> int:
    return max(1, EXACT_ENTRIES // words)


def exact_logits(factors: list[Tensor], rows: Tensor, words: Tensor | None = None) -> Tensor:
    """[rows, words] in float64."""
    if len(factors) == 1:
        logits = factors[0][rows]
        return (logits if words is None else logits[:, words]).double()
    hidden, weight = factors
    return hidden[rows].double() @ (weight if words is None else weight[words]).double().T


@lru_cache(maxsize=1)
def prepare(N: int, V: int, D: int, dtype: torch.dtype, rows: str, device: str) -> tuple[Inputs, Exact]:
    """Random inputs of a case, the same at every call, and what they should give."""
    torch.manual_seed(0)
    if D == 0:
        logits = torch.empty(N, V, device=device, dtype=dtype)
        for part in logits.split(rows_at_once(V)):
            part.copy_(SPREAD * torch.randn(part.shape, device=device))
        factors = [logits]
    else:
        hidden, weight = torch.randn(N, D, device=device), torch.randn(V, D, device=device)
        factors = [(hidden * (SPREAD / D**0.5)).to(dtype), weight.to(dtype)]
    return judge([x.requires_grad_() for x in factors], torch.randint(V, (N,), device=device), rows)


def judge(factors: list[Tensor], target: Tensor, rows: str = "all") -> tuple[Inputs, Exact]:
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
    )
    sampled = torch.linspace(0, N - 1, min(N, SAMPLED_ROWS), device=device).long()
    words = torch.linspace(0, V - 1, min(V, SAMPLED_WORDS), device=device).long()
    words = torch.cat([words, target[:: max(1, N // SAMPLED_ROWS)]]).unique()
    return inputs, Exact(inputs, normaliser, logprob, entropy, sampled, words)


def loss_of(logprob: Tensor, entropy: Tensor | None, inputs: Inputs) -> Tensor:
    """The loss as most trainers write it, from log-probabilities; without an entropy there is no bonus."""
    ratio = (logprob - inputs.old_logprob).exp()
    advantage = inputs.advantage
    per_token = -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
    if entropy is not None:
        per_token = per_token - inputs.entropy_coef * entropy
    if inputs.mask is None:
        return per_token.mean()
    return (per_token * inputs.mask).sum() / inputs.mask.sum()


@dataclass(frozen=True)
class Result:
    """What a step gives, as far as it gives it."""

    logprob: Tensor | None = None
    entropy: Tensor | None = None
    loss: Tensor | None = None
    gradient: tuple[Tensor, ...] = ()


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
        found["loss"] = float((result.loss.detach().double() - exact.loss(work)).abs())
    if result.gradient:
        picks = [exact.rows] if len(result.gradient) == 1 else [exact.rows, exact.words]
        names = ["grad_logits"] if len(result.gradient) == 1 else ["grad_hidden", "grad_weight"]
        for name, actual, pick, value in zip(
            names, result.gradient, picks, exact.gradient(case.op, work), strict=True
        ):
            actual = actual.flatten(0, -2)
            all_finite = bool(torch.isfinite(actual.sum(dtype=torch.float32)))
            error = float((actual[pick].double() - value).norm() / value.norm())
            found[name] = error if all_finite else float("nan")
    return {name: float(f"{error:.2g}") for name, error in found.items()}


def complaint(dtype: torch.dtype, found: dict[str, float]) -> str:
    """What is wrong, or nothing."""
    wrong = [f"{name} is off by {error:.2g}" for name, error in found.items() if not error < LOOSE[dtype]]
    return ", ".join(wrong)


def least(case: Case, exact: Exact) -> tuple[float, float]:
    """The bytes that must move and the operations that must be done, whoever does them.

    From logits: they are read, for statistics again in a backward that could not know its upstream gradient,
    and a gradient is written; arithmetic is counted as 6 operations a logit forward and 5 backward. With a
    head: one product of the rows that count, two more of those with a gradient; factors and gradients are
    read and written once.
    """
    size = torch.finfo(case.dtype).bits // 8
    counted = float(exact.tokens().sum())
    g, h = exact.upstream(case.op.removesuffix(f" {FORWARD}"), "all")
    live = 0.0 if case.op.endswith(FORWARD) else float(((g != 0) | (h != 0)).sum())
    if case.D == 0:
        passes = 1 if live == 0 else 3 if case.op in STATS else 2
        return passes * case.N * case.V * size, (6.0 if live == 0 else 11.0) * case.N * case.V
    moved = (case.N + case.V) * case.D * size * (1 if live == 0 else 2)
    return moved, 2.0 * case.V * case.D * (counted + 2 * live)


Step = Callable[..., Result]
Fresh = Callable[[], tuple[Any, ...]]
