"""What other people's rewards, names, files and disks do to the lines, tables and pictures of a command."""

import asyncio
import json
import os
import re
import resource
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.helpers.trainers import small
from training import plot
from training.checkpoint import Folder
from training.config import Config
from training.files import read_json, read_rows, write_file, write_folder, write_text
from training.processes import DEFECT, fault_of, naming, reason
from training.record import Recorder
from training.rewards import Rewards, load_reward
from training.tables import read_table
from training.tasks import Problem
from training.train import train

pytestmark = pytest.mark.needs("training")
PROBLEM = Problem("?", "1", "all")
CLASSES = (r"costs $\foo$", "_hidden", "[bold]a[/bold] | b", "x_^$")
ROW = {"step": 1, "entropy": 1.0, "target": 0.5, "accuracy": 0.2, "alpha": 0.1}


class Odd(BaseException):
    """An exception that pickle can't take to another process."""

    def __init__(self) -> None:
        super().__init__(lambda: None)


class Mute(Exception):
    def __str__(self) -> str:
        raise Odd


def own_reward(problem: Problem, response: str) -> float:
    """Each response is a way to fail."""
    if response == "exit 0":
        os._exit(0)
    raises = {
        "cancelled": asyncio.CancelledError("c"),
        "closed": GeneratorExit("g"),
        "interrupt": KeyboardInterrupt("k"),
        "exit": SystemExit(3),
        "odd": Odd(),
        "mute": Mute(),
        "half": ValueError("half \ud800"),
    }
    if response in raises:
        raise raises[response]
    return 1.0


WAYS = {
    "cancelled": "raised CancelledError: c",
    "closed": "raised GeneratorExit: g",
    "exit": "raised SystemExit: 3",
    "odd": "raised Odd: <function Odd.__init__.<locals>.<lambda> at 0x",
    "mute": "raised Mute: Mute",
    "half": "raised ValueError: half \\ud800",
}
IN_A_PROCESS = {"interrupt": "raised KeyboardInterrupt: k", "exit 0": "ended its process with exit code 0"}


@pytest.mark.parametrize(("workers", "ways"), [(0, WAYS), (1, WAYS | IN_A_PROCESS)])
def test_whatever_a_reward_raises_is_said(workers: int, ways: dict[str, str]) -> None:
    rewards = Rewards("tests.training.test_messages:own_reward", workers, timeout=30.0)
    try:
        scores = rewards.score([PROBLEM] * (len(ways) + 1), [*ways, "good"])
    finally:
        rewards.close()
    assert scores.values == [0.0] * len(ways) + [1.0]
    for failure, way in zip(scores.failures, ways.values(), strict=True):
        assert failure.startswith(f"reward tests.training.test_messages:own_reward {way}")


def test_ctrl_c_ends_a_reward_in_the_run_itself() -> None:
    with pytest.raises(KeyboardInterrupt):
        Rewards(own_reward, 0, 1.0).score([PROBLEM], ["interrupt"])


@pytest.mark.parametrize("raises", ["asyncio.CancelledError('c')", "GeneratorExit('c')"])
def test_whatever_its_import_raises_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raises: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    name = f"reward_{abs(hash(raises))}"
    (tmp_path / f"{name}.py").write_text(f"import asyncio\nraise {raises}\n")
    with pytest.raises(ValueError, match=f"reward '{name}:f' can't be loaded: .*: c"):
        load_reward(f"{name}:f")
    (tmp_path / "interrupts.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_reward("interrupts:f")


def test_a_row_that_no_process_takes_is_named() -> None:
    rewards = Rewards(own_reward, 1, 1.0)
    deep = json.loads("[" * 600 + "]" * 600)
    try:
        with pytest.raises(ValueError, match="reward_workers: a row is no data for another process"):
            rewards.score([replace(PROBLEM, metadata={"deep": deep})], [""])
    finally:
        rewards.close()


def test_reasons_are_texts_that_can_be_written(tmp_path: Path) -> None:
    assert reason(Mute()) == "Mute"
    assert reason(OSError(1, Mute())) == "PermissionError"
    assert reason(OSError(2, "no \ud800", "/f\udcff")) == "/f\\udcff: no \\ud800"

    def defect() -> None:
        raise RuntimeError("\ud800")

    assert str(fault_of(defect, tmp_path)).startswith("internal error: RuntimeError: \\ud800;")
    assert "\\ud800" in (tmp_path / DEFECT).read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"^a can't be read: line 3$"), naming("a can't be read"):
        raise ValueError("a can't be read: line 3")


ASCII = """
from pathlib import Path
from rich.console import Console
from training.processes import command

def work(asked):
    print("α")
    Console().print(asked)

command(lambda: print("ρ") or "τ → \\udcff", work, "", lambda asked: Path("/dev/null"))
"""


def test_what_a_terminal_can_not_show_stops_nothing() -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", ASCII], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "?\n?\n? ? ?\n", "")


def test_a_warning_is_no_markup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    recorder = Recorder(Folder(Config(output=tmp_path / "run")), Config(logger=()), 0, quiet=False)
    text = "[bold]a[/] :cat: \\["
    recorder.step(ROW | {"reward": 0.0, "warnings": [text]}, {"tokens_per_second": 1.0})
    recorder.close()
    assert f"step 1: {text}" in capsys.readouterr().out


class Drawn:
    """The texts of the last figure."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def keep(figure: Any, path: Path) -> None:
            self.figure = figure
            draw(figure, path)

        draw = plot._draw
        monkeypatch.setattr(plot, "_draw", keep)

    def legend(self, axis: int) -> list[str]:
        return [text.get_text() for text in self.figure.axes[axis].get_legend().get_texts()]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[Drawn]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error")
        yield Drawn(monkeypatch)


def metrics(run: Path, *lines: str) -> Path:
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    return run


def test_names_are_drawn_as_they_are(tmp_path: Path, drawn: Drawn, monkeypatch: pytest.MonkeyPatch) -> None:
    row = json.dumps(ROW | {f"coefficient/{label}": 1.0 for label in CLASSES})
    runs = [metrics(tmp_path / name, row) for name in (r"$\run$", "_run")]
    plot.main(plot.Plot(tuple(runs), tmp_path / "a.png"))
    assert drawn.legend(0) == [r"$\run$", "_run"]
    assert drawn.legend(3) == sorted(CLASSES)
    monkeypatch.chdir(runs[1])
    plot.main(plot.Plot((Path(),), tmp_path / "a.png"))
    assert drawn.legend(0) == ["_run"]

    scores = {"pass@1": 0.5, "pass@2": 0.6}
    result = {"classes": dict.fromkeys(CLASSES, scores)}
    plot.draw_evaluations({r"$\run$": result, "_run": result}, tmp_path / "b.png")
    assert drawn.legend(0) == [r"$\run$", "_run"]
    assert [axis.get_title() for axis in drawn.figure.axes] == list(CLASSES)
    ticks = [text.get_text() for axis in drawn.figure.axes for text in axis.get_xticklabels(which="both")]
    assert ticks == ["1", "2"] * len(CLASSES)


def test_names_stand_in_tables_as_they_are(tmp_path: Path) -> None:
    right = {"right": [1, 2], "samples": 2, "pass@1": 0.5, "pass@2": 0.6}
    classes = {label.replace("a", "a :cat:"): right for label in CLASSES}
    for name in ("initial", "aer"):
        metrics(tmp_path / f"{name}-0", json.dumps(ROW))
        scores = {"classes": classes, "overall": {"entropy": 1.0}}
        (tmp_path / f"{name}-0" / "scores.json").write_text(json.dumps(scores))
    table = StringIO()
    plot.report(tmp_path, ("aer",), (0,), 2, Console(file=table, width=300))
    assert all(label in table.getvalue() for label in classes)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert r"\[bold]a :cat:\[/bold] \| b: pass@1" in lines[0]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {len(CLASSES) + 3}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("3", "can't be read: line 2 is no object"),
        ('{"step": 1', "can't be read: line 2: Expecting ',' delimiter"),
        ("[" * 100_000, "can't be read: line 2: maximum recursion depth"),
        (json.dumps(ROW | {"step": "1"}), 'can\'t be drawn: line 2: step is "1"'),
        (json.dumps(ROW | {"alpha": None}), "can't be drawn: line 2: alpha is null"),
        (json.dumps(ROW | {"alpha": 10**400}), "can't be drawn: line 2: alpha is 1000"),
        (json.dumps(ROW | {"coefficient/a": []}), "can't be drawn: line 2: coefficient/a is []"),
        ('{"step": 1}', "can't be drawn: line 2: has no entropy"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    first = json.dumps(ROW | {"note": "\u2028"}, ensure_ascii=False)  # the end of a line to str alone
    run = metrics(tmp_path / "run", first, line)
    said = fault_of(lambda: plot.main(plot.Plot((run,), tmp_path / "a.png")), tmp_path)
    assert said is not None
    assert said.startswith(f"error: {run}/metrics.jsonl {message}")
    assert "line 1" not in said


def test_a_resumed_run_names_a_damaged_line_once(tmp_path: Path) -> None:
    run = metrics(tmp_path / "run", json.dumps(ROW), "{")
    (run / "config.json").write_text("{}")
    folder = object.__new__(Folder)
    folder.path = run
    said = fault_of(lambda: folder.cut_back(1), tmp_path)
    assert said is not None
    assert said.startswith(f"error: {run}/metrics.jsonl can't be read: line 2: Expecting property name")


def test_a_defect_of_plot_is_kept_with_the_run(tmp_path: Path) -> None:
    run = metrics(tmp_path / "run", json.dumps(ROW))
    (tmp_path / "sitecustomize.py").write_text("import matplotlib\ndel matplotlib.colormaps\n")
    command = [sys.executable, "-m", "training.plot", str(run), "--output", str(tmp_path / "a.png")]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stderr.startswith("internal error: ")
    assert (run / DEFECT).exists()


def test_json_beyond_pythons_depth_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=f"{path} can't be read: maximum recursion depth"):
        read_json(path)
    path.write_text("{}\n{")  # half a line
    assert read_rows(path) == [{}]


@contextmanager
def full(size: int) -> Iterator[None]:
    """No file can have more bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_what_can_not_be_written_is_named(tmp_path: Path) -> None:
    path, run = tmp_path / "a.png", metrics(tmp_path / "run", json.dumps(ROW))
    too_large = f"^{path} can't be written: File too large$"
    with full(100):
        for work in (
            lambda: write_text(path, "x" * 1000),
            lambda: write_folder(path, lambda new: new.write_text("x" * 1000)),
            lambda: plot.main(plot.Plot((run,), path)),
        ):
            with pytest.raises(OSError, match=too_large):
                work()
    with pytest.raises(OSError, match=f"^{run} can't be written: Is a directory$"):
        write_file(run, lambda new: new.write_text(""))
    said = fault_of(lambda: write_text(run / "metrics.jsonl" / "x", ""), tmp_path)
    assert said == f"error: {run / 'metrics.jsonl'}: File exists"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_a_full_disk_ends_tensorboard_in_a_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    config = Config(output=tmp_path / "run", logger=("tensorboard",))
    recorder = Recorder(Folder(config), config, 0, quiet=True)
    with full(100):
        said = fault_of(
            lambda: [recorder.sinks[0]({"a": 1.0, "b": 2.0}, step) for step in range(9)], tmp_path
        )
    where = tmp_path / "run" / "tensorboard"
    assert said == f"error: logger 'tensorboard': {where} takes no events: File too large"
    assert capfd.readouterr().err == ""

    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_a_full_disk_is_named_before_the_first_step(tmp_path: Path, cache: Path) -> None:
    config = small(cache, tmp_path / "run", steps=1)
    train(replace(config, output=tmp_path / "before"), quiet=True)  # makes the model
    with full(100):
        said = fault_of(lambda: train(config, quiet=True), tmp_path)
    assert said == f"error: {config.output}/config.json can't be written: File too large"


def test_columns_of_parquet_are_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    maps = pyarrow.array([[("a", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    parquet.write_table(pyarrow.table({"question": ["q"], "answer": maps}), path)
    assert read_table(str(path), ["answer"]).rows[0].texts == {"answer": {"a": 1}}
    late = pyarrow.array([10**8], pyarrow.int32()).cast(pyarrow.date32())
    parquet.write_table(pyarrow.table({"question": ["q"], "when": late}), path)
    with pytest.raises(ValueError, match=f"data {path} can't be read: column 'when': "):
        read_table(str(path), ["question"])
