"""The fragment, what it finds, and what is refused before anything starts."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import verl.trainer.main_ppo
from omegaconf import DictConfig, OmegaConf, open_dict
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.utils.config import omega_conf_to_dataclass

from aer_fast import AdaptiveEntropy
from aer_fast.integrations.verl import main, settings
from aer_fast.integrations.verl.settings import KERNEL_MODULE, import_kernel_in_workers, read_settings
from aer_fast.integrations.verl.trainer import AERTrainerSync
from tests import ROOT
from tests.verl.driver import configuration


def test_the_command_of_the_documentation_passes_the_checks() -> None:
    text = (ROOT / "docs" / "verl.md").read_text()
    command = text.split("python -m aer_fast.integrations.verl.main \\\n")[1].split("```")[0]
    overrides = [x for x in command.split() if x != "\\"]
    assert len(overrides) > 8
    from hydra import compose, initialize_config_module

    with initialize_config_module("aer_fast.integrations.verl", version_base=None):
        main.check(
            compose("aer_ppo_trainer", [*overrides, "trainer.n_gpus_per_node=1", "trainer.device=cpu"])
        )


def test_the_fragment_is_verls_configuration_with_three_additions() -> None:
    config = configuration()
    assert get_trainer_cls(config.trainer.v1.trainer_mode) is AERTrainerSync
    assert config.actor_rollout_ref.actor.calculate_entropy is True
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.trainer.config", version_base=None):
        theirs = OmegaConf.to_container(compose("ppo_trainer"))
    with initialize_config_module("aer_fast.integrations.verl", version_base=None):
        ours = OmegaConf.to_container(compose("aer_ppo_trainer"))
    assert isinstance(ours, dict)
    assert isinstance(theirs, dict)
    del ours["aer"]
    theirs["trainer"]["v1"]["trainer_mode"] = "aer_sync"
    theirs["actor_rollout_ref"]["actor"]["calculate_entropy"] = True
    assert ours == theirs


def test_the_section_has_every_argument_of_the_controller_with_its_default() -> None:
    section = dict(configuration().aer)
    written = OmegaConf.to_container(configuration().aer, resolve=False)
    assert isinstance(written, dict)
    for name, parameter in inspect.signature(AdaptiveEntropy).parameters.items():
        assert section.pop(name) == parameter.default, name
        assert written[name] == f"${{aer_default:{name}}}"  # and not written again
    assert section == {"threshold": 1.0, "accuracy_key": None, "fused_kernel": False}


def test_settings_reach_the_controller() -> None:
    given = read_settings(
        configuration(
            "aer.law=sign",
            "aer.eta=0.5",
            "aer.target=1.5",
            "aer.difficulty=gate",
            "aer.rho=0.25",
            "aer.alpha_max=9",
            "aer.threshold=0",
            "aer.accuracy_key=acc",
        )
    )
    controller = given.aer.controller
    controller.update(1.0)
    assert (controller.alpha, controller.target) == (0.5, 1.5)
    assert controller.weight([0.25, 0.26]).tolist() == [1.0, 0.0]
    assert (given.aer.threshold, given.accuracy_key, given.fused_kernel) == (0.0, "acc", False)


FUSED = (
    "aer.fused_kernel=true",
    "actor_rollout_ref.model.use_fused_kernels=true",
    "actor_rollout_ref.model.fused_kernel_options.impl_backend=triton",
)
REFUSED = {
    r"actor_rollout_ref\.actor\.calculate_entropy": ("actor_rollout_ref.actor.calculate_entropy=false",),
    r"algorithm\.rollout_correction\.bypass_mode": ("algorithm.rollout_correction.bypass_mode=true",),
    r"distillation\.enabled": ("distillation.enabled=true",),
    r"aer\.eta must be >= 0": ("aer.eta=-1",),
    r"aer has unknown keys \['etta'\]": ("+aer.etta=1",),
    r"aer must be a section": ("~aer",),
    r"algorithm\.filter_groups\.enable": ("algorithm.filter_groups.enable=true",),
    r"aer\.threshold must be a finite number, got 'high'": ("aer.threshold=high",),
    r"aer\.threshold must be a finite number, got nan": ("aer.threshold=nan",),
    r"aer\.accuracy_key": ("aer.accuracy_key=3",),
    r"aer\.fused_kernel must be true or false": ("aer.fused_kernel=1",),
    r"model\.use_fused_kernels=True": ("aer.fused_kernel=true",),
    r"impl_backend": (*FUSED, "actor_rollout_ref.model.fused_kernel_options.impl_backend=liger"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_contradicts_is_refused_by_name(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_settings(configuration(*REFUSED[message]))
    with pytest.raises(ValueError, match=message):
        AERTrainerSync(configuration(*REFUSED[message]))


def test_the_kernel_is_refused_with_megatron() -> None:
    config = configuration(*FUSED)
    read_settings(config)
    config.actor_rollout_ref.actor.strategy = "megatron"
    with pytest.raises(ValueError, match="strategy=megatron"):
        read_settings(config)


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        (None, KERNEL_MODULE),
        ("json", ["json", KERNEL_MODULE]),
        (["json", "csv"], ["json", "csv", KERNEL_MODULE]),
        (KERNEL_MODULE, KERNEL_MODULE),
    ],
)
def test_the_workers_import_the_kernel_after_what_they_imported_before(
    present: Any, expected: Any, model_path: Path
) -> None:
    from verl.utils.experimental import torch_functional

    from aer_fast.integrations.verl.kernel import use_aer_kernel

    sys.modules.pop(KERNEL_MODULE, None)
    config = configuration(*FUSED, model=model_path)
    with open_dict(config):
        config.actor_rollout_ref.model.external_lib = present
    AERTrainerSync(config)
    import_kernel_in_workers(config)  # twice is once
    assert OmegaConf.to_container(config.actor_rollout_ref.model)["external_lib"] == expected
    original = torch_functional.FusedLinearForPPO
    omega_conf_to_dataclass(config.actor_rollout_ref.model)  # what a worker does first
    try:
        assert torch_functional.FusedLinearForPPO is not original
    finally:
        use_aer_kernel().undo()


def test_without_the_setting_no_worker_imports_the_kernel() -> None:
    config = configuration()
    AERTrainerSync(config)
    assert config.actor_rollout_ref.model.external_lib is None


def startable(*overrides: str) -> DictConfig:
    return configuration("trainer.n_gpus_per_node=1", *overrides)


def test_the_entry_checks_before_it_starts_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    main.check(startable())
    for overrides, message in (
        (("trainer.v1.trainer_mode=sync",), r"trainer\.v1\.trainer_mode .* got 'sync'"),
        (("trainer.use_v1=false",), r"trainer\.use_v1"),
        (("aer.rho=2",), r"aer\.rho"),
        (("actor_rollout_ref.actor.ppo_mini_batch_size=400",), "train_batch_size"),  # verl's own check
    ):
        with pytest.raises(ValueError, match=message):
            main.check(startable(*overrides))


def test_the_runner_is_verls_and_registers_the_trainers_in_its_process(queue: Any) -> None:
    import ray

    underlying = main.AERTaskRunner.__ray_actor_class__
    assert issubclass(underlying, verl.trainer.main_ppo.TaskRunnerV1.__ray_actor_class__)
    # an unknown mode is verl's complaint after the registration, and before it starts anything
    runner = main.AERTaskRunner.remote()
    running = runner.run.remote(configuration("trainer.v1.trainer_mode=nobody"))
    with pytest.raises(ray.exceptions.RayTaskError, match=r"(?s)Unknown trainer 'nobody'.*aer_sync"):
        ray.get(running)


def test_the_command_composes_what_it_would_run() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "aer_fast.integrations.verl.main", "--cfg", "job"]
    overrides = ["aer.eta=0.125", "trainer.total_epochs=3"]
    result = subprocess.run([*command, *overrides], cwd=ROOT, capture_output=True, text=True, check=True)
    printed = OmegaConf.create(result.stdout)
    assert (printed.aer.eta, printed.trainer.total_epochs) == (0.125, 3)
    assert printed.trainer.v1.trainer_mode == "aer_sync"


def test_megatrons_configuration_composes_too() -> None:
    from hydra import compose, initialize_config_module

    with initialize_config_module("aer_fast.integrations.verl", version_base=None):
        config = compose("aer_ppo_trainer", overrides=["model_engine=megatron"])
    assert config.actor_rollout_ref.actor.strategy == "megatron"
    assert config.actor_rollout_ref.actor.calculate_entropy is True


def test_the_library_is_light_without_it() -> None:
    code = (
        "import sys, aer_fast, aer_fast.integrations; print([m for m in ('verl', 'ray') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_every_mode_of_the_entry_is_a_trainer() -> None:
    assert {get_trainer_cls(mode).verl_mode for mode in main.MODES} == {
        "sync",
        "colocate_async",
        "separate_async",
    }
    assert settings.FUSED_BACKENDS == ("triton", "torch")
