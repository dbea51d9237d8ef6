"""The integrations keep to themselves, and to the versions they were written against."""

import ast
import doctest
import importlib
import re
import subprocess
import sys
from importlib import metadata
from typing import Any

import pytest

from aer_fast.integrations import _versions
from tests import ROOT

pytestmark = pytest.mark.host
FOLDER = ROOT / "aer_fast" / "integrations"


def test_importing_the_library_imports_none_of_them() -> None:
    others = [*_versions.SUPPORTED, "ray", "accelerate", "packaging"]
    code = f"import sys, aer_fast, aer_fast.integrations; print([m for m in {others} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_they_use_public_names_of_the_library() -> None:
    for path in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("aer_fast"):
                assert not (node.module or "").startswith("aer_fast._"), path
                if node.module == "aer_fast":
                    assert not [a.name for a in node.names if a.name.startswith("_")], path
                assert (node.module or "").split(".")[1:2] in ([], ["integrations"], ["reference"]), path


@pytest.mark.parametrize("package", _versions.SUPPORTED)
def test_the_supported_versions_are_those_of_the_extras(package: str) -> None:
    text = (ROOT / "pyproject.toml").read_text()
    extras = dict(re.findall(r'^(\w+) = \[\s*"(\w+[^"]*)"', text, re.MULTILINE))
    python = _versions.PYTHON.get(package)
    marker = f"; python_version >= '{'.'.join(map(str, python))}'" if python else ""
    expected = f"{package}{_versions.SUPPORTED[package]}{marker}"
    assert extras.get(package) == expected, f'pyproject.toml needs an extra {package} = ["{expected}", ...]'


@pytest.mark.parametrize(
    ("installed", "fits"),
    [
        ("1.16.0", True),
        ("1.16.7", True),
        ("1.16.0rc1", False),
        ("1.15.2", False),
        ("1.17.0", False),
        (None, False),
    ],
)
def test_other_versions_are_refused(
    installed: str | None, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(package: str) -> str:
        assert package == "trl"
        if installed is None:
            raise metadata.PackageNotFoundError(package)
        return installed

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(_versions, "PYTHON", {})  # whatever runs this
    if fits:
        _versions.require("trl")
        return
    names = "needs trl>=1.16,<1.17" if installed is None else f"trl {re.escape(installed)} is installed"
    with pytest.raises(ImportError, match=names):
        _versions.require("trl")


def test_a_python_that_is_too_old_for_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_versions, "PYTHON", {"trl": (3, 99)})
    with pytest.raises(
        ImportError, match=r"needs trl>=1\.16,<1\.17, which needs Python 3\.99 or newer, and this"
    ):
        _versions.require("trl")


@pytest.mark.parametrize("module", _versions.SUPPORTED)
def test_the_check_comes_with_the_import(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if module == "trl":
        pytest.importorskip("transformers")  # which it imports before
    monkeypatch.setattr(_versions, "PYTHON", {})
    name = f"aer_fast.integrations.{module}"
    for loaded in [m for m in sys.modules if m.startswith(name)]:
        monkeypatch.delitem(sys.modules, loaded)
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda p: "0.1" if p == module else real(p))
    with pytest.raises(ImportError, match=f"{name} supports {module}>="):
        importlib.import_module(name)


def test_docstring_examples() -> None:
    pytest.importorskip("transformers")
    result = doctest.testmod(importlib.import_module("aer_fast.integrations.transformers"))
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_the_script_of_the_documentation_runs_as_printed() -> None:
    pytest.importorskip("trl")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "trl.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    rows = [row for row in names["trainer"].state.log_history if "loss" in row]
    assert len(rows) == 4
    alphas = [row["aer/alpha"] for row in rows]
    assert alphas == sorted(alphas)
    assert alphas[-1] > 0
