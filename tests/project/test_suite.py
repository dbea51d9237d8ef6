"""How the tests are chosen: by the marks that a file gives itself."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import aer_fast.kernels
from tests import ROOT, conftest

pytestmark = pytest.mark.host
TESTS = ROOT / "tests"
FILES = sorted(TESTS.glob("*/test_*.py"))
MARK = "pytest.mark"


def test_marks_are_read_before_a_file_is_imported(tmp_path: Path) -> None:
    file = tmp_path / "test_one.py"
    file.write_text(f"import no_such\npytestmark = {MARK}.needs('training', 'no_such')\n")
    assert conftest.marks(file) == {"needs": ("training", "no_such")}
    assert conftest.needs(file) == [*conftest.OURS["training"], "no_such"]
    several = tmp_path / "test_several.py"
    several.write_text(f"pytestmark = [{MARK}.emulated, {MARK}.skipif(x(), reason='y')]\n")
    assert conftest.marks(several) == {"emulated": (), "skipif": ()}
    assert conftest.needs(several) == []


def test_what_a_file_needs_stands_where_it_is_read() -> None:
    for path in FILES:
        written = path.read_text().count(f"{MARK}.needs(")
        assert written == ("needs" in conftest.marks(path)), path


def test_what_several_files_share_is_in_the_helpers() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                assert names[0] != "tests" or not any(name.startswith("test_") for name in names), path


COLLECT = """
import sys, pytest
sys.modules[{missing!r}] = None  # as if it were not installed
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *{options!r}]))
"""


@pytest.mark.parametrize(
    ("missing", "options", "refused"),
    [
        ("tyro", [], "training/test_runs.py needs tyro"),
        ("mpmath", ["--core"], "library/test_distill_loss.py needs mpmath"),
        ("tyro", ["--core"], None),
    ],
)
def test_ci_leaves_no_file_out(missing: str, options: list[str], refused: str | None) -> None:
    code = COLLECT.format(missing=missing, options=options)
    environment = os.environ | {"CI": "true"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if refused is None:
        assert done.returncode == pytest.ExitCode.OK, done.stderr
    else:
        assert done.returncode == pytest.ExitCode.USAGE_ERROR
        assert "CI runs every test" in done.stderr
        assert f"not collected: {refused}" in done.stderr


def test_no_folder_of_tests_hides_a_package() -> None:
    """One without __init__.py would put tests/ on the path, and there `kernels` and `training` are tests."""
    for path in TESTS.rglob("*.py"):
        assert (path.parent / "__init__.py").exists(), path
    for name in ("bench", "kernels", "training"):
        found = importlib.util.find_spec(name)
        assert found is not None
        assert str(TESTS / name) not in (found.submodule_search_locations or ())
    assert [Path(place).resolve() for place in aer_fast.kernels.__path__] == [ROOT / "kernels"]
