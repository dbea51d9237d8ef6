"""Whole runs: what is written, killed, resumed, refused, and done by two processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests import ROOT
from tests.helpers.trainers import small
from training import checkpoint, evaluate, experiments, plot
from training.checkpoint import Folder, plain, read_config
from training.config import PRESETS, Config, check
from training.files import read_rows, write_folder, write_text
from training.learner import Learner
from training.models import load_model, load_tokenizer
from training.processes import guard
from training.scratch import build_tokenizer
from training.temptations import DOMAINS
from training.train import Trainer, train

pytestmark = [
    pytest.mark.needs("training", "reasoning_gym", "math_verify"),
    pytest.mark.slow,
    pytest.mark.host,
]
two_processes = pytest.mark.skipif(
    torch.cuda.device_count() == 1, reason="two processes need two GPUs, or none"
)


@pytest.fixture
def config(cache: Path, tmp_path: Path) -> Config:
    return small(
        cache,
        tmp_path / "run",
        checkpoint_every=2,
        advantage="gae",
        kl_coef=0.01,
        lr_decay="linear",
        alpha_init=0.05,
        target_ratio=0.9,
        eval_every=2,
    )


def test_a_run_leaves_what_it_promises(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    train(replace(config, logger=("tensorboard",)))
    rows = read_rows(config.output / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {row["initial_entropy"] * 0.9 for row in rows} == {rows[0]["target"]}
    assert rows[0]["alpha"] != rows[3]["alpha"]
    assert [row["step"] for row in read_rows(config.output / "timing.jsonl")] == [1, 2, 3, 4]
    assert [row["step"] for row in read_rows(config.output / "evaluations.jsonl")] == [2, 4]
    assert [p.name for p in (config.output / "checkpoints").iterdir()] == ["step-000004"]
    assert list((config.output / "tensorboard").glob("events*"))
    assert read_config(config.output) == replace(config, logger=("tensorboard",))
    shown = capsys.readouterr().out
    assert (
        f"4/4 reward {rows[3]['reward']:.2f} H {rows[3]['entropy']:.3f} (target {rows[3]['target']:.3f})"
        in shown
    )

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(config.output / "checkpoints/step-000004/model")
    assert load_tokenizer(str(config.output / "checkpoints/step-000004/model")).eos_token == "<eos>"
    assert model.config.tie_word_embeddings


def test_tensorboard_has_every_step(config: Config) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(replace(config, logger=("tensorboard",)), quiet=True)
    events = EventAccumulator(str(config.output / "tensorboard"))
    events.Reload()
    logged = {e.step: e.value for e in events.Scalars("entropy")}
    rows = read_rows(config.output / "metrics.jsonl")
    assert logged == pytest.approx({row["step"]: row["entropy"] for row in rows})
    assert events.Scalars("tokens_per_second")
    assert [e.step for e in events.Scalars("eval/pass@1")] == [2, 4]


class FakeLogger(ModuleType):
    """What W&B and trackio have in common."""

    def __init__(self) -> None:
        super().__init__("trackio")
        self.logged: dict[int, dict[str, float]] = {}
        self.started: dict[str, Any] = {}

    def init(self, **options: Any) -> None:
        self.started = options

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.logged.setdefault(step, {}).update(numbers)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_loggers_get_the_numbers(config: Config, monkeypatch: pytest.MonkeyPatch, name: Any) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"logger '{name}' needs its package: pip install {name}"):
        train(replace(config, logger=(name,)), quiet=True)
    fake = FakeLogger()
    monkeypatch.setitem(sys.modules, name, fake)
    train(replace(config, output=config.output / "again", logger=(name,)), quiet=True)
    rows = read_rows(config.output / "again" / "metrics.jsonl")
    assert {step: numbers["entropy"] for step, numbers in fake.logged.items()} == {
        row["step"]: row["entropy"] for row in rows
    }
    assert "eval/pass@1" in fake.logged[2]
    assert fake.started["config"]["lr"] == config.lr


def command(config: Config, *more: str) -> list[str]:
    """The run as a user starts it."""
    flags: list[str] = []
    usual = plain(Config())
    for name, value in plain(config).items():
        if value != usual[name] and name != "resume":
            flag = "--" + name.replace("_", "-")
            if isinstance(value, bool):
                flags.append(flag if value else "--no-" + flag[2:])
            else:
                flags += [flag, *(map(str, value) if isinstance(value, list) else [str(value)])]
    return [sys.executable, "-m", "training.train", "custom", *flags, *more]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=120)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_killed_and_resumed_is_uninterrupted(config: Config, tmp_path: Path, lora_rank: int) -> None:
    """kill -9 after the third step, one beyond the checkpoint; then --resume: the same bits."""
    config = replace(config, threads=1, lora_rank=lora_rank, lr=1e-2)
    whole = replace(config, output=tmp_path / "whole")
    train(whole, quiet=True)

    metrics = config.output / "metrics.jsonl"
    process = subprocess.Popen(
        command(config), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while len(read_rows(metrics)) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with metrics.open("a") as file:
        file.write('{"step": 4, "ent')  # the line that it was writing
    (config.output / "checkpoints" / ".new-step-000004").mkdir(exist_ok=True)

    again = run(*command(config, "--resume"))
    assert again.returncode == 0, again.stderr
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert (config.output / name).read_text() == (whole.output / name).read_text()
    assert [p.name for p in (config.output / "checkpoints").iterdir()] == ["step-000004"]
    if lora_rank == 0:
        mine, theirs = (tensors(c.output / "checkpoints/step-000004") for c in (config, whole))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_resuming_before_the_first_checkpoint_starts_again(config: Config) -> None:
    folder = Folder(config)  # killed before anything was done
    folder.begin(config)
    folder.release()
    write_text(config.output / "metrics.jsonl", '{"step": 1, "entropy": 9}\n')
    train(replace(config, resume=True), quiet=True)
    assert [row["step"] for row in read_rows(config.output / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_finished_run_resumes_to_nothing(config: Config) -> None:
    train(config, quiet=True)
    before = (config.output / "metrics.jsonl").read_text()
    train(replace(config, resume=True), quiet=True)
    assert (config.output / "metrics.jsonl").read_text() == before


def test_a_resumed_run_must_be_the_same_run(config: Config) -> None:
    train(config, quiet=True)
    before = {p: p.stat().st_mtime_ns for p in config.output.rglob("*") if p.is_file() and p.name != ".lock"}
    with pytest.raises(ValueError, match="holds a run: --resume goes on with it"):
        train(config, quiet=True)
    with pytest.raises(ValueError, match=r"the run to resume has lr 0.0003, but 0.5 was asked for"):
        train(replace(config, resume=True, lr=0.5), quiet=True)
    after = {p: p.stat().st_mtime_ns for p in config.output.rglob("*") if p.is_file() and p.name != ".lock"}
    assert before == after
    train(replace(config, resume=True, checkpoint_every=3, keep=2), quiet=True)  # operational


def test_a_typo_claims_no_folder_and_strangers_files_are_safe(config: Config) -> None:
    with pytest.raises(ValueError, match="unknown task 'cary'"):
        train(replace(config, task="cary"), quiet=True)
    with pytest.raises(ValueError, match="alpha_init must be within"):
        train(replace(config, alpha_init=3.0), quiet=True)
    other = config.output / "other" / ".new-model"
    other.mkdir(parents=True)
    with pytest.raises(ValueError, match="is not empty and holds no run; choose another folder"):
        train(config, quiet=True)
    assert other.exists()
    other.rmdir()
    other.parent.rmdir()
    train(config, quiet=True)


def test_a_run_that_can_not_evaluate_says_so_first(config: Config, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1+1=", "answer": "2"}\n')
    with pytest.raises(ValueError, match=r"no row to train on|no held-out problems"):
        train(replace(config, data=str(rows)), quiet=True)
    assert not (config.output / "config.json").exists()


def test_two_runs_do_not_share_a_folder(config: Config) -> None:
    first = Folder(config)
    with pytest.raises(ValueError, match="is in use by another run"):
        Folder(replace(config, resume=True))
    first.release()
    Folder(replace(config, resume=True)).release()


def test_a_full_disk_keeps_the_last_checkpoint(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    save_shards = checkpoint.__dict__["save_shards"]
    calls = []

    def full(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return save_shards(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_shards", full)
    with pytest.raises(
        OSError, match=r"checkpoint of step 4 can't be written to .*: No space left on device"
    ):
        train(config, quiet=True)
    assert [p.name for p in (config.output / "checkpoints").iterdir()] == ["step-000002"]
    train(replace(config, resume=True), quiet=True)
    assert [row["step"] for row in read_rows(config.output / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_step_that_is_not_finite_keeps_the_last_checkpoint(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = Learner.update

    def poisoned(self: Learner, rollouts: Any, old: Any, rows: Any, name: str, problems: Any) -> Any:
        if name.startswith("step 3"):
            old[rows[0]]["logprob"] *= float("nan")
        return update(self, rollouts, old, rows, name, problems)

    monkeypatch.setattr(Learner, "update", poisoned)
    with pytest.raises(FloatingPointError, match=r"step 3, epoch 1, minibatch 1"):
        train(config, quiet=True)
    assert [row["step"] for row in read_rows(config.output / "metrics.jsonl")] == [1, 2]
    assert [p.name for p in (config.output / "checkpoints").iterdir()] == ["step-000002"]


def test_a_reward_that_always_fails_stops_the_run(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = replace(config, reward="tests.helpers.rewards:NUMBER")
    with pytest.raises(ValueError, match=r"reward 'tests.helpers.rewards:NUMBER' is no function"):
        train(broken, quiet=True)
    monkeypatch.setattr("tests.helpers.rewards.length", lambda problem, response: 1 / 0)
    broken = replace(config, output=config.output / "b", reward="tests.helpers.rewards:length")
    message = (
        r"the reward failed on every response of initial entropy 0; first: reward .* raised ZeroDivision"
    )
    with pytest.raises(ValueError, match=message):
        train(broken, quiet=True)


def test_a_failed_reward_is_a_counted_warning(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def sometimes(problem: Any, response: str) -> float:
        seen.append(response)
        if len(seen) % 5 == 0:
            raise SystemExit("[/INST] is no tag")
        return 1.0

    monkeypatch.setattr("tests.helpers.rewards.length", sometimes)
    train(replace(config, reward="tests.helpers.rewards:length", eval_every=0))
    row = read_rows(config.output / "metrics.jsonl")[0]
    assert row["failed_rewards"] in (3, 4)
    assert row["warnings"][0].startswith(f"{row['failed_rewards']} rewards counted as 0; first: reward")


def test_missing_models_and_tokenizers_are_named(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model /nowhere/at/all: no such folder"):
        train(replace(config, model="/nowhere/at/all"), quiet=True)
    with pytest.raises(ValueError, match=r"model carry\(size=3\): unknown setting size"):
        train(replace(config, output=tmp_path / "2", model="carry(size=3)"), quiet=True)
    tokenizer = build_tokenizer("0123456789+=")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match="its tokenizer has no EOS token"):
        train(replace(config, output=tmp_path / "3", model=str(tmp_path / "endless")), quiet=True)
    tokenizer.eos_token, tokenizer.pad_token = "<eos>", None
    tokenizer.save_pretrained(tmp_path / "unpadded")
    assert load_tokenizer(str(tmp_path / "unpadded")).pad_token == "<eos>"


@pytest.mark.parametrize(
    "model", ["carry(steps=0)", "carry(digits='a')", "carry(lr=1e30)", "carry(digits=True)", "carry(seed=-1)"]
)
def test_models_from_scratch_with_nonsense_are_named(config: Config, model: str) -> None:
    with pytest.raises(ValueError, match="must be from"):
        train(replace(config, model=model), quiet=True)
    with pytest.raises(ValueError, match="one model, not a sum"):
        train(replace(config, model="carry(digits=2) + carry(digits=3)"), quiet=True)


def test_errors_are_one_line(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    failed = run(*command(replace(config, task="no_such_task")))
    assert failed.returncode == 1
    assert (
        failed.stderr.strip()
        == f"error: unknown task 'no_such_task': not of {', '.join(DOMAINS)}, nor a name of reasoning-gym"
    )

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        guard(interrupted, "what is there is whole", config.output)
    assert stopped.value.code == 130
    assert "interrupted; what is there is whole" in capsys.readouterr().err


SIGNALS = """
import signal
import sys

sys.argv = ["-m"]  # as while python -m imports a package
before = signal.getsignal(signal.SIGINT)
from training import evaluate, experiments, plot, train

print(signal.getsignal(signal.SIGINT) is before)
"""


def test_importing_the_trainer_handles_no_signal() -> None:
    done = run(sys.executable, "-c", SIGNALS)
    assert done.stdout == "True\n", done.stderr


SLOW = """
import time

print(flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("name", ["train", "evaluate", "experiments", "plot"])
def test_a_command_that_is_still_importing_ends_without_a_traceback(name: str, tmp_path: Path) -> None:
    (tmp_path / "tyro.py").write_text(SLOW)  # which each command imports
    paths = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    process = subprocess.Popen(
        [sys.executable, "-m", f"training.{name}"],
        cwd=tmp_path,
        env=environment() | paths,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (-signal.SIGINT, b"")


DEAF = """
import os
import signal

if __name__ == "__mp_main__":  # Ctrl-C, as the terminal sends it to all: here before anything is imported
    os.kill(os.getpid(), signal.SIGINT)

from training.rewards import Rewards
from training.tasks import Problem

if __name__ == "__main__":
    rewards = Rewards("tests.helpers.rewards:interrupted", 1, 60.0)
    print(rewards.score([Problem("", "", "")], [""]))
    rewards.close()
    os.kill(os.getpid(), signal.SIGINT)
    print("never printed")
"""


def test_ctrl_c_is_for_the_run_and_not_for_its_processes(tmp_path: Path) -> None:
    script = tmp_path / "deaf.py"
    script.write_text(DEAF)
    done = run(sys.executable, str(script))
    assert done.stdout == "Scores(values=[1.0], failures=[])\n"
    assert done.stderr.count("Traceback") == done.stderr.count("KeyboardInterrupt") == 1  # the run's own


DEAF_GRID = """
import os
import signal
import sys
from pathlib import Path

if __name__ == "__mp_main__":
    os.kill(os.getpid(), signal.SIGINT)

from tests.helpers.trainers import small
from training.experiments import Experiment, main

if __name__ == "__main__":
    base = small(Path(sys.argv[1]), Path(sys.argv[2]), steps=1, threads=1)
    main(Experiment(modes=("none",), processes=2, eval_prompts=1, eval_samples=2, train=base))
"""


def test_ctrl_c_is_for_the_grid_and_not_for_its_runs(cache: Path, tmp_path: Path) -> None:
    script = tmp_path / "deaf.py"
    script.write_text(DEAF_GRID)
    done = run(sys.executable, str(script), str(cache), str(tmp_path / "grid"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "grid" / "table.md").exists()


def test_an_interrupted_run_says_so_in_a_line(config: Config) -> None:
    config = replace(config, steps=1000, eval_every=0, reward_workers=1, threads=1)
    process = subprocess.Popen(
        command(config),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    metrics = config.output / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not read_rows(metrics) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.decode().strip() == "interrupted; the same command with --resume goes on"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (1, 100)}, "k must be from 1 to eval_samples=4, got (1, 100)"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"group_size": 1}, "group_size must be at least 2 with advantage 'group'"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm must be positive"),
        ({"gae_lambda": 2.0}, "gae_lambda must be from 0 to 1"),
        ({"clip_low": -0.5}, "clip_low must be at least 0"),
        ({"minibatches": 17}, "minibatches must be at most prompts x group_size"),
        ({"dual_clip": 0.5}, "dual_clip must be above 1"),
        ({"rollout": "vllm", "lora_rank": 4}, "rollout 'vllm' does not take LoRA"),
        ({"reward": "mine"}, "reward must be module:function"),
        ({"prompt": "?"}, "prompt must contain {question}"),
        ({"kl_coef": float("inf")}, "kl_coef must be finite"),
        ({"weight_decay": float("inf")}, "weight_decay must be finite"),
        ({"dual_clip": float("inf")}, "dual_clip must be above 1 and finite"),
        ({"lr": 1e38}, "lr must be at most 10.0"),
        ({"temperature": 1e-30}, "temperature must be at least 0.001"),
        ({"prompt": "{question} {x}"}, "is no template of {question} alone"),
        ({"prompt": "{question}{"}, "is no template of {question} alone"),
        ({"entropy": "more"}, "entropy must be one of"),
    ],
)
def test_bad_settings_are_named(config: Config, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check(replace(config, advantage="group", **change) if "advantage" not in change else config)


def test_the_presets_are_sound() -> None:
    for _, preset in PRESETS.values():
        check(preset)
    with pytest.raises(ValueError, match="output /dev/null/run is no folder to write to"):
        Folder(Config(output=Path("/dev/null/run")))


TWO = """
import sys
from pathlib import Path
from tests.training import test_runs
test_runs.scripted_run(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
"""


TAUGHT: dict[str, dict[str, Any]] = {
    "taught": {"teacher": "carry(digits=2, steps=30, batch=32)", "divergence": "forward_kl"},
}


def scripted_run(cache: Path, output: Path, kind: str) -> None:
    """Three steps in which what is sampled depends on the prompt alone, not on who samples it."""
    advantage: Any = "group_mean" if kind in TAUGHT else kind
    from training import rollout
    from training.batch import Rollout

    def sample(self: Any, prompts: list[list[int]], seed: int) -> list[Rollout]:
        rollouts = []
        for k, prompt in enumerate(prompts):
            generator = torch.Generator().manual_seed(sum(t * 31**i for i, t in enumerate(prompt)) + k % 4)
            tokens = torch.randint(2, 14, (int(torch.randint(0, 4, (1,), generator=generator)),)).tolist()
            generated = torch.randint(2, 14, (len(tokens),), generator=generator).tolist()
            rollouts.append(Rollout(prompt, [*generated, 1], len(generated) == 3))
        return rollouts

    rollout.Generate.sample = sample  # type: ignore[method-assign]
    config = small(
        cache,
        output,
        steps=3,
        prompts=5,
        epochs=2,
        minibatches=2,
        micro_tokens=25,
        lr=1e-2,
        entropy="target",
        target_ratio=0.9,
        alpha_init=0.1,
        initial_tokens=50,
        aggregation="sequence_mean" if advantage == "gae" else "token_mean",
        reward="tests.helpers.rewards:length",
        packing=True,
        **{"advantage": advantage, "kl_coef": 0.05} | TAUGHT.get(kind, {}),
    )
    train(config, quiet=True)


@two_processes
@pytest.mark.parametrize("kind", ["gae", "group_mean", *TAUGHT])
def test_two_processes_are_one(cache: Path, tmp_path: Path, kind: str) -> None:
    """FSDP2 over gloo with unequal shares, five prompts on two ranks: losses and weights of one process."""
    one, two = tmp_path / "one", tmp_path / "two"
    script = tmp_path / "two.py"
    script.write_text(TWO)
    alone = run(sys.executable, str(script), str(cache), str(one), kind)
    assert alone.returncode == 0, alone.stderr
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    both = run(*launcher, str(script), str(cache), str(two), kind)
    assert both.returncode == 0, both.stderr
    rows = [read_rows(folder / "metrics.jsonl") for folder in (one, two)]
    assert len(rows[0]) == len(rows[1]) == 3
    for mine, theirs in zip(*rows):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            if name != "warnings":
                assert theirs[name] == pytest.approx(value, rel=2e-3, abs=2e-5), name
    mine, theirs = (tensors(folder / "checkpoints/step-000003") for folder in (one, two))
    for name, tensor in mine.items():
        # Adam divides by the gradient's size: an entry whose gradient is rounding error moves anywhere
        close = (theirs[name] - tensor).abs() < 1e-3
        assert close.double().mean() > 0.99, name
        torch.testing.assert_close(theirs[name], tensor, rtol=0.0, atol=0.05)


BFLOAT16 = """
import sys
from pathlib import Path
from tests.training import test_runs
test_runs.run_in_bfloat16(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def run_in_bfloat16(cache: Path, output: Path) -> None:
    """Steps of one update each, whose ratio is 1; then the sampler's copy is the policy."""
    from training.distributed import whole, world

    reward = "tests.helpers.rewards:length"
    config = small(cache, output, dtype="bfloat16", reward=reward, lr=1e-2, kl_coef=0.1, advantage="gae")
    with world() as here:
        made = Trainer(config, here, None, quiet=True)
        made.controller.anchor(1.0)
        for step in (1, 2):
            metrics = made.step(step)
            assert metrics["ratio_max"] == 1.0, metrics
            assert (metrics["kl"] < 1e-9) == (step == 1), metrics
        made.sampler.sync()
        sampled: Any = made.sampler
        copies = dict(sampled.sampled.model.named_parameters())
        for name, parameter in made.policy.model.named_parameters():
            assert copies[name].dtype == torch.bfloat16
            assert torch.equal(copies[name], whole(parameter).bfloat16()), name
        made.rewards.close()


@two_processes
def test_two_processes_in_bfloat16(cache: Path, tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(BFLOAT16)
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    both = run(*launcher, str(script), str(cache), str(tmp_path / "run"))
    assert both.returncode == 0, both.stderr


@two_processes
def test_two_processes_resume(cache: Path, tmp_path: Path) -> None:
    """The optimiser's shards come back: cut after two of four steps and resumed, as uninterrupted."""
    whole = small(cache, tmp_path / "whole", advantage="gae", lr=1e-2, threads=1, checkpoint_every=2, keep=2)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    first = run(*launcher, *command(whole)[1:])
    assert first.returncode == 0, first.stderr
    expected = (whole.output / "metrics.jsonl").read_text()
    last = whole.output / "checkpoints" / "step-000004"
    model = tensors(last)
    shutil.rmtree(last)
    again = run(*launcher, *command(whole, "--resume")[1:])
    assert again.returncode == 0, again.stderr
    assert (whole.output / "metrics.jsonl").read_text() == expected
    assert all(torch.equal(tensor, model[name]) for name, tensor in tensors(last).items())


def test_a_grid_runs_is_drawn_and_goes_on(cache: Path, tmp_path: Path) -> None:
    base = small(cache, tmp_path / "grid", steps=2, threads=1, lora_rank=2)
    grid = experiments.Experiment(
        modes=("none", "aer"), seeds=(0, 1), processes=2, eval_prompts=2, eval_samples=8, train=base
    )
    experiments.main(grid)
    names = {"none-0", "none-1", "aer-0", "aer-1", "initial-0", "initial-1"}
    files = {"table.md", "scores.json", "entropy.png", "outcome.png"}
    assert {p.name for p in base.output.iterdir()} == names | files
    for picture in ("entropy.png", "outcome.png"):
        assert (base.output / picture).read_bytes().startswith(b"\x89PNG")
    first = {seed: read_rows(base.output / f"none-{seed}" / "metrics.jsonl")[0] for seed in (0, 1)}
    assert read_rows(base.output / "aer-0" / "metrics.jsonl")[0]["entropy"] == first[0]["entropy"]
    assert first[0]["entropy"] != first[1]["entropy"]
    table = (base.output / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| initial", "| none", "| aer"]
    pooled = json.loads((base.output / "scores.json").read_text())
    assert pooled["aer"]["classes"]["1 carry"]["prompts"] == 4  # two of each seed
    assert list(pooled["aer"]["classes"]["1 carry"]["intervals"]) == ["pass@1", "pass@2", "pass@4"]

    kept = (base.output / "none-0" / "scores.json").read_text()
    done = {p: p.stat().st_mtime_ns for p in base.output.glob("*/scores.json")}
    experiments.main(replace(grid, modes=("none", "aer", "fixed")))  # one more mode: the others stay
    assert {p: p.stat().st_mtime_ns for p in done} == done
    assert (base.output / "fixed-1" / "scores.json").exists()
    experiments.main(replace(grid, modes=("none",), seeds=(0,), eval_samples=4))  # asked anew, so scored anew
    assert (base.output / "none-0" / "scores.json").read_text() != kept
    with pytest.raises(ValueError, match="seeds and modes must name at least one"):
        experiments.main(replace(grid, seeds=()))
    with pytest.raises(ValueError, match=r"the run to resume has steps 2, but 5 was asked for"):
        experiments.main(replace(grid, train=replace(base, steps=5)))


def test_intervals_cover_the_mean() -> None:
    values = [0.0] * 30 + [1.0] * 10
    low, high = plot.interval(values)
    assert low < 0.25 < high
    assert high - low == pytest.approx(2 * 1.96 * (0.25 * 0.75 / 40) ** 0.5, rel=0.2)
    assert plot.interval([0.5, 0.5]) == (0.5, 0.5)
    assert plot.pool([scores([4, 0]), scores([0, 0])])["classes"]["all"]["pass@1"] == 0.25


def scores(right: list[int]) -> dict[str, Any]:
    row = {"right": right, "samples": 4, "pass@1": None}
    return {"classes": {"all": row}, "overall": {"entropy": 1.0}}


def test_evaluating_a_run_writes_its_scores(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    train(config, quiet=True)
    evaluate.main(evaluate.Evaluation(config.output, prompts=3, samples=4, k=(1, 4)))
    result = json.loads((config.output / "evaluation.json").read_text())
    assert result["model"].endswith("step-000004/model")
    row = result["classes"]["1 carry"]
    assert row["prompts"] == len(row["right"]) == 3
    assert row["pass@1"] == pytest.approx(sum(row["right"]) / 12)
    assert {"pass@4", "maj@4", "entropy"} <= row.keys()
    assert (config.output / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert "pass@4" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds no run"):
        evaluate.main(evaluate.Evaluation(config.output / "nothing"))


def test_adapters_are_loaded_by_from_pretrained(config: Config) -> None:
    config = replace(config, lora_rank=2, lr=0.1, eval_samples=8, k=(1,))
    train(config, quiet=True)
    evaluate.main(evaluate.Evaluation(config.output))
    result = json.loads((config.output / "evaluation.json").read_text())
    during = read_rows(config.output / "evaluations.jsonl")[-1]
    assert result["overall"]["entropy"] == pytest.approx(during["overall"]["entropy"], rel=1e-4)
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([[3, 4, 5]])
    path = config.output / "checkpoints" / "step-000004" / "model"
    theirs = AutoModelForCausalLM.from_pretrained(path)(ids).logits
    mine = load_model(str(path), config, torch.device("cpu"))(ids).logits
    torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-4)
    initial = replace(config, output=config.output / "initial", lr=1e-12)
    train(initial, quiet=True)
    untrained = read_rows(initial.output / "evaluations.jsonl")[-1]["overall"]["entropy"]
    assert abs(untrained - during["overall"]["entropy"]) > 0.1


def test_runs_are_drawn(config: Config, tmp_path: Path) -> None:
    train(config, quiet=True)
    picture = tmp_path / "one.png"
    plot.main(plot.Plot((config.output,), picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="has no metrics yet"):
        plot.main(plot.Plot((tmp_path,), picture))


def test_an_interrupted_replacement_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    rename = Path.rename

    def second_fails(self: Path, target: Path) -> Path:
        if target == tmp_path / "model" and self.name == "model":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "model", Path.mkdir)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_write_keeps_what_was_there(tmp_path: Path) -> None:
    def half(path: Path) -> None:
        path.mkdir()
        (path / "weights").write_text("ha")
        raise KeyboardInterrupt

    def whole(path: Path) -> None:
        path.mkdir()
        (path / "weights").write_text("whole")

    for _ in range(2):
        write_folder(tmp_path / "model", whole)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "model", half)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "weights").read_text() == "whole"
