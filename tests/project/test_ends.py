"""The oldest and the newest versions that are tested are those of pyproject.toml and docs/limits.md."""

import os
import re
import subprocess
import sys

import pytest

from tests import ROOT, conftest

pytestmark = pytest.mark.host
TESTS = ROOT / "tests"
FILES = [path for path in sorted(TESTS.glob("*/test_*.py")) if path.parent.name not in ("verl", "vllm")]
PROJECT = (ROOT / "pyproject.toml").read_text()
PYTHON = dict(
    re.findall(r"^PYTHON_(\w+) = \$\(call python_of,python([\d.]+)\)", (ROOT / "Makefile").read_text(), re.M)
)


def pins(end: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+)==([\d.]+)$", (TESTS / f"{end}.txt").read_text(), re.MULTILINE))


def floors(table: str) -> dict[str, str]:
    """The least versions of one list of pyproject.toml."""
    (listed,) = re.findall(rf"^{table} = \[\n(.*?)^\]", PROJECT, re.MULTILINE | re.DOTALL)
    return dict(re.findall(r'"([\w-]+)>=([\d.]+)', listed))


def numbers(version: str, at_least: int = 0) -> tuple[int, ...]:
    parts = [int(part) for part in version.split(".")]
    return (*parts, *[0] * (at_least - len(parts)))


def test_the_oldest_are_the_floors() -> None:
    needed, oldest = floors("dependencies") | floors("test"), pins("oldest")
    assert needed.keys() == oldest.keys() >= {"torch", "triton", "pytest", "setuptools"}
    for name, floor in needed.items():
        least = numbers(floor, at_least=2)
        assert numbers(oldest[name])[: len(least)] == least, name
    (python,) = re.findall(r'^requires-python = ">=([\d.]+)"', PROJECT, re.MULTILINE)
    assert PYTHON["oldest"] == python


def test_the_newest_are_newer_than_what_is_tested_otherwise() -> None:
    usual = dict(re.findall(r"^\w+ \?= (torch|triton)==([\d.]+)$", (ROOT / "Makefile").read_text(), re.M))
    newest = pins("newest")
    assert newest.keys() == usual.keys()
    assert all(numbers(newest[name]) > numbers(usual[name]) for name in usual)


@pytest.mark.parametrize("end", ["oldest", "newest"])
def test_the_page_of_limits_and_the_workflow_name_what_make_installs(end: str) -> None:
    versions = f"Python {PYTHON[end]}, torch {pins(end)['torch']}, triton {pins(end)['triton']}"
    assert f"`make test-{end}` ({versions})" in " ".join((ROOT / "docs" / "limits.md").read_text().split())
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert re.findall(rf'- end: {end}\n\s+python: "([\d.]+)"', workflow) == [PYTHON[end]]


def test_the_core_needs_no_more_than_its_extra() -> None:
    assert set(conftest.TEST) <= floors("test").keys()
    assert conftest.beyond_the_core(TESTS / "training" / "test_trainer.py")
    assert not conftest.beyond_the_core(TESTS / "library" / "test_distill_loss.py")
    assert not conftest.beyond_the_core(TESTS / "library" / "test_ppo_loss.py")


IMPORTS = """
import importlib, sys
import pytest

sys.modules |= dict.fromkeys({missing!r})  # as if they were not installed
for name in {names!r}:
    try:
        importlib.import_module("tests." + name)
    except pytest.skip.Exception:
        pass
    except ModuleNotFoundError as error:
        print(name, "imports", error)
"""


def test_the_files_of_the_core_import_no_more_than_it_has() -> None:
    core = [path for path in FILES if not conftest.beyond_the_core(path)]
    names = [".".join(path.relative_to(TESTS).with_suffix("").parts) for path in core]
    assert "project.test_ends" in names
    needed = {package for path in FILES for package in conftest.needs(path)}
    missing = (needed | {"matplotlib"}) - {*conftest.TEST, "filelock"}  # which torch brings
    code = IMPORTS.format(missing=missing, names=names)
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "", "list what these files import in NEEDS of tests/conftest.py"
