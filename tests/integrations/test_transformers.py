"""A fused causal LM returns the loss that its own logits give, whatever is around it."""

import copy
import inspect
import os
import subprocess
import sys
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from aer_fast import reference
from aer_fast.integrations import transformers as integration
from aer_fast.integrations.transformers import (
    HeadShape,
    LossInputs,
    causal_lm,
    check_lm_head,
    fuse_lm_head,
    head_loss,
    head_shape,
    lm_body,
    next_token_target,
    unfuse_lm_head,
)
from tests import ROOT
from tests.helpers.models import FAMILIES, NAMES, SIZES, V, adapted, build, refused

pytestmark = pytest.mark.needs("transformers", "peft")
B, T = 3, 7


@pytest.fixture
def tokens() -> dict[str, Tensor]:
    return {
        "old_logprob": -4 + torch.randn(B, T),
        "advantage": torch.randn(B, 1),
        "mask": torch.rand(B, T) < 0.8,
        "entropy_coef": 0.3 * torch.rand(B, 1),
    }


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, V, (B, T))


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    wanted = {k: p for k, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {k: g for k, g in zip(wanted, grads) if g is not None}


def assert_same_as_logits(model: Any, ids: Tensor, tokens: dict[str, Tensor], **settings: Any) -> None:
    """Loss, statistics and every gradient against the model's own logits."""
    target = next_token_target(ids)
    logits = model(ids).logits.float()
    expected = reference.ppo_loss(logits, target, **tokens, **settings)
    wanted = gradients(model, expected.loss)
    out = model(ids, target=target, **tokens, **settings)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.logprob, expected.logprob, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.entropy, expected.entropy, atol=1e-4, rtol=1e-4)
    assert out.metrics.keys() == expected.metrics.keys()
    found = gradients(model, out.loss)
    assert found.keys() == wanted.keys()
    assert any("lm_head" in k or "embed" in k or "wte" in k for k in found) or hasattr(model, "peft_config")
    for name, grad in found.items():
        torch.testing.assert_close(grad, wanted[name], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads(family: str, ids: Tensor, tokens: dict[str, Tensor]) -> None:
    model = build(family)
    fuse_lm_head(model)
    assert_same_as_logits(model, ids, tokens, temperature=0.7)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parts_are_the_whole(family: str, ids: Tensor, tokens: dict[str, Tensor]) -> None:
    """`lm_body` and `head_loss` of a model that is not fused: what a fused one returns, to the bit."""
    model, target = build(family), next_token_target(ids)
    check_lm_head(model)
    inputs = LossInputs(target=target, temperature=0.7, **tokens)
    parts = head_loss(model, lm_body(model)(ids).last_hidden_state, inputs)
    assert parts.loss is not None
    found = gradients(model, parts.loss)
    stats = LossInputs(target=target, temperature=0.7)
    head_loss(model, lm_body(model)(ids).last_hidden_state, stats)
    assert inputs.result is parts
    assert "forward" not in model.__dict__
    fuse_lm_head(model)
    whole = model(ids, target=target, temperature=0.7, **tokens)
    assert torch.equal(parts.loss, whole.loss)
    measured = model(ids, target=target, temperature=0.7)
    assert stats.result is not None
    assert torch.equal(stats.result.logprob, measured.logprob)
    assert torch.equal(stats.result.entropy, measured.entropy)
    for name, grad in gradients(model, whole.loss).items():
        assert torch.equal(found[name], grad)


def test_the_parts_of_a_wrapped_model(ids: Tensor) -> None:
    model, target = adapted("scale untied", ["lm_head"]), next_token_target(ids)
    check_lm_head(model)
    assert causal_lm(model) is model.get_base_model()
    expected = reference.token_stats(model(ids).logits, target)
    out = head_loss(model, lm_body(model)(ids).last_hidden_state, LossInputs(target=target))
    torch.testing.assert_close(out.entropy, expected.entropy, atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = lm_body(model)(ids).last_hidden_state
        exact = head_loss(model, hidden, LossInputs(target=target), head_dtype=torch.float32)
    again = head_loss(model, hidden.float(), LossInputs(target=target))
    torch.testing.assert_close(exact.logprob, again.logprob)


def test_a_model_that_runs_under_autocast_alone_is_tried_there() -> None:
    model = build("scale with bias")
    model.register_forward_pre_hook(lambda *_: None if torch.is_autocast_enabled("cpu") else 1 / 0)
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        check_lm_head(model)
    check_lm_head(model, autocast=torch.bfloat16)
    model.lm_head.register_forward_hook(lambda m, a, out: 1.5 * out)
    with pytest.raises(ValueError, match="does more to its logits"):
        check_lm_head(model, autocast=torch.bfloat16)


class Largest(TorchDispatchMode):
    """The most words that any tensor has rows for."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dim() > 1 and out.shape[-1] == V:
            self.rows = max(self.rows, out.numel() // V)
        return out


def test_no_logits_are_made() -> None:
    model = build(hidden_size=8)
    fuse_lm_head(model)
    ids = torch.randint(V, (8, 20))
    with Largest() as eager:
        model(ids)
    with Largest() as fused:
        model(ids, target=next_token_target(ids), advantage=1.0, chunk_tokens=4).loss.backward()
    assert eager.rows == 160
    assert fused.rows <= 16


def test_a_softcap_that_small_logits_do_not_show() -> None:
    model = build("softcap", initializer_range=0.001)
    fuse_lm_head(model)
    unfuse_lm_head(model)
    model.config.final_logit_softcapping = 4.0  # which the model reads; what is known of it is another
    with (
        patch.object(integration, "head_shape", lambda config: HeadShape(None, 1.0)),
        pytest.raises(ValueError, match="does more to its logits"),
    ):
        fuse_lm_head(model)


def test_one_adapter_for_each_row_is_refused(ids: Tensor) -> None:
    model = adapted("untied", ["lm_head"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["lm_head"]))
    model.eval()
    fuse_lm_head(model)
    with pytest.raises(ValueError, match="adapter_names: a fused LM head"):
        model(ids, adapter_names=["default", "other", "default"], target=ids)


def test_a_head_that_is_replaced_after_fusing(ids: Tensor, tokens: dict[str, Tensor]) -> None:
    model = build()
    fuse_lm_head(model)
    model.resize_token_embeddings(V + 4)
    assert_same_as_logits(model, ids, tokens)
    wrapped = get_peft_model(model, LoraConfig(r=3, target_modules=["lm_head"], init_lora_weights=False))
    assert_same_as_logits(wrapped, ids, tokens)
    merged = wrapped.merge_and_unload().requires_grad_(True)
    assert_same_as_logits(merged, ids, tokens)
    unfuse_lm_head(merged)
    assert not any("aer" in k for m in merged.modules() for k in m.__dict__)
    assert not any("forward" in m.__dict__ for m in merged.modules())


def test_a_copy_of_the_head_is_a_copy_of_the_head(ids: Tensor, tokens: dict[str, Tensor]) -> None:
    """PEFT copies what it trains a copy of; the whole model must not come along."""
    model = build()
    fuse_lm_head(model)
    memo: dict[int, Any] = {}
    copy.deepcopy(model.lm_head, memo)
    assert id(model.lm_head.weight) in memo
    assert id(model.model.embed_tokens.weight) not in memo
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert_same_as_logits(wrapped, ids, tokens)


def test_a_model_that_accelerate_has_wrapped_is_refused(ids: Tensor) -> None:
    model = build()
    model._original_forward = model.forward  # as Accelerator.prepare leaves it under mixed precision
    with pytest.raises(ValueError, match=r"before accelerator\.prepare"):
        fuse_lm_head(model)


def test_a_scale_below_a_softcap() -> None:
    hidden, weight, bias = torch.randn(5, 8), torch.randn(V, 8), torch.randn(V)
    target = torch.randint(V, (5,))
    logits = 3.0 * (0.4 * (hidden @ weight.T + bias) / 3.0).tanh()
    expected = reference.token_stats(logits, target, temperature=0.7)
    out = LossInputs(target=target, temperature=0.7).loss_of(hidden, weight, bias, HeadShape(3.0, 0.4))
    torch.testing.assert_close(out.logprob, expected.logprob)
    torch.testing.assert_close(out.entropy, expected.entropy)


def test_a_teachers_scale_is_its_own() -> None:
    """The student's head is scaled and capped; the teacher's is as it is given."""
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(V, 8)
    ref_hidden, ref_weight = torch.randn(5, 6), torch.randn(V + 3, 6)
    target = torch.randint(V, (5,))
    given: dict[str, Any] = {"temperature": 0.7, "divergence": "jsd", "jsd_beta": 0.3, "coef": 0.4}
    logits = 3.0 * (0.4 * (hidden @ weight.T) / 3.0).tanh()
    expected = reference.distill_loss(logits, ref_hidden @ ref_weight.T, target, **given)
    (gradient,) = torch.autograd.grad(expected.loss, hidden)
    inputs = LossInputs(target=target, ref_hidden=ref_hidden, ref_weight=ref_weight, **given)
    out = inputs.loss_of(hidden, weight, None, HeadShape(3.0, 0.4))
    assert out.loss is not None
    torch.testing.assert_close(torch.autograd.grad(out.loss, hidden)[0], gradient.float())
    torch.testing.assert_close(out.logprob, expected.logprob)
    torch.testing.assert_close(out.metrics["divergence"], expected.divergence.mean())


def test_the_body_keeps_no_cache(ids: Tensor) -> None:
    model = build()
    fuse_lm_head(model)
    seen: list[Any] = []
    model.model.register_forward_hook(lambda module, args, output: seen.append(output.past_key_values))
    model(ids, target=ids)
    model(ids)
    assert seen[0] is None
    assert seen[1] is not None


def test_statistics_carry_gradients(ids: Tensor) -> None:
    model = build("softcap")
    fuse_lm_head(model)
    target = next_token_target(ids)
    expected = reference.token_stats(model(ids).logits, target, temperature=1.3)
    wanted = gradients(model, expected.logprob.sum() + expected.entropy.square().sum())
    out = model(ids, target=target, temperature=1.3)
    assert out.loss is None
    found = gradients(model, out.logprob.sum() + out.entropy.square().sum())
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)


def test_an_objective_of_ones_own(ids: Tensor) -> None:
    model, weight = build("scale"), torch.rand(B, T)
    fuse_lm_head(model)
    target = next_token_target(ids)

    def objective(logprob: Tensor, entropy: Tensor, weight: Tensor) -> Tensor:
        return -weight * logprob - entropy**2

    stats = reference.token_stats(model(ids).logits, target)
    live = target != -100
    wanted = gradients(model, objective(stats.logprob, stats.entropy, weight)[live].mean())
    out = model(ids, target=target, objective=objective, token_tensors=[weight])
    torch.testing.assert_close(gradients(model, out.loss), wanted, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("keep", [3, slice(-4, -1), torch.tensor([1, 4])], ids=["last", "slice", "index"])
def test_a_part_of_the_positions(keep: Any, ids: Tensor) -> None:
    model = build()
    fuse_lm_head(model)
    target = next_token_target(ids)
    part = slice(-keep, None) if isinstance(keep, int) else keep
    whole = model(ids, target=target, advantage=1.0).logprob[:, part]
    out = model(ids, target=target[:, part], advantage=1.0, logits_to_keep=keep)
    torch.testing.assert_close(out.logprob, whole)


def test_padding_and_positions_reach_the_body(ids: Tensor) -> None:
    model = build()
    fuse_lm_head(model)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    target = next_token_target(ids, mask)
    out = model(ids, attention_mask=mask, target=target)
    alone = model(ids[:1, 3:], target=target[:1, 3:])
    torch.testing.assert_close(out.logprob[:1, 3:], alone.logprob, atol=1e-4, rtol=1e-4)


def test_next_token_target() -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    assert next_token_target(ids).tolist() == [[6, 7, 8, -100]]
    assert next_token_target(ids, torch.tensor([[0, 0, 1, 0]])).tolist() == [[-100, 7, -100, -100]]


def test_a_mixture_of_experts_returns_its_aux_loss(ids: Tensor, tokens: dict[str, Tensor]) -> None:
    sizes = SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
    fuse_lm_head(model)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    out = model(ids, attention_mask=mask, target=next_token_target(ids), **tokens)
    torch.testing.assert_close(out.aux_loss, model(ids, attention_mask=mask).aux_loss)
    assert gradients(model, out.aux_loss)
    without = model(ids, target=next_token_target(ids), output_router_logits=False)
    assert without.aux_loss is None


@pytest.mark.parametrize(
    ("family", "modules", "settings"),
    [
        ("untied", ["q_proj", "v_proj"], {}),
        ("untied", ["q_proj", "lm_head"], {}),
        ("bias", ["lm_head"], {"lora_bias": True}),
        ("softcap untied", ["lm_head"], {}),
        ("scale untied", ["v_proj"], {"modules_to_save": ["lm_head"]}),
    ],
    ids=["body", "head", "head with biases", "head with softcap", "trained copy of the head"],
)
def test_lora(
    family: str, modules: list[str], settings: dict[str, Any], ids: Tensor, tokens: dict[str, Tensor]
) -> None:
    model = adapted(family, modules, **settings)
    fuse_lm_head(model)
    assert_same_as_logits(model, ids, tokens)
    with model.disable_adapter():
        target = next_token_target(ids)
        expected = reference.token_stats(model(ids).logits, target)
        torch.testing.assert_close(model(ids, target=target).entropy, expected.entropy, atol=1e-4, rtol=1e-4)
    if "lm_head" in modules:
        model.merge_adapter()
        expected = reference.token_stats(model(ids).logits, target)
        torch.testing.assert_close(model(ids, target=target).entropy, expected.entropy, atol=1e-4, rtol=1e-4)


def test_dropout_of_lora_on_the_head_is_peft_s_own(ids: Tensor) -> None:
    model = adapted("untied", ["lm_head"], lora_dropout=0.5).train()
    fuse_lm_head(model)
    target = next_token_target(ids)
    torch.manual_seed(3)
    expected = reference.token_stats(model(ids).logits, target)
    torch.manual_seed(3)
    torch.testing.assert_close(model(ids, target=target).entropy, expected.entropy, atol=1e-4, rtol=1e-4)


def test_head_dtype(ids: Tensor) -> None:
    model = build().to(torch.bfloat16)
    fuse_lm_head(model, head_dtype=torch.float32)
    target = next_token_target(ids)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(ids).last_hidden_state
        out = model(ids, target=target)
    expected = reference.token_stats(hidden.float() @ model.lm_head.weight.float().T, target)
    torch.testing.assert_close(out.logprob, expected.logprob, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_trial_allows_for_the_rounding_of_bfloat16(family: str, ids: Tensor) -> None:
    model = build(family).to(torch.bfloat16).eval()
    fuse_lm_head(model)
    target = next_token_target(ids)
    expected = reference.token_stats(model(ids).logits.float(), target)
    torch.testing.assert_close(model(ids, target=target).logprob, expected.logprob, atol=0.1, rtol=0.05)


# dynamo asks for the gradient of a tensor that has none.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_it_returns_the_same(ids: Tensor, tokens: dict[str, Tensor]) -> None:
    model = build()
    fuse_lm_head(model)
    target = next_token_target(ids)
    expected = model(ids, target=target, **tokens)
    compiled = torch.compile(model, backend="eager")
    out = compiled(ids, target=target, **tokens)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(gradients(model, out.loss), gradients(model, expected.loss))
    unfuse_lm_head(compiled)
    torch._dynamo.reset()


def test_generation_is_unchanged(ids: Tensor) -> None:
    model = build()
    options = {"max_new_tokens": 4, "do_sample": False}
    before = model.generate(ids, **options)
    signature = inspect.signature(model.forward)
    fuse_lm_head(model)
    assert inspect.signature(model.forward) == signature
    assert torch.equal(model.generate(ids, **options), before)
    torch.testing.assert_close(model(ids, labels=ids).loss, build()(ids, labels=ids).loss)


def test_what_others_have_patched_before_is_called_and_put_back(ids: Tensor) -> None:
    model, calls = build(), []

    def patched(module: Any, name: str) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return type(module).forward(module, *args, **kwargs)

        return forward

    model.forward, model.lm_head.forward = patched(model, "model"), patched(model.lm_head, "head")
    forwards = model.forward, model.lm_head.forward
    fuse_lm_head(model)
    calls.clear()
    model(ids)
    assert calls == ["model", "head"]
    unfuse_lm_head(model)
    assert (model.__dict__["forward"], model.lm_head.__dict__["forward"]) == forwards


def test_undone_it_is_as_it_was(ids: Tensor) -> None:
    model = build()
    fuse_lm_head(model)
    assert model(ids, target=ids).loss is None
    unfuse_lm_head(model)
    assert "forward" not in model.__dict__
    assert "forward" not in model.lm_head.__dict__
    assert not any("aer" in k for m in model.modules() for k in m.__dict__)
    with pytest.raises(ValueError, match="has no fused head"):
        unfuse_lm_head(model)


def test_undoing_below_somebody_else_s_patch_is_refused() -> None:
    model = build()
    fuse_lm_head(model)
    model.forward = lambda *_: None
    with pytest.raises(ValueError, match="was replaced"):
        unfuse_lm_head(model)


def test_a_copy_is_fused_by_itself(ids: Tensor) -> None:
    model = build()
    fuse_lm_head(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    target = next_token_target(ids)
    assert model(ids, target=target).entropy[0, 0] < 4.0
    torch.testing.assert_close(other(ids, target=target).entropy[0, 0].item(), torch.tensor(V).log().item())
    torch.testing.assert_close(other(ids).logits.abs().max().item(), 0.0)
    unfuse_lm_head(other)
    assert model(ids, target=target).logprob.any()


@pytest.mark.parametrize("name", [*NAMES, "unknown logits", "twice"])
def test_refused_with_the_reason(name: str) -> None:
    model, reason = refused(name)
    forward = model.forward
    with pytest.raises(ValueError, match=reason):
        fuse_lm_head(model)
    assert model.forward == forward


def test_the_trial_of_a_model_leaves_it_as_it_was() -> None:
    model = build()
    model.train()
    model.model.layers[0].eval()
    state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
    fuse_lm_head(model)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_a_head_that_cannot_be_tried_can_be_fused_unseen(ids: Tensor) -> None:
    model = build()
    handle = model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ValueError, match=r"ZeroDivisionError.*check=False"):
        fuse_lm_head(model)
    handle.remove()
    fuse_lm_head(model, check=False)
    assert model(ids, target=ids).entropy.any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"advantage": 1.0}, "target is missing"),
        ({"target": 1, "ref_hidden": 1.0}, "ref_weight is missing"),
        ({"target": 1, "old_logprob": 1.0}, r"old_logprob: not an input of linear_token_stats"),
        (
            {"target": 1, "advantage": 1.0, "token_tensors": ()},
            "token_tensors: not an input of linear_ppo_loss",
        ),
        ({"target": 1, "objective": 1, "clip": 1}, "clip: not an input of linear_token_loss"),
        ({"target": 1, "advantage": 1.0, "weight": 1}, "weight: not an input"),
        (
            {"target": 1, "advantage": 1.0, "old_logprob": torch.ones(1, dtype=torch.bfloat16)},
            "old_logprob must be float32, got torch.bfloat16",
        ),
        (
            {"target": 1, "advantage": 1.0, "ref_logprob": torch.ones(1, dtype=torch.float16)},
            "ref_logprob must be float32",
        ),
    ],
)
def test_bad_inputs(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossInputs(**given)


def test_inputs_are_given_in_one_way(ids: Tensor) -> None:
    model = build()
    fuse_lm_head(model)
    request: Any = LossInputs(target=next_token_target(ids), advantage=1.0)
    out: Any = model(ids, loss_inputs=request)
    assert request.result is out
    torch.testing.assert_close(out.loss, model(ids, target=next_token_target(ids), advantage=1.0).loss)
    with pytest.raises(ValueError, match="temperature: give all inputs"):
        model(ids, loss_inputs=request, temperature=0.5)
    with pytest.raises(ValueError, match="loss_inputs must be a LossInputs, got dict"):
        model(ids, loss_inputs={"target": ids})
    with pytest.raises(ValueError, match="labels: "):
        model(ids, target=ids, labels=ids)


CASES = (
    ("ddp", "untied"),
    ("ddp", "tied"),
    ("fsdp2", "untied"),
    ("fsdp2", "tied"),
    ("head", "untied"),
    ("after", "softcap"),
    ("mixed", "untied"),
)

PARALLEL = """
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from aer_fast.integrations.transformers import LossInputs, fuse_lm_head, next_token_target
from tests.helpers.models import build
from tests.integrations.test_transformers import CASES

torch.set_num_threads(1)
dist.init_process_group("gloo")
torch.manual_seed(0)
ids = torch.randint(3, 60, (4, 7))
tokens = {"old_logprob": -4 + torch.randn(4, 7), "advantage": torch.randn(4, 1)}
tokens["entropy_coef"] = torch.rand(4, 1)
mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)


def wrapped(kind, model):
    if kind == "ddp":
        fuse_lm_head(model)
        return DistributedDataParallel(model, find_unused_parameters=True)
    policy = MixedPrecisionPolicy()
    if kind == "mixed":  # as accelerate has it
        half = torch.bfloat16
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, output_dtype=half)
    if kind != "after":
        fuse_lm_head(model)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    if kind == "head":
        fully_shard(model.lm_head, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    if kind == "after":
        fuse_lm_head(model)
    return model


def mixed(model, inputs):
    try:
        model(ids[mine], **inputs)
    except ValueError as error:
        assert "LossInputs" in str(error)
    else:
        raise AssertionError("the cast went unnoticed")
    request = LossInputs(**inputs)
    out = model(ids[mine], loss_inputs=request)
    assert out.loss.dtype == torch.bfloat16  # FSDP2's doing
    assert request.result.logprob.dtype == torch.float32
    assert not torch.equal(request.result.logprob, out.logprob.float())
    # a first minibatch off its own log-probabilities: ratios are 1, to the bit
    first = LossInputs(**inputs | {"old_logprob": request.result.logprob})
    model(ids[mine], loss_inputs=first)
    assert first.result.metrics["ratio_max"] == 1.0
    return request.result


for kind, family in CASES:
    alone = build(family)
    fuse_lm_head(alone)
    expected = alone(ids, target=next_token_target(ids), denominator=10.0, **tokens)
    expected.loss.backward()
    model = wrapped(kind, build(family))
    inputs = {name: x[mine] for name, x in tokens.items()}
    inputs |= {"target": next_token_target(ids[mine]), "denominator": 5.0}
    if kind == "mixed":
        out, tolerance = mixed(model, inputs), {"atol": 0.05, "rtol": 0.2}
    else:
        out, tolerance = model(ids[mine], **inputs), {"atol": 1e-5, "rtol": 1e-4}
        torch.testing.assert_close(out.logprob, expected.logprob[mine], **tolerance)
    out.loss.backward()
    wanted = dict(alone.named_parameters())
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, grad in found.items():
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        torch.testing.assert_close(grad.float(), wanted[name].grad, **tolerance)
    print(f"<{kind} {family}>", flush=True)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    script = tmp_path_factory.mktemp("parallel") / "parallel.py"
    script.write_text(PARALLEL)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}  # gloo: two processes do not share one GPU
    return subprocess.run(
        [*torchrun, str(script)], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_two_processes_are_one(kind: str, family: str, two_processes: Any) -> None:
    assert two_processes.stdout.count(f"<{kind} {family}>") == 2, two_processes.stderr[-3000:]


def test_head_shape_of_all_kinds() -> None:
    shapes: dict[str, Any] = {family: tuple(head_shape(build(family).config)) for family in FAMILIES}
    assert shapes["softcap"] == (3.0, 1.0)
    assert shapes["scale"] == (None, 0.3)
    assert shapes["divided"] == (None, pytest.approx(1 / 3))
    assert shapes["untied"] == (None, 1.0)
