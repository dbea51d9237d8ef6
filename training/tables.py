"""The rows of a data file, with the characters that the file has.

Nothing guesses a type: 15 beside 2.5 stays 15, 007 stays 007, a date stays as it is written. A name is no
pattern, its bytes are UTF-8, and what can't be read is named with its line.
"""

import csv
import hashlib
import io
import json
from collections.abc import Collection, Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from training.files import decode
from training.processes import naming, reason

FORMATS = (".jsonl", ".json", ".parquet", ".csv")


class Row(NamedTuple):
    """A row, as a reward sees it and as it is asked."""

    place: str
    values: dict[str, Any]  # with the types of JSON or Parquet; a CSV has texts, and None for an empty cell
    texts: dict[str, Any]  # of the columns that are asked for, with texts for numbers, dates and booleans


class Table(NamedTuple):
    columns: list[str]
    rows: list[Row]
    digest: str  # of all bytes of the file


def read_table(name: str, columns: Collection[str]) -> Table:
    """All rows of a file. Raises ValueError that names the file, and the line where there is one."""
    path = Path(name)
    if path.exists() and path.suffix.lower() not in FORMATS:
        raise ValueError(f"data {name} must be one of {', '.join(FORMATS)} or a name on the hub")
    if not path.is_file():
        raise ValueError(f"data {name}: no such file")
    try:
        raw = path.read_bytes()
        if path.suffix.lower() == ".parquet":
            found, rows = _parquet(raw, columns) if raw else ([], [])
        else:
            read = _csv if path.suffix.lower() == ".csv" else _json
            text = decode(raw)
            found, rows = read(text, columns) if text.strip() else ([], [])
    except OSError as error:
        raise ValueError(f"data {name} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"data {name} can't be read: {reason(error)}") from error
    if not rows:
        raise ValueError(f"data {name} is empty")
    return Table(found, rows, hashlib.sha256(raw).hexdigest())


def _json(text: str, columns: Collection[str]) -> tuple[list[str], list[Row]]:
    """One array of objects, or an object a line; read twice, once with numbers as they are written."""
    if text.lstrip().startswith("["):
        pairs = zip(_loads(text, None), _loads(text, None, parse_int=str, parse_float=str))
        items = [(f"row {number}", *pair) for number, pair in enumerate(pairs, start=1)]
    else:
        lines = [(k, line) for k, line in enumerate(text.split("\n"), start=1) if line.strip()]
        items = [
            (_place(number, k), _loads(line, k), _loads(line, k, parse_int=str, parse_float=str))
            for number, (k, line) in enumerate(lines, start=1)
        ]
    rows, found = [], dict[str, None]()
    for place, values, written in items:
        if not isinstance(values, dict):
            raise ValueError(f"{place} is no object")
        found |= dict.fromkeys(values)
        rows.append(Row(place, values, {name: as_text(written.get(name)) for name in columns}))
    return list(found), rows


def _loads(text: str, line: int | None, **numbers: Any) -> Any:
    """What JSON says; ``line`` is the text's own in its file, None for a whole file."""
    expected = "expected an object a line, or one array of objects"
    try:
        return json.loads(text, object_pairs_hook=_object, **numbers)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {line or error.lineno}: {error.msg}; {expected}") from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # a column twice, a number or a depth beyond Python's limits
        raise ValueError(f"line {line}: {error}" if line else str(error)) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _distinct([name for name, _ in pairs])
    return dict(pairs)


def _csv(text: str, columns: Collection[str]) -> tuple[list[str], list[Row]]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than some questions
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    try:
        header = next(cells for cells in lines if cells)
        _distinct([name for name in header if name])
        end = lines.line_num
        for cells in lines:
            start, end = end + 1, lines.line_num
            if not cells:
                continue
            place = _place(len(rows) + 1, start)
            if len(cells) > len(header):
                raise ValueError(f"{place} has {len(cells)} cells under {len(header)} columns")
            values = dict.fromkeys(header) | {key: cell or None for key, cell in zip(header, cells)}
            rows.append(Row(place, values, {name: values.get(name) for name in columns}))
    except csv.Error as error:
        raise ValueError(f"line {lines.line_num}: {error}") from None
    return header, rows


def _parquet(raw: bytes, columns: Collection[str]) -> tuple[list[str], list[Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(raw)).read()
        _distinct(table.column_names)
    except Exception as error:  # OSError, KeyError and more: a damaged file
        raise ValueError(reason(error)) from error
    cells = []
    for name, column in zip(table.column_names, table.columns):
        with naming(f"column {name!r}"):  # a date or time zone beyond Python's
            cells.append(column.to_pylist())
    values = [dict(zip(table.column_names, row)) for row in zip(*cells)]
    return table.column_names, list(arrow_rows(table, values, columns))


def arrow_rows(table: Any, values: Iterable[dict[str, Any]], columns: Collection[str]) -> Iterator[Row]:
    """The rows of a table of Arrow, whose ``values`` are given; its columns keep their own types' texts."""
    import pyarrow

    texts = {}
    for name in columns:
        if name in table.column_names:
            kind = table.schema.field(name).type
            while hasattr(kind, "value_type") and not pyarrow.types.is_dictionary(kind):
                kind = kind.value_type
            number = kind.to_pandas_dtype() if pyarrow.types.is_floating(kind) else float
            texts[name] = [as_text(value, number) for value in table.column(name).to_pylist()]
    for k, row in enumerate(values):
        yield Row(f"row {k + 1}", row, {name: column[k] for name, column in texts.items()})


def as_text(value: Any, number: Any = float) -> Any:
    """A number, date or boolean as text, in lists too; what is none of these stays as it is.

    ``number`` is the type in which a float was stored: 0.1 of 32 bits is 0.1, not 0.10000000149011612.
    """
    if isinstance(value, list):
        if value and isinstance(value[0], tuple):  # a map, as Arrow has it
            return {str(key): item for key, item in value}
        return [as_text(item, number) for item in value]
    if isinstance(value, bool):
        return "true" if value else "false"  # as JSON and Parquet have it
    if isinstance(value, float):
        return str(number(value)) if abs(value) < float("inf") else value
    if isinstance(value, Decimal):
        return f"{value:f}"
    return value if value is None or isinstance(value, (str, bytes, dict, tuple)) else str(value)


def _distinct(names: list[str]) -> None:
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has two columns {twice!r}")


def _place(number: int, line: int) -> str:
    return f"row {number}" if number == line else f"row {number} (line {line})"
