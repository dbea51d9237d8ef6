"""Write files and folders so that a reader, or an interruption, never meets half of one; text is UTF-8."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

TEMPORARY = ".new-"  # what a killed process leaves behind has this name


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """A temporary folder beside it; the system's errors name the path, not what is in that folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(prefix=TEMPORARY, dir=path.parent) as scratch:
            yield Path(scratch)
    except OSError as error:
        raise OSError(f"{path} can't be written: {error.strerror or error}") from error


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file of that name in a temporary folder, then move it into place."""
    with _scratch(path) as scratch:
        new = scratch / path.name
        write(new)
        os.replace(new, path)


def write_text(path: Path, text: str) -> None:
    write_file(path, lambda new: new.write_text(text, encoding="utf-8"))


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a folder of that name in a temporary one, then put it where the old one was."""
    with _scratch(path) as scratch:
        new = scratch / path.name
        write(new)
        old = scratch / "old"
        try:
            if path.exists():
                path.rename(old)
            new.rename(path)
        except BaseException:  # an interruption between the two, too
            if old.exists() and not path.exists():
                old.rename(path)
            raise


def decode(raw: bytes) -> str:
    """Bytes as UTF-8, with or without a byte-order mark. Raises ValueError that names line and byte."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raw = error.object  # without the mark, and so is the error's place
        line, wrong = raw.count(b"\n", 0, error.start) + 1, raw[error.start]
        raise ValueError(f"line {line}: expected UTF-8, got byte 0x{wrong:02x}") from None


def read_json(path: Path) -> Any:
    """What a file of one JSON value holds. Raises ValueError that names the file."""
    try:
        return json.loads(decode(path.read_bytes()))
    except (ValueError, RecursionError) as error:  # no JSON, or nested too deeply
        raise ValueError(f"{path} can't be read: {error}") from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file, an object each; a killed process may have left half of one.

    Raises ValueError that names file and line.
    """
    try:
        lines = decode(path.read_bytes()).split("\n")[:-1] if path.exists() else []
    except ValueError as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    return [_row(line, f"{path} can't be read: line {number}") for number, line in enumerate(lines, start=1)]


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number or a depth beyond Python's limits
        raise ValueError(f"{where}: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no object")
    return row
