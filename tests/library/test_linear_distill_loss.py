"""The divergence from a teacher, from two hidden states and heads."""

from typing import Any

import pytest
import torch
from torch import Tensor

import aer_fast
from aer_fast import distill_loss, plan
from aer_fast._linear import distill_loss as distill
from aer_fast._linear import loops
from tests.helpers.heads import (
    LOOPS,
    Products,
    assert_matches_float64,
    linear_distill_loss,
    per_token,
    run,
    take_loop,
    with_teacher,
)

pytestmark = pytest.mark.numerics
IMPLS = ["torch", "triton"]
KINDS = ["reverse_kl", "forward_kl", "jsd"]
SHAPES = [(1, 7, 3), (13, 101, 9), (6, 2049, 33)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("divergence", KINDS)
@pytest.mark.parametrize("loop", [x for x in LOOPS if x != "vocabulary"])
@pytest.mark.parametrize(("N", "V", "D"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_matches_float64(
    impl: str,
    divergence: str,
    loop: str,
    N: int,
    V: int,
    D: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    options = {"divergence": divergence, "jsd_beta": 0.3, "planner": take_loop(loop)}
    inputs = with_teacher(N, V, D, device, dtype)
    inputs["target"][N // 2] = -100
    assert_matches_float64(linear_distill_loss, inputs, impl, **options)
    inputs |= per_token(N, device)
    assert_matches_float64(linear_distill_loss, inputs, impl, **options)
    for frozen in (("weight", "bias"), ("hidden",)):
        assert_matches_float64(
            linear_distill_loss, inputs | {"bias": None, "ref_bias": None}, impl, frozen, **options
        )


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("V_ref", [90, 110])
def test_vocabularies_of_two_sizes(impl: str, V_ref: int, device: torch.device) -> None:
    inputs = with_teacher(6, 100, 8, device, torch.float32, V_ref)
    inputs["target"][:3] = torch.tensor([0, 95, max(100, V_ref) - 1])
    out, grads = run(linear_distill_loss, inputs, impl=impl)
    V = min(100, V_ref)
    few = {k: x[:V] if k.endswith(("weight", "bias")) else x for k, x in inputs.items()}
    few["target"] = few["target"].where(few["target"] < V, 0)
    expected, expected_grads = run(linear_distill_loss, few, impl=impl)
    torch.testing.assert_close(out.divergence, expected.divergence)
    torch.testing.assert_close(grads["hidden"], expected_grads["hidden"])
    torch.testing.assert_close(grads["weight"][:V], expected_grads["weight"])
    assert (grads["weight"][V:] == 0).all()
    assert (grads["bias"][V:] == 0).all()
    beyond = inputs["target"] >= V
    assert beyond.any()
    assert (out.logprob[beyond] == -torch.inf).all()
    assert (out.ref_logprob[beyond] == -torch.inf).all()
    assert out.logprob[~beyond].isfinite().all()
    with pytest.raises(ValueError, match=rf"target must be in \[0, V={max(100, V_ref)}\)"):
        linear_distill_loss(**inputs | {"target": inputs["target"] + max(100, V_ref)}, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("divergence", KINDS)
def test_cuts_between_chunks_do_not_matter(impl: str, divergence: str, device: torch.device) -> None:
    inputs = with_teacher(13, 101, 9, device, torch.float32) | per_token(13, device)
    whole, whole_grads = run(linear_distill_loss, inputs, impl=impl, divergence=divergence)
    for chunk_tokens in (1, 4, 12):
        out, grads = run(
            linear_distill_loss, inputs, impl=impl, divergence=divergence, chunk_tokens=chunk_tokens
        )
        torch.testing.assert_close(out.divergence, whole.divergence, rtol=1e-5, atol=1e-6)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, whole_grads[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_four_products_and_three_with_a_frozen_head(impl: str, device: torch.device) -> None:
    inputs = with_teacher(13, 101, 9, device, torch.float32)
    inputs["target"][:3] = -100
    with Products(101, 9) as student:
        run(linear_distill_loss, inputs, impl=impl)
        assert student.totals == (10, 10, 10)
        student.clear()
        run(linear_distill_loss, inputs, ("weight", "bias"), impl=impl)
        assert student.totals == (10, 10, 0)
    with Products(101, 14) as teacher:
        run(linear_distill_loss, inputs, impl=impl)
        assert teacher.totals == (10, 0, 0)
    made = plan(9, 101, 9, ref_D=14)
    assert made.products == 4
    assert plan(9, 101, 9).products == 3
    assert plan(9, 101, 9, ref_D=14, grad_weight=False).products == 3
    assert plan(9, 101, 9, ref_D=14, grad_weight=False, grad_hidden=False).products == 2


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_without_a_coefficient_take_part_in_two_products(impl: str, device: torch.device) -> None:
    inputs = with_teacher(13, 101, 9, device, torch.float32)
    coef = (torch.arange(13, device=device) < 5).float()
    with Products(101, 9) as student:
        out, grads = run(linear_distill_loss, inputs, impl=impl, coef=coef)
    assert student.totals == (13, 5, 5)
    assert (grads["hidden"][5:] == 0).all()
    assert (out.divergence > 0).all()


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_masked_rows_are_never_read(impl: str, device: torch.device) -> None:
    inputs = with_teacher(6, 50, 8, device, torch.float32)
    inputs["target"][1] = -100
    mask = torch.tensor([1.0, 1, 0, 1, 1, 1], device=device)
    dead = (mask == 0) | (inputs["target"] == -100)
    inputs["hidden"][dead], inputs["ref_hidden"][dead] = torch.nan, torch.nan
    out, grads = run(linear_distill_loss, inputs, mask=mask, impl=impl)
    assert out.loss.isfinite()
    assert all(g.isfinite().all() for g in grads.values())
    assert (grads["hidden"][dead] == 0).all()
    assert (out.divergence[dead] == 0).all()
    out, grads = run(linear_distill_loss, inputs, mask=0.0 * mask, impl=impl)
    assert out.loss == 0
    assert all((g == 0).all() for g in grads.values())


@pytest.mark.parametrize("impl", IMPLS)
def test_without_a_target_every_token_counts(impl: str, device: torch.device) -> None:
    inputs = with_teacher(6, 50, 8, device, torch.float32)
    shaped = {k: x.view(2, 3, -1) if k.endswith("hidden") else x for k, x in inputs.items()}
    expected, expected_grads = run(linear_distill_loss, inputs, impl=impl)
    del shaped["target"]
    out, grads = run(linear_distill_loss, shaped, impl=impl)
    assert out.logprob is None
    assert out.ref_logprob is None
    assert out.divergence.shape == out.entropy.shape == (2, 3)
    torch.testing.assert_close(out.divergence.view(-1), expected.divergence)
    torch.testing.assert_close(grads["weight"], expected_grads["weight"])


@pytest.mark.parametrize("impl", IMPLS)
def test_factors_of_two_dtypes(impl: str, device: torch.device) -> None:
    inputs = with_teacher(6, 50, 8, device, torch.float32)
    teacher = {k: x.bfloat16() for k, x in inputs.items() if k.startswith("ref_")}
    out, _ = run(linear_distill_loss, inputs | teacher, impl=impl)
    logits = inputs["hidden"] @ inputs["weight"].T + inputs["bias"]
    ref_logits = teacher["ref_hidden"].float() @ teacher["ref_weight"].float().T + teacher["ref_bias"].float()
    torch.testing.assert_close(
        out.divergence, distill_loss(logits, ref_logits).divergence, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_casts_the_products_of_both(impl: str, device: torch.device) -> None:
    inputs = with_teacher(6, 50, 8, device, torch.float32)
    narrow = {k: x.bfloat16() if x.is_floating_point() else x for k, x in inputs.items()}
    expected, expected_grads = run(linear_distill_loss, narrow, impl=impl)
    with torch.autocast(device.type, torch.bfloat16):
        out, grads = run(linear_distill_loss, inputs, impl=impl)
    torch.testing.assert_close(out.divergence, expected.divergence)
    assert grads["weight"].dtype == torch.float32
    torch.testing.assert_close(grads["weight"], expected_grads["weight"].float(), rtol=2e-2, atol=1e-3)


def test_only_the_student_gets_a_gradient() -> None:
    inputs = with_teacher(6, 50, 8, torch.device("cpu"), torch.float32)
    for name in ("ref_hidden", "ref_weight", "ref_bias"):
        inputs[name].requires_grad_()
    out, _ = run(linear_distill_loss, inputs, ("hidden", "weight", "bias"))
    assert not out.loss.requires_grad
    run(linear_distill_loss, inputs)
    assert inputs["ref_hidden"].grad is None
    assert inputs["ref_weight"].grad is None
    again = aer_fast.linear_distill_loss(**inputs | {"hidden": inputs["hidden"].clone().requires_grad_()})
    again.loss.backward()
    with pytest.raises(RuntimeError, match="compute the loss again"):
        again.loss.backward()


def nothing(*shape: int) -> Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ref_hidden": None}, "ref_hidden must be a tensor, got NoneType"),
        ({"ref_hidden": nothing(3, 8)}, r"ref_hidden must have the leading shape of hidden, \(6,\)"),
        ({"ref_hidden": nothing(6, 7)}, "ref_weight must be .* D=7"),
        ({"ref_weight": nothing(50)}, "ref_weight must be"),
        ({"ref_weight": nothing(50, 13).half()}, "ref_weight must have the dtype of ref_hidden"),
        ({"ref_bias": nothing(49)}, r"ref_bias must be \[V\] with V=50"),
        ({"ref_bias": 1.0}, "ref_bias must be a tensor"),
        ({"weight": None}, "weight must be a tensor"),
        ({"hidden": 3.0, "target": None}, "hidden must be a tensor"),
        ({"hidden": nothing(), "target": None}, r"hidden must be \[\.\.\., D\]"),
        ({"vocab_size": 60}, "vocab_size must be at most the 50"),
        ({"divergence": "l2"}, "divergence must be one of"),
        ({"chunk_tokens": 0}, "chunk_tokens must be"),
        ({"ref_softcap": 0.0}, "ref_softcap must be positive"),
        ({"ref_temperature": nothing(6)}, "ref_temperature must be positive"),
        ({"coef": nothing(5)}, "coef must be a number"),
    ],
)
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_bad_arguments_are_named(impl: str, wrong: dict[str, Any], message: str) -> None:
    good = with_teacher(6, 50, 8, torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match=message):
        linear_distill_loss(**good | {"impl": impl} | wrong)


def test_the_teachers_logits_make_room_for_the_last_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their memory is kept from chunk to chunk, and not beside the products of the last one."""
    made: list[distill.DistillRows] = []
    kept: list[bool] = []
    init, add = distill.DistillRows.__init__, loops.Gradients.add

    def initialised(self: Any, *arguments: Any) -> None:
        init(self, *arguments)
        made.append(self)

    def adding(self: Any, *arguments: Any, **options: Any) -> None:
        kept.append(made[-1].room is not None)
        add(self, *arguments, **options)

    monkeypatch.setattr(distill.DistillRows, "__init__", initialised)
    monkeypatch.setattr(loops.Gradients, "add", adding)
    inputs = with_teacher(6, 50, 8, torch.device("cpu"), torch.float32)
    run(aer_fast.linear_distill_loss, inputs, impl="torch", chunk_tokens=2)
    assert kept == [True, True, False]
    assert made[-1].room is None
