"""Score responses in processes of their own, each call with a time limit.

A reward that raises, hangs or is no finite number counts as 0 and is reported; where all of a step fail, the
run stops.
"""

import importlib
import math
import pickle
import sys
from concurrent.futures import TimeoutError
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any, NamedTuple

from pebble import ProcessExpired, ProcessPool

from training.processes import end_with_parent, is_interrupt, naming, reason, uninterrupted
from training.tasks import Problem, Scorer

ENDED = 256  # for exit code 0
_scorer: Scorer | str | None = None  # of a worker process; or why there is none


class Scores(NamedTuple):
    """Scores in the order of the responses, and what went wrong."""

    values: list[float]
    failures: list[str]


def load_reward(name: str) -> Scorer:
    """The function that ``module:function`` names; the working directory is looked at first."""
    module, _, attribute = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module), attribute)
    except BaseException as error:  # whatever the module does while it is imported
        if is_interrupt(error):
            raise
        raise ValueError(
            f"reward {name!r} can't be loaded: {type(error).__name__}: {reason(error)}"
        ) from error
    if not callable(function):
        raise ValueError(f"reward {name!r} is no function")
    result: Scorer = function
    return result


class _Process(SpawnProcess):
    """Of a pool, which would wait for the result of one that a reward ends with exit code 0."""

    @property
    def exitcode(self) -> int | None:
        code = super().exitcode
        return ENDED if code == 0 else code


class _Processes(SpawnContext):
    """Threads of torch do not survive a fork."""

    Process = _Process


class Rewards:
    """A pool of scoring processes; with ``workers=0`` none, and no time limit."""

    def __init__(self, scorer: Scorer | str, workers: int, timeout: float) -> None:
        self.name = scorer if isinstance(scorer, str) else getattr(scorer, "__name__", str(scorer))
        if isinstance(scorer, str):
            self.scorer = load_reward(scorer)  # a wrong name is found here, not in the first step
        else:
            self.scorer = scorer
        self.timeout = timeout
        self.pool: ProcessPool | None = None
        if workers > 0:
            self.pool = ProcessPool(
                workers, initializer=_set_scorer, initargs=(scorer,), context=_Processes()
            )

    def score(self, problems: list[Problem], responses: list[str]) -> Scores:
        """The score of each response to its problem."""
        values, failures = [], []
        if self.pool is None:
            attempts = [_attempt(self.scorer, p, r) for p, r in zip(problems, responses)]
        else:
            with naming("reward_workers: a row is no data for another process; with 0 there is none"):
                rows = [pickle.dumps(problem) for problem in problems]
            with uninterrupted():  # the first call starts the processes
                futures = [
                    self.pool.schedule(_score, args=(row, r), timeout=self.timeout)
                    for row, r in zip(rows, responses)
                ]
            attempts = []
            for future in futures:
                attempts.append(self._result(future))
        for attempt in attempts:
            values.append(0.0 if isinstance(attempt, str) else attempt)
            if isinstance(attempt, str):
                failures.append(f"reward {self.name} {attempt}")
        return Scores(values, failures)

    def _result(self, future: Any) -> float | str:
        try:
            result: float | str = future.result()
        except TimeoutError:
            return f"took more than {self.timeout:g} s"
        except ProcessExpired as error:
            return f"ended its process with exit code {0 if error.exitcode == ENDED else error.exitcode}"
        except BrokenProcessPool as error:
            fault = "its processes end before they score anything; reward_workers 0 may show why"
            raise ValueError(f"reward {self.name}: {fault}") from error
        return result

    def close(self) -> None:
        if self.pool is not None:
            self.pool.stop()
            self.pool.join()


def _set_scorer(scorer: Scorer | str) -> None:
    global _scorer
    end_with_parent()
    try:
        _scorer = load_reward(scorer) if isinstance(scorer, str) else scorer
    except ValueError as error:  # although the trainer's own process could import it
        _scorer = str(error)


def _score(row: bytes, response: str) -> float | str:
    assert _scorer is not None
    if isinstance(_scorer, str):
        return f"is not there: {_scorer}"
    return _attempt(_scorer, pickle.loads(row), response)


def _attempt(scorer: Scorer, problem: Problem, response: str) -> float | str:
    """The score, or what went wrong."""
    try:
        value = float(scorer(problem, response))
    except BaseException as error:
        if is_interrupt(error):
            raise
        return f"raised {type(error).__name__}: {reason(error)}"
    return value if math.isfinite(value) else f"returned {value}"
