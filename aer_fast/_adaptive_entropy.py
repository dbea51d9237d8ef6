"""The entropy coefficient of AER: per prompt, anchored to the initial entropy, adjusted every step."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from aer_fast._exchange import exchange_device
from aer_fast._validation import check_number, is_number

Difficulty = Callable[[Tensor, float], Tensor]
Law = Callable[[float, float, float, float], float]

# The shapes of w and the laws of α. A new one is an entry here and a line in the docstring below.
DIFFICULTIES: dict[str, Difficulty] = {
    "linear": lambda accuracy, rho: _linear(accuracy, rho),
    "gate": lambda accuracy, rho: (accuracy <= rho).to(accuracy.dtype),
    "complement": lambda accuracy, rho: 1.0 - accuracy,
    "uniform": lambda accuracy, rho: torch.ones_like(accuracy),
}
LAWS: dict[str, Law] = {  # besides "pi", which remembers
    "proportional": lambda alpha, entropy, target, eta: alpha + eta * (1.0 - entropy / target),
    "sign": lambda alpha, entropy, target, eta: alpha + eta * ((entropy < target) - (entropy > target)),
    "fixed": lambda alpha, entropy, target, eta: alpha,
}
ETA = {"pi": 0.008}  # η of a law; of the others 0.02
# The weights' mean counts as this at least: the last few hard prompts get at most ten times α.
LEAST_MEAN = 0.1


@dataclass
class _ProportionalIntegral:
    """The law ``pi``."""

    gain: float
    start: float
    alpha_range: tuple[float, float]
    integral: float | None = None  # not before the target was met

    def __call__(self, alpha: float, entropy: float, target: float, eta: float) -> float:
        error = 1.0 - min(entropy / target, sys.float_info.max)
        if self.integral is None:
            if entropy > target:
                return max(self.gain * error + self.start, min(self.start, 0.0))
            self.integral = self.start
        low, high = self.alpha_range
        self.integral = min(max(self.integral + eta * error, low - self.gain / 2), high)
        return self.gain * error + self.integral

    def state_dict(self) -> dict[str, float]:
        return {} if self.integral is None else {"integral": self.integral}

    def load_state_dict(self, state: dict[str, float]) -> None:
        if state.keys() - {"integral"}:
            raise ValueError(f"state['law'] must be that of the law 'pi', got {state!r}")
        self.integral = state.get("integral")


class AdaptiveEntropy:
    """Entropy coefficients after AER, Adaptive Entropy Regularization (arXiv 2510.10959).

    A prompt q gets the coefficient c(q) = α · w(q) / w̄. It holds for every token of the prompt's rollouts:
    pass it as ``entropy_coef`` to `ppo_loss`. Three components make it; each can be switched off, "(off)"
    below.

    **1. Difficulty-aware allocation.** acc(q) is the share of the rollouts of prompt q that are right. Harder
    prompts get a larger weight:

        linear       w = max(0, (ρ - acc) / ρ)
        gate         w = 1 if acc <= ρ else 0
        complement   w = 1 - acc
        uniform      w = 1  (off)

    w̄ is the mean weight of the prompts of the last step that `update` was told of, at least 0.1. Dividing by
    it keeps the controller as strong when prompts get easier. w̄ is 1 until `update` was told, and with
    ``normalize=False``.

    **2. Initial-anchored target.** H* = target_ratio · H₀, where H₀ is the entropy given to `anchor` or to
    the first `update`, frozen from then on. With ``target``, H* is that absolute entropy instead (off).

    **3. Dynamic global coefficient.** α moves once per training step, by the token-mean entropy H of the
    step, with e = 1 - H / H*:

        pi             α ← clip(K e + I, α_min, α_max)  with  I ← I + η e
        proportional   α ← clip(α + η e, α_min, α_max)
        sign           α ← clip(α ± η, α_min, α_max)
        fixed          α stays  (off)

    ``sign`` moves α up below the target, down above it, and not at it. ``pi`` is a proportional-integral
    controller. I starts at alpha_init. Until the entropy has met the target for the first time, I rests and α
    is not below min(alpha_init, 0). From then on I stays within [α_min-K/2, α_max], so that it soon finds its
    way back from where α cannot follow (anti-windup). ``proportional`` is its integral part alone, and
    swings.

    The default was chosen by comparing such laws on two seeds of a small task (docs/evidence.md). Of the
    means of ten steps after the target was met, 92% were within 15% of it and all within 30%, the largest at
    1.19 of it. ``proportional`` with α >= 0 and without ``normalize``: 69%, 90%, 1.57. ``pi`` with K = 0.1:
    83% within 15% with α >= 0, and 90% with α >= -0.05.

    **What is the paper's.** The three components and target_ratio = 0.4. Its exact coefficient law, step size
    and ρ are not public to us; the laws above, their names and the other defaults are ours. Two neighbours
    are special cases: an absolute target with ``uniform``, ``sign`` and ``gate_above_target`` is the
    controller of Skywork-OR1 (2505.22312) and of TRL, and ``uniform`` with ``fixed`` is the plain entropy
    bonus.

    **What to feed it.** The plain mean entropy over all response tokens of the step, of all ranks, before
    anything is filtered; not a mean weighted by c(q). A small first batch makes a noisy H₀: anchor on enough
    tokens.

    Args:
        target_ratio: H* / H₀, positive.
        target: H* in nats, positive. None anchors it to H₀.
        difficulty: the shape of w: "linear", "gate", "complement" or "uniform". Or a function of yours,
            ``difficulty(accuracy, rho)``, which returns the weights as a tensor like accuracy.
        rho: ρ in (0, 1], the accuracy up to which ``linear`` and ``gate`` give weight.
        normalize: divide the weights by their mean w̄.
        law: how α moves: "pi", "proportional", "sign" or "fixed". Or a function of yours,
            ``law(alpha, entropy, target, eta)``, which returns α before it is clipped. A law with a memory is
            an object that belongs to one controller, and has ``state_dict()``, which returns numbers by name,
            and ``load_state_dict(state)``; `state_dict` keeps them under "law".
        eta: η >= 0, the step of α. None: 0.008 for ``pi``, 0.02 otherwise.
        gain: K >= 0, the proportional part of ``pi``.
        alpha_init: α before the first update, within [alpha_min, alpha_max].
        alpha_min: the least α. Below 0 the bonus lowers an entropy that is above its target. With 0 the noise
            of H, cut off on one side, would hold the entropy above it.
        alpha_max: the largest α.
        gate_above_target: `coefficient` is 0 while the entropy of the last update was above the target.

    Raises:
        ValueError: if an argument is not as above.

    Examples:
        >>> aer = AdaptiveEntropy(eta=0.05)
        >>> aer.update(2.0), aer.target, aer.alpha  # far above the target: no bonus
        (None, 0.8, 0.0)
        >>> accuracy = torch.tensor([0.0, 0.25, 1.0])
        >>> aer.update(0.4, weight=aer.weight(accuracy).mean(), prompts=3)  # half the target
        >>> round(aer.alpha, 6)  # K e + η e
        0.1
        >>> aer.coefficient(accuracy)  # their mean is α
        tensor([0.2000, 0.1000, 0.0000])
    """

    difficulties: ClassVar[tuple[str, ...]] = tuple(DIFFICULTIES)
    """The names that ``difficulty`` takes."""
    laws: ClassVar[tuple[str, ...]] = ("pi", *LAWS)
    """The names that ``law`` takes."""

    def __init__(
        self,
        *,
        target_ratio: float = 0.4,
        target: float | None = None,
        difficulty: str | Difficulty = "linear",
        rho: float = 0.5,
        normalize: bool = True,
        law: str | Law = "pi",
        eta: float | None = None,
        gain: float = 0.15,
        alpha_init: float = 0.0,
        alpha_min: float = -0.05,
        alpha_max: float = 0.2,
        gate_above_target: bool = False,
    ) -> None:
        if eta is None:
            eta = ETA.get(law, 0.02) if isinstance(law, str) else 0.02
        numbers = {
            "target_ratio": target_ratio,
            "rho": rho,
            "eta": eta,
            "gain": gain,
            "alpha_init": alpha_init,
            "alpha_min": alpha_min,
            "alpha_max": alpha_max,
        }
        for name, value in numbers.items():
            check_number(name, value)
        if target is not None:
            check_number("target", target)
            if target <= 0:
                raise ValueError(f"target must be a positive entropy in nats or None, got {target}")
        if target_ratio <= 0:
            raise ValueError(f"target_ratio must be positive, got {target_ratio}")
        _check_choice("difficulty", difficulty, DIFFICULTIES, "(accuracy, rho) -> weights")
        if not 0 < rho <= 1:
            raise ValueError(f"rho must be in (0, 1], got {rho}")
        _check_choice("law", law, ("pi", *LAWS), "(alpha, entropy, target, eta) -> alpha")
        _memory(law)  # raises ValueError for a law that is none
        for name, flag in (("normalize", normalize), ("gate_above_target", gate_above_target)):
            if not isinstance(flag, bool):
                raise ValueError(f"{name} must be True or False, got {flag!r}")
        for name, value in (("eta", eta), ("gain", gain)):
            if value < 0:
                raise ValueError(f"{name} must be >= 0, got {value}")
        if not alpha_min <= alpha_init <= alpha_max:
            raise ValueError(
                f"alpha_init must be within [alpha_min, alpha_max] = [{alpha_min}, {alpha_max}],"
                f" got {alpha_init}"
            )
        self._target_ratio = float(target_ratio)
        self._difficulty = difficulty
        self._rho = float(rho)
        self._normalize = normalize
        self._name = law
        self._eta = float(eta)
        self._alpha_range = (float(alpha_min), float(alpha_max))
        self._gate_above_target = gate_above_target
        self._law = law
        if law == "pi":
            self._law = _ProportionalIntegral(float(gain), float(alpha_init), self._alpha_range)

        self._alpha = float(alpha_init)
        self._absolute_target = None if target is None else float(target)
        self._target = self._absolute_target
        self._initial_entropy: float | None = None
        self._last_entropy: float | None = None
        self._mean_weight: float | None = None

    @property
    def alpha(self) -> float:
        """α, the global coefficient."""
        return self._alpha

    @property
    def target(self) -> float | None:
        """H* in nats; None until it is anchored."""
        return self._target

    @property
    def initial_entropy(self) -> float | None:
        """H₀ in nats; None until it is anchored, and where the target is absolute."""
        return self._initial_entropy

    @property
    def alpha_range(self) -> tuple[float, float]:
        """(alpha_min, alpha_max), between which α moves; (α, α) where the law is ``fixed``."""
        return (self._alpha, self._alpha) if self._name == "fixed" else self._alpha_range

    def weight(self, accuracy: Tensor | float) -> Tensor:
        """w(q), the weight of each prompt, before it is divided by the mean.

        Args:
            accuracy: the prompts' accuracies in [0, 1], any shape.

        Returns:
            Weights of the shape of accuracy: float32, or the dtype of a floating-point ``accuracy``.

        Raises:
            ValueError: if an accuracy is outside [0, 1] or a weight is not finite. Neither is read on a GPU.
        """
        if not isinstance(accuracy, Tensor):
            try:
                accuracy = torch.as_tensor(accuracy)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"accuracy must be numbers in [0, 1], got {accuracy!r}") from error
        if not accuracy.is_floating_point():
            accuracy = accuracy.float()
        bad = None if accuracy.is_cuda else accuracy[~((accuracy >= 0) & (accuracy <= 1))]
        if bad is not None and bad.numel() > 0:
            raise ValueError(f"accuracy must be in [0, 1], got {bad[0].item()}")
        weight = _function(self._difficulty, DIFFICULTIES)(accuracy, self._rho)
        if not isinstance(weight, Tensor) or weight.shape != accuracy.shape:
            raise ValueError(
                f"difficulty must return a tensor of shape {tuple(accuracy.shape)}, got {weight!r}"
            )
        if not accuracy.is_cuda and not weight.isfinite().all():
            raise ValueError(f"difficulty must return finite weights, got {weight!r}")
        return weight.to(accuracy.dtype)

    def coefficient(self, accuracy: Tensor | float) -> Tensor:
        """c(q) = α · w(q) / w̄, the coefficient of each prompt; 0 while gated.

        Args:
            accuracy: the prompts' accuracies in [0, 1], any shape.

        Returns:
            Coefficients of the shape and dtype that `weight` returns.

        Raises:
            ValueError: as `weight`.
        """
        alpha = 0.0 if self._gated() else self._alpha
        if self._normalize and self._mean_weight is not None:
            alpha /= max(self._mean_weight, LEAST_MEAN)
        return alpha * self.weight(accuracy)

    def anchor(self, entropy: Tensor | float) -> None:
        """Set H₀ and H* from an initial entropy measured before the first `update`. α does not move.

        Args:
            entropy: token-mean entropy of the initial policy, in nats.

        Raises:
            ValueError: if the entropy is not a finite positive number, or H* is known already, anchored or
                absolute. Nothing is changed then.
        """
        initial = _number("entropy", entropy)
        if not (math.isfinite(initial) and initial > 0):
            raise ValueError(f"entropy must be a finite positive number to anchor H0, got {initial}")
        if self._target is not None:
            known = "anchored already" if self._absolute_target is None else "absolute"
            raise ValueError(f"target must not be known to be anchored, and it is {known}: {self._target}")
        self._initial_entropy, self._target = initial, self._target_ratio * initial

    def update(
        self,
        entropy: Tensor | float,
        count: Tensor | float = 1.0,
        group: dist.ProcessGroup | None = None,
        *,
        weight: Tensor | float | None = None,
        prompts: Tensor | float = 1.0,
    ) -> None:
        """Move α by the entropy of this step. The first call also anchors H₀, unless the target is known.

        Args:
            entropy: token-mean entropy in nats; with ``group``, of this rank.
            count: number of tokens behind it, >= 0. With 0 the entropy does not count, whatever it is. If no
                rank has a token the call changes nothing.
            group: process group to average over, weighted by count. All its ranks must call. None: this
                process alone.
            weight: mean of `weight` over the prompts of the step, for ``normalize``; with ``group``, of this
                rank. None: the last one stays.
            prompts: number of prompts behind it, >= 0, used like count.

        Raises:
            ValueError: if the entropy or the weight is not finite, a count is not a finite number >= 0, H₀ is
                not positive, or a law of yours returns no finite number. If so on one rank, all ranks raise.
                Nothing is changed then, but for the memory of such a law.
        """
        fault, means = "", [(0.0, 0.0)] * 2
        try:
            means[0] = _mean("entropy", entropy, "count", count)
            if weight is not None:
                means[1] = _mean("weight", weight, "prompts", prompts)
        except ValueError as error:
            fault = str(error)  # raised below, once the other ranks know
        if group is not None:
            sums = [x for mean, number in means for x in (mean * number, number)]
            *sums, faults = _all_reduce([*([0.0] * 4 if fault else sums), float(bool(fault))], group)
            if faults or not all(map(math.isfinite, sums)):
                fault = fault or "entropy, weight or a count was not finite on another rank of the group"
            means = [
                (total / number if number else 0.0, number) for total, number in zip(sums[::2], sums[1::2])
            ]
        if fault:
            raise ValueError(fault)
        (mean_entropy, tokens), (mean_weight, asked) = means
        if tokens > 0:
            self._step(mean_entropy)
        if asked > 0:
            self._mean_weight = mean_weight

    def state_dict(self) -> dict[str, Any]:
        """The state as plain numbers, for the checkpoint.

        Returns:
            A dict with "alpha", and with "target", "initial_entropy", "last_entropy" and "mean_weight" as far
            as they are known. A law that remembers adds "law", a dict of its own numbers.
        """
        state = {
            "alpha": self._alpha,
            "target": self._target,
            "initial_entropy": self._initial_entropy,
            "last_entropy": self._last_entropy,
            "mean_weight": self._mean_weight,
            "law": _memory(self._law) if self._name != "pi" else _memory(self._law) or None,
        }
        return {name: value for name, value in state.items() if value is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned. The settings stay those of the constructor.

        A law that remembers keeps its memory if the state has none for it: another law wrote the state.

        Args:
            state: from `state_dict`.

        Raises:
            ValueError: if a key is unknown, alpha is missing, a value is not finite, or the state contradicts
                the settings: alpha outside its range, another absolute target, or the state of a law where
                this one has none or refuses it. Nothing is changed then.
        """
        if not isinstance(state, dict):
            raise ValueError(f"state must be a dict, got {type(state).__name__}")
        known = {"alpha", "target", "initial_entropy", "last_entropy", "mean_weight"}
        if _memory(self._law) is not None:
            known.add("law")
        if unknown := set(state) - known:
            raise ValueError(f"state has unknown keys {sorted(unknown)}, expected {sorted(known)}")
        if "alpha" not in state:
            raise ValueError(f"state must have the key 'alpha', got {sorted(state)}")
        for name, value in state.items():
            if name != "law":
                check_number(f"state[{name!r}]", value)
        low, high = self._alpha_range
        if not low <= state["alpha"] <= high:
            raise ValueError(f"state['alpha'] must be within [{low}, {high}], got {state['alpha']}")
        target = _optional(state, "target")
        if target is not None and target <= 0:
            raise ValueError(f"state['target'] must be positive, got {target}")
        if self._absolute_target is not None and target not in (None, self._absolute_target):
            raise ValueError(f"state['target'] is {target}, but target={self._absolute_target} was asked for")
        if "law" in state or self._name == "pi":
            _load_memory(self._law, state.get("law", {}))  # the last that can fail
        self._alpha = float(state["alpha"])
        self._target = self._absolute_target if target is None else target
        self._initial_entropy = _optional(state, "initial_entropy")
        self._last_entropy = _optional(state, "last_entropy")
        self._mean_weight = _optional(state, "mean_weight")

    def __repr__(self) -> str:
        return (
            f"AdaptiveEntropy(alpha={self._alpha:.6g}, target={self._target},"
            f" difficulty={self._difficulty!r}, law={self._name!r})"
        )

    def _step(self, entropy: float) -> None:
        if self._target is None and entropy <= 0:
            raise ValueError(f"entropy of the first update must be positive to anchor H0, got {entropy}")
        target = self._target_ratio * entropy if self._target is None else self._target
        alpha = _function(self._law, LAWS)(self._alpha, entropy, target, self._eta)
        if not isinstance(self._name, str) and not is_number(alpha):
            at = f"alpha={self._alpha}, entropy={entropy}, target={target}, eta={self._eta}"
            raise ValueError(f"law must return a finite number, got {alpha!r} for {at}")
        if self._target is None:
            self.anchor(entropy)
        low, high = self._alpha_range
        self._alpha = min(max(float(alpha), low), high)
        self._last_entropy = entropy

    def _gated(self) -> bool:
        if not self._gate_above_target or self._last_entropy is None or self._target is None:
            return False
        return self._last_entropy > self._target


def _linear(accuracy: Tensor, rho: float) -> Tensor:
    rho = max(rho, torch.finfo(accuracy.dtype).tiny)  # or it would be 0 in that dtype, and 0 / 0 the weight
    return ((rho - accuracy) / rho).clamp(min=0.0)


def _check_choice(name: str, given: object, table: Collection[str], signature: str) -> None:
    own = "" if isinstance(given, str) else f", or a function {signature}"
    if given not in table if not own else isinstance(given, type) or not callable(given):
        raise ValueError(f"{name} must be one of {', '.join(table)}{own}, got {given!r}")


def _memory(law: Any) -> dict[str, float] | None:
    """The state of a law that has one."""
    methods = {name for name in ("state_dict", "load_state_dict") if hasattr(law, name)}
    if len(methods) == 1:
        raise ValueError(f"law must have both state_dict and load_state_dict or neither, got {law!r}")
    return _checked_memory("law.state_dict()", law.state_dict()) if methods else None


def _load_memory(law: Any, state: object) -> None:
    try:
        law.load_state_dict(_checked_memory("state['law']", state))
    except (KeyError, TypeError) as error:
        raise ValueError(f"state['law'] must be that of the law {law!r}, got {state!r}") from error


def _checked_memory(name: str, state: object) -> dict[str, float]:
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise ValueError(f"{name} must be a dict of numbers by name, got {state!r}")
    for key, value in state.items():
        check_number(f"{name}[{key!r}]", value)
    return dict(state)


def _number(name: str, value: Tensor | float) -> float:
    """A Python float; a 0-d tensor is read, which waits for its device once a step."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be one number, got shape {tuple(value.shape)}")
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a finite number, and is beyond float64") from None


def _function(given: Any, table: Mapping[str, Any]) -> Any:
    return table[given] if isinstance(given, str) else given


def _mean(name: str, mean: Tensor | float, of: str, count: Tensor | float) -> tuple[float, float]:
    """A mean and its count; (0, 0) where there is nothing behind it, whatever it is."""
    value, number = _number(name, mean), _number(of, count)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{of} must be a finite number >= 0, got {number}")
    if number == 0:
        return 0.0, 0.0
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return value, number


def _all_reduce(values: list[float], group: dist.ProcessGroup) -> list[float]:
    """Sum over the ranks, in float64 on the device the group's backend works on."""
    tensor = torch.tensor(values, dtype=torch.float64, device=exchange_device(group))
    dist.all_reduce(tensor, group=group)
    return [float(x) for x in tensor.tolist()]


def _optional(state: dict[str, float], name: str) -> float | None:
    return float(state[name]) if name in state else None
