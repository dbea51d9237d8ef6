"""The program for compute-sanitizer launches what it says, and notices what it does not launch."""

import subprocess
import sys

import pytest

from tests import ROOT
from tests.helpers import sanitizer

pytestmark = pytest.mark.host


def test_every_kernel_and_variant_is_launched() -> None:
    command = [sys.executable, "-m", "tests.helpers.sanitizer"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    launched = {line.split(":")[0] for line in lines[:-1]}
    assert launched == set(sanitizer.expected())
    assert len(launched) == len(lines[:-1]) >= 7
    assert lines[-1] == "every kernel and variant was launched, and its result is right"


def test_a_kernel_or_variant_that_is_not_launched_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = sanitizer.expected()
    assert wanted["_ppo_loss_kernel"]["HAS_REF"] == {True, False}
    seen = {name: {k: set(v) for k, v in constants.items()} for name, constants in wanted.items()}
    assert sanitizer.missing(seen) == []
    seen["_ppo_loss_kernel"]["HAS_REF"].remove(True)
    seen["_scale_grad_kernel"]["ALIGN"].remove(1)
    assert sanitizer.missing(seen) == [
        "_ppo_loss_kernel: not launched with HAS_REF=True",
        "_scale_grad_kernel: not launched with ALIGN=1",
    ]
