"""The entropy bonuses that can be chosen: settings of `AdaptiveEntropy`, and other methods' laws of α."""

import math
from typing import Any

from aer_fast import AdaptiveEntropy
from training.config import Config

FIXED = 0.01  # α where it does not move and none is given


def multiplicative(alpha: float, entropy: float, target: float, eta: float) -> float:
    """log α ← log α + η (1 - H / H*), as SAC moves its temperature (1812.05905); α stays positive."""
    return alpha * math.exp(min(eta * (1.0 - entropy / target), 100.0))


def dead_band(alpha: float, entropy: float, target: float, eta: float) -> float:
    """AEnt's rule (2509.03493): α moves by η times how far, in nats, H is outside of 0.9 to 1.1 H*."""
    return alpha - eta * (min(0.0, entropy - 0.9 * target) + max(0.0, entropy - 1.1 * target))


class EntroPIC:
    """EntroPIC's rule (2511.15248) for the coefficient of our bonus: α = K_p e + K_i Σ e, e = H* - H in nats,
    with its K_p = 1 and K_i = 0.01; the sum grows after use. Its own actuator reweights tokens instead."""

    def __init__(self) -> None:
        self.sum = 0.0

    def __call__(self, alpha: float, entropy: float, target: float, eta: float) -> float:
        alpha = (target - entropy) + 0.01 * self.sum
        self.sum += target - entropy
        return alpha

    def state_dict(self) -> dict[str, float]:
        return {"sum": self.sum}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.sum = state["sum"]


# What each mode is. "anchored": the target is target_ratio times the initial entropy; else target_entropy.
MODES: dict[str, dict[str, Any]] = {
    "aer": {"anchored": True, "weighted": True},
    # one component of AER each
    "difficulty": {"anchored": True, "law": "fixed", "weighted": True},
    "anchor": {"anchored": True, "law": "fixed", "gate_above_target": True},
    "dynamic": {"anchored": False},
    # AER without one of them: the weights, the anchor
    "target": {"anchored": True},
    "absolute": {"anchored": False, "weighted": True},
    "fixed": {"anchored": True, "law": "fixed"},
    "none": {"anchored": True, "law": "fixed", "alpha_init": 0.0},
    # c ± η, off above the target (arXiv 2505.22312; TRL's use_adaptive_entropy), each with its defaults
    "skywork": {"law": "sign", "eta": 1e-4, "alpha_min": 0.0, "alpha_max": 5e-3, "gate_above_target": True},
    "trl": {"law": "sign", "eta": 5e-3, "alpha_min": 0.0, "alpha_max": 1.0, "gate_above_target": True},
    # other methods' laws with the anchor of AER
    "sac": {
        "anchored": True,
        "weighted": True,
        "law": multiplicative,
        "eta": 0.1,
        "alpha_init": 1e-3,
        "alpha_min": 1e-4,
    },
    "aent": {"anchored": True, "weighted": True, "law": dead_band, "eta": 1e-3, "alpha_min": 1e-5}
    | {"alpha_init": 1e-3, "alpha_max": 0.01},
    "entropic": {"anchored": True, "weighted": True, "law": EntroPIC, "alpha_min": -1.0, "alpha_max": 1.0},
}


def build_controller(config: Config) -> AdaptiveEntropy:
    """The controller of a run, not yet anchored."""
    mode = dict(MODES[config.entropy])
    anchored, weighted = mode.pop("anchored", False), mode.pop("weighted", False)
    settings: dict[str, Any] = {"difficulty": "uniform", "law": config.law, "gain": config.gain} | mode
    if weighted:
        settings |= {"difficulty": config.difficulty_weight, "rho": config.rho, "normalize": config.normalize}
    if anchored:
        settings["target_ratio"] = config.target_ratio
    else:
        settings["target"] = config.target_entropy
    if isinstance(settings["law"], type):
        settings["law"] = settings["law"]()  # it remembers
    if config.entropy != "none":
        if settings["law"] == "fixed":
            settings["alpha_init"] = FIXED
        for name in ("alpha_init", "alpha_min", "alpha_max", "eta"):
            if getattr(config, name) is not None:
                settings[name] = getattr(config, name)
    return AdaptiveEntropy(**settings)
