"""Write files and folders so that a reader, or an interruption, never meets half of one."""

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
    write_file(path, lambda new: new.write_text(text))


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


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; a killed process may have left half of one."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
