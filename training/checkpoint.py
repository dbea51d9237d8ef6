"""Checkpoints that are whole or not there, and a run's folder.

    config.json                what the run was told
    data.json                  digests of the data it read
    metrics.jsonl              one line a step: what the seed determines, and nothing else
    timing.jsonl               one line a step: seconds and tokens a second
    checkpoints/step-000050/   model/ (from_pretrained loads it), optimizer/, state.json

Random states and the order of the data are functions of the seed and the step, and so is the learning rate:
the step is their checkpoint.
"""

import json
import logging
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypeVar

import torch
from filelock import FileLock, Timeout
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from aer_fast import AdaptiveEntropy
from training.config import OPERATIONAL, Config, check_types
from training.distributed import World, whole
from training.files import TEMPORARY, read_json, read_rows, write_text
from training.policy import Policy
from training.processes import DEFECT, naming, reason

T = TypeVar("T")
# What a run that goes on reads of the steps before
REPORTED = ("entropy", "initial_entropy", "target", "alpha", "ratio_max", "grad_norm")


class Folder:
    """A run's folder, held by one process at a time."""

    def __init__(self, config: Config) -> None:
        self.path, self.keep = config.output, config.keep
        check_writable(self.path)
        try:
            self.lock = FileLock(self.path / ".lock")
            self.lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"output {self.path} is in use by another run") from None
        try:
            self._check(config)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        self.lock.release()

    def _check(self, config: Config) -> None:
        recorded = (self.path / "config.json").exists()
        if recorded and not config.resume:
            raise ValueError(
                f"output {self.path} holds a run: --resume goes on with it, or choose another folder"
            )
        if recorded:
            compare(_record(self.path), plain(config))
        elif any(
            p.name not in (".lock", DEFECT) and not p.name.startswith(TEMPORARY) for p in self.path.iterdir()
        ):
            raise ValueError(f"output {self.path} is not empty and holds no run; choose another folder")

    def begin(self, config: Config, digests: dict[str, str] | None = None) -> None:
        """Make the folder this run's; called when everything is loaded, so that a typo claims nothing."""
        for folder in (self.path, self.path / "checkpoints"):
            for left in folder.glob(f"{TEMPORARY}*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
        write_text(self.path / "config.json", json.dumps(plain(config), indent=1) + "\n")
        write_text(self.path / "data.json", json.dumps(digests or {}, indent=1) + "\n")

    def last(self) -> Path | None:
        """The folder of the last checkpoint."""
        return max(checkpoints(self.path), default=None, key=step_of)

    def cut_back(self, step: int) -> list[dict[str, Any]]:
        """Cut the records back to the end of a step; returns the metrics that are left."""
        for name in ("metrics.jsonl", "timing.jsonl", "evaluations.jsonl"):
            with naming(f"{self.path / name} can't be read"):
                rows = [row for row in read_rows(self.path / name) if row["step"] <= step]
            write_text(self.path / name, "".join(json.dumps(row) + "\n" for row in rows))
        metrics = read_rows(self.path / "metrics.jsonl")
        if [row["step"] for row in metrics] != list(range(1, step + 1)) or any(
            name not in row for row in metrics for name in REPORTED
        ):
            raise ValueError(
                f"{self.path}/metrics.jsonl is not the record of {step} steps: lines are missing"
            )
        return metrics

    def append(self, name: str, row: dict[str, Any]) -> None:
        path = self.path / name
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:  # of a full disk's error the file's name is no part
            raise OSError(f"{path} can't be written: {error.strerror}") from error

    def forget(self) -> None:
        """Delete all checkpoints but the last ``keep``."""
        for old in sorted(checkpoints(self.path), key=step_of)[: -self.keep]:
            shutil.rmtree(old)


def check_writable(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise ValueError(f"output {output} is no folder to write to: {error.strerror}") from error


def check_digests(run: Path, digests: dict[str, str], *, accept: bool) -> None:
    """What goes on with a run, or judges it, must read what it read, unless a change is accepted."""
    record = run / "data.json"
    known = read_json(record) if record.exists() else {}
    if not isinstance(known, dict):
        raise ValueError(f"{record} can't be read: it has no digests by name")
    for name, digest in digests.items():
        if name not in known:
            print(f"warning: {run} has no digest of data {name}: it may have changed", file=sys.stderr)
        elif known[name] != digest and not accept:
            raise ValueError(
                f"data {name} has changed since the run began; --accept-changed-data goes on with it"
            )


def claim(config: Config, here: World) -> Folder | None:
    """The run's folder, on the first rank."""
    return _first(here, lambda: Folder(config))


def check_data(folder: Folder | None, digests: dict[str, str], config: Config, here: World) -> None:
    """Stop a run that goes on with other data than it began with."""

    def check() -> None:
        if folder is not None and (folder.path / "config.json").exists():
            check_digests(folder.path, digests, accept=config.accept_changed_data)

    _first(here, check)


def _first(here: World, work: Callable[[], T]) -> T | None:
    """Do it on the first rank; what is wrong stops all, and is said once."""
    result, fault = None, None
    if here.main:
        try:
            result = work()
        except ValueError as error:
            fault = str(error)
    if (fault := here.same(fault)) is not None:
        raise ValueError(fault) if here.main else SystemExit(1)
    return result


def checkpoints(run: Path) -> list[Path]:
    names = re.compile(r"step-[0-9]+")
    return [path for path in (run / "checkpoints").glob("step-*") if names.fullmatch(path.name)]


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def newest(run: Path) -> str:
    """The model of a run's last checkpoint."""
    last = max(checkpoints(run), default=None, key=step_of)
    if last is None:
        raise ValueError(f"run {run} has no checkpoint yet; --model names another model")
    return str(last / "model")


def plain(config: Config) -> dict[str, Any]:
    """A configuration as JSON has it."""
    result: dict[str, Any] = json.loads(json.dumps(asdict(config), default=str))
    return result


def read_config(path: Path) -> Config:
    """The configuration that a run's folder records. Raises ValueError if there is none."""
    fields = _record(path)
    if unknown := fields.keys() - plain(Config()).keys():
        raise ValueError(f"{path}/config.json is not that of a run: it has {min(unknown)!r}")
    fields = plain(Config()) | fields
    for name, value in fields.items():
        if isinstance(value, list):
            fields[name] = tuple(value)
        elif name in ("output", "model_cache") and isinstance(value, str):
            fields[name] = Path(value)
    try:
        check_types(fields)
    except ValueError as error:
        raise ValueError(f"{path}/config.json: {error}") from error
    return Config(**fields)


def _record(path: Path) -> dict[str, Any]:
    fields = read_json(path / "config.json")
    if not isinstance(fields, dict):
        raise ValueError(f"{path}/config.json is not that of a run: it is no object")
    return fields


def compare(recorded: dict[str, Any], asked: dict[str, Any]) -> None:
    for name in asked | recorded:
        if name not in OPERATIONAL and recorded.get(name) != asked.get(name):
            raise ValueError(
                f"the run to resume has {name} {recorded.get(name)!r}, but {asked.get(name)!r} was asked for"
            )


def save_model(policy: Policy, tokenizer: Any, path: Path, here: World) -> None:
    """A folder that from_pretrained loads; with adapters, the adapters' own."""
    state = {name: whole(p) for name, p in policy.model.state_dict().items()}  # all ranks take part
    if here.main:
        with naming("its model"):
            policy.model.save_pretrained(path, state_dict=state)
            tokenizer.save_pretrained(path)


@contextmanager
def _shards() -> Iterator[None]:
    """torch's checkpoints, whose one exception is no Exception and has tracebacks for its text."""
    with naming("its optimizer"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # no_dist says so
        logging.disable()  # its warnings have tracebacks, too
        try:
            yield
        except CheckpointException as error:
            raise next(cause for cause, _ in error.failures.values()) from error
        finally:
            logging.disable(logging.NOTSET)


def save(
    folder: Path,
    step: int,
    policy: Policy,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    controller: AdaptiveEntropy,
    here: World,
) -> None:
    """Write the checkpoint of the end of a step, under another name until it is whole."""
    path = folder / "checkpoints" / f"step-{step:06d}"
    scratch = path.parent / f"{TEMPORARY}{path.name}"
    if here.main:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    here.wait()
    try:
        save_model(policy, tokenizer, scratch / "model", here)
        alone = here.size == 1
        trained = _trained(policy, optimizer)
        with _shards():
            save_shards(trained, checkpoint_id=scratch / "optimizer", no_dist=alone)
        if here.main:
            state = {"step": step, "controller": controller.state_dict()}
            write_text(scratch / "state.json", json.dumps(state))
        here.wait()
        if here.main:
            scratch.rename(path)
    except BaseException as error:  # the folder may be full: leave nothing half behind
        shutil.rmtree(scratch, ignore_errors=True)
        if isinstance(error, (OSError, ValueError)):
            what = f"checkpoint of step {step} can't be written to {folder}"
            raise OSError(f"{what}: {reason(error)}") from error
        raise
    here.wait()


def restore(
    path: Path, policy: Policy, optimizer: torch.optim.Optimizer, controller: AdaptiveEntropy, here: World
) -> int:
    """Load what `save` wrote besides the model; returns the step."""
    state = _trained(policy, optimizer)
    with naming(f"checkpoint {path} can't be read; without it --resume takes the one before"):
        with _shards():
            load_shards(state, checkpoint_id=path / "optimizer", no_dist=here.size == 1)
            set_optimizer_state_dict(policy, optimizer, state["optimizer"])
        if policy.value_head is not None:
            policy.value_head.load_state_dict(state["value_head"])
        recorded = read_json(path / "state.json")
        controller.load_state_dict(recorded["controller"])
        return int(recorded["step"])


def _trained(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state = {"optimizer": get_optimizer_state_dict(policy, optimizer)}
    if policy.value_head is not None:
        state["value_head"] = policy.value_head.state_dict()
    return state
