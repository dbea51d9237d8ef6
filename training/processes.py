"""Manners of a run's processes: how they are interrupted, how they fail, how they end.

Ctrl-C is for the run. A command that is still importing ends with no traceback (each sets that before its
imports), later `guard` says in a line what goes on; processes that a run starts never hear of it.
"""

import dis
import io
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
OURS = ("training", "aer_fast")
DEFECT = "internal-error.txt"  # in a run's folder: the tracebacks of our own defects


def command(
    parse: Callable[[], T], work: Callable[[T], Any], interrupted: str, folder: Callable[[T], Path]
) -> None:
    """Read the command line, and do what it asks for; ``folder`` is where a defect leaves its traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what a terminal can't show stops nothing
    asked = parse()
    guard(lambda: work(asked), interrupted, folder(asked))


def guard(work: Callable[[], Any], interrupted: str, folder: Path) -> None:
    """Do it; say in one line why it could not be done. A defect leaves its traceback in the folder."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        fault = fault_of(work, folder)
    except KeyboardInterrupt:
        print(f"\ninterrupted; {interrupted}", file=sys.stderr)
        sys.exit(130)
    if fault is not None:
        sys.exit(fault)


def fault_of(work: Callable[[], Any], folder: Path) -> str | None:
    """Do it; returns the line that says why it could not be done.

    What was foreseen is a ValueError or FloatingPointError of a line of ours, or comes from the system; an
    exception of another package gets its line where it is called (`naming`). The rest are defects of ours.
    """
    try:
        work()
    except (torch.OutOfMemoryError, MemoryError) as error:
        smaller = "smaller micro_tokens or rollout_batch, or activation_checkpointing, need less"
        return f"error: out of memory; {smaller}: {reason(error)}"
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in OURS:
            return _defect(error, folder)
        return f"error: the package {package!r} is missing; pip install 'aer-fast[train]' has what is needed"
    except OSError as error:
        return f"error: {_one_line(error)}"
    except (ValueError, FloatingPointError) as error:
        return f"error: {_one_line(error)}" if _is_said(error) else _defect(error, folder)
    except Exception as error:
        return _defect(error, folder)
    return None


def _is_said(error: BaseException) -> bool:
    """Whether a ``raise`` of this project raised it: not a package that was called, nor a slip of ours."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    instruction = dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]]
    package = str(last.tb_frame.f_globals.get("__package__")).partition(".")[0]
    return instruction == "RAISE_VARARGS" and package in OURS


def _defect(error: BaseException, folder: Path) -> str:
    text = _writable("".join(traceback.format_exception(error)))
    where = f"its traceback is in {folder / DEFECT}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / DEFECT).open("a", encoding="utf-8") as file:
            file.write(text + "\n")
    except OSError as full:
        print(text, file=sys.stderr)
        where = f"its traceback can't be written to {folder}: {reason(full)}"
    return f"internal error: {type(error).__name__}: {reason(error)}; {where}"


@contextmanager
def naming(what: str) -> Iterator[None]:
    """For calls of other packages alone, which raise what they like: one line says what could not be done.

    Once: what begins with these words already stays as it is.
    """
    try:
        yield
    except (torch.OutOfMemoryError, ModuleNotFoundError):
        raise  # says enough, and is not about what was given
    except (OSError, ValueError) as error:
        raise ValueError(f"{what}: {reason(error).removeprefix(f'{what}: ')}") from error
    except Exception as error:  # a KeyError's text is the key alone
        raise ValueError(f"{what}: {type(error).__name__}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """An exception's text in one line of at most 300 characters, or its name."""
    text = _one_line(error)
    return text if len(text) <= 300 else text[:297] + "..."


def _one_line(error: BaseException) -> str:
    try:
        if isinstance(error, OSError) and error.strerror:
            text = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
        else:
            text = str(error)
    except BaseException as fault:  # what other people's exceptions do for their text
        if is_interrupt(fault):
            raise
        text = ""
    return _writable(" ".join(text.split())) or type(error).__name__


def _writable(text: str) -> str:
    """Halves of surrogate pairs, which no file and no terminal takes, as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def is_interrupt(error: BaseException) -> bool:
    """Whether it is the user's Ctrl-C, of which processes that a run starts never hear."""
    return isinstance(error, KeyboardInterrupt) and multiprocessing.parent_process() is None


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back; threads and processes started in here never get it, from their first moment on."""
    resource_tracker.ensure_running()  # its start lets Ctrl-C through again: it comes first
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """Let this process end when the one that started it does, also by kill -9, whatever it is doing."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
