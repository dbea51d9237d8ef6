"""The layout promise: kernels/ is aer_fast.kernels, and never the top-level module `kernels`."""

import ast
import doctest
import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import aer_fast
from tests import ROOT

pytestmark = pytest.mark.host
KERNELS = ROOT / "kernels"


def python(code: str, folder: Path = ROOT, interpreter: str = sys.executable) -> str:
    command = [interpreter, "-c", code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def test_the_kernels_folder_is_a_link_and_no_package() -> None:
    assert not (KERNELS / "__init__.py").exists()
    assert (ROOT / "aer_fast" / "kernels").is_symlink()
    assert (ROOT / "aer_fast" / "kernels").resolve() == KERNELS


def test_the_hugging_face_package_is_not_shadowed() -> None:
    if not any(distribution.name == "kernels" for distribution in metadata.distributions()):
        pytest.skip("the Hugging Face package kernels is not installed")
    assert python("from kernels import get_kernel; print(get_kernel.__name__)") == "get_kernel"


def test_importing_the_library_does_not_import_triton() -> None:
    code = "import sys, aer_fast; print([m for m in ('triton', 'transformers') if m in sys.modules])"
    assert python(code) == "[]"


def imports(path: Path) -> set[str]:
    """Top-level packages a file imports; "." for a relative import."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found.add("." if node.level else (node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
    return found


# What measures the linear path's own products and loops has to see them.
MEASURED = {"tuning.py", "profiling.py", "planned.py"}


def test_the_arrows_point_one_way() -> None:
    for path in KERNELS.glob("*.py"):
        assert imports(path) <= {".", "__future__", "collections", "math", "torch", "triton", "typing"}, path
    for path in [*(ROOT / "aer_fast").glob("*.py"), *(ROOT / "aer_fast").glob("_*/*.py")]:
        assert not imports(path) & {".", "triton", "training", "bench", "tests"}, path
    for folder in ("training", "bench", "docs/recipes"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("aer_fast"):
                    private = {a.name for a in node.names if a.name.startswith("_")}
                    assert not private, path
                    inside = (node.module or "").startswith("aer_fast._")
                    assert not inside or (folder == "bench" and path.name in MEASURED), path


def imported_modules(path: Path) -> set[str]:
    """The modules of this project that a file imports anywhere, in functions, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            inside = {name for name in names if file_of(name) is not None}
            found |= inside | ({node.module} if inside != names else set())
    return {name for name in found if file_of(name) is not None}


def file_of(module: str) -> Path | None:
    path = ROOT / module.replace(".", "/")
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.exists()), None)


def test_no_import_goes_round_in_circles() -> None:
    waiting: dict[str, set[str]] = {}
    for path in [*(ROOT / "aer_fast").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if not name.startswith("aer_fast.kernels"):
            waiting[name] = imported_modules(path) - {name}
    while free := {name for name, needs in waiting.items() if not needs & waiting.keys()}:
        waiting = {name: needs for name, needs in waiting.items() if name not in free}
    assert not waiting


def rooms(path: Path) -> set[str]:
    """The modules of training/ that one of them imports, wherever in it, and if only for its types."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "training":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("training."):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("training.")}
    return found


def test_the_rooms_of_the_trainer_have_an_order() -> None:
    """That of their list: no circle, not a hidden one either."""
    folder = ROOT / "training"
    listed = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    order = ", ".join(re.findall(r"^ {4}(\w+(?:, \w+)*)  ", listed, re.MULTILINE)).split(", ")
    unlisted = {path.stem for path in folder.glob("*.py")} ^ {"__init__", *order}
    assert not unlisted, f"the docstring of training/__init__.py must list each module once: {unlisted}"
    assert rooms(folder / "train.py") > {"config", "policy", "rollout"}
    for place, name in enumerate(order):
        later = rooms(folder / f"{name}.py") - set(order[:place])
        assert not later, f"training/{name}.py imports {later}, which training/__init__.py lists after it"


def test_public_names() -> None:
    for name in aer_fast.__all__:
        assert getattr(aer_fast, name).__doc__


@pytest.mark.parametrize(
    "module",
    [
        "_token_stats",
        "_ppo_loss",
        "_distill_loss",
        "_linear.ppo_loss",
        "_linear.token_loss",
        "_linear.token_stats",
        "_linear.distill_loss",
        "_linear.plan",
        "_adaptive_entropy",
        "_metrics",
    ],
)
def test_docstring_examples(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"aer_fast.{module}"))
    assert result.attempted > 0
    assert result.failed == 0


def test_a_wheel_holds_the_kernels_and_imports_elsewhere(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a build leaves traces
    skipped = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, symlinks=True, ignore=skipped)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"aer_fast-{aer_fast.__version__}-py3-")
    names = zipfile.ZipFile(wheel).namelist()
    files = {path for path in (ROOT / "aer_fast").rglob("*.*") if path.suffix in (".py", ".yaml", ".typed")}
    sources = {path.relative_to(ROOT).as_posix() for path in files}
    sources |= {f"aer_fast/kernels/{path.name}" for path in KERNELS.glob("*.py")}
    assert {"aer_fast/py.typed", "aer_fast/integrations/verl/aer_ppo_trainer.yaml"} <= sources
    left_out = sources - set(names)
    assert not left_out, f"[tool.setuptools] of pyproject.toml leaves out {', '.join(sorted(left_out))}"
    assert {name.split("/")[0].split("-")[0] for name in names} == {"aer_fast"}

    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); import aer_fast, aer_fast.kernels.ppo_loss;"
        "print(aer_fast.__file__)"
    )
    assert python(code, tmp_path) == str(site / "aer_fast" / "__init__.py")
