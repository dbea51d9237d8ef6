"""Data files: the characters of the file, the types of the row, and what is refused."""

import datetime
import json
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.helpers.trainers import small
from training.config import Config
from training.data import Rows, build_task
from training.files import read_json, read_rows, write_text
from training.rollout import encode
from training.tasks import Problem
from training.train import train

pytestmark = pytest.mark.needs("training", "datasets", "pyarrow")


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., list[Problem]]:
    """The problems of a file of this name and content, in its order."""

    def problems(name: str, content: bytes | str, **settings: Any) -> list[Problem]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return read_all(path, **settings)

    return problems


def read_all(path: Path, **settings: Any) -> list[Problem]:
    with TemporaryDirectory() as folder:
        return Rows(Config(data=other(Path(folder)), eval_data=str(path), **settings)).eval_rows


def other(folder: Path) -> str:
    """A file for the rest of a task."""
    path = folder / "other.jsonl"
    path.write_text('{"question": "?", "answer": "0", "level": "0", "list": "0", "when": "0"}\n')
    return str(path)


Read = Callable[..., list[Problem]]


WRITTEN = [
    '"2024-01-05"',
    '"2024-01-05T10:00:00Z"',
    '"12:30"',
    '"007"',
    '"1e5"',
    '"1.0"',
    '"NA"',
    '"None"',
    '"null"',
    '"NaN"',
    '"nan"',
    '"true"',
    '" padded "',
    '"line\\u2028sep\\u0085\\u000b"',
    '"line\u2028and\u0085another"',
    "15",
    "2.5",
    "1e5",
    "1E+05",
    "1.0",
    "1.10",
    "-0",
    "-0.0",
    "0.1",
    "1e400",
    "123456789012345678901234567890",
    "3.14159265358979323846",
    "true",
    "false",
]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "array.json", "array.jsonl"])
def test_json_keeps_the_characters_of_every_cell(read: Read, name: str) -> None:
    """Whatever the neighbours are: they all stand in one column."""
    lines = [f'{{"question": "q{k}", "answer": {a}, "level": {a}}}' for k, a in enumerate(WRITTEN)]
    text = "\n".join(lines) if name.startswith("rows") else f"[{', '.join(lines)}]"
    expected = [json.loads(text) if text.startswith('"') else text for text in WRITTEN]
    found = {p.question: p for p in read(name, text, class_field="level")}
    for k, right in enumerate(expected):
        assert (found[f"q{k}"].answer, found[f"q{k}"].label) == (right, right)
        typed = found[f"q{k}"].metadata["answer"]
        assert (typed, type(typed)) == (json.loads(WRITTEN[k]), type(json.loads(WRITTEN[k])))


def test_a_question_may_be_a_number_and_its_characters_are_asked(read: Read) -> None:
    found = read("rows.jsonl", '{"question": 1.50, "answer": 1}\n{"question": "x", "answer": 2}\n')
    assert [p.question for p in found] == ["1.50", "x"]


def test_other_columns_of_json_reach_a_reward_as_they_are(read: Read) -> None:
    row = {"when": "2024-01-05", "n": 3, "x": 1.5, "ok": True, "no": None, "deep": {"a": [1, {"b": "c"}]}}
    lines = [{"question": "a", "answer": "1"} | row, {"question": "b", "answer": "2", "more": [1]}]
    found = read("rows.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    assert [p.metadata for p in found] == lines
    assert [type(found[0].metadata[name]) for name in ("n", "x", "ok")] == [int, float, bool]


CELLS = [
    "007",
    "15",
    "2.5",
    "1e5",
    "1.0",
    "2024-01-05",
    "true",
    "True",
    "NA",
    "None",
    "null",
    "NaN",
    "-",
    " x",
]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_csv_keeps_the_characters_of_every_cell(read: Read, end: str) -> None:
    lines = ["question,answer,level", *(f"q{k},{cell},{cell}" for k, cell in enumerate(CELLS))]
    found = read("rows.csv", end.join(lines) + end, class_field="level")
    assert {p.question: (p.answer, p.label) for p in found} == {f"q{k}": (c, c) for k, c in enumerate(CELLS)}
    assert found[0].metadata["answer"] == found[0].answer


def test_csv_cells_with_quotes_commas_and_lines(read: Read) -> None:
    text = 'question,answer,note\r\n"a, ""b""\r\nc\nd","1,000",\r\n\r\nq,2\r\n' + f"{'x' * 200_000},3,n\r\n"
    found = read("rows.csv", text)
    assert [(p.question, p.answer) for p in found[:2]] == [('a, "b"\r\nc\nd', "1,000"), ("q", "2")]
    assert [p.metadata["note"] for p in found] == [None, None, "n"]  # an empty cell is missing


def test_parquet_columns_keep_their_own_types_text(tmp_path: Path) -> None:
    day, time = datetime.date(2024, 1, 5), datetime.datetime(2024, 1, 5, 10, 30)
    cells = [
        (pyarrow.string(), "2024-01-05", "2024-01-05"),
        (pyarrow.string(), "NA", "NA"),
        (pyarrow.large_string(), "007", "007"),
        (pyarrow.dictionary(pyarrow.int8(), pyarrow.string()), "None", "None"),
        (pyarrow.int64(), 15, "15"),
        (pyarrow.uint64(), 2**64 - 1, "18446744073709551615"),
        (pyarrow.float64(), 15.0, "15.0"),
        (pyarrow.float64(), 0.1, "0.1"),
        (pyarrow.float32(), 0.1, "0.1"),
        (pyarrow.decimal128(20, 2), Decimal("15.00"), "15.00"),
        (pyarrow.decimal128(20, 10), Decimal(0), "0.0000000000"),
        (pyarrow.bool_(), True, "true"),
        (pyarrow.date32(), day, "2024-01-05"),
        (pyarrow.timestamp("us"), time, "2024-01-05 10:30:00"),
        (pyarrow.time64("us"), time.time(), "10:30:00"),
    ]
    for kind, value, text in cells:
        columns = {name: pyarrow.array([value], kind) for name in ("answer", "level")}
        columns |= {"question": pyarrow.array(["q"]), "list": pyarrow.array([[value]], pyarrow.list_(kind))}
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
        (found,) = read_all(tmp_path / "rows.parquet", class_field="level")
        assert (found.answer, found.label) == (text, text), kind
        assert type(found.metadata["answer"]) is type(columns["answer"][0].as_py())
        (found,) = read_all(tmp_path / "rows.parquet", answer_field="list")
        assert found.answers == (text,), kind


def test_a_list_means_any_of_them(read: Read) -> None:
    found = read(
        "rows.jsonl",
        '{"question": "a", "answer": ["42", 43, 1.50]}\n{"question": "b", "answer": "[1, 2]"}\n'
        '{"question": "c", "answer": ["7"]}\n',
    )
    assert [p.answers for p in found] == [("42", "43", "1.50"), ("[1, 2]",), ("7",)]
    assert found[0].metadata["answer"] == ["42", 43, 1.5]
    task = build_task(Config())
    assert task.training(0).answers == (task.training(0).answer,)


def test_any_right_answer_scores_and_examples_show_the_first(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "answer": ["42", "43"]}\n{"question": "b", "answer": [2, 3]}\n')
    task = Rows(Config(data=str(path), eval_data=other(tmp_path)))
    first, second = task.rows
    assert [task.scorer(first, f"\\boxed{{{n}}}") for n in (42, 43, 44)] == [1.0, 1.0, 0.0]
    assert task.scorer(second, "\\boxed{3}") == 1.0

    class Characters:
        def encode(self, text: str) -> list[str]:
            return [text]

    prompt: Any = encode(second, [first], Characters(), Config())
    assert prompt == ["a 42\n\nb"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("null", "answer is missing"),
        ('""', "answer is missing"),
        ('" \\n"', "answer is missing"),
        ("[]", "answer is missing"),
        ('["1", null]', "answer is missing"),
        ('["1", ""]', "answer is missing"),
        ('{"value": 42}', "answer is an object"),
        ('[["42"]]', "answer is a list, where"),
        ('["1", {"a": 1}]', "answer is an object"),
        ("NaN", "answer is the number nan"),
        ("-Infinity", "answer is the number -inf"),
        ('"\\ud800"', "answer has half of a surrogate pair"),
    ],
)
def test_cells_that_are_no_text_are_refused_by_row(read: Read, answer: str, message: str) -> None:
    good = '{"question": "a", "answer": "1"}\n'
    with pytest.raises(ValueError, match=rf"data .*rows\.jsonl, row 2: {message}"):
        read("rows.jsonl", f'{good}{{"question": "b", "answer": {answer}}}\n{good}')
    with pytest.raises(ValueError, match=rf"data .*rows\.json, row 2: {message}"):
        read("rows.json", f'[{good},{{"question": "b", "answer": {answer}}}]')


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"question": [{"role": "user"}], "answer": "1"}', "question is a chat whose turn 1 is no object"),
        ('{"question": [{"role": "user", "content": 1}], "answer": "1"}', "question is a chat whose turn 1"),
        (
            '{"question": [{"role": "user", "content": "x"}, "y"], "answer": "1"}',
            "question is a chat whose turn 2 is no object with texts role and content",
        ),
        (
            '{"question": [{"role": "assistant", "content": "y"}], "answer": 1}',
            "question is a chat that ends with role 'assistant', where user asks",
        ),
        ('{"question": [{"role": "user", "content": " "}], "answer": "1"}', "question is missing"),
        (
            '{"question": [{"role": "\\ud800", "content": "x"}, {"role": "user", "content": "y"}]}',
            "question, turn 1, has half of a surrogate pair",
        ),
        (
            '{"question": [{"role": "system", "content": "\\ud800"}, {"role": "user", "content": "y"}]}',
            "question, turn 1, has half of a surrogate pair",
        ),
        ('{"question": "b", "answer": [{"role": "user", "content": "1"}]}', "answer is an object"),
        ('{"question": ["a", "b"], "answer": "1"}', "question is a list, where"),
        ('{"question": {"a": "b"}, "answer": "1"}', "question is an object"),
        ('{"answer": "1"}', "question is missing"),
        ('{"question": "b"}', "answer is missing"),
        ('{"question": "b", "answer": "1", "level": null}', "level is missing"),
        ('{"question": "b", "answer": "1", "level": ["x"]}', "level is a list, where"),
    ],
)
def test_questions_and_classes_are_one_text(read: Read, row: str, message: str) -> None:
    good = '{"question": "a", "answer": "1", "level": 3}\n'
    with pytest.raises(ValueError, match=rf"rows\.jsonl, row 2: {message}"):
        read("rows.jsonl", f"{good}{row}\n", class_field="level")


SYSTEM = {"role": "system", "content": "Be brief."}
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "1+1"}],
    [SYSTEM, {"role": "user", "content": "2+2"}],
    [
        SYSTEM,
        {"role": "user", "content": "3+3"},
        {"role": "assistant", "content": "6", "name": "a"},
        {"role": "user", "content": "2+2"},
    ],
]


class Turns:
    """A tokenizer of which one sees what it is asked for."""

    chat_template = "there is one"

    def apply_chat_template(self, turns: Any, add_generation_prompt: bool, tokenize: bool) -> Any:
        return turns if add_generation_prompt and not tokenize else None

    def encode(self, text: Any, add_special_tokens: bool = True) -> Any:
        return text


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_questions_that_are_chats(read: Read, tmp_path: Path, kind: str) -> None:
    rows = [{"question": chat, "answer": str(k)} for k, chat in enumerate(CHATS)]
    if kind == "jsonl":
        problems = read("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
        problems = read_all(tmp_path / "rows.parquet")
    assert [problem.question for problem in problems] == ["1+1", "2+2", "2+2"]
    tokenizer: Any = Turns()
    for problem, chat in zip(problems, CHATS, strict=True):
        turns: Any = encode(problem, [], tokenizer, Config())
        assert turns == chat
    asked: Any = encode(problems[2], problems[:2], tokenizer, Config(prompt="{question}!"))
    assert [turn["content"] for turn in asked] == [
        "Be brief.",
        *("1+1!", "0", "2+2!", "1"),
        *("3+3", "6", "2+2!"),
    ]
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        encode(problems[0], [], tokenizer, Config())


def test_chats_are_held_out_by_all_that_was_said(tmp_path: Path) -> None:
    """What is held out is not trained on, whatever its system turn; its last turn in other chats may be."""
    paths = tmp_path / "train.jsonl", tmp_path / "held-out.jsonl"
    user = {"role": "user", "content": "2+2"}
    trained = [[user], [SYSTEM, user], CHATS[2], CHATS[2][1:]]
    for path, chats in zip(paths, (trained, [[user]]), strict=True):
        path.write_text("".join(json.dumps({"question": chat, "answer": "4"}) + "\n" for chat in chats))
    rows = Rows(Config(data=str(paths[0]), eval_data=str(paths[1]))).rows
    assert [len(row.before or ()) for row in rows] == [3, 2]


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.struct([("a", pyarrow.int64())]),
        pyarrow.map_(pyarrow.string(), pyarrow.int64()),
        pyarrow.list_(pyarrow.list_(pyarrow.int64())),
        pyarrow.binary(),
    ],
)
def test_parquet_columns_that_are_no_text_are_refused(tmp_path: Path, kind: Any) -> None:
    values = {"struct": {"a": 1}, "map": [("a", 1)], "list": [[1]], "binary": b"42"}
    value = values[str(kind).partition("<")[0]]
    columns = {"question": pyarrow.array(["q"]), "answer": pyarrow.array([value], kind)}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"rows\.parquet, row 1: answer is (an object|a list|a map|binary)"):
        read_all(tmp_path / "rows.parquet")


LINE = '{"question": "a", "answer": "1"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "rows.jsonl",
            LINE.encode() + '{"question": "é"}'.encode("latin-1"),
            "line 2: expected UTF-8, .* 0xe9",
        ),
        ("rows.csv", "question,answer\na,1\nb,é\n".encode("cp1252"), "line 3: expected UTF-8, got byte 0xe9"),
        ("rows.json", b"\xef\xbb\xbf[\n" + b'{"question": "\x80"}]', "line 2: expected UTF-8, got byte 0x80"),
        ("rows.jsonl", LINE.encode("utf-16"), "line 1: expected UTF-8, got byte 0xff"),
        ("rows.jsonl", LINE + '{"question": "b", "answer"}\n', "line 2: Expecting ':'.*an object a line"),
        ("rows.jsonl", LINE + "\n" + "x\n", "line 3: Expecting value"),
        ("rows.jsonl", LINE + "[1]\n", "row 2 is no object"),
        ("rows.jsonl", LINE + "\n3\n", r"row 2 \(line 3\) is no object"),
        ("rows.json", '[{"question": "a",\n"answer" "1"}]', "line 2: Expecting ':'"),
        ("rows.json", '[{"question": "a", "answer": "1"}, 3]', "row 2 is no object"),
        ("rows.json", '{\n "data": []\n}', "line 1: .*expected an object a line, or one array of objects"),
        ("rows.jsonl", LINE + "[" * 100_000, "line 2: .*recursion"),
        (
            "rows.jsonl",
            '{"question": "a", "answer": "1", "answer": "2"}',
            "line 1: it has two columns 'answer'",
        ),
        ("rows.csv", "question,answer,answer\na,1,2\n", "it has two columns 'answer'"),
        ("rows.csv", "question,answer\na,1,2\n", r"row 1 \(line 2\) has 3 cells under 2 columns"),
        ("rows.csv", 'question,answer\n"a,1\nb,2\n', "line 3: unexpected end of data"),
        ("rows.parquet", "PAR1 junk", "."),
    ],
)
def test_what_can_not_be_read_is_named_with_its_line(
    read: Read, name: str, content: bytes | str, message: str
) -> None:
    with pytest.raises(ValueError, match=rf"data .*{name} can't be read: {message}") as caught:
        read(name, content)
    assert "\n" not in str(caught.value)


def test_a_csv_row_is_named_with_its_line(read: Read) -> None:
    with pytest.raises(ValueError, match=r"rows\.csv, row 2 \(line 4\): answer is missing"):
        read("rows.csv", 'question,answer\n"a\nb",1\nc,\n')
    with pytest.raises(ValueError, match=r"rows\.csv, row 1 \(line 2\): answer is missing"):
        read("rows.csv", "question,answer\nc\n")


def test_parquet_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    names = ["question", "answer", "answer"]
    table = pyarrow.Table.from_arrays([pyarrow.array([x]) for x in "ab1"], names)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"rows\.parquet can't be read: it has two columns 'answer'"):
        read_all(tmp_path / "rows.parquet")


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff", "\ufeff\r\n"])
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_empty_files_are_named(read: Read, content: str, ending: str) -> None:
    message = "is empty" if ending != "parquet" or not content else "can't be read"
    with pytest.raises(ValueError, match=rf"data .*rows\.{ending} {message}"):
        read(f"rows.{ending}", content)


def test_a_byte_order_mark_is_no_part_of_the_first_column(read: Read) -> None:
    for name, text in (("a.csv", "question,answer\na,1\n"), ("a.jsonl", LINE), ("a.json", f"[{LINE}]")):
        assert [p.answer for p in read(name, b"\xef\xbb\xbf" + text.encode())] == ["1"], name


@pytest.mark.parametrize(
    "name", ["[a]*.jsonl", "a b.jsonl", "**.CSV", "{x,y}?.json", "hf:/x.jsonl", "é.JSONL"]
)
def test_names_are_no_patterns(
    read: Read, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "another file", "answer": "0"}\n')
    text = "question,answer\na,1\n" if name.endswith("CSV") else LINE
    assert [p.question for p in read(name, text)] == ["a"]
    monkeypatch.chdir(tmp_path)
    assert [p.question for p in read_all(Path(name))] == ["a"]
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="no such file"):
        build_task(Config(data=name))


def test_a_data_set_of_the_hub_keeps_the_texts_of_its_types(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    kinds = {"question": "string", "answer": "float32", "when": "date32"}
    features = datasets.Features({name: datasets.Value(kind) for name, kind in kinds.items()})
    rows = [
        {"question": "007", "answer": 0.1, "when": datetime.date(2024, 1, 5)},
        {"question": "NA", "answer": 15.0, "when": datetime.date(2024, 1, 6)},
    ]
    asked = []

    def load(name: str, subset: str | None, split: str) -> Any:
        asked.append((name, subset, split))
        return datasets.Dataset.from_list(rows, features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    config = Config(data="someone/rows", eval_data=other(tmp_path), class_field="when")
    task = Rows(config)
    assert asked == [("someone/rows", None, "train")]
    found = [(p.question, p.answer, p.label) for p in task.rows]
    assert found == [("007", "0.1", "2024-01-05"), ("NA", "15.0", "2024-01-06")]
    assert task.rows[0].metadata["when"] == datetime.date(2024, 1, 5)
    before = task.digests
    assert build_task(config).digests == before
    rows[0]["answer"] = 0.2
    assert build_task(config).digests != before


def test_configuration_and_splits_of_a_data_set_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    asked = []

    def load(name: str, subset: str | None, split: str) -> Any:
        asked.append((name, subset, split))
        return datasets.Dataset.from_list([{"question": f"{name} {split}", "answer": 1}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    config = Config(data="a/b", data_config="main", eval_split="test")
    task = Rows(config)
    assert [p.question for p in (*task.rows, *task.eval_rows)] == ["a/b train", "a/b test"]
    assert task.digests.keys() == {"a/b main", "a/b main test"}
    Rows(replace(config, data_split="train[:9]", eval_data="c/d", eval_split=None))
    main = [("a/b", "main", split) for split in ("train", "test", "train[:9]")]
    assert asked == [*main, ("c/d", None, "train")]
    with pytest.raises(ValueError, match=r"data a/b main test has no column 'x'; it has question, answer"):
        Rows(replace(config, data_split="test", answer_field="x"))
    for setting in ({"data_config": "main"}, {"data_split": "train"}, {"eval_split": "test"}):
        with pytest.raises(ValueError, match=r"other\.jsonl is a file: data_config and splits are for"):
            Rows(Config(data=other(tmp_path), **setting))


def test_files_of_a_run_are_utf_8_and_named(tmp_path: Path) -> None:
    for read_it, name in ((read_rows, "metrics.jsonl"), (read_json, "config.json")):
        path = tmp_path / name
        path.write_bytes(b'{"a": 1}\n{"b": "\xe9"}\n')
        with pytest.raises(ValueError, match=rf"{name} can't be read: line 2: expected UTF-8"):
            read_it(path)
        path.write_bytes(b'{"a": 1\n')
        with pytest.raises(ValueError, match=rf"{name} can't be read: "):
            read_it(path)
    write_text(tmp_path / "table.md", "α")
    assert (tmp_path / "table.md").read_bytes() == "α".encode()
    assert read_rows(tmp_path / "nothing.jsonl") == []


@pytest.fixture
def run(cache: Path, tmp_path: Path) -> Config:
    """A run of two steps that has read two files."""
    for name, k in (("rows.jsonl", 10), ("held_out.jsonl", 50)):
        rows = [{"question": f"{n}+{n}=", "answer": "1"} for n in range(k, k + 20)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"data": str(tmp_path / "rows.jsonl"), "eval_data": str(tmp_path / "held_out.jsonl")}
    config = small(cache, tmp_path / "run", steps=2, checkpoint_every=1, **files)
    train(config, quiet=True)
    return replace(config, resume=True)


@pytest.mark.parametrize("field", ["data", "eval_data"])
def test_a_resumed_run_reads_what_it_read(run: Config, field: str, capfd: pytest.CaptureFixture[str]) -> None:
    train(run, quiet=True)
    path = Path(getattr(run, field))
    kept = {p: p.read_bytes() for p in run.output.glob("*.json*")}
    path.write_text(path.read_text().replace('"answer": "1"', '"answer": "2"', 1))
    with pytest.raises(ValueError, match=rf"data .*{path.name} has changed.*; --accept-changed-data goes on"):
        train(run, quiet=True)
    assert kept == {p: p.read_bytes() for p in run.output.glob("*.json*")}
    assert capfd.readouterr().err == ""
    train(replace(run, accept_changed_data=True), quiet=True)
    train(run, quiet=True)  # what was accepted is what it goes on with


def test_a_run_without_digests_goes_on_with_a_warning(run: Config, capfd: pytest.CaptureFixture[str]) -> None:
    (run.output / "data.json").unlink()
    record = read_json(run.output / "config.json")
    del record["accept_changed_data"]  # as a run of before has it
    write_text(run.output / "config.json", json.dumps(record))
    train(run, quiet=True)
    said = capfd.readouterr().err.splitlines()
    assert [line.startswith("warning: ") and "has no digest of data" in line for line in said] == [True, True]
    train(run, quiet=True)
    assert capfd.readouterr().err == ""
