"""A teacher's hidden states and head given to a fused model, and TRL's GKD on them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from aer_fast import distill_loss, linear_ppo_loss
from aer_fast.integrations.transformers import LossInputs, fuse_lm_head, lm_body, next_token_target
from tests.helpers.grpo import build as build_for_trl
from tests.helpers.grpo import tokenizer
from tests.helpers.models import build
from tests.helpers.recipes import commands, execute

trl = pytest.importorskip("trl.experimental.gkd")

pytestmark = [
    pytest.mark.needs("transformers", "trl", "datasets", "peft"),
    # of transformers and TRL, about themselves
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*trl.*"),
    pytest.mark.filterwarnings("ignore:.*GKD.*"),
]


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 60, (2, 6))


def logits_of(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids).logits
    return logits


@pytest.mark.parametrize("family", ["untied", "softcap", "scale with softcap", "divided"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_a_fused_model_learns_from_a_teacher(family: str, divergence: str, ids: Tensor) -> None:
    """Softcaps and scales of the student are its own."""
    teacher, student = build("tied"), build(family)
    target, temperature = next_token_target(ids), 0.7
    leaf = student(ids).logits.detach().requires_grad_()
    shared = {"divergence": divergence, "temperature": temperature}
    expected = distill_loss(leaf, logits_of(teacher, ids), target, **shared)
    fuse_lm_head(student)
    with torch.no_grad():
        ref_hidden = lm_body(teacher)(ids).last_hidden_state
    named = {"target": target, "ref_hidden": ref_hidden, "ref_weight": teacher.lm_head.weight} | shared
    for inputs in (named, {"loss_inputs": LossInputs(**named)}):
        out = student(ids, **inputs)
        torch.testing.assert_close(out.loss, expected.loss, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(out.divergence, expected.divergence, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out.logprob, expected.logprob, rtol=1e-4, atol=1e-5)
    out.loss.backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_a_policy_loss_takes_the_exact_kl(ids: Tensor) -> None:
    reference, model = build("tied"), build()
    fuse_lm_head(model)
    with torch.no_grad():
        ref_hidden = lm_body(reference)(ids).last_hidden_state
    hidden = lm_body(model)(ids).last_hidden_state
    given = {"advantage": torch.ones(2, 1), "kl_coef": 0.3, "ref_hidden": ref_hidden}
    given |= {"old_logprob": None, "ref_weight": reference.lm_head.weight}
    expected = linear_ppo_loss(hidden, model.lm_head.weight, next_token_target(ids), **given)
    out = model(ids, target=next_token_target(ids), **given)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.metrics["ref_kl"], expected.metrics["ref_kl"])
    assert out.divergence is None


def test_a_reference_has_the_scale_and_softcap_of_the_policy(ids: Tensor) -> None:
    reference, model = build("scale with softcap"), build("scale with softcap")
    expected = distill_loss(logits_of(model, ids), logits_of(reference, ids), next_token_target(ids))
    fuse_lm_head(model)
    with torch.no_grad():
        ref_hidden = lm_body(reference)(ids).last_hidden_state
    given = {"ref_hidden": ref_hidden, "ref_weight": reference.lm_head.weight, "kl_coef": 1.0}
    out = model(ids, target=next_token_target(ids), advantage=0.0, **given)
    torch.testing.assert_close(out.metrics["ref_kl"], expected.metrics["divergence"], rtol=1e-4, atol=1e-6)


def test_a_teacher_s_hidden_states_as_autocast_leaves_them(ids: Tensor) -> None:
    teacher, model = build("tied"), build()
    fuse_lm_head(model, head_dtype=torch.float32)
    given = {"target": next_token_target(ids), "ref_weight": teacher.lm_head.weight}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ref_hidden = lm_body(teacher)(ids).last_hidden_state.bfloat16()
        out = model(ids, ref_hidden=ref_hidden, **given)
        expected = model(ids, ref_hidden=ref_hidden.float(), **given)
    assert torch.equal(out.loss, expected.loss)


def test_what_does_not_belong_to_a_teacher_is_named(ids: Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"clip: not an input of linear_distill_loss \(ref_hidden is given\)"
    ):
        LossInputs(
            target=ids, ref_hidden=torch.zeros(2, 6, 8), ref_weight=torch.zeros(60, 8), clip=(0.2, 0.2)
        )


def gkd(cls: Any, folder: Path, beta: float) -> Any:
    rows = [
        {"messages": [{"role": "user", "content": f"{a}+"}, {"role": "assistant", "content": f"{a}="}]}
        for a in range(8)
    ]
    words = tokenizer()
    words.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    torch.manual_seed(3)
    teacher = build_for_trl()
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.1 * torch.randn_like(p))
    student = build_for_trl()
    settings = trl.GKDConfig(
        output_dir=str(folder),
        beta=beta,
        lmbda=0.0,
        max_length=16,
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_steps=1,
        disable_tqdm=True,
    )
    return cls(
        model=student,
        teacher_model=teacher,
        args=settings,
        processing_class=words,
        train_dataset=Dataset.from_list(rows),
    )


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("items", [None, 7])
def test_gkd_of_the_recipe_is_trl_s_own(beta: float, items: int | None, tmp_path: Path) -> None:
    names = execute("gkd_trl", "gkd_trl")
    torch.manual_seed(5)
    inputs = {"input_ids": torch.randint(3, 15, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    inputs["attention_mask"][1, 5:] = 0
    inputs["labels"] = inputs["input_ids"].clone()
    inputs["labels"][:, :2], inputs["labels"][1, 5:] = -100, -100
    found = []
    for cls in (trl.GKDTrainer, names["FusedGKDTrainer"]):
        trainer = gkd(cls, tmp_path / cls.__name__, beta)
        count = None if items is None else torch.tensor(items)
        loss = trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=count)
        loss.backward()
        found.append((loss.detach(), [p.grad for p in trainer.model.parameters()]))
    torch.testing.assert_close(*(x[0] for x in found), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*(x[1] for x in found), rtol=1e-4, atol=1e-6)
    assert found[0][0] > 0.01


def test_gkd_of_the_recipe_trains(tmp_path: Path) -> None:
    names = execute("gkd_trl", "gkd_trl")
    trainer = gkd(names["FusedGKDTrainer"], tmp_path, 0.5)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))


def test_the_script_of_gkd_trains_as_trl_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert commands("gkd_trl") == ["python docs/recipes/gkd_trl.py"]
    monkeypatch.chdir(tmp_path)
    names = execute("gkd_trl", "__main__")
    assert len(names["losses"]) == 10
    assert names["losses"] == pytest.approx(names["train"](trl.GKDTrainer), rel=1e-3)
