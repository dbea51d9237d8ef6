"""A case of the benches by autograd, and runs of them beside peers that are made up."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from bench import cases, operations
from bench.cases import Case, divergence_of
from bench.operations import Result
from bench.peers import calls
from tests import ROOT


def prepared(case: Case) -> tuple[operations.Inputs, operations.Exact]:
    return operations.prepare(case.N, case.V, case.D, case.dtype, case.rows, "cpu", case.D_ref)


def distilled(kind: str, inputs: operations.Inputs, factors: list[Tensor]) -> Tensor:
    """The mean divergence of the tokens that count, by torch's kl_div: KL of its second from its first."""
    heads = factors, [x.double() for x in inputs.teacher]
    student, teacher = ((hidden @ weight.T).softmax(-1) for hidden, weight in heads)
    middle = (student + teacher) / 2
    pairs = {
        "reverse_kl": [(1.0, teacher, student)],
        "forward_kl": [(1.0, student, teacher)],
        "jsd": [(0.5, middle, teacher), (0.5, middle, student)],
    }
    parts = [share * kl_div(a.log(), b, reduction="none").sum(-1) for share, a, b in pairs[kind]]
    return sum(parts, torch.zeros(())).view(-1)[slice(None) if inputs.mask is None else inputs.mask].mean()


def autograd(case: Case, work: str, inputs: operations.Inputs) -> Result:
    """What a case should give, by torch in float64."""
    factors = [x.detach().double().requires_grad_() for x in inputs.factors]
    if kind := divergence_of(case.op):
        loss = distilled(kind, inputs, factors)
        return Result(loss=loss, gradient=torch.autograd.grad(loss, factors))
    logits = factors[0] if len(factors) == 1 else factors[0] @ factors[1].T
    logprob, entropy = calls.eager_stats(logits, inputs.target)
    if work == "cross-entropy":
        loss = -logprob.mean()
    elif case.op in cases.STATS:
        loss = (inputs.grad_logprob * logprob + inputs.grad_entropy * entropy).sum()
    else:
        loss = operations.loss_of(logprob, entropy if work == "all" else None, inputs)
    return Result(logprob, entropy, loss, torch.autograd.grad(loss, factors))


VERSIONS = {"trl": "9.9", "liger-kernel": "8.8", "unsloth-zoo": "7.7", "verl": "6.6"}


def bench(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}  # what is expected here is of a CPU
    for name in ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER"):
        environment.pop(name, None)
    return subprocess.run(
        [sys.executable, "-m", *arguments], env=environment | more, cwd=ROOT, capture_output=True, text=True
    )


def install(folder: Path, files: dict[str, str], versions: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for package, version in versions.items():
        about = folder / f"{package.replace('-', '_')}-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
