"""Write files and folders so that a reader, or an interruption, never meets half of one; text is UTF-8."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

TEMPORARY = ".new-"  # what a killed process leaves behind has this name


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file of that name in a temporary folder, then move it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=TEMPORARY, dir=path.parent) as scratch:
        new = Path(scratch) / path.name
        write(new)
        os.replace(new, path)


def write_text(path: Path, text: str) -> None:
    write_file(path, lambda new: new.write_text(text, encoding="utf-8"))


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a folder of that name in a temporary one, then put it where the old one was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=TEMPORARY, dir=path.parent) as scratch:
        new = Path(scratch) / path.name
        write(new)
        old = Path(scratch) / "old"
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
    except ValueError as error:
        raise ValueError(f"{path} can't be read: {error}") from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; a killed process may have left half of one."""
    try:
        lines = decode(path.read_bytes()).splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise ValueError(f"{path} can't be read: {error}") from error
