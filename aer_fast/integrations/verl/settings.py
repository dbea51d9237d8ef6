"""The section `aer` of verl's configuration, and what of the rest contradicts it."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from verl.trainer.distillation import is_distillation_enabled

from aer_fast import AdaptiveEntropy
from aer_fast.integrations.aer import DEFAULTS, THRESHOLD, Bookkeeping

KERNEL_MODULE = "aer_fast.integrations.verl.kernel_on"
FUSED_BACKENDS = ("triton", "torch")

_KNOWN = (*DEFAULTS, "threshold", "accuracy_key", "fused_kernel")

# ${aer_default:rho} in the configuration is the default of that argument.
OmegaConf.register_new_resolver(
    "aer_default", ({"threshold": THRESHOLD} | DEFAULTS).__getitem__, replace=True
)


@dataclass(frozen=True)
class Settings:
    """What the trainer needs to know of the configuration.

    Attributes:
        aer: the controller, and what it needs to know of a step.
        accuracy_key: key of the reward function's extra information to compare with the threshold. None: the
            score.
        fused_kernel: whether workers shall call `use_aer_kernel`.
    """

    aer: Bookkeeping
    accuracy_key: str | None
    fused_kernel: bool


def read_settings(config: DictConfig) -> Settings:
    """Read the section ``aer`` of the configuration, and check the rest against it.

    Args:
        config: verl's.

    Returns:
        A `Settings`.

    Raises:
        ValueError: naming the key, for a setting that is unknown or out of range, and for a configuration in
            which there is no entropy, or nobody who applies the coefficients.
    """
    section = config.get("aer")
    if section is None:
        raise ValueError("aer must be a section of the configuration, as in aer_ppo_trainer.yaml")
    given = OmegaConf.to_container(section, resolve=True)
    assert isinstance(given, dict)
    if unknown := sorted(str(key) for key in given if key not in _KNOWN):
        raise ValueError(f"aer has unknown keys {unknown}, expected {', '.join(_KNOWN)}")
    try:
        controller = AdaptiveEntropy(**{key: given[key] for key in DEFAULTS if key in given})
        aer = Bookkeeping(controller, given.get("threshold", THRESHOLD))
    except ValueError as error:
        raise ValueError(f"aer.{error}") from error
    accuracy_key = given.get("accuracy_key")
    if accuracy_key is not None and (not isinstance(accuracy_key, str) or not accuracy_key):
        raise ValueError(f"aer.accuracy_key must be a string or null, got {accuracy_key!r}")
    fused_kernel = given.get("fused_kernel", False)
    if not isinstance(fused_kernel, bool):
        raise ValueError(f"aer.fused_kernel must be true or false, got {fused_kernel!r}")

    _check_entropy(config)
    if fused_kernel:
        _check_kernel(config)
    return Settings(aer, accuracy_key, fused_kernel)


def import_kernel_in_workers(config: DictConfig) -> None:
    """Add `kernel_on` to the modules that verl's workers import, after those that are there.

    Args:
        config: verl's, which is changed.
    """
    model = config.actor_rollout_ref.model
    present = model.get("external_lib")
    modules = list(present) if isinstance(present, (list, ListConfig)) else [present] if present else []
    if KERNEL_MODULE not in modules:
        with open_dict(model):
            model.external_lib = [*modules, KERNEL_MODULE] if modules else KERNEL_MODULE


def _check_entropy(config: DictConfig) -> None:
    if not config.actor_rollout_ref.actor.get("calculate_entropy", False):
        raise ValueError(
            "actor_rollout_ref.actor.calculate_entropy must be true: the bonus needs the entropy and its"
            " gradient"
        )
    correction = config.algorithm.get("rollout_correction")
    if correction is not None and correction.get("bypass_mode", False):
        raise ValueError(
            "algorithm.rollout_correction.bypass_mode must be false: with it verl takes the old"
            " log-probabilities from the rollout, and nobody computes the entropy that the controller follows"
        )
    filtering = config.algorithm.get("filter_groups")
    if filtering is not None and filtering.get("enable", False):
        raise ValueError(
            "algorithm.filter_groups.enable must be false: with it prompts that are all right or all wrong"
            " never arrive, and the entropy of the rest is not that of the policy"
        )
    if is_distillation_enabled(config.get("distillation")):
        raise ValueError(
            "distillation.enabled must be false: distillation has a loss of its own, which knows no"
            " entropy_coef"
        )


def _check_kernel(config: DictConfig) -> None:
    model = config.actor_rollout_ref.model
    if not model.get("use_fused_kernels", False):
        raise ValueError(
            "aer.fused_kernel needs actor_rollout_ref.model.use_fused_kernels=True, the switch it stands"
            " behind"
        )
    backend = (model.get("fused_kernel_options") or {}).get("impl_backend")
    if backend not in FUSED_BACKENDS:
        raise ValueError(
            "aer.fused_kernel needs actor_rollout_ref.model.fused_kernel_options.impl_backend to be"
            f" one of {', '.join(FUSED_BACKENDS)}, got {backend!r}"
        )
    if config.actor_rollout_ref.actor.strategy == "megatron":
        raise ValueError(
            "aer.fused_kernel must be false with actor_rollout_ref.actor.strategy=megatron, whose head holds"
            " a part of the vocabulary"
        )
