"""The oldest and the newest versions that are tested are those that pyproject.toml and the README name."""

import re
from pathlib import Path

import pytest

from tests import conftest

ROOT = Path(__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()
PYTHON = dict(
    re.findall(r"^PYTHON_(\w+) = \$\(call python_of,python([\d.]+)\)", (ROOT / "Makefile").read_text(), re.M)
)


def pins(end: str) -> dict[str, str]:
    return dict(
        re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "tests" / f"{end}.txt").read_text(), re.MULTILINE)
    )


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
def test_the_readme_and_the_workflow_name_what_make_installs(end: str) -> None:
    versions = f"Python {PYTHON[end]}, torch {pins(end)['torch']}, triton {pins(end)['triton']}"
    assert f"`make test-{end}` ({versions})" in " ".join((ROOT / "README.md").read_text().split())
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert re.findall(rf'- end: {end}\n\s+python: "([\d.]+)"', workflow) == [PYTHON[end]]


def test_the_core_needs_no_more_than_its_extra() -> None:
    assert set(conftest.TEST) <= floors("test").keys()
    assert conftest.beyond_the_core("test_trainer.py")
    assert not conftest.beyond_the_core("test_distill_loss.py")
    assert not conftest.beyond_the_core("test_ppo_loss.py")
