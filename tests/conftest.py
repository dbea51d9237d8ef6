"""Where the tests run: kernels on a GPU if there is one, under Triton's interpreter otherwise.

With --emulate sm_90 they are compiled for that GPU, and their instructions emulated (`bench.ptx`).
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import ExitStack
from pathlib import Path

import torch

# cuBLAS warns under deterministic algorithms without it, and here a warning is an error
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest

torch.set_num_threads(1)  # the tensors are small; two threads on two busy cores are slower than one


# What a file imports, at once or by way of bench and training, and a machine without a network may lack.
TRAINING = ("transformers", "filelock", "pebble", "typeguard")
BENCH = ("cpuinfo", "psutil", "pytest_benchmark")
NEEDS = {
    "test_agreement.py": TRAINING,
    "test_answers.py": ("math_verify",),
    "test_attention.py": TRAINING,
    "test_bench.py": (*BENCH, "tyro"),
    "test_bench_report.py": (*BENCH, "tyro", "matplotlib"),
    "test_bench_stages.py": (*TRAINING, "tyro"),
    "test_bench_teachers.py": BENCH,
    "test_bench_use.py": (*BENCH, "transformers"),
    "test_commands.py": (*TRAINING, "tyro", "peft"),
    "test_data.py": (*TRAINING, "datasets", "pyarrow"),
    "test_distill_loss.py": ("mpmath",),
    "test_evidence.py": (*TRAINING, "tyro", "scipy"),
    "test_integrations_forwards.py": ("transformers", "peft", "accelerate"),
    "test_integrations_teacher.py": ("transformers", "trl", "datasets", "peft"),
    "test_integrations_transformers.py": ("transformers", "peft"),
    "test_integrations_trl.py": ("trl", "datasets", "peft"),
    "test_l2.py": BENCH,
    "test_messages.py": (*TRAINING, "tyro"),
    "test_ppo_step.py": TRAINING,
    "test_recipes.py": ("transformers", "accelerate", "lightning", "peft", "safetensors"),
    "test_recipes_processes.py": ("transformers",),
    "test_runs.py": (*TRAINING, "tyro", "reasoning_gym", "math_verify"),
    "test_shared_prompts.py": TRAINING,
    "test_tasks.py": (*TRAINING, "datasets", "reasoning_gym", "math_verify"),
    "test_teacher.py": (*TRAINING, "peft", "safetensors"),
    "test_trainer.py": (*TRAINING, "peft"),
    "test_training_parts.py": (*TRAINING, "tyro"),
    "trainers.py": TRAINING,
}
# Of these, what the extra "test" of pyproject.toml has: all that the tests of the core need.
TEST = ("mpmath",)
MISSING = {
    name: [package for package in packages if importlib.util.find_spec(package) is None]
    for name, packages in NEEDS.items()
}
collect_ignore = [name for name, packages in MISSING.items() if packages]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--emulate", metavar="TARGET", help="kernels compiled for sm_80, sm_90 or sm_100, emulated on the CPU"
    )
    parser.addoption(
        "--noise",
        type=float,
        default=0.0,
        help="errors of the emulated approximate instructions, 1: as documented",
    )
    parser.addoption(
        "--core", action="store_true", help='only the files that need no more than the extra "test"'
    )


def pytest_configure(config: pytest.Config) -> None:
    target = config.getoption("emulate")
    if target is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU that is there has no part in it
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1" if target is None else "0"  # before anything imports triton
        if target is None and importlib.util.find_spec("triton") is not None:
            from tests.interpreter import replace_once_a_launch

            replace_once_a_launch()
    if target is not None:
        config.add_cleanup(emulate(target, config.getoption("noise")).close)
    whole = config.args_source is not config.ArgsSource.ARGS
    left_out = [name for name in collect_ignore if not (config.getoption("core") and beyond_the_core(name))]
    if whole and left_out and os.environ.get("CI"):
        raise pytest.UsageError(f"CI runs every test: {pytest_report_header()}")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    emulated = collection_path.name == "test_emulated.py" and not config.getoption("emulate")
    core = config.getoption("core") and beyond_the_core(collection_path.name)
    return True if emulated or core else None


def beyond_the_core(name: str) -> bool:
    return not set(NEEDS.get(name, ())) <= set(TEST)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs come first: what is short can be shared evenly at the end."""
    items.sort(key=lambda item: item.path.name != "test_runs.py")


def emulate(target: str, noise: float) -> ExitStack:
    """Emulate a GPU until what is returned is closed."""
    from aer_fast.kernels import primitives
    from bench.ptx import arithmetic, launch

    if target not in launch.TARGETS:
        raise pytest.UsageError(f"--emulate takes {', '.join(launch.TARGETS)}, got {target}")
    if problem := launch.unsupported():
        raise pytest.UsageError(problem)
    stack = ExitStack()
    stack.enter_context(launch.emulated(target))
    patch = stack.enter_context(pytest.MonkeyPatch.context())
    patch.setattr(primitives, "INTERPRETED", True)  # kernels take tensors of a CPU
    patch.setattr(arithmetic, "NOISE", noise)
    return stack


def pytest_report_header() -> list[str]:
    return [f"not collected: {name} needs {', '.join(MISSING[name])}" for name in collect_ignore]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> None:
    """torch.empty comes back full of NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
