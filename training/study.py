"""The runs of STUDY.md, each done once; `training.evidence` reads their results.

    python -m training.study                  # all of it, days of one core; what is done costs nothing
    python -m training.study admission        # a part: what no bonus does to each domain

A run's folder goes on where it was interrupted. Its result, one compressed JSON file in training/results/,
holds the settings, where and when it ran, what each step reported, and how many samples of each held-out
problem are right.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports below: end, with no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import datetime
import gzip
import json
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
import tyro
from rich.progress import Progress

from training.checkpoint import plain
from training.config import PRESETS, Config, check
from training.experiments import Experiment, Job, evaluate_start, progress_of, run_all, run_one
from training.files import read_json, read_rows, write_file
from training.plot import INITIAL
from training.processes import command

RESULTS = Path(__file__).parent / "results"
TUNING, CARRY, ELSEWHERE, ABLATION = (100, 101), range(10, 20), range(10, 16), range(10, 15)
DOMAINS = {name: replace(PRESETS[name][1], checkpoint_every=250) for name in ("carry", "program", "logic")}
DOMAINS["control"] = replace(
    PRESETS["carry"][1],
    model="carry(digits=2, steps=500, batch=128)",
    task="carry(digits=2)",
    max_new_tokens=4,
    lr=3e-4,
    steps=150,
    checkpoint_every=150,
)
EVALUATION = Experiment(eval_prompts=100, eval_samples=64)

# What each arm changes in a domain's settings; INITIAL is the model before the first step.
ARMS: dict[str, dict[str, Any]] = {
    INITIAL: {"entropy": "none"},
    "none": {"entropy": "none"},
    "aer": {},
    "target": {"entropy": "target"},
    "clip-higher": {"entropy": "none", "clip_high": 0.28},
    "skywork": {"entropy": "skywork"},
}
ARMS |= {f"fixed-{alpha}": {"entropy": "fixed", "alpha_init": alpha} for alpha in (0.003, 0.01, 0.03, 0.1)}
ARMS |= {
    f"clip-cov-{share}-{low}": {"entropy": "none", "clip_cov": share, "clip_cov_range": (low, high)}
    for share, low, high in ((2e-4, 1.0, 5.0), (2e-3, 1.0, 5.0), (2e-3, 0.1, 1.0), (2e-2, 0.1, 1.0))
}
ARMS |= {
    f"skywork-{eta}-{most}": {"entropy": "skywork", "target_entropy": 0.175, "eta": eta, "alpha_max": most}
    for eta, most in ((1e-3, 0.05), (3e-3, 0.1), (1e-2, 0.1), (1e-2, 0.3))
}
# Candidates for the controller
LAWS: dict[str, dict[str, Any]] = {
    "integral": {"law": "proportional", "alpha_min": 0.0},
    "pi": {"gain": 0.1, "eta": 0.005, "alpha_min": 0.0},
    "pi-low": {"gain": 0.1, "eta": 0.005, "alpha_min": -0.05},
    "pi-fast-low": {"gain": 0.15, "eta": 0.008, "alpha_min": -0.05},
    "sac": {"entropy": "sac"},
    "aent": {"entropy": "aent"},
    "entropic": {"entropy": "entropic"},
}
# ... and those with 0.75 within ±15% on the first tuning seed, which alone were run on the second
SECOND: tuple[str, ...] = ("integral", "pi-fast-low")
SECOND += tuple(f"{law}-mean1" for law in ("integral", "pi", "pi-low", "pi-fast-low", "entropic"))
ARMS |= {f"law-{name}": {"normalize": False} | settings for name, settings in LAWS.items()}
ARMS |= {f"law-{name}-mean1": {"normalize": True} | settings for name, settings in LAWS.items()}


# What tuning chose (STUDY.md), and the absolute target of a user who copies logic's recipe, τ·H₀ there.
BEST = {"fixed": "fixed-0.03", "clip-cov": "clip-cov-0.002-0.1", "skywork": "skywork-0.01-0.3"}
ABSOLUTE = 0.072
ARMS |= {
    "absolute": {"entropy": "absolute", "target_entropy": ABSOLUTE},
    "dynamic": {"entropy": "dynamic", "target_entropy": ABSOLUTE},
    "difficulty": {"entropy": "difficulty", "alpha_init": ARMS[BEST["fixed"]]["alpha_init"]},
}


class Run(NamedTuple):
    domain: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.domain}-{self.arm}-{self.seed}"

    @property
    def result(self) -> Path:
        return RESULTS / f"{self.name}.json.gz"


def grid(domain: str, arms: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """Two seeds at a time, so that two initial models are made side by side."""
    pairs = (seeds[k : k + 2] for k in range(0, len(seeds), 2))
    return [Run(domain, arm, seed) for pair in pairs for arm in arms for seed in pair]


PRIMARY = (INITIAL, "none", BEST["fixed"], "aer")
RIVALS = ("clip-higher", BEST["clip-cov"], "skywork", BEST["skywork"], "target")
PARTS: dict[str, list[Run]] = {
    "admission": [run for domain in DOMAINS for run in grid(domain, [INITIAL, "none"], TUNING)],
    "controller": grid("carry", [arm for arm in ARMS if arm.startswith("law-")], TUNING[:1])
    + grid("carry", [f"law-{name}" for name in SECOND], TUNING[1:]),
    "tuning": grid(
        "carry",
        [arm for arm in ARMS if arm != "skywork" and arm.startswith(("fixed-", "clip-cov-", "skywork-"))],
        TUNING,
    ),
    "carry": grid("carry", PRIMARY, CARRY) + grid("carry", RIVALS, CARRY),
    "ablation": grid(
        "carry", ["aer", "target", "absolute", "dynamic", "difficulty", BEST["fixed"]], ABLATION
    ),
    "elsewhere": [run for domain in ("program", "control") for run in grid(domain, PRIMARY, ELSEWHERE)],
}


@dataclass(frozen=True)
class Study:
    """The study, or a part of it."""

    part: tyro.conf.Positional[
        Literal["all", "admission", "controller", "tuning", "carry", "ablation", "elsewhere"]
    ] = "all"
    """What to run."""
    processes: int = 2
    """Runs at a time, one thread each."""
    output: Path = Path("runs/study")
    """Folder of the runs, and of the models they start from."""


def main(settings: Study) -> None:
    if settings.processes < 1:
        raise ValueError(f"processes must be at least 1, got {settings.processes}")
    parts = PARTS if settings.part == "all" else [settings.part]
    runs = list(dict.fromkeys(run for part in parts for run in PARTS[part]))
    waiting = [run for run in runs if not run.result.exists()]
    configs = {run: config_of(run, settings.output) for run in waiting}
    for config in configs.values():
        check(config)
    jobs: list[Job] = [(complete, config, EVALUATION) for config in configs.values()]
    with Progress() as progress:
        bar = progress.add_task(settings.part, total=sum(config.steps + 1 for config in configs.values()))

        def show() -> None:
            done = [
                config.steps + 1 if run.result.exists() else progress_of(config.output)
                for run, config in configs.items()
            ]
            progress.update(bar, completed=sum(done))

        run_all(jobs, settings.processes, show)
    print(f"{len(runs)} results of {settings.part} in {RESULTS}")


def config_of(run: Run, output: Path) -> Config:
    base = replace(DOMAINS[run.domain], model_cache=output / "models", logger=(), resume=True)
    return replace(base, output=output / run.name, seed=run.seed, **ARMS[run.arm])


def complete(config: Config, settings: Experiment) -> None:
    """In a process of its own: run, evaluate, keep the result and drop the checkpoints."""
    domain, *arm, seed = config.output.name.split("-")
    run = Run(domain, "-".join(arm), int(seed))
    folder, fault = config.output, {}
    try:
        (evaluate_start if run.arm == INITIAL else run_one)(config, settings)
        scores = read_json(folder / "scores.json")
    except FloatingPointError as error:
        fault = {"error": str(error)}
        scores = read_result(run._replace(arm=INITIAL))["scores"]
    rows, timing = read_rows(folder / "metrics.jsonl"), read_rows(folder / "timing.jsonl")
    names = dict.fromkeys(
        name for row in rows for name, value in row.items() if isinstance(value, (int, float))
    )
    result = {
        **run._asdict(),
        "settings": settings_of(config),
        "commit": git("rev-parse", "HEAD")
        + ("+" if git("status", "--porcelain", "--untracked-files=no") else ""),
        "machine": processor(),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers)}
        | {"python": platform.python_version()},
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "seconds": round(sum(row["seconds"] for row in timing), 1),
        "scores": scores,
        "steps": {name: [rounded(row.get(name)) for row in rows] for name in names},
        **fault,
    }
    raw = gzip.compress(json.dumps(result).encode(), mtime=0)
    write_file(run.result, lambda path: path.write_bytes(raw))
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def rounded(value: float | None) -> float | None:
    """Six digits; None where a step has none of a class."""
    return None if value is None else float(f"{value:.6g}")


def settings_of(config: Config) -> dict[str, Any]:
    """All settings of a run, for defaults may change; but for its folders."""
    folders = ("output", "model_cache", "resume", "logger")
    return {name: value for name, value in plain(config).items() if name not in folders}


def read_result(run: Run) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(gzip.decompress(run.result.read_bytes()))
    return result


def git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    command(
        lambda: tyro.cli(Study, description=__doc__),
        main,
        "the same command goes on",
        lambda asked: asked.output,
    )
