"""The stages of bench/gpu.sh, run by a Python that does nothing, and what the demo needs elsewhere."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests import ROOT

pytestmark = [pytest.mark.needs("training"), pytest.mark.host]
DOCUMENT = ROOT / "docs" / "benchmarks.md"

PYTHON = """#!/usr/bin/env bash
echo "$PYTHONPATH :: $*" >>"$CALLS"
case "$*" in
    -) echo rows.jsonl ;;
    *training.experiments*)
        grid=$(sed 's/.*--train.output \\([^ ]*\\).*/\\1/' <<<"$*")
        mkdir -p "$grid/none-0/checkpoints"
        touch "$grid/none-0/metrics.jsonl" "$grid/none-0/checkpoints/large"
        exit "$STATUS" ;;
esac
"""


def stages(tmp_path: Path, *names: str, status: int = 0) -> tuple[subprocess.CompletedProcess[str], str]:
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    (tmp_path / "wheels").mkdir(exist_ok=True)
    (tmp_path / "wheels" / "some.whl").touch()
    paths = {"PYTHON": "python", "OUT": "out", "WHEELS": "wheels", "CALLS": "calls"}
    own = {name: str(tmp_path / path) for name, path in paths.items()} | {"DRY": "1", "STATUS": str(status)}
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), *names]
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True)
    return done, (tmp_path / "calls").read_text()


def test_every_stage_is_known(tmp_path: Path) -> None:
    done, calls = stages(tmp_path)
    assert done.returncode == 0, done.stdout
    assert "no stage" not in done.stdout
    suites = ("test_losses.py -m headline", "tuning.py::test_tile", "tuning.py::test_loop")
    for suite in (*suites, "test_step.py\n", "test_step.py --memory-cap", "profiling.py"):
        assert f"bench/{suite}" in calls
    assert "-m bench.profiling launch" in calls
    assert "-m bench.ranks" in calls
    assert "-m bench.packed tiny" in calls


def test_one_table_says_what_the_stages_are() -> None:
    (listed,) = re.findall(r"\|\| STAGES=\(([\w\s]+)\)", (ROOT / "bench" / "gpu.sh").read_text())
    rows = re.findall(r"^\| (\w+) \| .+ \| *\d* \| \d+ \|$", DOCUMENT.read_text(), re.MULTILINE)
    assert rows == listed.split()
    assert "| `sanitize` |" not in (ROOT / "CONTRIBUTING.md").read_text()


@pytest.mark.parametrize("status", [0, 1])
def test_the_curves_of_the_demo_come_back(tmp_path: Path, status: int) -> None:
    done, calls = stages(tmp_path, "demo", status=status)
    assert done.returncode == status  # what there is of a run that was cut short, too
    with tarfile.open(tmp_path / "out" / "demo.tar.gz") as archive:
        names = archive.getnames()
    assert "gpu-demo/none-0/metrics.jsonl" in names
    assert not any("checkpoints" in name for name in names)
    (unpacked,) = [line for line in calls.splitlines() if "zipfile -e" in line]
    target = unpacked.split()[-1]
    (call,) = [line for line in calls.splitlines() if "training.experiments" in line]
    assert target in call.split(" :: ")[0].split(":")


DEMO = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("reasoning_gym", "math_verify", "datasets", "antlr4"):
            raise ImportError(name)

sys.meta_path.insert(0, Block())
from training import data, evaluate, experiments, models, train
from training.config import DEMO

data.build_task(DEMO)
print("imported")
"""


def test_the_demo_imports_nothing_that_its_list_leaves_out() -> None:
    listed = [x for x in (ROOT / "bench" / "demo.txt").read_text().splitlines() if not x.startswith("#")]
    assert {x.partition("==")[0] for x in listed} == {"tyro", "docstring-parser", "typeguard", "Pebble"}
    done = subprocess.run([sys.executable, "-c", DEMO], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "imported\n"), done.stderr
