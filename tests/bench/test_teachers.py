"""The benchmarks beside a teacher: its inputs, how they judge, and a run with peers that are right."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import measure, operations
from bench.cases import DISTILL, DIVERGENCES, Case
from tests.helpers.benches import VERSIONS, autograd, bench, install, prepared

pytestmark = [pytest.mark.needs("bench"), pytest.mark.host]


@pytest.mark.parametrize("D_ref", [64, 256])
def test_a_teacher_is_near_its_student_and_as_sure(D_ref: int) -> None:
    inputs, exact = prepared(Case(f"{DISTILL}reverse_kl", 64, 2000, 64, D_ref=D_ref))
    hidden, weight = inputs.teacher
    assert (hidden @ weight.T).std().item() == pytest.approx(operations.SPREAD, rel=0.1)
    assert 1 < exact.loss(f"{DISTILL}reverse_kl", "all") < 3


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_another_divergence_is_called_wrong(kind: str) -> None:
    case = Case(DISTILL + kind, 64, 2000, 64, torch.bfloat16, D_ref=64)
    inputs, exact = prepared(case)
    for other in DIVERGENCES:
        result = autograd(replace(case, op=DISTILL + other), "all", inputs)
        found = operations.errors(case, "all", exact, result)
        wrong = operations.complaint(case.dtype, found)
        assert all(name in wrong for name in ("grad_hidden", "grad_weight")) == (other != kind)


# ---- a whole run

JSD = """
from torch.nn.functional import kl_div

def jsd(hidden, weight, ref_hidden, ref_weight, beta):
    p, q = (hidden @ weight.T).softmax(-1), (ref_hidden @ ref_weight.T).softmax(-1)
    m = beta * q + (1 - beta) * p
    of = lambda middle, x: kl_div(middle.log(), x, reduction="none").sum(-1)
    if beta in (0, 1):
        return of(m, p if beta == 1 else q)
    return beta * of(m, q) + (1 - beta) * of(m, p)
"""
BESIDE_A_TEACHER = {
    "generalised.py": JSD,
    "trl/__init__.py": "raise RuntimeError('needs everything')",
    "trl/kernels/__init__.py": "",
    "trl/kernels/chunked_divergence.py": """
from generalised import jsd

class ChunkedDivergenceFunction:
    @staticmethod
    def apply(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, beta):
        return jsd(hidden, weight, ref_hidden, ref_weight, beta), None
""",
    "liger_kernel/__init__.py": "",
    "liger_kernel/ops.py": """
from generalised import jsd

class LigerFusedLinearJSDFunction:
    @staticmethod
    def apply(hidden, weight, ref_hidden, ref_weight, labels, beta, ignored, temperature):
        assert (ignored, temperature) == (-100, 1)
        each = jsd(hidden, weight, ref_hidden, ref_weight, beta)
        return each.mean() if labels is None else each[labels != -100].mean()
""",
    "liger_kernel/chunked_loss.py": """
from liger_kernel.ops import LigerFusedLinearJSDFunction

class LigerFusedLinearJSDLoss:
    def __init__(self, weight_hard_loss, weight_soft_loss, beta):
        assert (weight_hard_loss, weight_soft_loss) == (0, 1)
        self.beta = beta

    def __call__(self, hidden, weight, ref_hidden, ref_weight, labels):
        both = hidden, weight, ref_hidden, ref_weight
        return LigerFusedLinearJSDFunction.apply(*both, labels, self.beta, -100, 1.0)
""",
}


def test_a_run_beside_a_teacher(tmp_path: Path) -> None:
    install(tmp_path, BESIDE_A_TEACHER, VERSIONS)
    options = ["--size", "tiny", "--impl", "torch", "--results", str(tmp_path / "r.jsonl"), "-q"]
    options += ["-p", "no:cacheprovider", "--benchmark-storage", f"file://{tmp_path}/saved"]
    chosen = ["-k", "linear_distill_loss and not compile"]
    done = bench(tmp_path, "pytest", "bench/test_losses.py", *options, *chosen, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    every = {"aer_fast", "four products alone", "eager", "TRL", "Liger", "Liger torch"}
    rows, _ = measure.read(tmp_path / "r.jsonl")
    assert {row.op for row in rows} == {DISTILL + kind for kind in DIVERGENCES}
    for case in {(row.op, row.rows) for row in rows}:
        names = {row.provider for row in rows if (row.op, row.rows) == case}
        assert names == every - ({"four products alone"} if case[1] == "realistic" else set())
    assert {row.status for row in rows} == {"ok"}
    assert max(error for row in rows for error in row.errors.values()) < 1e-4
    assert {row.shape["D_ref"] for row in rows} == {192}
