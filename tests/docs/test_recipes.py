"""The recipes run, and are what they claim: compared with plain torch, from logits, in float64."""

import ast
import copy
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import aer_fast
from aer_fast import AdaptiveEntropy
from aer_fast.integrations import transformers as integration
from tests import ROOT
from tests.helpers.recipes import (
    FOLDER,
    NAMES,
    ROUNDING,
    Ran,
    assert_printed,
    commands,
    eager_ppo,
    eager_stats,
    execute,
    gradients,
    movement,
    next_tokens,
    relative_error,
    sgd,
    state_of,
    torchrun,
)

pytestmark = pytest.mark.needs("transformers", "accelerate", "lightning", "peft", "safetensors")


@pytest.fixture
def cook(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], Ran]:
    """Run a recipe in an empty folder; what it prints must be what its comments say."""
    twins: list[Any] = []
    fuse = integration.fuse_lm_head

    def remember_and_fuse(model: Any) -> None:
        twins.append(copy.deepcopy(model).double())
        fuse(model)

    def run(name: str) -> Ran:
        assert f"python docs/recipes/{name}.py" in commands(name)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(integration, "fuse_lm_head", remember_and_fuse)
        capsys.readouterr()
        names = execute(name, "__main__")
        assert_printed(name, capsys.readouterr().out)
        return Ran(names, twins[0])

    return run


def test_the_table_has_each_recipe_once() -> None:
    page = (FOLDER.parent / "recipes.md").read_text()
    rows = re.findall(r"^\| \[(\w+)\.py\]\(recipes/\1\.py\) \|", page, re.MULTILINE)
    assert sorted(rows) == NAMES, "docs/recipes.md must have one row for each script of docs/recipes"
    assert "```python" not in page  # code is tested where it stands


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_how_to_run_it_and_what_to_replace(name: str) -> None:
    code = (FOLDER / f"{name}.py").read_text()
    assert "For a real model" in (ast.get_docstring(ast.parse(code)) or "")
    assert re.search(r"# yours: AutoModelForCausalLM\.from_pretrained\(", code)
    assert commands(name)
    assert all(f"docs/recipes/{name}.py" in command for command in commands(name))
    assert re.search(r"^ *([\w.]*print\(.*\)  # |assert )", code, re.MULTILINE)
    tested = any(f'"{name}"' in path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert tested, f"a test must run {name}.py: test_recipes.py or test_recipes_processes.py, say"


@pytest.mark.parametrize("path", list(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_no_recipe_hides_a_package(path: Path) -> None:
    """A script's folder comes first on sys.path: a lightning.py would be what it imports itself."""
    found = importlib.util.find_spec(path.stem)
    assert found is None or found.origin == str(path)


def test_a_plain_loop_in_micro_batches_is_the_loop_over_logits(
    cook: Callable[[str], Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    sampled: list[Tensor] = []
    generate = LlamaForCausalLM.generate

    def remember(self: Any, *args: Any, **options: Any) -> Tensor:
        assert options["do_sample"]
        assert options["top_k"] == 0
        sampled.append(generate(self, *args, **options))
        return sampled[-1]

    monkeypatch.setattr(LlamaForCausalLM, "generate", remember)
    names, twin = cook("plain_loop")
    assert names["metrics"]["tokens"] == 2 * names["tokens"]
    assert names["metrics"]["ratio_max"] == max(part["ratio_max"] for part in names["parts"]) > 1
    model, start = names["model"], state_of(twin)
    names["model"] = SimpleNamespace(generate=lambda *args, **options: sampled.pop(0))
    optimizer = torch.optim.AdamW(twin.parameters(), lr=2e-2)
    controller, accuracies = AdaptiveEntropy(target_ratio=0.9, alpha_init=0.1), []
    for _ in range(10):
        ids, mask = names["rollouts"](names["prompts"])
        for row, kept in zip(ids[:, 5:].tolist(), mask.tolist()):
            length = row.index(2) + 1 if 2 in row else len(row)
            assert kept == [False] * 5 + [True] * length + [False] * (len(row) - length)
        target, live = next_tokens(ids, mask), mask.roll(-1, 1)
        right = (ids[:, 5] % 2 == 0).double().view(4, 8)
        accuracies.append(right.mean().item())
        advantage = ((right - right.mean(1, keepdim=True)) / (right.std(1, keepdim=True) + 1e-6)).view(-1, 1)
        with torch.no_grad():
            old_logprob, old_entropy = eager_stats(twin, ids, target)
        weight = (1 - 2 * right.mean(1)).clamp(min=0).mean()
        controller.update(old_entropy.sum().item() / mask.sum().item(), weight=weight)
        coefficient = controller.coefficient(right.mean(1)).repeat_interleave(8).unsqueeze(1)
        for _ in range(2):
            logprob, entropy = eager_stats(twin, ids, target)
            loss = (
                eager_ppo(logprob, old_logprob, advantage, live, (0.2, 0.28)) - (coefficient * entropy).sum()
            )
            optimizer.zero_grad()
            (loss / mask.sum()).backward()
            optimizer.step()
    assert names["accuracies"] == pytest.approx(accuracies)
    # Adam divides by the gradient's size: where that is rounding, an entry moves anywhere
    budget = 1000 * ROUNDING
    found, wanted = names["controller"].state_dict(), controller.state_dict()
    assert found.pop("law") == pytest.approx(wanted.pop("law"), rel=budget)  # the target was met
    assert found == pytest.approx(wanted, rel=budget)
    expected = movement(twin.state_dict(), start)
    assert relative_error(movement(model.state_dict(), start), expected) < budget


def rollouts_of(names: dict[str, Any], rows: slice) -> dict[str, Tensor]:
    rollouts = names["rollouts"][rows]
    return {
        name: torch.stack([x[name] for x in rollouts]) for name in ("ids", "mask", "advantage", "accuracy")
    }


def eager_accelerate(names: dict[str, Any], twin: Any) -> AdaptiveEntropy:
    """Two steps of SGD on 8 rollouts each, at once."""
    controller = AdaptiveEntropy(target_ratio=0.9, alpha_init=0.1)
    for rows in (slice(0, 8), slice(8, 16)):
        batch = rollouts_of(names, rows)
        target = next_tokens(batch["ids"], batch["mask"])
        live = target != -100
        logprob, entropy = eager_stats(twin, batch["ids"], target)
        weight = (1 - 2 * batch["accuracy"].double()).mean()
        controller.update((entropy.sum() / live.sum()).item(), weight=weight)
        coefficient = controller.coefficient(batch["accuracy"])
        loss = eager_ppo(logprob, logprob.detach(), batch["advantage"], live) - (coefficient * entropy).sum()
        sgd(twin, loss / live.sum())
    return controller


@pytest.fixture
def forget_accelerate() -> Any:
    """accelerate keeps its state in the class; leave none to other tests."""
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_accelerate_on_one_process_and_on_two_is_one_big_batch(
    cook: Callable[[str], Ran], tmp_path: Path, forget_accelerate: None
) -> None:
    from safetensors.torch import load_file

    names, twin = cook("accelerate_loop")
    start = state_of(twin)
    controller = eager_accelerate(names, twin)
    expected = movement(twin.state_dict(), start)
    assert names["controller"].state_dict() == pytest.approx(controller.state_dict(), rel=ROUNDING)
    assert relative_error(movement(names["model"].state_dict(), start), expected) < ROUNDING

    saved = names["controller"].state_dict()
    names["controller"].update(9.0)
    with torch.no_grad():
        names["model"].lm_head.weight.zero_()
    names["accelerator"].load_state("runs/recipes/accelerate")
    assert names["controller"].state_dict() == saved
    assert relative_error(movement(names["model"].state_dict(), start), expected) < ROUNDING

    folder = tmp_path / "two"
    folder.mkdir()
    torchrun(folder, "accelerate_loop")
    weights = load_file(folder / "runs/recipes/accelerate" / "model.safetensors")
    assert relative_error(movement(weights, start), expected) < ROUNDING
    (path,) = (folder / "runs/recipes/accelerate").glob("custom_checkpoint_*.pkl")
    assert torch.load(path) == pytest.approx(controller.state_dict(), rel=ROUNDING)


@pytest.mark.filterwarnings(
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:.isinstance.treespec, LeafSpec.. is deprecated",
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated",
)
def test_lightning_with_accumulation_is_one_big_batch(cook: Callable[[str], Ran]) -> None:
    names, twin = cook("lightning_loop")
    start, controller = state_of(twin), AdaptiveEntropy(target_ratio=0.9, alpha_init=0.1)
    for rows in (slice(0, 8), slice(8, 16)):
        batch = rollouts_of(names, rows)
        target = next_tokens(batch["ids"], batch["mask"])
        live = target != -100
        logprob, entropy = eager_stats(twin, batch["ids"], target)
        coefficient = controller.coefficient(batch["accuracy"])
        loss = eager_ppo(logprob, logprob.detach(), batch["advantage"], live) - (coefficient * entropy).sum()
        sgd(twin, loss / live.sum())
        weight = (1 - 2 * batch["accuracy"].double()).mean()
        controller.update((entropy.sum() / live.sum()).item(), weight=weight)
    assert names["policy"].controller.state_dict() == pytest.approx(controller.state_dict(), rel=ROUNDING)
    assert names["restored"].controller.state_dict() == names["policy"].controller.state_dict()
    expected = movement(twin.state_dict(), start)
    for policy in (names["policy"], names["restored"]):
        assert relative_error(movement(policy.model.state_dict(), start), expected) < ROUNDING


def test_lora_trains_as_pefts_own_forward_does(cook: Callable[[str], Ran]) -> None:
    names, twin = cook("lora")
    start, ids = state_of(twin), names["ids"]
    target = next_tokens(ids, torch.arange(12).expand_as(ids) >= 4)
    live = target != -100
    parameters = [p for p in twin.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    with torch.no_grad():
        old_logprob, _ = eager_stats(twin, ids, target)  # the reference's as well: B is 0 at first

    def eager_loss(model: Any) -> Tensor:
        logprob, entropy = eager_stats(model, ids, target)
        d = old_logprob - logprob
        kl = ((d.exp() - d - 1) * live).sum()
        ppo = eager_ppo(logprob, old_logprob, names["advantage"], live)
        return (ppo + 0.05 * kl - 0.01 * entropy.sum()) / live.sum()

    for _ in range(3):
        optimizer.zero_grad()
        eager_loss(twin).backward()
        optimizer.step()
    expected = movement(twin.state_dict(), start)
    assert relative_error(movement(names["model"].state_dict(), start), expected) < ROUNDING
    changed = {name for name in start if not torch.equal(start[name], twin.state_dict()[name])}
    assert changed == set(names["trained"])
    assert {name.split(".")[-4] for name in changed} >= {"q_proj", "v_proj"}
    for side in ("lora_A", "lora_B"):
        assert any("lm_head" in name and side in name for name in changed)
    with torch.no_grad(), names["model"].disable_adapter():  # the reference is still what it was
        after = names["model"](ids, target=target).logprob
    torch.testing.assert_close(after, names["ref_logprob"])
    # and from the same weights, not through the optimiser
    fused = gradients(names["loss"](), names["model"])
    assert relative_error(fused, gradients(eager_loss(twin), twin)) < ROUNDING


def test_dpo_is_the_loss_of_the_logits(cook: Callable[[str], Ran]) -> None:
    names, twin = cook("dpo")
    responses = torch.cat((names["chosen"], names["rejected"]))
    ids = torch.cat((names["prompt"].repeat(2, 1), responses), 1)

    def log_likelihood() -> Tensor:
        log_softmax: Tensor = twin(ids).logits[:, 3:-1].log_softmax(-1)
        return log_softmax.gather(-1, responses.unsqueeze(-1)).sum((1, 2))

    optimizer = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=1e-2)
    with torch.no_grad():
        reference = log_likelihood()

    def eager_loss() -> Tensor:
        gain = log_likelihood() - reference
        return -(0.1 * (gain[:4] - gain[4:])).sigmoid().log().mean()

    for _ in range(10):
        loss = eager_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert names["loss"].item() == pytest.approx(loss.item(), rel=1e-3)
    # from the same weights, not through the optimiser
    twin.load_state_dict(names["model"].state_dict())
    fused = names["dpo"]()
    torch.testing.assert_close(fused, eager_loss().float())
    assert relative_error(gradients(fused, names["model"]), gradients(eager_loss(), twin)) < ROUNDING


def test_fused_statistics_are_no_views(cook: Callable[[str], Ran]) -> None:
    """FSDP2 hangs its hooks on what a model returns, and warns of views: with DPO, at each call."""
    names, _ = cook("dpo")
    out = names["model"](names["ids"], target=names["target"])
    assert out.logprob.requires_grad
    assert not out.logprob._is_view()
    assert not out.entropy._is_view()


def eager_gspo(logprob: Tensor, old_logprob: Tensor, advantage: Tensor, live: Tensor) -> Tensor:
    """The paper's objective, one sequence after another: the mean over sequences, and what is clipped."""
    losses = []
    for b in range(len(live)):
        ratio = (logprob[b] - old_logprob[b])[live[b]].mean().exp()
        losses.append(-torch.minimum(ratio * advantage[b], ratio.clamp(1 - 3e-4, 1 + 4e-4) * advantage[b]))
    return torch.stack(losses).mean()


def test_gspo_and_cispo_are_what_the_papers_say(cook: Callable[[str], Ran]) -> None:
    names, twin = cook("gspo_cispo")
    model, target = names["model"], names["target"]
    live = target != -100
    assert (~live[:, 3:-1]).any()  # masked tokens inside of sequences
    twin.load_state_dict(model.state_dict())
    logprob, _ = eager_stats(twin, names["ids"], target)
    shift = torch.tensor([-1e-3, -2e-4, 0.0, 1e-4, 2e-4, 3.5e-4, 1e-3, 2e-3]).unsqueeze(1)
    sign = torch.tensor([1, -1, 1, 1, -1, -1, 1, -1]).unsqueeze(1)
    names["advantage"] = sign * names["advantage"].abs()

    def with_old(old_logprob: Tensor, loss: str, **options: Any) -> Tensor:
        names["old_logprob"] = old_logprob.float()
        result: Tensor = names[loss](**options)
        return result

    old_logprob = logprob.detach() - shift + 0.1 * torch.randn_like(logprob).where(live, 0.0)
    drift = [(logprob[b] - old_logprob[b] - shift[b])[live[b]].mean().item() for b in range(8)]
    old_logprob = (old_logprob + torch.tensor(drift).unsqueeze(1)).detach()  # the means are the shifts
    expected = eager_gspo(logprob, old_logprob, names["advantage"].double(), live)
    grads = gradients(expected, twin)
    clipped = ((shift > 4e-4) & (sign > 0)) | ((shift < -3e-4) & (sign < 0))
    assert 0 < clipped.sum() < 8
    for options in ({}, {"chunk_tokens": 1}, {"memory_budget": 1}):
        fused = with_old(old_logprob, "gspo_loss", **options)
        torch.testing.assert_close(fused, expected.float(), rtol=1e-5, atol=1e-6)
        assert relative_error(gradients(fused, model), grads) < ROUNDING, options

    logprob, _ = eager_stats(twin, names["ids"], target)
    old_logprob = logprob.detach() + 2 * torch.randn_like(logprob)
    ratio = (logprob.detach() - old_logprob).exp()
    assert 0 < (ratio[live] > 5).sum() < live.sum()
    expected = -(ratio.clamp(max=5.0) * names["advantage"] * logprob)[live].mean()
    fused = with_old(old_logprob, "cispo_loss")
    torch.testing.assert_close(fused, expected.float())
    assert relative_error(gradients(fused, model), gradients(expected, twin)) < ROUNDING


@pytest.mark.parametrize("layout", ["packed", "logits_to_keep"])
def test_the_bounds_of_gspos_sequences_are_those_of_the_target(
    cook: Callable[[str], Ran], layout: str
) -> None:
    """Packed [N] in linear_token_loss; B · k where the model keeps the last k positions."""
    names = cook("gspo_cispo").names
    model, target, mask = names["model"], names["target"], names["target"] != -100
    with torch.no_grad():  # ratios of their own for the sequences, and on the side where nothing is clipped
        old_logprob = model(names["ids"], target=target).logprob
        old_logprob += names["advantage"].sign() * torch.arange(1, 9).unsqueeze(1) / 100
    names["old_logprob"] = old_logprob
    expected = names["gspo_loss"]()
    tensors = [x.expand_as(target) for x in (old_logprob, names["advantage"], names["sequence"])]
    if layout == "packed":
        hidden = model.model(names["ids"]).last_hidden_state
        length = torch.arange(5, 13)  # of unequal length: the first positions of each sequence are prompt
        kept = torch.arange(12) >= 12 - length.unsqueeze(1)
        out = aer_fast.linear_token_loss(
            hidden[kept],
            model.lm_head.weight,
            target.where(kept, -100)[kept],
            names["gspo"],
            *(x[kept] for x in tensors),
            cu_seqlens=torch.nn.functional.pad(length.cumsum(0), (1, 0)),
            denominator=8,
            chunk_tokens=4,
        )
        names["target"] = target.where(kept, -100)
        expected = names["gspo_loss"]()
    else:
        assert not mask[:, :3].any()
        out = model(
            names["ids"],
            target=target[:, 3:],
            objective=names["gspo"],
            token_tensors=[x[:, 3:] for x in tensors],
            cu_seqlens=torch.arange(0, 8 * 9 + 1, 9),
            denominator=8,
            logits_to_keep=9,
            chunk_tokens=4,
        )
    assert out.loss.item() != 0
    torch.testing.assert_close(out.loss, expected, rtol=1e-5, atol=1e-7)
    exact = [g.double() for g in gradients(expected, model)]
    assert relative_error(gradients(out.loss, model), exact) < ROUNDING


@pytest.mark.parametrize("shape", ["rollout", "token"])
def test_a_temperature_divides_the_logits(cook: Callable[[str], Ran], shape: str) -> None:
    names, twin = cook("temperature_per_rollout")
    model, target = names["model"], names["target"]
    live = target != -100
    torch.testing.assert_close(names["temperature"][::4, 0], torch.tensor([0.6, 1.0, 1.4]))
    assert torch.equal(target, next_tokens(names["ids"], torch.arange(13).expand(12, 13) >= 5))
    with torch.no_grad():  # the sampler's own log-probabilities, before the step
        logprob, _ = eager_stats(twin, names["ids"], target, names["temperature"])
        torch.testing.assert_close(names["old_logprob"], logprob.float(), rtol=0.0, atol=1e-4)
    if shape == "token":
        names["temperature"] = 0.5 + torch.rand(12, 13)
    twin.load_state_dict(model.state_dict())
    logprob, entropy = eager_stats(twin, names["ids"], target, names["temperature"])
    names["old_logprob"] = (logprob.detach() + 0.3 * torch.randn_like(logprob)).float()
    loss = eager_ppo(logprob, names["old_logprob"], names["advantage"], live)
    expected = (loss - 0.01 * entropy.sum()) / live.sum()
    out = names["step"]()
    torch.testing.assert_close(out.logprob, logprob.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.entropy, entropy.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.loss, expected.float(), rtol=1e-4, atol=1e-5)
    assert relative_error(gradients(out.loss, model), gradients(expected, twin)) < ROUNDING


def test_an_entropy_that_is_only_logged_is_exact_and_leaves_no_trace(cook: Callable[[str], Ran]) -> None:
    names, twin = cook("entropy_metric")
    start, ids = state_of(twin), names["ids"]
    target = next_tokens(ids, torch.arange(12).expand_as(ids) >= 4)
    live = target != -100
    logprob, entropy = eager_stats(twin, ids, target)
    torch.testing.assert_close(names["stats"].entropy, entropy.float())
    assert names["entropy"].item() == pytest.approx(entropy.sum().item() / 64, rel=1e-5)
    assert names["controller"].target == pytest.approx(0.4 * entropy.sum().item() / 64, rel=1e-5)
    sgd(twin, eager_ppo(logprob, logprob.detach(), names["advantage"], live) / 64)  # no entropy in it
    expected = movement(twin.state_dict(), start)
    assert relative_error(movement(names["model"].state_dict(), start), expected) < ROUNDING
    # stats="active": rows without an advantage are left out, and the metric is the mean of the others
    _, entropy = eager_stats(twin, ids, target)
    out = names["out"]
    assert not out.entropy[:4].any()
    torch.testing.assert_close(out.entropy[4:], entropy[4:].float(), rtol=1e-4, atol=1e-5)
    assert out.metrics["entropy"].item() == pytest.approx(entropy[4:].sum().item() / 32, rel=1e-4)
