"""Where the tests run: kernels on a GPU if there is one, under Triton's interpreter otherwise."""

from __future__ import annotations

import importlib.util
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
# cuBLAS warns under deterministic algorithms without it, and here a warning is an error
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest

torch.set_num_threads(1)  # the tensors are small; two threads on two busy cores are slower than one


# What a file imports, at once or by way of bench and training, and a machine without a network may lack.
TRAINING = ("transformers", "filelock", "pebble")
NEEDS = {
    "test_bench.py": ("tyro",),
    "test_bench_report.py": ("tyro",),
    "test_integrations_transformers.py": ("transformers", "peft"),
    "test_integrations_trl.py": ("trl", "datasets", "peft"),
    "test_ppo_step.py": TRAINING,
    "test_runs.py": (*TRAINING, "tyro", "reasoning_gym", "math_verify"),
    "test_tasks.py": (*TRAINING, "datasets", "reasoning_gym", "math_verify"),
    "test_trainer.py": TRAINING,
    "test_training_parts.py": (*TRAINING, "tyro"),
    "trainers.py": TRAINING,
}
MISSING = {
    name: [package for package in packages if importlib.util.find_spec(package) is None]
    for name, packages in NEEDS.items()
}
collect_ignore = [name for name, packages in MISSING.items() if packages]


def pytest_configure(config: pytest.Config) -> None:
    whole = config.args_source is not config.ArgsSource.ARGS
    if whole and collect_ignore and os.environ.get("CI"):
        raise pytest.UsageError(f"CI runs every test: {pytest_report_header()}")


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
