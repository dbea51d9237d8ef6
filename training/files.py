"""Write files and folders so that a reader, or an interruption, never meets half of one."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then move it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        write(Path(name))
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_file(path, lambda scratch: scratch.write_text(text))


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary folder beside ``path``, then put it in the place of what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        write(scratch / "new")
        if path.exists():
            path.rename(scratch / "old")
        (scratch / "new").rename(path)
    finally:
        shutil.rmtree(scratch)
