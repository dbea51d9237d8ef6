"""Rewards that users might write, good and bad."""

import os
import signal
import time
from pathlib import Path

from training.tasks import Problem


def length(problem: Problem, response: str) -> float:
    return len(response) / 10 + len(problem.metadata)


def fragile(problem: Problem, response: str) -> float:
    """Each response is a way to go wrong."""
    if response == "raise":
        raise KeyError("no such thing")
    if response == "hang":
        time.sleep(60)
    if response == "nan":
        return float("nan")
    if response == "exit":
        os._exit(3)
    if response == "text":
        return "good"  # type: ignore[return-value]
    return 1.0


def where(problem: Problem, response: str) -> float:
    """Say which process this is, in the file that the question names; then hang."""
    Path(problem.question).write_text(f"{os.getpid()}.")
    time.sleep(60)
    return 1.0


def interrupted(problem: Problem, response: str) -> float:
    os.kill(os.getpid(), signal.SIGINT)
    return 1.0


NUMBER = 3
