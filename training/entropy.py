"""The entropy bonuses that can be chosen: settings of `AdaptiveEntropy`."""

from typing import Any

from aer_fast import AdaptiveEntropy
from training.config import Config

FIXED = 0.01  # α where it does not move and none is given

# What each mode is. "anchored": the target is target_ratio times the initial entropy; else target_entropy.
MODES: dict[str, dict[str, Any]] = {
    "aer": {"anchored": True, "law": "proportional", "weighted": True},
    # one component of AER each
    "difficulty": {"anchored": True, "law": "fixed", "weighted": True},
    "anchor": {"anchored": True, "law": "fixed", "gate_above_target": True},
    "dynamic": {"anchored": False, "law": "proportional"},
    # AER without the weights
    "target": {"anchored": True, "law": "proportional"},
    "fixed": {"anchored": True, "law": "fixed"},
    "none": {"anchored": True, "law": "fixed", "alpha_init": 0.0},
    # c ± η, off above the target (arXiv 2505.22312; TRL's use_adaptive_entropy), each with its defaults
    "skywork": {"law": "sign", "eta": 1e-4, "alpha_max": 5e-3, "gate_above_target": True},
    "trl": {"law": "sign", "eta": 5e-3, "alpha_max": 1.0, "gate_above_target": True},
}


def build_controller(config: Config) -> AdaptiveEntropy:
    """The controller of a run, not yet anchored."""
    mode = dict(MODES[config.entropy])
    anchored, weighted = mode.pop("anchored", False), mode.pop("weighted", False)
    settings: dict[str, Any] = {"difficulty": "uniform"} | mode
    if weighted:
        settings |= {"difficulty": config.difficulty_weight, "rho": config.rho}
    if anchored:
        settings["target_ratio"] = config.target_ratio
    else:
        settings["target"] = config.target_entropy
    if config.entropy != "none":
        if settings["law"] == "fixed":
            settings["alpha_init"] = FIXED if config.alpha_init is None else config.alpha_init
        elif config.alpha_init is not None:
            settings["alpha_init"] = config.alpha_init
        if config.alpha_max is not None:
            settings["alpha_max"] = config.alpha_max
        if config.eta is not None:
            settings["eta"] = config.eta
    return AdaptiveEntropy(**settings)
