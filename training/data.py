"""The task of a run: generated problems, or questions and answers from a file or a hub.

The latter are checked by math-verify.
"""

import random
from pathlib import Path
from typing import Any

from training.config import Config
from training.processes import reason
from training.tasks import Mixture, Problem, Scorer, Task, is_held_out

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def build_task(config: Config) -> Task:
    """The task of a run. Raises ValueError that names what is unknown or missing."""
    return Mixture(config.task, config.seed) if config.data is None else Rows(config)


class Rows:
    """The rows of a data set, shuffled anew in each pass."""

    def __init__(self, config: Config) -> None:
        assert config.data is not None
        rows = _load(config.data, config)
        if config.eval_data is not None:
            self.rows, self.eval_rows = rows, _load(config.eval_data, config)
            questions = {row.question for row in self.eval_rows}
            self.rows = [row for row in rows if row.question not in questions]
        else:
            self.rows = [row for row in rows if not is_held_out(row.question)]
            self.eval_rows = [row for row in rows if is_held_out(row.question)]
        self.shown, self.rows = self.rows[: config.shots], self.rows[config.shots :]
        if not self.rows:
            raise ValueError(f"data {config.data} has no row to train on ({len(rows)} rows in all)")
        self.seed = config.seed
        self.classes = tuple(sorted({row.label for row in (*self.rows, *self.eval_rows)}))
        self.scorer: Scorer = math_score
        self.order: tuple[int | None, list[int]] = (None, [])

    def training(self, index: int) -> Problem:
        epoch, place = divmod(index, len(self.rows))
        if self.order[0] != epoch:
            order = list(range(len(self.rows)))
            random.Random(f"order {self.seed} {epoch}").shuffle(order)
            self.order = epoch, order
        return self.rows[self.order[1][place]]

    def held_out(self, count: int) -> list[Problem]:
        rows = {name: [row for row in self.eval_rows if row.label == name] for name in self.classes}
        return [row for name in self.classes for row in rows[name][:count]]

    def examples(self, count: int) -> list[Problem]:
        return self.shown[:count]

    def vote(self, response: str) -> str:
        import math_verify

        found = math_verify.parse(response)
        return str(found[0]) if found else response.strip()


def math_score(problem: Problem, response: str) -> float:
    """1 where math-verify finds the response's answer equal to the right one."""
    import math_verify

    right = math_verify.parse(f"\\boxed{{{problem.answer}}}")
    return float(math_verify.verify(right, math_verify.parse(response)))


def _load(name: str, config: Config) -> list[Problem]:
    import datasets

    path = Path(name)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if path.suffix in FORMATS and not path.is_file():
        raise ValueError(f"data {name}: no such file")
    if path.exists() and path.suffix not in FORMATS:
        raise ValueError(f"data {name} must be one of {', '.join(FORMATS)} or a name on the hub")
    if path.is_file() and not path.read_bytes()[:4096].strip():
        raise ValueError(f"data {name} is empty")
    try:
        if path.suffix in FORMATS:
            table = datasets.load_dataset(FORMATS[path.suffix], data_files=str(path), split="train")
        else:
            table = datasets.load_dataset(name, split="train")
    except Exception as error:  # of as many kinds as there are formats
        raise ValueError(f"data {name} can't be read: {reason(error.__cause__ or error)}") from error
    fields = [config.question_field, config.answer_field]
    fields += [config.class_field] if config.class_field else []
    if missing := [field for field in fields if field not in table.column_names]:
        raise ValueError(f"data {name} has no column {missing[0]!r}; it has {', '.join(table.column_names)}")
    return [_problem(name, number, row, config) for number, row in enumerate(table, start=1)]


def _problem(name: str, number: int, row: dict[str, Any], config: Config) -> Problem:
    question, answer = row[config.question_field], row[config.answer_field]
    for field, value in ((config.question_field, question), (config.answer_field, answer)):
        if value is None or not str(value).strip():
            raise ValueError(f"data {name}, row {number}: {field} is missing")
    label = "all" if config.class_field is None else str(row[config.class_field])
    return Problem(str(question), str(answer), label, dict(row))
