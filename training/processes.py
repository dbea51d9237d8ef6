"""Manners of a run's processes: how they are interrupted, how they fail, how they end.

Ctrl-C is for the run. A command that is still importing ends with no traceback (each sets that before its
imports), later `guard` says in a line what goes on; processes that a run starts never hear of it.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any


def guard(work: Callable[[], Any], interrupted: str) -> None:
    """Do it; say in one line why it could not be done."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        work()
    except KeyboardInterrupt:
        print(f"\ninterrupted; {interrupted}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, FloatingPointError, OSError) as error:
        sys.exit(f"error: {error}")


def reason(error: BaseException) -> str:
    """An exception's text in one line of at most 300 characters, or its name."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


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
