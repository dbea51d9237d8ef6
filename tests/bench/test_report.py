"""What a row costs, and what tables and pictures make of rows, by hand."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.patches import Rectangle
from torch import Tensor

from bench import conftest, measure
from bench.cases import (
    AS_IT_IS,
    BARE,
    DISTILL,
    LINEAR_OPS,
    LOGITS_OPS,
    STEP,
    TOKENS_THAT_FIT,
    WHOLE,
    WITHIN,
)
from bench.measure import Row
from bench.operations import Result
from bench.report import __main__ as command
from bench.report import documents, headlines, pictures, tables
from bench.report.results import Results

pytestmark = [pytest.mark.needs("bench", "tyro", "matplotlib"), pytest.mark.host]
WHERE = {
    "device": "A",
    "driver": "",
    "cuda": "",
    "threads": 2,
    "torch": "2",
    "triton": "3",
    "python": "3.11",
    "commit": "abc1234",
    "date": "2026-01-02",
}


def row(provider: str, ms: float, mib: float, op: str = "linear_ppo_loss", **more: Any) -> Row:
    linear = op.startswith(("linear", "optimiser"))
    given: dict[str, Any] = {
        "op": op,
        "shape": {"N": 8, "V": 16} | ({"D": 4} if linear else {}),
        "dtype": "float32",
        "rows": "all",
        "provider": provider,
        "version": "",
        "work": "all",
        "headline": True,
        "ms": ms,
        "ms_iqr": 0.5,
        "rounds": 3,
        "peak_mib": mib,
        "gb_per_s": 3.0,
        "tflop_per_s": 7.0,
        "of_limit": 0.25,
        "where": WHERE,
        "errors": {"loss": 1e-3, "grad_hidden": 2e-5, "grad_weight": 4e-5},
        "limits": {"gb_per_s": 12.0, "tflop_per_s": 28.0},
    }
    return Row(**given | more)


ROWS = [row("eager", 20.0, 40.0), row("ours", 10.0, 5.0), row("half", 4.0, 2.0, work="no entropy")]


def results(rows: list[Row], *others: dict[str, Any]) -> Results:
    return Results(Path("r.jsonl"), rows, list(others))


def test_tables() -> None:
    assert "| ours | 10 ± 0.5 | 5 | 0.50 | 0.12 | 4e-05 |" in headlines.relative_table(ROWS)
    assert "| ours | 10 | 0.5 | 3 | 5 | 7 | 25% | 1e-03 | 4e-05 |" in tables.group_table(ROWS)
    assert "| half (no entropy) |" in tables.group_table(ROWS)
    assert "| 3 | 25% |" in tables.group_table([row("ours", 10.0, 5.0, "ppo_loss")])
    nan = replace(ROWS[1], status="wrong", errors={"grad_hidden": float("nan"), "grad_weight": 1.0})
    assert "| nan |" in tables.group_table([nan])
    assert tables.provenance(WHERE) == "A, 2 threads, torch 2, triton 3, Python 3.11, abc1234, 2026-01-02"


def test_the_table_of_optimiser_steps() -> None:
    rows = [replace(row, op=STEP) for row in ROWS]
    assert "| 8 × 16 | ours | 5 | 0.12 | 10 |" in tables.steps(results(rows))
    assert "| 8 × 16 | ours | 5 | – | 10 |" in tables.steps(results(rows[1:]))  # eager was not reached
    assert tables.steps(results(ROWS)) == "Not measured."


def step(provider: str, T: int, ms: float | None, mib: float | None, **more: Any) -> Row:
    return replace(row(provider, 1.0, 1.0, STEP), shape={"T": T, "N": T, "V": 9}, ms=ms, peak_mib=mib, **more)


def test_the_table_of_steps_by_tokens() -> None:
    full = {"status": "out of memory", "rows": "Q's"}
    rows = [step("ours", 1000, 10.0, 2048.0, rows="Q's"), step("eager", 1000, 20.0, 4096.0, rows="Q's")]
    rows += [step("ours", 4000, 40.0, 3072.0, rows="Q's"), step("eager", 4000, None, None, **full)]
    rows += [step("TRL", 4000, None, None, status="missing", rows="Q's")]
    text = tables.in_use(results(rows).groups)
    assert "One optimiser step of a model of Q's shape, V = 9, float32" in text
    assert "| 1,000 | ours | 10 ± 0.5 | 2 | 0.50 | 0.50 |" in text
    assert "| 1,000 | eager | 20 ± 0.5 | 4 | 1.00 | 1.00 |" in text
    assert "| 4,000 | ours | 40 ± 0.5 | 3 | – | – |" in text  # nothing to compare with
    assert "| 4,000 | eager | out of memory | – | – | – |" in text
    assert "TRL" not in text
    assert "| 1,000 × 9 | ours | 2,048 | 0.50 | 10 |" in tables.steps(results(rows))
    assert tables.in_use(results([replace(x, op=STEP) for x in ROWS]).groups) == ""  # of one length alone


def fitting(provider: str, **found: float) -> Row:
    some = row(provider, 7.0, 5120.0, TOKENS_THAT_FIT, rows="Q's", shape={"V": 9, "D": 4})
    return replace(some, found={"cap_gib": 77.0, **found})


def test_the_table_of_what_fits() -> None:
    rows = [fitting("ours", tokens=9000, too_many=9500), fitting("eager", tokens=1000, too_many=1050)]
    rows += [fitting("endless", tokens=64_000), replace(fitting("none"), status="missing", found={})]
    rows += [replace(fitting("x", tokens=0, too_many=5), status="out of memory", ms=None, peak_mib=None)]
    text = tables.in_use(results(rows).groups)
    assert "of Q's shape, V = 9, float32, within 77 GiB of memory" in text
    assert "| ours | 9,000 | 9,500 | 9.00 | 7 | 5 |" in text
    assert "| endless | 64,000 | not reached | 64.00 | 7 | 5 |" in text
    assert "| x | 0 | 5 | – | – | – |" in text
    assert "none" not in text


def test_the_table_of_a_call_and_its_products() -> None:
    op = WITHIN + "linear_ppo_loss"
    rows = [row("row kernel", 1.0, 0.0, op), row("matrix products", 3.0, 0.0, op), row(WHOLE, 6.0, 0.0, op)]
    rows += [replace(row(BARE, 4.0, 0.0, op), found={"ours_over_it": 1.5})]
    text = tables.within(results(rows).groups)
    assert text.startswith("linear_ppo_loss, N = 8")
    assert f"| {WHOLE} | 6 ± 0.5 | 7 | 25% | – |" in text
    assert f"| {BARE} | 4 ± 0.5 | 7 | 25% | 1.50 |" in text
    assert "| row kernel | 1 | 25% |" in text  # of what the profiler saw
    assert tables.within(results(ROWS).groups) == ""
    assert BARE not in tables.within(results(rows[:2]).groups)


def test_the_table_of_choices() -> None:
    names = {AS_IT_IS: 12.0, "wide": 10.0, "narrow": 11.0}
    rows = [row(name, ms, 1.0, "product logits") for name, ms in names.items()]
    rows += [replace(rows[0], provider="broken", ms=None, status="wrong", reason="it is off")]
    rows += [row(AS_IT_IS, 5.0, 1.0, "loops of linear_ppo_loss"), row("4 / 8 warps", 6.0, 1.0, "tiles of x")]
    text = tables.choices(results(rows).groups)
    first = "product logits, N = 8, V = 16, float32"
    assert f"| {first} | 12 ± 0.5 | wide | 10 ± 0.5 | 1.20 | 25% | narrow: 11 |" in text
    assert f"| 5 ± 0.5 | {AS_IT_IS} | 5 ± 0.5 | 1.00 | 25% | – |" in text
    assert "| – | 4 / 8 warps | 6 ± 0.5 | – | 25% | – |" in text
    assert tables.choices(results(ROWS).groups) == ""
    whole = documents.everything(results(rows), ".")
    assert "### Choices" in whole
    assert "### product logits" not in whole
    assert f"- {first}, broken: wrong, `it is off`" in whole


def test_the_page_has_what_was_measured_and_no_more() -> None:
    headings = ("### In use", "### Beside the products alone", "### Choices")
    assert not any(heading in documents.everything(results(ROWS), ".") for heading in headings)
    rows = [step("ours", 9, 1.0, 1.0), fitting("ours", tokens=9), row(WHOLE, 6.0, 0.0, WITHIN + "x")]
    text = documents.everything(results([*ROWS, *rows, row(AS_IT_IS, 1.0, 1.0, "product x")]), ".")
    assert all(heading in text for heading in headings)
    assert f"### {TOKENS_THAT_FIT}" not in text
    assert f"### {WITHIN}" not in text
    assert f"### {STEP}" in text  # its errors


def test_the_table_of_silent_rows() -> None:
    forward = row("aer_fast", 4.0, 1.0, "linear_token_stats forward")
    silent = [row("aer_fast", ms, 1.0, rows=f"{k}% silent") for k, ms in ((0, 10.0), (30, 7.0))]
    assert "| 30% | 7 ± 0.5 | 0.50 |" in tables.silent(results([forward, *silent]))
    for partial in (silent, [forward, silent[1]], [forward]):
        assert tables.silent(results(partial)) == "Not measured."


def test_rows_in_bfloat16_of_a_cpu_have_a_section_that_others_do_not_replace() -> None:
    half = row("narrow", 1.0, 2.0, dtype="bfloat16")
    both, gpu = results([*ROWS, half]), results([replace(half, where=WHERE | {"cuda": "13"})])
    assert "narrow" in tables.bfloat16(both)
    assert "eager" not in tables.bfloat16(both)
    assert "narrow" not in documents.everything(both, "x")
    assert "narrow" in documents.everything(gpu, "x")
    shows = documents.RENDERERS["bfloat16"][1]
    assert [shows(x) for x in (both, gpu, results(ROWS))] == [True, False, False]


def test_what_went_wrong_is_said() -> None:
    later = replace(ROWS[0], where={**WHERE, "commit": "def5678"})
    start = {"kind": "start", "id": "a", "planned": 9, "time": "", "where": WHERE}
    end = {"kind": "end", "id": "a", "how": "interrupted", "rows": 3}
    text = documents.everything(results([later, *ROWS[1:]], start, end), ".")
    assert "Measured at several commits: abc1234" in text
    assert "A session of 9 rows was interrupted after 3." in text
    beside = {**start, "id": "b", "planned": 7}  # of two at a time, one was cut short
    assert results(ROWS, start, beside, end).trouble()[1] == "A session of 7 rows was cut short."
    assert results(ROWS, start, {**end, "how": "complete"}).trouble() == []


def test_bars_say_how_many_times_faster() -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    pictures.draw_bars([ROWS], figure)
    panel: Any = figure.axes[0]
    names = [text.get_text() for text in panel.get_yticklabels()]
    widths: dict[str, float] = dict(zip(names, (bar.get_width() for bar in panel.patches)))
    assert widths == {"eager": 1.0, "ours": 2.0, "half": 5.0}
    assert "r-speed.png" not in pictures.names([ROWS[1:]], "r")  # nothing to compare with


def test_the_headlines_have_a_divergence_too() -> None:
    op = f"{DISTILL}reverse_kl"
    beside = [replace(x, op=op, shape={**x.shape, "D_ref": 6}) for x in ROWS]
    text = headlines.headline(results([*beside, *ROWS]))
    first = text.index("linear_ppo_loss, N = 8, V = 16, D = 4, float32, forward and backward:")
    assert first < text.index(f"{op}, N = 8, V = 16, D = 4, D_ref = 6, float32, forward and backward:")
    assert text.count("| ours | 10 ± 0.5 | 5 | 0.50 |") == 2


def test_the_readme_has_ours_and_the_fastest_others() -> None:
    others = [row(name, ms, 1.0) for name, ms in (("slow", 9.0), ("b", 6.0), ("a", 5.0), ("c", 7.0))]
    less = [row("partial", 1.0, 1.0, work="no entropy"), row("floor", 2.0, 1.0, work="products alone")]
    ours = [row("aer_fast", 10.0, 5.0), row("aer_fast, in place", 11.0, 5.0), row("eager", 20.0, 40.0)]
    failed = replace(others[0], provider="failed", status="wrong", ms=None)
    group = [others[0], *less, *ours, failed, *others[1:]]
    shown = ["aer_fast", "aer_fast, in place", "eager", "a", "b", "c"]
    assert [one.provider for one in headlines.few(group)] == shown
    beside = [replace(one, op=f"{DISTILL}reverse_kl") for one in ours]
    text = headlines.shortened(results([*group, *beside]))
    assert text.count("forward and backward") == 1  # no divergence
    assert "| aer_fast | 10 ± 0.5 | 5 | 0.50 | 0.12 | 4e-05 |" in text


def test_the_picture_of_costs_has_time_and_memory() -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    floor = row("three products alone", 9.0, 4.0, work="products alone", version="1")
    pictures.draw_costs([*ROWS, floor], figure)  # "half" does less
    time, memory = (
        [bar.get_width() for bar in panel.patches if isinstance(bar, Rectangle)] for panel in figure.axes
    )
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [
        "eager",
        "ours",
        "three products alone 1",
    ]
    assert time == [20.0, 10.0, 9.0]
    assert memory == [40.0, 5.0, 4.0]
    assert "r-costs.png" not in pictures.names([[row("ours", 1.0, 1.0, "ppo_loss")]], "r")
    assert documents.picture(results(ROWS), "docs/x").endswith("](docs/x/r-costs.png)")


def test_a_roofline_shows_every_operation() -> None:
    from matplotlib.figure import Figure

    ops = [f"operation {k}" for k in range(9)]
    figure = Figure()
    pictures.draw_roofline([[row("ours", 10.0, 5.0, op)] for op in ops], figure)
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert set(ops) <= set(labels)


def test_the_newest_of_each_machine_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    for k, (name, cuda) in enumerate(zip("dcba", ["", "", "13", "13"])):
        path = tmp_path / f"{name}.jsonl"
        where = {**WHERE, "cuda": cuda}
        start = {"kind": "start", "id": "", "planned": 1, "time": f"2026-01-0{1 + k}", "where": where}
        measure.append(path, start)
        for op in (*LOGITS_OPS, *LINEAR_OPS):
            measure.append(path, row("eager", k + 1.0, 1.0, op, where=where))
    partial = tmp_path / "partial.jsonl"  # the newest, of one operation alone
    measure.append(partial, {**start, "time": "2026-02-01", "where": WHERE})
    measure.append(partial, row("eager", 9.0, 1.0, f"{DISTILL}reverse_kl"))
    page = tmp_path / "page.md"
    block = "<!-- bench: headline of {0}, from nothing -->\nold\n<!-- end -->\n"
    beside = block.replace("headline", "teacher") + block.replace("headline", "everything")
    page.write_text(block.format("cpu") + "between\n" + block.format("gpu") + beside.format("cpu"))
    monkeypatch.setattr(documents, "DOCUMENTS", (page,))
    monkeypatch.setattr(documents, "PICTURES", tmp_path / "pictures")
    monkeypatch.setattr(command, "ROOT", tmp_path)
    command.main(output=tmp_path / "out", publish=True)
    text = page.read_text()
    assert "headline of cpu, from c.jsonl" in text
    assert "headline of gpu, from a.jsonl" in text
    assert "everything of cpu, from c.jsonl" in text
    assert "teacher of cpu, from partial.jsonl" in text
    assert "\nbetween\n" in text
    assert "old" not in text
    assert list((tmp_path / "pictures").glob("*.png"))
    assert all(actual == expected for actual, expected in documents.blocks(text))


def test_rows_of_another_kind_stay(tmp_path: Path) -> None:
    first = ROWS[0]
    kinds = [
        first,
        replace(first, dtype="bfloat16"),
        replace(first, rows="realistic"),
        replace(first, shape={"N": 9}),
    ]
    for one in kinds:
        measure.append(tmp_path / "r.jsonl", one)
    assert measure.read(tmp_path / "r.jsonl")[0] == kinds


# ---- one row


class Benchmark:
    """pytest-benchmark's, as far as it is used."""

    stats: Any = None
    _timer: Any = None

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, step: Any, setup: Any, rounds: int) -> None:
        for _ in range(rounds):
            setup()
            step()
        found = {"median": 2e-3, "iqr": 1e-3, "mean": 9.0, "max": 9.0, "stddev": 9.0, "rounds": rounds}
        self.stats = SimpleNamespace(stats=SimpleNamespace(**found))


class Judge:
    """Runs one provider; its rows are kept."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def __call__(
        self,
        step: Any = lambda x: Result(),
        errors: dict[str, float] | None = None,
        ours: bool = True,
        dtype: torch.dtype = torch.float32,
        found: Any = dict,
    ) -> Row:
        stash = {conftest.RECORD: SimpleNamespace(add=self.rows.append, impl="auto")}
        run = conftest.Run(Benchmark(), SimpleNamespace(stash=stash))
        identity = {
            "op": "x",
            "shape": {"N": 1},
            "rows": "all",
            "provider": "p",
            "version": "",
            "work": "all",
        }
        work = conftest.Work(lambda: (torch.zeros(1),), step, lambda result: errors or {}, (4e6, 1e9), found)
        run(identity, "", lambda: work, dtype=dtype, ours=ours)
        return self.rows[-1]


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Judge:
    rates = {torch.float32: 1.0, torch.bfloat16: 4.0}
    monkeypatch.setattr(conftest, "DEVICE", "cpu")
    monkeypatch.setattr(
        measure, "limits", lambda device, dtype: {"gb_per_s": 10.0, "tflop_per_s": rates[dtype]}
    )
    return Judge()


def test_what_a_row_says(judge: Judge) -> None:
    one = judge(errors={"loss": 1e-6})
    costs = (one.ms, one.ms_iqr, one.gb_per_s, one.tflop_per_s, one.of_limit, one.rounds)
    assert costs == (2.0, 1.0, 2.0, 0.5, 0.5, conftest.ROUNDS["cpu"][1])
    assert one.errors == {"loss": 1e-6}
    assert judge(dtype=torch.bfloat16).of_limit == 0.2


def test_a_short_budget_takes_the_fewest_rounds(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def pedantic(self: Benchmark, step: Any, setup: Any, rounds: int) -> None:
        taken.append(rounds)

    monkeypatch.setattr(Benchmark, "pedantic", pedantic)
    run: Any = conftest.Run(Benchmark(), SimpleNamespace(stash={conftest.RECORD: SimpleNamespace()}))
    run.identity = {"op": "x", "shape": {}, "rows": "all", "provider": "p", "dtype": "d"}
    watched: list[int] = []

    def step() -> Result:
        watched.append(taken[-1])
        return Result()

    work = conftest.Work(tuple, step, lambda result: {}, None)
    for budget in (1.5, conftest.SHORT):
        run.time(work, 0.25, budget)
    assert taken == [6, 3]
    assert watched == [6, 6, 6, 3]  # memory in fewer


def test_a_row_says_what_else_was_found(judge: Judge) -> None:
    assert judge().found == {}
    assert judge(found=lambda: {"chunk": 3.0}).found == {"chunk": 3.0}


def test_every_round_gets_fresh_arguments(judge: Judge) -> None:
    seen = []

    def step(x: Tensor) -> Result:
        seen.append(float(x))
        x.add_(1)
        return Result()

    judge(step)
    assert not any(seen)


def outcome(judge: Judge, **arguments: Any) -> BaseException:
    """An xfail inside pytest.raises would pass the test, hence this."""
    try:
        judge(**arguments)
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("ours", [True, False])
def test_what_fails_the_run(judge: Judge, ours: bool) -> None:
    def no(_: Tensor) -> Result:
        raise TypeError("no")

    def full(_: Tensor) -> Result:
        raise torch.OutOfMemoryError("no")

    assert isinstance(outcome(judge, step=no, ours=ours), TypeError if ours else pytest.xfail.Exception)
    assert judge.rows[-1].status == "failed"
    wrong = outcome(judge, errors={"loss": 1.0}, ours=ours)
    assert isinstance(wrong, pytest.fail.Exception)
    assert isinstance(wrong, pytest.xfail.Exception) != ours
    assert (judge.rows[-1].status, judge.rows[-1].ms) == ("wrong", None)
    assert isinstance(outcome(judge, step=full, ours=ours), pytest.xfail.Exception)
    assert judge.rows[-1].status == "out of memory"


def test_an_interruption_is_written_down(tmp_path: Path) -> None:
    seen: list[bool] = []
    record = SimpleNamespace(end=seen.append)
    session: Any = SimpleNamespace(config=SimpleNamespace(stash={conftest.RECORD: record}))
    for status in (2, 0):
        hook: Any = conftest.pytest_sessionfinish(session, status)
        next(hook)
        hook.close()
    assert seen == [True, False]
