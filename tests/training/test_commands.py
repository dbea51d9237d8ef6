"""What one command writes another reads; and whatever cannot be read or written is said in one line."""

import json
import math
import re
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTNeoConfig, ReformerConfig, XLNetConfig

from tests.helpers.trainers import small
from training import evaluate, experiments, models, plot
from training.checkpoint import newest, plain
from training.config import Config
from training.evaluate import Evaluation
from training.experiments import Experiment
from training.files import read_rows
from training.models import load_model, load_policy, load_tokenizer, resolve
from training.policy import positions
from training.processes import DEFECT, fault_of, guard, naming
from training.tasks import Mixture
from training.train import Trainer, train

pytestmark = pytest.mark.needs("training", "peft")
HERE = torch.device("cpu")
ADAPTERS = "model/adapter_model.safetensors"  # of a checkpoint


@pytest.fixture
def config(cache: Path, tmp_path: Path) -> Config:
    return small(cache, tmp_path / "run", steps=2, checkpoint_every=1, keep=2, lr=1e-2, threads=1)


def fault(config: Config) -> str:
    """The line with which a training ends."""
    line = fault_of(lambda: train(config, quiet=True), config.output)
    assert line is not None
    assert "\n" not in line
    return line


def last_entropy(run: Path) -> float:
    """Of the evaluation of a run by the command."""
    evaluate.main(Evaluation(run))
    entropy: float = json.loads((run / "evaluation.json").read_text())["overall"]["entropy"]
    return entropy


EVERYTHING = {
    "advantage": "gae",
    "kl_coef": 0.05,
    "dtype": "bfloat16",
    "activation_checkpointing": True,
    "packing": True,
    "reward": "tests.helpers.rewards:length",
    "eval_every": 1,
}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("more", [{"lora_rank": 2}, {"packing": False}])
def test_a_run_with_everything_is_read_by_every_command(config: Config, more: Any, tmp_path: Path) -> None:
    """Evaluated, from its folder, a checkpoint and a checkpoint's model; drawn; resumed."""
    config = replace(config, **(EVERYTHING | more))
    train(config, quiet=True)
    run, rows = config.output, read_rows(config.output / "metrics.jsonl")
    first, second = read_rows(run / "evaluations.jsonl")
    assert last_entropy(run) == pytest.approx(second["overall"]["entropy"], rel=0.02)
    checkpoint = run / "checkpoints" / "step-000001"
    for asked in (
        Evaluation(checkpoint),
        Evaluation(checkpoint / "model"),
        Evaluation(run, model=str(checkpoint)),
        Evaluation(run, model=str(checkpoint / "model")),
    ):
        evaluate.main(asked)
        found = json.loads((run / "evaluation.json").read_text())
        assert found["overall"]["entropy"] == pytest.approx(first["overall"]["entropy"], rel=0.02)
    plot.main(plot.Plot((run,), tmp_path / "picture"))
    assert (tmp_path / "picture").read_bytes().startswith(b"\x89PNG")
    shutil.rmtree(run / "checkpoints" / "step-000002")
    train(replace(config, resume=True), quiet=True)
    assert read_rows(run / "metrics.jsonl") == rows


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_training_goes_on_from_adapters(config: Config, tmp_path: Path, lora_rank: int) -> None:
    """All weights, or adapters of their own upon those of the checkpoint, from elsewhere than its run."""
    config = replace(config, reward="tests.helpers.rewards:length")  # which has gradients from the first step
    before = replace(config, lora_rank=2, lr=0.1)
    train(before, quiet=True)
    checkpoint = before.output / "checkpoints" / "step-000002"
    start = load_model(str(checkpoint / "model"), config, HERE)
    assert all(p.requires_grad for p in start.parameters())
    after = replace(
        config, model=str(checkpoint), output=tmp_path / "after", lora_rank=lora_rank, lr=1e-4, eval_every=2
    )
    train(after, quiet=True)
    during = read_rows(after.output / "evaluations.jsonl")[-1]["overall"]["entropy"]
    assert last_entropy(after.output) == pytest.approx(during, rel=1e-4)

    trained = after.output / "checkpoints" / "step-000002" / "model"
    ids = torch.tensor([[3, 4, 5]])
    off = AutoModelForCausalLM.from_pretrained(trained)(ids).logits - start(ids).logits
    base = load_model(resolve(config), config, HERE)(ids).logits
    assert 0 < off.abs().max() < 0.1 < (base - start(ids).logits).abs().max()


def test_adapters_without_a_base_are_named(config: Config) -> None:
    config = replace(config, lora_rank=2)
    train(config, quiet=True)
    model = config.output / "checkpoints" / "step-000002" / "model"
    for base, message in (
        (5, "names no base_model_name_or_path, but 5"),
        (["x"], r"names no base_model_name_or_path, but \['x'\]"),
        (None, "names no base_model_name_or_path, but None"),
        (str(model), "names its own folder as base_model_name_or_path"),
        (
            "/nowhere/at/all",
            "the base of its adapters: model /nowhere/at/all can't be loaded: no such folder",
        ),
    ):
        settings("adapter_config.json", base_model_name_or_path=base)(model)
        with pytest.raises(ValueError, match=f"model {model} can't be loaded.*{message}"):
            evaluate.main(Evaluation(config.output))


def test_an_evaluation_trains_nothing(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    train(config, quiet=True)
    monkeypatch.delattr(torch.optim, "AdamW")
    evaluate.main(Evaluation(config.output))


def spoilt(config: Config, folder: Path, change: Callable[[Path], object]) -> Config:
    """The run on a copy of its model in which something is changed."""
    shutil.copytree(resolve(config), folder)
    change(folder)
    return replace(config, model=str(folder))


def tokens(**changes: str) -> Callable[[Path], None]:
    """Special tokens that the tokenizer gets, but the model does not; or its chat template."""

    def change(folder: Path) -> None:
        tokenizer = load_tokenizer(str(folder))
        for name, value in changes.items():
            if name == "chat_template":
                tokenizer.chat_template = value
            else:
                tokenizer.add_special_tokens({name: value})
        tokenizer.save_pretrained(folder)

    return change


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def settings(name: str, **changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def weights(change: Callable[[Tensor], object], name: str = "model.safetensors") -> Callable[[Path], None]:
    """The first weight of a file is changed, or left out where the change is to None."""

    def rewrite(folder: Path) -> None:
        found = load_file(folder / name)
        first = min(found)
        if change(found[first]) is None:
            del found[first]
        save_file(found, folder / name, {"format": "pt"})

    return rewrite


def layers(count: int) -> Callable[[Path], object]:
    return settings("config.json", num_hidden_layers=count, layer_types=["full_attention"] * count)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (tokens(pad_token="<p>"), {}, "its tokenizer's padding token has id 14, its embedding 14 rows"),
        (tokens(eos_token="<e>"), {}, "its tokenizer's EOS token has id 14, its embedding 14 rows"),
        (tokens(mask_token="<m>"), {"prompt": "<m>{question}"}, "its tokenizer gives '<m>' the id 14: '"),
        (tokens(), {"chat": True}, "has no chat template"),
        (tokens(chat_template="{{ raise_exception('no') }}"), {"chat": True}, "chat template of model"),
        (tokens(chat_template="{% for %}"), {"chat": True}, "chat template of model"),
        (tokens(chat_template="{{ '' }}"), {"chat": True}, "makes no token of"),
        (text("model.safetensors", "?"), {}, "can't be loaded: SafetensorError"),
        (lambda folder: (folder / "model.safetensors").unlink(), {}, "can't be loaded: "),
        (layers(6), {}, "can't be loaded: its files lack 22 of its weights"),
        (settings("config.json", hidden_size=64), {}, "can't be loaded: "),
        (settings("config.json", num_hidden_layers="4"), {}, "num_hidden_layers"),
        (text("config.json", "["), {}, "not a valid JSON file"),
        (text("tokenizer.json", "{}"), {}, "no tokenizer: KeyError: 'added_tokens'"),
        (text("tokenizer_config.json", "[1]"), {}, "no tokenizer: "),
        (
            settings("generation_config.json", eos_token_id="x"),
            {},
            "eos_token_id is no id of its 14 tokens: 'x'",
        ),
        (
            settings("generation_config.json", eos_token_id=3.5),
            {},
            "eos_token_id is no id of its 14 tokens: 3.5",
        ),
        (settings("generation_config.json", eos_token_id=[1, [2]]), {}, "no id of its 14 tokens: [2]"),
        (settings("generation_config.json", eos_token_id=[1, 10**30]), {}, f"its 14 tokens: {10**30}"),
        (weights(lambda w: w.fill_(math.nan)), {}, "can't be loaded: 1 of its weights are not finite"),
        (weights(lambda w: w.fill_(-math.inf)), {"entropy": "none"}, "1 of its weights are not finite"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_can_not_be_used_is_named(
    config: Config, tmp_path: Path, change: Any, options: Any, message: str
) -> None:
    config = replace(spoilt(config, tmp_path / "model", change), **options)
    line = fault(config)
    assert line.startswith("error: ")
    assert message in line
    assert str(tmp_path / "model") in line
    assert not (config.output / "config.json").exists()  # the folder is still free


def test_every_prompt_is_asked_for_ids_that_the_model_has(config: Config, tmp_path: Path) -> None:
    made = Trainer(
        spoilt(config, tmp_path / "model", tokens(mask_token="<m>")), trainer_world(), None, quiet=True
    )
    problem = made.task.training(0)
    made.encoded(problem)
    with pytest.raises(ValueError, match="its tokenizer gives '<m>' the id 14: '1<m>='"):
        made.collect([problem, replace(problem, question="1<m>=")], 2, "step 1")


def trainer_world() -> Any:
    from training.distributed import World

    return World()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: (c / "state.json").unlink(), "step-000002 can't be read"),
        (text("state.json", "{}"), "step-000002 can't be read"),
        (lambda c: shutil.rmtree(c / "optimizer"), "step-000002 can't be read"),
        (text("optimizer/.metadata", "?"), "step-000002 can't be read"),
        (text("optimizer/__0_0.distcp", "?"), "step-000002 can't be read"),
        (lambda c: shutil.rmtree(c / "model"), "step-000002/model can't be loaded"),
        (text("model/adapter_model.safetensors", "?"), "step-000002/model can't be loaded"),
        (settings("model/adapter_config.json", target_modules=["no"]), "step-000002/model can't be loaded"),
        (settings("model/adapter_config.json", r=5), "step-000002/model can't be loaded"),
        (
            weights(lambda w: None, ADAPTERS),
            "model can't be loaded: its files lack 1 of its weights, for one",
        ),
        (weights(lambda w: w.fill_(math.nan), ADAPTERS), "can't be loaded: 1 of its weights are not finite"),
        (lambda c: (c / ADAPTERS).unlink(), "model can't be loaded: it has no adapter_model.safetensors"),
        (lambda c: (c.parent.parent / "metrics.jsonl").unlink(), "is not the record of 2 steps"),
        (text("../../metrics.jsonl", '{"step": 1}\n{"step": 2}\n'), "is not the record of 2 steps"),
        (text("../../config.json", "?"), "config.json can't be read"),
        (text("../../metrics.jsonl", "?\n"), "metrics.jsonl can't be read"),
        (text("../../metrics.jsonl", '{"loss": 1}\n'), "metrics.jsonl can't be read: KeyError: 'step'"),
    ],
)
def test_a_broken_checkpoint_is_named(
    cache: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    change: Any,
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = tmp_path_factory.getbasetemp() / "whole"  # one run for all of them
    config = small(cache, whole, steps=2, checkpoint_every=1, keep=2, threads=1, lora_rank=2)
    train(replace(config, resume=True), quiet=True)
    shutil.copytree(whole, tmp_path / "run")
    change(tmp_path / "run" / "checkpoints" / "step-000002")
    line = fault(replace(config, output=tmp_path / "run", resume=True))
    assert line.startswith("error: ")
    assert message in line
    assert str(tmp_path / "run") in line
    assert not [record for record in caplog.records if record.exc_info]  # torch logs tracebacks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": "2"}, "steps is '2': str is not an instance of int"),
        ({"k": "12"}, "k is '12': str is not"),
        ({"k": [1, "x"]}, "k is (1, 'x'): item 1"),
        ({"temperature": None}, "temperature is None"),
        ({"task": 5}, "task is 5"),
        ({"dtype": "float16"}, "dtype is 'float16': str is not any of ('float32', 'bfloat16')"),
        ({"packing": "no"}, "packing is 'no'"),
        ({"max_new_tokens": 4.0}, "max_new_tokens is 4.0"),
        ({"output": 3}, "output is 3"),
        ({"degenerate": "zzz"}, "degenerate is 'zzz'"),
        ({"of_a_newer_version": 1}, "is not that of a run: it has 'of_a_newer_version'"),
    ],
)
def test_a_record_of_another_type_is_named(config: Config, tmp_path: Path, change: Any, message: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(plain(config) | change))
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/run/config.json")) as error:
        evaluate.main(Evaluation(tmp_path / "run"))
    assert message in str(error.value)


def test_a_record_of_a_newer_version_is_not_gone_on_with(config: Config) -> None:
    config.output.mkdir()
    (config.output / "config.json").write_text(json.dumps(plain(config) | {"of_a_newer_version": 1}))
    assert "has of_a_newer_version 1, but None was asked for" in fault(replace(config, resume=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": "{question[0]}"}, "prompt must contain {question}"),
        ({"prompt": "{question.foo}"}, "is no template of {question} alone"),
        ({"prompt": "{question[foo]}"}, "is no template of {question} alone"),
        ({"seed": 2**64}, "seed must be at most"),
        ({"task": "carry * None"}, "a weight must be a positive number up to 1e9, got None"),
        ({"task": "carry * (1, 2)"}, "a weight must be a positive number"),
        ({"task": "carry * 1j"}, "a weight must be a positive number"),
        ({"task": f"carry * {'9' * 400}"}, "a weight must be a positive number"),
        ({"task": "carry * True"}, "a weight must be a positive number"),
        ({"task": "carry(digits={[]: 1})"}, "is not of the form"),
        ({"model": "carry(digits={[]: 1})"}, "is not of the form"),
        ({"task": "chain_sum(size=1.5)"}, "size must be a positive integer, got 1.5"),
    ],
)
def test_settings_that_are_nonsense_are_named(config: Config, settings: Any, message: str) -> None:
    assert message in fault(replace(config, **settings))


def test_settings_of_a_task_may_be_lists() -> None:
    task = Mixture("basic_arithmetic(operators=['+', '-'], max_terms=2, max_digits=1) * 2", 0)
    assert task.weights == [2.0]
    problem = task.training(0)
    assert task.scorer(problem, problem.answer) == 1.0


def test_data_that_changed_is_not_judged_in_silence(config: Config, tmp_path: Path) -> None:
    """Neither by an evaluation, nor by a grid that has its scores."""
    path = tmp_path / "rows.jsonl"
    rows = "".join(f'{{"question": "{a}+{a + 1}=", "answer": "{2 * a + 1}"}}\n' for a in range(40))
    path.write_text(rows)
    config = replace(config, data=str(path), reward_workers=0, steps=1)
    grid = Experiment(modes=("none",), eval_prompts=1, eval_samples=2, train=config)
    experiments.main(grid)
    train(replace(config, output=tmp_path / "single"), quiet=True)
    path.write_text(rows + '{"question": "1+1=", "answer": "2"}\n')
    message = "data .*rows.jsonl has changed since the run began; --accept-changed-data goes on with it"
    with pytest.raises(ValueError, match=message):
        evaluate.main(Evaluation(tmp_path / "single"))
    evaluate.main(Evaluation(tmp_path / "single", accept_changed_data=True))
    with pytest.raises(ValueError, match=f"run none-0: {message}"):
        experiments.main(grid)
    (tmp_path / "single" / "data.json").write_text("3")
    with pytest.raises(ValueError, match=r"data\.json can't be read"):
        evaluate.main(Evaluation(tmp_path / "single"))


def test_a_baseline_of_other_settings_is_scored_anew(config: Config) -> None:
    settings = Experiment(modes=("none",), eval_prompts=1, eval_samples=2, train=config)
    start = replace(config, output=config.output / "initial-0")
    experiments.evaluate_start(start, settings)
    assert experiments.is_scored(start, settings)
    for change in ({"prompt": "Q: {question}"}, {"reward": "tests.helpers.rewards:length"}, {"shots": 1}):
        assert not experiments.is_scored(replace(start, **change), settings)
    assert not experiments.is_scored(start, replace(settings, eval_samples=3))
    assert experiments.is_scored(replace(start, reward_workers=1), settings)


def test_models_with_limits_of_their_own(config: Config, tmp_path: Path) -> None:
    """Rows beyond a buffer; states wider than hidden_size; no padding; no limit, written as -1."""
    tokenizer = load_tokenizer(resolve(config))

    def model(name: str, kind: Any, **settings: Any) -> Config:
        ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        made = AutoModelForCausalLM.from_config(kind(vocab_size=14, **settings, **ends))
        made.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return replace(config, model=str(tmp_path / name), output=tmp_path / f"run-{name}", steps=1)

    sizes: dict[str, Any] = {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
    neo = model("neo", GPTNeoConfig, hidden_size=32, max_position_embeddings=24, **sizes)
    line = fault(replace(neo, packing=True))
    assert "no packed row of more than its 24 positions; use micro_tokens up to 24, or --no-packing" in line
    train(replace(neo, packing=True, micro_tokens=24), quiet=True)
    sizes = {"hidden_size": 32, "feed_forward_size": 64, "num_attention_heads": 2, "attention_head_size": 16}
    sizes |= {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local"]}
    reformer = model("reformer", ReformerConfig, **sizes)
    head = load_policy(reformer.model, replace(reformer, advantage="gae"), HERE).value_head
    assert head is not None
    assert head.in_features == 64
    xlnet = model("xlnet", XLNetConfig, d_model=32, n_layer=1, n_head=2, d_inner=64)  # wants another mask
    assert "can't be run on padded sequences: RuntimeError" in fault(xlnet)
    policy = load_policy(resolve(config), config, HERE)
    for given, expected in ((-1, None), (7, 7)):
        policy.causal_lm.config.max_position_embeddings = given
        assert positions(policy) == expected


def test_other_folders_are_named(config: Config, tmp_path: Path) -> None:
    model = resolve(config)
    (tmp_path / "empty").mkdir()
    train(config, quiet=True)
    (config.output / "checkpoints" / "step-old").mkdir()  # of somebody else
    (config.output / "checkpoints" / "step-²").mkdir()
    shutil.copytree(config.output / "checkpoints" / "step-000002", tmp_path / "copied")
    assert newest(config.output).endswith("step-000002/model")
    for asked, message in (
        (Evaluation(Path(model)), "config.json is not that of a run: it has 'architectures'"),
        (Evaluation(tmp_path / "empty"), "holds no run: no config.json"),
        (
            Evaluation(tmp_path / "copied"),
            f"run {tmp_path}/copied holds no run: no config.json (the folder of",
        ),
        (Evaluation(config.output, model=str(config.output)), "is a run; name one of its checkpoints"),
        (
            Evaluation(config.output, model=str(tmp_path / "empty")),
            f"model {tmp_path / 'empty'}: no tokenizer",
        ),
        (
            Evaluation(config.output, output=Path("/dev/null/x")),
            "output /dev/null/x is no folder to write to",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            evaluate.main(asked)
    for drawn, message in (
        (plot.Plot(()), "runs must name at least one"),
        (plot.Plot((config.output,), tmp_path / "picture.xyz"), "output picture.xyz can't be drawn"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            plot.main(drawn)
    unwritable = replace(config, output=tmp_path / "2", model_cache=Path("/dev/null/x"))
    assert fault(unwritable).startswith("error: model_cache /dev/null/x is no folder to write to")


def test_a_full_disk_is_named(config: Config, tmp_path: Path) -> None:
    """Files of more than 100 kB can't be written: neither a model made here nor a checkpoint."""
    resolve(config)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        made = fault(replace(config, model="carry(digits=2, steps=1, batch=1)", output=tmp_path / "1"))
        written = fault(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert made.startswith(
        f"error: model_cache {config.model_cache} is no folder to write to: SafetensorError"
    )
    assert written.startswith(f"error: checkpoint of step 1 can't be written to {config.output}: its model: ")
    assert not list((config.output / "checkpoints").iterdir())


def test_rewards_that_can_not_be_imported_are_named(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "reward_that_exits.py").write_text("raise SystemExit(3)\n")
    message = "error: reward 'reward_that_exits:f' can't be loaded: SystemExit: 3"
    assert fault(replace(config, reward="reward_that_exits:f")) == message
    once = "import multiprocessing as m\nassert m.parent_process() is None, 'once'\ndef f(*_): return 1.0\n"
    (tmp_path / "reward_of_one_process.py").write_text(once)
    alone = replace(config, reward="reward_of_one_process:f", reward_workers=1)
    assert "the reward failed on every response" in fault(alone)
    assert "'reward_of_one_process:f' can't be loaded: AssertionError: once" in fault(
        replace(alone, resume=True)
    )
    assert "Traceback" not in capfd.readouterr().err


def slip() -> None:
    int("a slip of ours")


def said() -> None:
    with naming("file x can't be read"):
        json.loads("{")


def test_defects_keep_their_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was said in a line of ours is an error; everything else is an internal one."""

    def raises(error: Exception) -> Callable[[], None]:
        def work() -> None:
            raise error

        return work

    for work in (raises(KeyError("x")), raises(ValueError("x")), slip, lambda: json.loads("{")):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        with pytest.raises(SystemExit) as stopped:
            guard(work, "", folder)
        assert str(stopped.value.code).startswith("internal error: ")
        assert str(stopped.value.code).endswith(f"its traceback is in {folder / DEFECT}")
        assert "Traceback (most recent call last)" in (folder / DEFECT).read_text()
    assert "Traceback" not in capsys.readouterr().err
    line = fault_of(raises(KeyError("x")), Path("/dev/null"))
    assert line is not None
    assert "can't be written to /dev/null" in line
    assert "Traceback" in capsys.readouterr().err

    folder = tmp_path / "said"
    assert str(fault_of(said, folder)).startswith("error: file x can't be read: Expecting property name")
    monkeypatch.setitem(globals(), "__package__", "training")
    assert fault_of(raises(ValueError("two\nlines")), folder) == "error: two lines"
    assert str(fault_of(slip, tmp_path)).startswith("internal error: ValueError: invalid literal")
    assert fault_of(raises(OSError(28, "No space left", "/f")), folder) == "error: /f: No space left"
    missing = ModuleNotFoundError(name="matplotlib")
    assert str(fault_of(raises(missing), folder)).startswith("error: the package 'matplotlib' is missing")
    own = ModuleNotFoundError(name="training.gone")
    assert str(fault_of(raises(own), tmp_path)).startswith("internal error: ModuleNotFoundError")
    full = torch.OutOfMemoryError("CUDA out of memory")
    assert str(fault_of(raises(full), folder)).startswith("error: out of memory; smaller micro_tokens")
    assert not folder.exists()


def test_a_defect_claims_no_folder(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(models, "requested", lambda *_: 1 / 0)
        patch.setattr("training.train.load_tokenizer", lambda path: 1 / 0)
        assert fault(config).startswith("internal error: ZeroDivisionError")
    train(config, quiet=True)
