"""Where the tests run: kernels on a GPU if there is one, under Triton's interpreter otherwise.

With --emulate sm_90 they are compiled for that GPU, and their instructions emulated (`bench.ptx`).
"""

from __future__ import annotations

import ast
import os
from contextlib import ExitStack
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

# cuBLAS warns under deterministic algorithms without it, and here a warning is an error
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest

torch.set_num_threads(1)  # the tensors are small; two threads on two busy cores are slower than one


# A mark `needs` may also name one of these folders, for what its modules import.
OURS = {
    "training": ("transformers", "filelock", "pebble", "typeguard", "tyro"),
    "bench": ("cpuinfo", "psutil", "pytest_benchmark"),
}
# Of what the files need, what the extra "test" of pyproject.toml has: all that the tests of the core need.
TEST = ("mpmath",)
HERE = Path(__file__).parent
collect_ignore = ["helpers"]  # no tests


@cache
def marks(path: Path) -> dict[str, tuple[str, ...]]:
    """The marks that a file gives all its tests, and what `needs` names, read before the file is imported."""
    found: dict[str, tuple[str, ...]] = {}
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            for mark in node.value.elts if isinstance(node.value, ast.List) else [node.value]:
                name, _, _ = ast.unparse(mark).removeprefix("pytest.mark.").partition("(")
                given = mark.args if name == "needs" and isinstance(mark, ast.Call) else []
                found[name] = tuple(ast.literal_eval(argument) for argument in given)
    return found


def needs(path: Path) -> list[str]:
    """The packages that a file needs beyond those of the library."""
    return [package for name in marks(path).get("needs", ()) for package in OURS.get(name, (name,))]


def beyond_the_core(path: Path) -> bool:
    return not set(needs(path)) <= set(TEST)


def left_out(config: pytest.Config) -> list[str]:
    """A line for each file without its packages, of those that are asked for."""
    lines = []
    for path in sorted(HERE.glob("*/test_*.py")):
        missing = [package for package in needs(path) if find_spec(package) is None]
        if missing and not (config.getoption("core") and beyond_the_core(path)):
            lines.append(f"not collected: {path.relative_to(HERE)} needs {', '.join(missing)}")
    return lines


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
        if target is None and find_spec("triton") is not None:
            from tests.helpers.interpreter import replace_once_a_launch

            replace_once_a_launch()
    if target is not None:
        config.add_cleanup(emulate(target, config.getoption("noise")).close)
    whole = config.args_source is not config.ArgsSource.ARGS
    if whole and os.environ.get("CI") and (lines := left_out(config)):
        raise pytest.UsageError("\n".join(["CI runs every test", *lines]))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if not collection_path.match("test_*.py"):
        return None
    missing = any(find_spec(package) is None for package in needs(collection_path))
    emulated = "emulated" in marks(collection_path) and not config.getoption("emulate")
    core = config.getoption("core") and beyond_the_core(collection_path)
    return True if missing or emulated or core else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long comes first: what is short can be shared evenly at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


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


def pytest_report_header(config: pytest.Config) -> list[str]:
    return left_out(config)


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
