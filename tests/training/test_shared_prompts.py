"""A prompt that several responses share is computed once, when it is learned from and when it is sampled."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.helpers.attention import CPU, EAGER, FAMILIES, SIZES, assert_same, build, gradients, settled
from tests.helpers.trainers import BASE, small, trainer
from training import attention, rollout
from training.attention import PACKED, Packed, packed_mask
from training.batch import Rollout, make_batch
from training.learner import Learner
from training.policy import Policy, check_model

pytestmark = pytest.mark.needs("training")
GENERATOR = torch.Generator().manual_seed(1)


def tokens(length: int) -> list[int]:
    return torch.randint(3, 61, (length,), generator=GENERATOR).tolist()


# Prompts of one token and longer than a window; responses alike and not; a prompt that comes back; one alone,
# as long as the prompt after it.
PROMPTS = [tokens(length) for length in (7, 1, 5, 5, 2)]
RESPONSES = [(0, [3, 1, 5, 3]), (1, [4]), (2, [2, 2, 9, 1]), (3, [1, 1]), (0, [6]), (1, [1, 12]), (4, [11])]
GROUPED = [Rollout(PROMPTS[k], tokens(n), False) for k, lengths in RESPONSES for n in lengths]
SHARED = make_batch(GROUPED, packing=True, pad=0, device=CPU, share=True)
PADDED = make_batch(GROUPED, packing=False, pad=0, device=CPU)


def check(model: Any) -> Policy:
    policy = Policy(model, temperature=1.0, dtype="float32", value_head=False)
    check_model(policy, row=64, pad=0, name="this")
    return policy


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - EAGER))
def test_shared_is_padded(family: str, recompute: bool) -> None:
    model = build(family).double()
    if "moe" in family:
        model.set_experts_implementation("eager")  # the others have no float64
    expected = gradients(copy.deepcopy(model), PADDED)
    model = settled(model)
    if recompute:
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        model.train()
    assert check(model).shares
    assert SHARED.ids.shape[1] < sum(r.length for r in GROUPED) - 30
    assert_same(gradients(model, SHARED), expected)


def test_keys_are_copied_for_few_tokens_and_not_for_each_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for as many tokens of short responses as the prompt has; for each of the long ones."""
    seen: list[tuple[tuple[int, ...], int]] = []
    function = nn.functional.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, *rest: Tensor, **options: Any) -> Tensor:
        entries = key.untyped_storage().nbytes() // key.element_size()
        seen.append((tuple(key.shape[:3]), entries // SIZES["head_dim"]))
        return function(query, key, *rest, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", spy)
    model = settled(build("llama"))
    group = [Rollout(PROMPTS[0], tokens(n), False) for n in (3, 3, 1, 4, 3, 4)]
    gradients(model, make_batch(group, packing=True, pad=0, device=CPU, share=True))
    # the prompt, among all keys of the row; 4 and 4 after it; 3 and 3, 3 and 1 of 2 heads for each one's keys
    expected = [((1, 2, 7), 2 * 25), ((2, 2, 11), 2 * 22), ((2, 2, 13), 2 * 13), ((2, 2, 11), 2 * 11)]
    assert seen == expected * SIZES["num_hidden_layers"]


def test_a_long_prompt_is_not_held_for_each_response() -> None:
    """Forty short responses to it hold no more than as many tokens without a shared prompt."""
    prompt = tokens(40)
    group = [Rollout(prompt, tokens(1), False) for _ in range(40)]
    held = []
    for rollouts, share in ((group, True), (group[:2], False)):
        batch = make_batch(rollouts, packing=True, pad=0, device=CPU, share=share)
        sizes: dict[int, int] = {}

        def keep(x: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model = settled(build())
            hidden = Policy(model, temperature=1.0, dtype="float32", value_head=False).hidden(batch)
        assert hidden.requires_grad
        held.append(sum(sizes.values()) / batch.ids.shape[1])
    assert held[0] < 1.1 * held[1]


def test_an_empty_response_predicts_nothing() -> None:
    group = [Rollout(PROMPTS[0], response, False) for response in ([], [7, 8], [])]
    padded = make_batch(group, packing=False, pad=0, device=CPU)
    model = build()
    for share in (False, True):
        batch = make_batch(group, packing=True, pad=0, device=CPU, share=share)
        assert batch.target.tolist() == padded.target.tolist() == [7, 8]
        assert batch.ids[0, batch.last].tolist() == [PROMPTS[0][-1], 8, PROMPTS[0][-1]]
        assert_same(gradients(settled(model), batch), gradients(copy.deepcopy(model), padded))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_another_attention_shares_nothing(attention: str) -> None:
    """Not even of a model that hardly notices what it attends to."""
    model = build(initializer_range=1e-3)
    model.set_attn_implementation(attention)
    assert not check(model).shares


def test_responses_that_see_each_other_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even in a model that hardly notices what it attends to."""
    model = settled(build(initializer_range=1e-3))
    assert check(model).shares
    apart = attention._mask
    monkeypatch.setattr(attention, "_mask", lambda *given: torch.zeros_like(apart(*given)))
    assert not check(model).shares


def test_a_row_whose_mask_is_another_ones_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a model that has such a mask shares nothing."""
    model = settled(build())
    shared = Policy(model, temperature=1.0, dtype="float32", value_head=False)
    apart = attention._packed
    monkeypatch.setattr(attention, "_packed", lambda **given: None)
    with pytest.raises(ValueError, match="the model's mask is not that of the row"):
        shared(SHARED)

    def shifted(**given: Any) -> Packed | None:
        found = apart(**given)
        return None if found is None else replace(found, parts=found.parts[::-1])

    monkeypatch.setattr(attention, "_packed", shifted)
    with pytest.raises(ValueError, match="the model's mask is not that of the row"):
        shared(SHARED)
    assert attention._row.get() is None  # whatever happens in a forward

    def only_apart(**given: Any) -> Packed | Tensor | None:
        return None if any(part.prompt for part in attention._row.get() or ()) else packed_mask(**given)

    monkeypatch.undo()
    monkeypatch.setitem(transformers.AttentionMaskInterface._global_mapping, PACKED, only_apart)
    assert not check(model).shares


# ---- a step of the trainer


@pytest.mark.parametrize("advantage", ["group", "gae"])
def test_a_step_with_shared_prompts_is_the_step_without(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, advantage: Any
) -> None:
    """The same numbers, from fewer tokens: one prompt for each of its groups in a minibatch."""
    more: dict[str, Any] = {"packing": True, "minibatches": 2, "advantage": advantage, "kl_coef": 0.1}
    found, rows = [], []
    for share in (True, False):
        made = trainer(small(cache, tmp_path / "run", **more))
        assert made.policy.shares
        made.learner.share = share
        read: list[Any] = []
        monkeypatch.setattr(Policy, "hidden", spy(read, Policy.hidden))
        metrics = made.step(1)
        monkeypatch.undo()
        names = ("loss", "grad_norm", "entropy", "value_loss", "kl", "ratio_max", "approx_kl")
        found.append([metrics[name] for name in names])
        rows.append([(batch.ids.shape[1], len(batch.target), batch.parts) for batch in read])
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-7)
    for (length, responses, parts), (_, others, apart) in zip(*rows, strict=True):
        assert responses == others
        assert sum(not part.prompt for part in parts) <= made.config.prompts < len(apart) == 8
        assert length == sum(part.length for part in parts)


def spy(read: list[Any], forward: Any) -> Any:
    def hidden(policy: Policy, batch: Any) -> Any:
        read.append(batch)
        return forward(policy, batch)

    return hidden


def test_a_teacher_that_cannot_share_keeps_prompts_apart(cache: Path, tmp_path: Path) -> None:
    taught = {"packing": True, "teacher": BASE.model, "attention": "auto"}
    made = trainer(small(cache, tmp_path / "run", **taught))
    assert made.learner.share
    assert made.teacher is not None
    made.teacher.shares = False
    learner = Learner(made.policy, None, made.teacher, made.config, made.here, pad=0, trains=False)
    assert not learner.share


# ---- sampling


def rows() -> tuple[list[list[int]], Tensor, Tensor]:
    prompts = [PROMPTS[k] for k in (0, 0, 0, 1, 1, 2, 3, 2, 0)]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return prompts, ids, mask


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_sampled_is_the_same(family: str) -> None:
    """And the body reads each prompt once, then one token of each row at a time."""
    model, (prompts, ids, mask) = build(family).eval(), rows()
    settings = transformers.GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=12, eos_token_id=2, pad_token_id=0
    )
    read: list[tuple[int, int]] = []
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, given, out: read.append(tuple(given[0].shape)))
    with torch.no_grad():
        torch.manual_seed(5)
        expected = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        read.clear()
        known = rollout.read_once(model, prompts, ids, mask)
        torch.manual_seed(5)
        found = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings, **known)
    assert torch.equal(found, expected)
    assert read == [(4, 6)] + [(9, 1)] * (found.shape[1] - 7)


def test_nothing_is_read_where_no_prompt_is_shared() -> None:
    model, (_, ids, mask) = build(), rows()
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda *_: pytest.fail("the model was run"))
    assert rollout.read_once(model, PROMPTS[:3], ids[[0, 3, 5]], mask[[0, 3, 5]]) == {}
    assert rollout.read_once(model, [PROMPTS[1]] * 2, ids[3:5, -1:], mask[3:5, -1:]) == {}


def test_a_model_that_remembers_anything_else_reads_for_itself() -> None:
    config = transformers.Lfm2Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
    )
    assert rollout.read_once(transformers.Lfm2ForCausalLM(config), *rows()) == {}
