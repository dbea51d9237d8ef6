"""The task of a run: generated problems, or questions and answers from a file or a hub.

The latter are checked by the type of their answers, mathematics by math-verify.
"""

import hashlib
import random
from pathlib import Path
from typing import Any

from training.answers import score, vote
from training.config import Config
from training.processes import reason
from training.tables import FORMATS, Row, Table, arrow_rows, read_table
from training.tasks import Mixture, Problem, Scorer, Task, is_held_out


def build_task(config: Config) -> Task:
    """The task of a run. Raises ValueError that names what is unknown or missing."""
    return Mixture(config.task, config.seed) if config.data is None else Rows(config)


class Rows:
    """The rows of a data set, shuffled anew in each pass."""

    def __init__(self, config: Config) -> None:
        assert config.data is not None
        self.digests: dict[str, str] = {}
        rows = self._load(config.data, config.data_config, config.data_split, config)
        held_out = config.eval_data or (config.data if config.eval_split else None)
        if held_out is not None:
            subset = config.data_config if held_out == config.data else None
            self.rows, self.eval_rows = rows, self._load(held_out, subset, config.eval_split, config)
            questions = {_key(row) for row in self.eval_rows}
            self.rows = [row for row in rows if _key(row) not in questions]
        else:
            self.rows = [row for row in rows if not is_held_out(_key(row))]
            self.eval_rows = [row for row in rows if is_held_out(_key(row))]
        self.shown, self.rows = self.rows[: config.shots], self.rows[config.shots :]
        if not self.rows:
            raise ValueError(f"data {config.data} has no row to train on ({len(rows)} rows in all)")
        self.seed = config.seed
        self.classes = tuple(sorted({row.label for row in (*self.rows, *self.eval_rows)}))
        self.scorer: Scorer = math_score
        self.order: tuple[int | None, list[int]] = (None, [])

    def _load(self, name: str, subset: str | None, split: str | None, config: Config) -> list[Problem]:
        fields = [config.question_field, config.answer_field]
        fields += [config.class_field] if config.class_field else []
        path, place = Path(name), " ".join(filter(None, (name, subset, split)))
        if not path.exists() and path.suffix.lower() not in FORMATS:
            table = _from_hub(place, name, subset, split or "train", fields)
        elif subset or split:
            raise ValueError(f"data {name} is a file: data_config and splits are for data sets of the hub")
        else:
            table = read_table(name, fields)
        if missing := [field for field in fields if field not in table.columns]:
            raise ValueError(f"data {place} has no column {missing[0]!r}; it has {', '.join(table.columns)}")
        self.digests[place] = table.digest
        return [_problem(f"data {place}, {row.place}", row, config) for row in table.rows]

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
        return vote(response)


def math_score(problem: Problem, response: str) -> float:
    """1 where the final answer of the response is a right one."""
    return max(score(answer, response) for answer in problem.answers)


def _from_hub(place: str, name: str, subset: str | None, split: str, fields: list[str]) -> Table:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        found = datasets.load_dataset(name, subset, split=split)
        table, values = found.with_format("arrow")[:], list(found)
    except Exception as error:  # of as many kinds as there are formats
        raise ValueError(f"data {place} can't be read: {reason(error.__cause__ or error)}") from error
    rows = list(arrow_rows(table, values, fields))
    # other columns may be pictures, which have no text
    digest = hashlib.sha256("".join(f"{row.texts!r}\n" for row in rows).encode()).hexdigest()
    return Table(found.column_names, rows, digest)


def _problem(where: str, row: Row, config: Config) -> Problem:
    asked, before = row.texts.get(config.question_field), None
    if isinstance(asked, list) and asked and isinstance(asked[0], dict):
        asked, before = _chat(f"{where}: {config.question_field}", row.values[config.question_field])
    question = _text(where, config.question_field, asked)
    right = row.texts.get(config.answer_field)
    answer, *others = (
        _text(where, config.answer_field, value)
        for value in (right if isinstance(right, list) and right else [right])
    )
    label = "all"
    if config.class_field is not None:
        label = _text(where, config.class_field, row.texts.get(config.class_field))
    return Problem(question, answer, label, row.values, tuple(others), before)


def _chat(where: str, messages: list[Any]) -> tuple[str, tuple[dict[str, Any], ...]]:
    """The last turn of a chat, which asks, and the turns before it."""
    turns = []
    for number, message in enumerate(messages, start=1):
        # a column of Parquet has nulls where only other rows' messages have a key
        turn = {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else {}
        if not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise ValueError(
                f"{where} is a chat whose turn {number} is no object with texts role and content"
            )
        for text in (turn["role"], turn["content"]):
            _check_characters(f"{where}, turn {number},", text)
        turns.append(turn)
    if turns[-1]["role"] != "user":
        raise ValueError(f"{where} is a chat that ends with role {turns[-1]['role']!r}, where user asks")
    return turns[-1]["content"], tuple(turns[:-1])


def _key(problem: Problem) -> str:
    """What makes two problems the same: a system turn, and how an answer is written, do not."""
    turns = [turn["content"] for turn in problem.before or () if turn["role"] != "system"]
    return "\n".join([*turns, problem.question])


def _text(where: str, field: str, value: Any) -> str:
    """The text of a cell; what has none is refused, for str() would make one of anything."""
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        raise ValueError(f"{where}: {field} is missing")
    if not isinstance(value, str):
        kinds = {dict: "an object", list: "a list", tuple: "a map", float: f"the number {value}"}
        found = kinds.get(type(value), "binary")
        raise ValueError(f"{where}: {field} is {found}, where a text or a number is expected")
    _check_characters(f"{where}: {field}", value)
    return value


def _check_characters(where: str, text: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{where} has half of a surrogate pair, which is no character")
