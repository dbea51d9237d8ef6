"""Statistics and losses, from logits and from hidden states and a head, beside the peers."""

from typing import Any

import pytest
import torch

from bench import operations
from bench.cases import SIZES, Case
from bench.conftest import DEVICE, RECORD, Run, Work, size
from bench.peers.providers import Provider, providers_of, step_of


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    impl = metafunc.config.stash[RECORD].impl
    parameters = [
        pytest.param(
            case,
            provider,
            id=f"{case.op}, {case}, {provider.name}" + (", full" if case.coverage == "full" else ""),
            marks=[pytest.mark.headline] if case.headline else [],
        )
        for case in SIZES[size(metafunc.config)]()
        for provider in providers_of(case, impl)
    ]
    metafunc.parametrize(("case", "provider"), parameters)


def test_loss(case: Case, provider: Provider, run: Run) -> None:
    def build() -> Work:
        inputs, exact = operations.prepare(case.N, case.V, case.D, case.dtype, case.rows, DEVICE, case.D_ref)
        fresh, step = step_of(case, provider, inputs)
        return Work(
            fresh,
            step,
            errors=lambda result: operations.errors(case, provider.work, exact, result),
            least=operations.least(case, exact, provider.work),
        )

    identity: dict[str, Any] = {
        "op": case.op,
        "shape": case.shape,
        "rows": case.rows,
        "provider": provider.name,
        "version": provider.version,
        "work": provider.work,
        "headline": case.headline,
    }
    ours = provider.name.startswith("aer_fast")
    torch.set_float32_matmul_precision("highest")
    run(identity, provider.missing(DEVICE), build, dtype=case.dtype, ours=ours)
