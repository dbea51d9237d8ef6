"""The benchmarks judge before they time, record as they go, and report whatever became of a run."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench import cases, measure, operations
from bench.cases import DISTILL, Case
from bench.operations import Result
from bench.peers import calls, providers
from bench.report import documents
from tests import ROOT
from tests.helpers.benches import VERSIONS, autograd, bench, install, prepared

pytestmark = [pytest.mark.needs("bench", "tyro"), pytest.mark.host]
CASES = [
    Case("token_stats", 32, 50),
    Case("ppo_loss", 32, 50),
    Case("ppo_loss", 64, 50, rows="realistic"),
    Case("linear_token_stats", 32, 50, 8),
    Case("linear_ppo_loss", 32, 50, 8),
    Case("linear_ppo_loss", 64, 50, 8, rows="realistic"),
    Case("linear_ppo_loss", 32, 50, 8, rows="30% silent"),
    Case(f"{DISTILL}reverse_kl", 32, 50, 8, D_ref=12),
    Case(f"{DISTILL}jsd", 64, 50, 8, rows="realistic", D_ref=12),
    Case(f"{DISTILL}forward_kl", 32, 50, 8, D_ref=6),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("work", ["all", "no entropy", "cross-entropy"])
def test_what_is_called_exact_is_exact(case: Case, work: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if work == "no entropy" and case.op in cases.STATS:
        pytest.skip("statistics have an entropy")
    if work == "cross-entropy" and case.rows == "realistic":
        pytest.skip("a cross-entropy is of all rows")
    if work != "all" and case.D_ref:
        pytest.skip("no provider leaves a part of a divergence out")
    monkeypatch.setattr(operations, "EXACT_ENTRIES", 500)  # in several parts
    operations.prepare.cache_clear()
    inputs, exact = prepared(case)
    operations.prepare.cache_clear()
    actual = autograd(case, work, inputs)
    if not case.D_ref:
        torch.testing.assert_close(exact.logprob, actual.logprob)
        torch.testing.assert_close(exact.entropy, actual.entropy)
    assert all(grad.any() for grad in actual.gradient)
    onto = [operations.direction(grad.shape[-1], grad.device) for grad in actual.gradient]
    expected = tuple(grad @ x for grad, x in zip(actual.gradient, onto))
    torch.testing.assert_close(exact.gradient(case.op, work), expected)
    if case.op not in cases.STATS:
        torch.testing.assert_close(exact.loss(case.op, work), actual.loss)


def test_rows_are_as_they_are_called() -> None:
    inputs, exact = operations.prepare(64, 50, 8, torch.float32, "realistic", "cpu")
    assert inputs.mask is not None
    assert inputs.mask.float().mean() == 0.75
    g, h = exact.upstream("linear_ppo_loss", "all")
    live = (g != 0) | (h != 0)
    assert 0.3 < live.double().mean() < 0.6
    assert ((g == 0) & (h != 0)).any()  # clipped, with a bonus
    _, silent = operations.prepare(1024, 50, 8, torch.float32, "30% silent", "cpu")
    g, h = silent.upstream("linear_ppo_loss", "all")
    assert not h.any()
    assert (g == 0).double().mean() == pytest.approx(0.3, abs=0.05)


def test_ratios_keep_away_from_the_edges_of_the_clip() -> None:
    inputs, exact = operations.prepare(64, 50, 0, torch.bfloat16, "all", "cpu")
    ratio = (exact.logprob - inputs.old_logprob).exp()
    for edge in (1 - operations.CLIP, 1 + operations.CLIP):
        assert (ratio.log() - torch.tensor(edge).log()).abs().min() > 0.07


def spoil(tensor: Tensor, how: str) -> Tensor:
    spoiled = tensor.detach().clone()
    if how == "nan":
        spoiled.view(-1)[-1] = float("nan")
    elif how == "half":
        spoiled *= 0.5
    elif how == "one entry" and spoiled.dim() > 0:
        spoiled.view(-1)[7] += spoiled.double().norm()
    return spoiled


@pytest.mark.parametrize("name", ["logprob", "entropy", "loss", "grad_hidden", "grad_weight"])
@pytest.mark.parametrize("how", ["nan", "half", "one entry"])
def test_a_wrong_result_is_called_wrong(name: str, how: str) -> None:
    if how == "one entry" and name == "loss":
        pytest.skip("it has one entry")
    case = CASES[4]
    inputs, exact = prepared(case)
    right = autograd(case, "all", inputs)
    found = operations.errors(case, "all", exact, right)
    assert set(found) == {"logprob", "entropy", "loss", "grad_hidden", "grad_weight"}
    assert operations.complaint(case.dtype, found) == ""
    parts = {"logprob": right.logprob, "entropy": right.entropy, "loss": right.loss}
    grads = dict(zip(["grad_hidden", "grad_weight"], right.gradient))
    for values in (parts, grads):
        values.update({key: spoil(x, how) for key, x in values.items() if key == name and x is not None})
    wrong = Result(parts["logprob"], parts["entropy"], parts["loss"], tuple(grads.values()))
    assert name in operations.complaint(case.dtype, operations.errors(case, "all", exact, wrong))


@pytest.mark.parametrize(
    "case",
    [*(replace(case, coverage="full") for case in CASES), Case("token_stats forward", 32, 50)],
    ids=str,
)
def test_every_installed_provider_is_right(case: Case) -> None:
    inputs, exact = prepared(case)
    names = []
    for provider in providers.providers_of(case, "torch"):
        if provider.package or "compile" in provider.name:
            continue
        fresh, step = providers.step_of(case, provider, inputs)
        found = operations.errors(case, provider.work, exact, step(*fresh()))
        assert operations.complaint(case.dtype, found) == ""
        names.append(provider.name)
    assert "aer_fast" in names
    assert "eager" in names or case.rows.endswith("silent")


def test_picking_the_rows_that_count_changes_nothing() -> None:
    inputs, _ = operations.prepare(64, 50, 8, torch.float32, "realistic", "cpu")
    provider = providers.Provider("eager", lambda: calls.eager_linear_stats)
    losses = []
    for skips in (False, True):
        chosen = replace(provider, skips_masked=skips)
        losses.append(providers.loss_function(chosen, calls.eager_linear_stats, inputs)(*inputs.factors))
    torch.testing.assert_close(*losses)


def test_the_least_work_is_counted_by_hand() -> None:
    def least(case: Case) -> tuple[float, float]:
        return operations.least(case, prepared(case)[1])

    assert least(Case("token_stats forward", 32, 50)) == (4 * 32 * 50, 6 * 32 * 50)
    assert least(Case("token_stats", 32, 50))[0] == 3 * 4 * 32 * 50
    assert least(Case("ppo_loss", 32, 50, dtype=torch.bfloat16))[0] == 2 * 2 * 32 * 50
    rows = 48 + 64  # read, and written
    assert least(Case("ppo_loss", 64, 50, rows="realistic"))[0] == 4 * rows * 50
    assert least(Case("linear_token_stats forward", 32, 50, 8))[1] == 2 * 32 * 50 * 8
    assert least(Case("linear_ppo_loss", 32, 50, 8))[1] == 3 * 2 * 32 * 50 * 8
    beside = Case(f"{DISTILL}jsd", 64, 50, 8, rows="realistic", D_ref=12)
    assert least(beside) == (4 * (64 + 50) * (2 * 8 + 12), 2 * 48 * 50 * (3 * 8 + 12))


def test_in_bfloat16_a_bonus_that_is_left_out_or_has_the_wrong_sign_shows() -> None:
    case = Case("linear_ppo_loss", 64, 2000, 64, torch.bfloat16)
    inputs, exact = prepared(case)
    right = autograd(case, "all", inputs)
    without = autograd(case, "no entropy", inputs)
    wrong_sign = tuple(2 * b - a for a, b in zip(right.gradient, without.gradient))
    for gradient, is_wrong in ((right.gradient, False), (without.gradient, True), (wrong_sign, True)):
        found = operations.errors(case, "all", exact, Result(gradient=gradient))
        assert bool(operations.complaint(case.dtype, found)) == is_wrong
    eager = providers.Provider("eager", lambda: calls.eager_linear_stats)
    fresh, step = providers.step_of(case, eager, inputs)
    found = operations.errors(case, "all", exact, step(*fresh()))
    assert operations.complaint(case.dtype, found) == ""


@pytest.mark.parametrize("case", [CASES[4], CASES[7]], ids=str)
def test_a_provider_that_changes_its_inputs_is_wrong_and_the_next_gets_new_ones(case: Case) -> None:
    inputs, exact = prepared(case)
    right = autograd(case, "all", inputs)
    changed = inputs.teacher[1] if case.D_ref else inputs.factors[1]
    changed.data.mul_(1.5)
    assert "inputs" in operations.complaint(case.dtype, operations.errors(case, "all", exact, right))
    assert prepared(case)[0].factors[1] is not inputs.factors[1]


def test_a_gpu_is_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            events.append("recorded")

        def synchronize(self) -> None:
            events.append("waited")

        def elapsed_time(self, later: "Event") -> float:
            return 1500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = measure.clock("cuda")
    start = clock()
    assert clock() - start == 1.5
    assert events == ["recorded", "recorded", "waited"]


def test_time_is_taken_and_memory_watched_around_the_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench import conftest

    seen: list[str] = []
    monkeypatch.setattr(conftest, "DEVICE", "cpu")
    monkeypatch.setattr(measure, "clock", lambda device: lambda: seen.append("clock"))
    monkeypatch.setattr(measure, "cool", lambda device: seen.append("cool"))

    class Benchmark:
        _timer: Any = None

        def pedantic(self, step: Any, setup: Any, rounds: int) -> None:
            for _ in range(rounds):
                setup()
                self._timer()
                step()
                self._timer()

    class PeakMemory(measure.PeakMemory):
        def __enter__(self) -> measure.PeakMemory:
            seen.append("watched")
            return super().__enter__()

    monkeypatch.setattr(measure, "PeakMemory", PeakMemory)
    run = conftest.Run.__new__(conftest.Run)
    run.benchmark = Benchmark()  # type: ignore[assignment]
    run.identity = {"op": "o", "shape": {}, "dtype": "d", "rows": "all", "provider": "p"}
    held: list[Tensor] = []

    def step(*_: Any) -> Result:
        seen.append("step")
        held[:] = [torch.ones(32 << 18)]  # 32 MiB
        return Result()

    def fresh() -> tuple[Any, ...]:
        seen.append("fresh")
        held.clear()
        return ()

    peak = run.time(conftest.Work(fresh, step, lambda result: {}, None), seconds=10.0)
    assert 24 < peak < 48
    timed, watched = ["fresh", "cool", "clock", "step", "clock"], ["fresh", "cool", "watched", "step"]
    assert seen == ["cool", *timed * 3, *watched]


def test_what_each_provider_is() -> None:
    case = Case("ppo_loss", 32, 50)
    inputs, _ = operations.prepare(32, 50, 0, torch.float32, "all", "cpu")
    (in_place,) = [p for p in providers.providers_of(case, "torch") if p.name == "aer_fast, in place"]
    fresh, step = providers.step_of(case, in_place, inputs)
    before, given = inputs.factors[0].detach().clone(), fresh()
    step(*given)
    assert torch.equal(inputs.factors[0], before)
    assert not torch.equal(given[0], before)

    inputs, _ = operations.prepare(32, 50, 8, torch.float32, "all", "cpu")
    case = Case("linear_token_stats forward", 32, 50, 8)
    for provider in providers.providers_of(case, "torch"):
        if not provider.missing("cpu"):
            fresh, step = providers.step_of(case, provider, inputs)
            assert not step(*fresh()).gradient
    assert providers.Provider("x", dict, package="no-such").missing("cpu") == "no-such is not installed"

    inputs, _ = operations.prepare(64, 50, 8, torch.float32, "realistic", "cpu")
    rows = []

    def stats(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        rows.append(len(hidden))
        return calls.eager_linear_stats(hidden, weight, target)

    providers.loss_function(providers.Provider("x", dict, skips_masked=True), stats, inputs)(*inputs.factors)
    assert rows == [48]


def test_the_products_alone_are_those(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "plan", lambda *sizes, **options: SimpleNamespace(chunk=5))
    hidden, weight = torch.randn(12, 4), torch.randn(7, 4)
    dz = hidden @ weight.T
    teacher = torch.randn(12, 3), torch.randn(7, 3)
    widths: list[tuple[tuple[Tensor, ...], int]] = [((), 3 * 4), (teacher, 3 * 4 + 3)]
    for more, width in widths:
        with FlopCounterMode(display=False) as counter:
            made = calls.products()(hidden, weight, *more, backward=True)
        torch.testing.assert_close(made, (dz @ weight, dz.T @ hidden))
        assert counter.get_total_flops() == 2 * 12 * 7 * width


def test_peak_memory_is_that_of_the_step() -> None:
    with measure.PeakMemory("cpu") as memory:
        held = torch.ones(64 << 18)  # 64 MiB
        other = held + 1
        del other
    assert 110 < memory.peak < 150


def test_a_module_is_stood_in_for_only_where_it_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stands").mkdir()
    for name, text in (("__init__", "raise ImportError"), ("broken", "import nowhere"), ("whole", "x = 1")):
        (tmp_path / "stands" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    calls.enter("stands")
    try:
        for name, expected in (("broken", 2), ("whole", 1)):
            calls.stand_in(f"stands.{name}", x=2)
            assert sys.modules[f"stands.{name}"].x == expected
        calls.stand_in("stands.nothing.here", x=2)  # another version, which does without
        assert "stands.nothing.here" not in sys.modules
    finally:
        for name in [name for name in sys.modules if name.startswith("stands")]:
            del sys.modules[name]


# ---- whole runs

FAKES = {
    # a package that cannot be imported, and whose file can
    "trl/__init__.py": "raise RuntimeError('needs everything')",
    "trl/kernels/__init__.py": "",
    "trl/kernels/chunked_logprob.py": """
class ChunkedLogProbFunction:
    @staticmethod
    def apply(*arguments):
        raise TypeError("the tile is\\ntoo large")
""",
    "liger_kernel/__init__.py": "",
    "liger_kernel/ops.py": """
class LigerFusedLinearScaledCrossEntropyFunction:
    @staticmethod
    def apply(hidden, weight, target, *settings):
        logp = (hidden @ weight.T).log_softmax(-1)
        nll = -1.1 * logp.gather(-1, target[:, None])[:, 0]
        return nll, -(logp.exp() * logp).sum(-1)
""",
    "liger_kernel/chunked_loss.py": """
import torch

class LigerFusedLinearGRPOLoss:
    def __init__(self, **settings):
        assert settings["loss_type"] == "dapo"

    def __call__(self, hidden, weight, ids, mask, advantage, old_per_token_logps):
        logp = (hidden @ weight.T).log_softmax(-1)
        ratio = (logp.gather(-1, ids[..., None])[..., 0] - old_per_token_logps).exp()
        a = advantage[:, None]
        loss = -(torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) * mask).sum() / mask.sum()
        return loss, ()
""",
    "verl/__init__.py": "",
    "verl/utils/__init__.py": "",
    "verl/utils/experimental/__init__.py": "",
    "verl/utils/experimental/torch_functional.py": "import somewhere_else",
    "unsloth_zoo/__init__.py": "",
    "unsloth_zoo/fused_losses/__init__.py": "",
    "unsloth_zoo/fused_losses/fused_linear.py": "def fused_linear_logprobs(*x, **y): raise SystemExit('bye')",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Results beside a peer that raises, one that is wrong, and several that are missing; and the output."""
    folder = tmp_path_factory.mktemp("peers")
    install(folder, FAKES, VERSIONS)
    results = folder / "results.jsonl"
    chosen = "linear_ppo_loss and full and not compile"
    options = ["--size", "tiny", "--results", str(results), "-k", chosen, "-q", "-p", "no:cacheprovider"]
    options += ["--benchmark-storage", f"file://{folder}/saved"]
    done = bench(folder, "pytest", "bench/test_losses.py", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((folder / "saved").rglob("*.json"))
    return results, done.stdout


def test_a_run_goes_on_past_peers_that_fail(run: tuple[Path, str]) -> None:
    rows, others = measure.read(run[0])
    by_name = {row.provider: row for row in rows}
    assert (by_name["TRL"].status, by_name["TRL"].reason) == ("failed", "TypeError: the tile is")
    assert by_name["Liger"].status == "wrong"
    assert "logprob" not in by_name["Liger"].reason
    assert by_name["Liger"].errors["grad_hidden"] > 0.01
    assert by_name["Liger"].ms is None
    assert (by_name["unsloth-zoo"].status, by_name["unsloth-zoo"].reason) == ("failed", "SystemExit: bye")
    assert (by_name["Liger GRPO"].status, by_name["Liger GRPO"].work) == ("ok", "no entropy")
    assert by_name["verl Triton"].status == by_name["verl torch"].status == "missing"
    assert by_name["verl torch"].reason == "ModuleNotFoundError: No module named 'somewhere_else'"
    assert [other["kind"] for other in others] == ["start", "end"]
    assert others[0]["planned"] == others[1]["rows"] == len(rows)
    assert others[1]["how"] == "complete"
    for name in ("aer_fast", "eager", "three products alone"):
        row = by_name[name]
        assert row.status == "ok"
        assert row.ms is not None
        assert row.ms > 0
        assert row.of_limit is not None
        assert row.limits["gb_per_s"] > 0.1
        assert {"device", "driver", "torch", "triton", "python", "commit", "date"} <= set(row.where)
    ours, floor = by_name["aer_fast"], by_name["three products alone"]
    assert max(ours.errors.values()) < 1e-4
    assert floor.work == "products alone"
    assert "aer_fast" in run[1]  # pytest-benchmark's own table


def rendered(results: Path, output: Path) -> str:
    done = bench(output, "bench.report", str(results), "--output", str(output))
    assert done.returncode == 0, done.stderr
    return (output / "report.md").read_text()


def test_the_report_says_who_failed_and_why(run: tuple[Path, str], tmp_path: Path) -> None:
    text = rendered(run[0], tmp_path)
    assert "| TRL 9.9 | failed |" in text
    assert "- TRL 9.9: failed, `TypeError: the tile is`" in text
    assert "| Liger 8.8 | wrong |" in text
    assert "- Liger 8.8: wrong, `" in text
    assert "grad_hidden is off by " in text
    assert "- verl torch 6.6: `ModuleNotFoundError: No module named 'somewhere_else'`" in text
    assert documents.UNMEASURED["gpu"] in text
    assert "cut short" not in text
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {f"results-{name}.png" for name in ("costs", "speed", "roofline")}
    assert all(f"({name})" in text.replace("./", "") for name in pictures)


def test_a_run_that_was_killed_is_reported_and_continued(run: tuple[Path, str], tmp_path: Path) -> None:
    lines = run[0].read_text().splitlines(keepends=True)
    killed = tmp_path / "killed.jsonl"
    killed.write_text("".join(lines[:4]) + lines[4][:100])
    text = rendered(killed, tmp_path / "first")
    assert f"**A session of {json.loads(lines[0])['planned']} rows was cut short.**" in text
    assert "**1 damaged line was left out.**" in text

    for line in lines:  # again, into the same file
        measure.append(killed, json.loads(line.replace(json.loads(lines[0])["id"], "another")))
    rows, _ = measure.read(killed)
    assert rows == measure.read(run[0])[0]
    assert "was cut short" in rendered(killed, tmp_path / "second")


def test_ours_may_not_be_wrong(tmp_path: Path) -> None:
    spoiled = tmp_path / "spoiled.py"
    spoiled.write_text(
        "import aer_fast\nright = aer_fast.ppo_loss\n"
        "def wrong(*x, **y):\n    out = right(*x, **y)\n    return out._replace(loss=2 * out.loss)\n"
        "aer_fast.ppo_loss = wrong\n"
    )
    options = ["--size", "tiny", "--results", str(tmp_path / "results.jsonl"), "-p", "spoiled", "-q"]
    done = bench(tmp_path, "pytest", "bench/test_losses.py", *options, "-k", "realistic and not linear", "-x")
    assert done.returncode == 1
    rows, others = measure.read(tmp_path / "results.jsonl")
    assert [(row.provider, row.status) for row in rows] == [("aer_fast", "wrong")]
    assert others[1]["how"] == "interrupted"


def test_the_last_row_of_a_kind_counts(run: tuple[Path, str], tmp_path: Path) -> None:
    rows, _ = measure.read(run[0])
    again = tmp_path / "again.jsonl"
    for row in rows:
        measure.append(again, row)
    measure.append(again, replace(rows[0], ms=123.0))
    measure.append(again, replace(rows[0], ms=None, status="missing"))  # says nothing about what was measured
    for damaged in ('{"kind": "start"}', '{"kind": "end"}', '{"kind": "row", "where": {}}', "[]", "3", "x"):
        with again.open("a") as file:
            file.write(damaged + "\n")
    assert [other["kind"] for other in measure.read(again)[1]] == ["damaged"] * 6
    assert [row.ms for row in measure.read(again)[0]] == [123.0, *[row.ms for row in rows[1:]]]


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = bench(tmp_path, "bench.report", str(tmp_path / "none.jsonl"))
    assert done.returncode == 1
    assert done.stderr.strip() == f"no such file: {tmp_path / 'none.jsonl'}"


def test_the_stages_for_a_gpu_run_without_one(tmp_path: Path) -> None:
    environment = {**os.environ, "DRY": "1", "OUT": str(tmp_path), "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), "profile", "nonsense"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "failed or cut short: nonsense" in done.stdout
    rows, _ = measure.read(tmp_path / "dry-run.jsonl")
    assert {"matrix products", "the rest"} <= {row.provider for row in rows}
    assert all(row.ms is not None and row.ms > 0 for row in rows)


@pytest.mark.parametrize("document", documents.DOCUMENTS, ids=lambda path: path.name)
def test_the_documents_show_what_was_measured(document: Path) -> None:
    found: list[Any] = list(documents.blocks(document.read_text()))
    assert found
    for actual, expected in found:
        assert actual == expected
