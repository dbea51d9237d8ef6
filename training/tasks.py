"""Problems and who says whether an answer is right.

A task draws problems by their number, so that a run needs no state to go on where it stopped: problem 17 of
a seed is the same problem in every process. A tenth of all questions, by a hash, is held out and never
trained on.

``--task`` and ``--model`` are written in a small language, names with settings, added up with weights:

    chain_sum(max_terms=2) * 3 + leg_counting
"""

import ast
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, Protocol

from training.processes import reason
from training.temptations import DOMAINS, classes_of, draw

# (problem, response) -> score. Picklable: it is sent to the processes that score.
Scorer = Callable[["Problem", str], float]


@dataclass(frozen=True)
class Problem:
    """What is asked, what is right, and what it counts as in reports."""

    question: str
    answer: str
    label: str
    metadata: dict[str, Any] = field(default_factory=dict, compare=False)
    others: tuple[str, ...] = ()  # as right as ``answer``, which is the one that examples show
    before: tuple[dict[str, Any], ...] | None = None  # the turns before the question, where it ends a chat

    @property
    def answers(self) -> tuple[str, ...]:
        """All that are right."""
        return (self.answer, *self.others)


class Task(Protocol):
    """Where problems come from."""

    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def scorer(self) -> Scorer: ...
    @property
    def digests(self) -> dict[str, str]:
        """What it read, {name: digest of the contents}: a run goes on with the same."""

    def training(self, index: int) -> Problem:
        """Problem ``index`` of an endless sequence."""

    def held_out(self, count: int) -> list[Problem]:
        """The first ``count`` problems of each class, or all there are; the same for every seed."""

    def examples(self, count: int) -> list[Problem]:
        """Solved problems to show before a prompt; rows that are shown are not trained on."""

    def vote(self, response: str) -> str:
        """The answer in a response, as majority votes count it."""


class Call(NamedTuple):
    """One name with its settings."""

    text: str
    name: str
    settings: dict[str, Any]
    weight: float


def parse(text: str) -> list[Call]:
    """The summands of a sum of calls. Raises ValueError that shows what was meant to be one."""
    try:
        return _terms(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, OverflowError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else error
        form = "name(setting=value) * weight + ..."
        raise ValueError(f"{text!r} is not of the form {form}: {reason}") from None


def _terms(node: ast.expr) -> list[Call]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _terms(node.left) + _terms(node.right)
    weight = 1.0
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        number, node = (
            (node.left, node.right) if isinstance(node.left, ast.Constant) else (node.right, node.left)
        )
        weight = ast.literal_eval(number)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight <= 1e9:
            raise ValueError(f"a weight must be a positive number up to 1e9, got {ast.unparse(number)}")
        weight = float(weight)
    if isinstance(node, ast.Name):
        return [Call(node.id, node.id, {}, weight)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
        settings = {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
        return [Call(ast.unparse(node), node.func.id, settings, weight)]
    raise ValueError(f"{ast.unparse(node)!r} is no name with settings")


def is_held_out(question: str) -> bool:
    return zlib.crc32(question.encode()) % 10 == 0


class Mixture:
    """Procedurally generated problems: those of `temptations` and reasoning-gym."""

    def __init__(self, task: str, seed: int) -> None:
        self.seed = seed
        calls = parse(task)
        self.sources = [_source(call) for call in calls]
        self.weights = [call.weight for call in calls]
        self.classes = tuple(dict.fromkeys(name for source in self.sources for name in source.classes))
        self.scorer: Scorer = score_generated
        self.digests: dict[str, str] = {}

    def training(self, index: int) -> Problem:
        rng = random.Random(f"training {self.seed} {index}")
        (source,) = rng.choices(self.sources, self.weights)
        return _draw(source, rng, None, held_out=False)

    def held_out(self, count: int) -> list[Problem]:
        problems: list[Problem] = []
        for source in self.sources:
            for label in source.classes:
                rng = random.Random(f"held out {source.call.text} {label}")
                drawn = (_draw(source, rng, label, held_out=True) for _ in range(20 * count))
                distinct: dict[str, Problem] = {}
                while len(distinct) < count and (problem := next(drawn, None)):
                    distinct[problem.question] = problem
                problems += distinct.values()
        return problems

    def examples(self, count: int) -> list[Problem]:
        return [self.training(-1 - k) for k in range(count)]

    def vote(self, response: str) -> str:
        return response.strip()


class Source(Protocol):
    @property
    def call(self) -> Call: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    def draw(self, rng: random.Random, label: str | None) -> Problem: ...
    def held_out(self, problem: Problem) -> bool: ...
    def score(self, problem: Problem, response: str) -> float: ...


def _draw(source: Source, rng: random.Random, label: str | None, *, held_out: bool) -> Problem:
    for _ in range(10_000):
        problem = source.draw(rng, label)
        if source.held_out(problem) == held_out:
            return problem
    which = "held-out" if held_out else "training"
    raise ValueError(f"task {source.call.text} gave no {which} problem in 10,000 draws: it has too few")


def score_generated(problem: Problem, response: str) -> float:
    call = Call(*problem.metadata["task"])
    return _source(call).score(problem, response)


def _source(call: Call) -> Source:
    if call.name in DOMAINS:
        return _DomainSource(call)
    return _gym(call.text)


@cache
def _gym(text: str) -> Source:
    """Of a call without its weight: settings may be lists, which can't be looked up."""
    (call,) = parse(text)
    return _GymSource(call)


class _DomainSource:
    """A task of `temptations`."""

    def __init__(self, call: Call) -> None:
        self.call, self.domain = call, DOMAINS[call.name]
        name, largest = self.domain.setting, self.domain.largest
        self.size = call.settings.get(name, self.domain.usual)
        wrong = isinstance(self.size, bool) or not isinstance(self.size, int) or not 1 <= self.size <= largest
        if wrong or set(call.settings) - {name}:
            raise ValueError(f"task {call.text}: its one setting is {name}, from 1 to {largest}")
        self.classes = classes_of(self.domain, self.size)

    def draw(self, rng: random.Random, label: str | None) -> Problem:
        label = label or rng.choices(self.classes, self.domain.mix[: len(self.classes)])[0]
        example = draw(self.domain, rng, self.size, label)
        metadata = {"task": tuple(self.call), "key": example.key}
        return Problem(example.question, example.answer, label, metadata)

    def held_out(self, problem: Problem) -> bool:
        key: str = problem.metadata["key"]
        return is_held_out(key)

    def score(self, problem: Problem, response: str) -> float:
        return float(response == problem.answer)


class _GymSource:
    """A task of reasoning-gym with its own scorer, which gives partial credit."""

    def __init__(self, call: Call) -> None:
        import reasoning_gym

        self.call, self.classes = call, (call.text,)
        if call.name not in reasoning_gym.factory.DATASETS:
            raise ValueError(
                f"unknown task {call.name!r}: not of {', '.join(DOMAINS)}, nor a name of reasoning-gym"
            )
        self.size = call.settings.get("size", 100_000)
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"task {call.text}: size must be a positive integer, got {self.size!r}")
        try:
            settings = {"seed": 0} | call.settings | {"size": self.size}
            self.dataset = reasoning_gym.create_dataset(call.name, **settings)
            self.dataset[0]
        except Exception as error:  # each task checks its settings in its own way
            raise ValueError(f"task {call.text}: {reason(error)}") from error

    def draw(self, rng: random.Random, label: str | None) -> Problem:
        entry = self.dataset[rng.randrange(self.size)]
        metadata = {"task": tuple(self.call), "entry": entry}
        return Problem(entry["question"], str(entry["answer"]), self.call.text, metadata)

    def held_out(self, problem: Problem) -> bool:
        return is_held_out(problem.question)

    def score(self, problem: Problem, response: str) -> float:
        return float(self.dataset.score_answer(response.strip(), problem.metadata["entry"]))
