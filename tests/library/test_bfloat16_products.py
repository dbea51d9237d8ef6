"""The linear functions on a CPU that multiplies bfloat16: gradients from dz in bfloat16, over the logits."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from aer_fast import linear_token_stats as statistics
from aer_fast._linear import products
from aer_fast._rows import careful, pairs_with_torch, strips
from tests.helpers.heads import (
    LOOPS,
    Products,
    assert_matches_float64,
    head,
    linear_distill_loss,
    linear_ppo_loss,
    linear_token_loss,
    linear_token_stats,
    per_token,
    run,
    take_loop,
    with_teacher,
)

pytestmark = pytest.mark.host
HOST, NARROW, WIDE = torch.device("cpu"), torch.bfloat16, torch.float32


def ppo(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Any:
    """Every third row is clipped, every fifth masked, every seventh has no advantage."""
    row = torch.arange(len(target))
    given = {k: v for k, v in options.items() if k in ("bias", "softcap", "temperature")}
    old = statistics(hidden.detach(), weight.detach(), target, impl="reference", **given).logprob.float()
    advantage = torch.where(row % 7 == 3, 0.0, 1.0 + row / len(row))
    constants = (old - (row % 3 == 1) * 0.5, advantage, (row % 5 != 4).float())
    return linear_ppo_loss(hidden, weight, target, *constants, **options)


def objective(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Any:
    def surprise(logprob: Tensor, entropy: Tensor) -> Tensor:
        return -logprob - 0.1 * entropy

    return linear_token_loss(hidden, weight, target, surprise, **options)


def distill(divergence: str) -> Callable[..., Any]:
    def function(*args: Any, **options: Any) -> Any:
        return linear_distill_loss(*args, divergence=divergence, jsd_beta=0.3, **options)

    return function


def exact_kl(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Any:
    return linear_ppo_loss(hidden, weight, target, None, 1.0, kl_coef=0.3, **options)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "ppo_loss": ppo,
    "token_stats": linear_token_stats,
    "token_loss": objective,
    "reverse_kl": distill("reverse_kl"),
    "forward_kl": distill("forward_kl"),
    "jsd": distill("jsd"),
    "exact_kl": exact_kl,
}
WITH_TEACHER = ("reverse_kl", "forward_kl", "jsd", "exact_kl")


@pytest.fixture(autouse=True)
def multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "has_bfloat16", lambda: True)


@pytest.fixture(params=[False, True], ids=["one strip", "strips"])
def many_strips(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows at a time: a gradient is written before the logits of the next rows are read."""
    if request.param:
        for module, name in (
            (strips, "CPU_STRIP"),
            (pairs_with_torch, "CPU_HELD"),
            (careful, "CPU_ENTRIES"),
        ):
            monkeypatch.setattr(module, name, 1)


def inputs_of(name: str, N: int, V: int, D: int) -> dict[str, Any]:
    made = (with_teacher if name in WITH_TEACHER else head)(N, V, D, HOST, NARROW)
    if N > 4:
        made["target"][N // 2] = -100
    return made


@pytest.mark.usefixtures("many_strips")
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(("N", "V", "D"), [(1, 7, 3), (13, 101, 9), (22, 2049, 33)])
def test_matches_float64(name: str, loop: str, N: int, V: int, D: int) -> None:
    if name in WITH_TEACHER and loop == "vocabulary":
        pytest.skip("beside a teacher there is one order")
    inputs, taken = inputs_of(name, N, V, D), {"planner": take_loop(loop)}
    assert_matches_float64(FUNCTIONS[name], inputs, "torch", **taken)
    constants = ("temperature", "softcap") + ("ref_temperature", "ref_softcap") * (name in WITH_TEACHER[:3])
    options = {key: value for key, value in per_token(N, HOST).items() if key in constants}
    assert_matches_float64(FUNCTIONS[name], inputs, "torch", **options, **taken)


@pytest.mark.usefixtures("many_strips")
@pytest.mark.parametrize("frozen", [("weight", "bias"), ("hidden",), ("hidden", "weight")])
def test_a_frozen_part_changes_nothing_for_the_others(frozen: tuple[str, ...]) -> None:
    for name in ("ppo_loss", "token_stats", "reverse_kl"):
        assert_matches_float64(FUNCTIONS[name], inputs_of(name, 13, 101, 9), "torch", frozen)


@pytest.mark.usefixtures("many_strips")
def test_a_banned_token_has_no_gradient() -> None:
    for name in ("ppo_loss", "token_stats", "reverse_kl"):
        inputs = inputs_of(name, 13, 101, 9)
        inputs["target"].clamp_(max=99)
        for bias in {"bias", "ref_bias"} & inputs.keys():
            inputs[bias][100] = -math.inf
        _, grads = run(FUNCTIONS[name], inputs, impl="torch")
        assert not grads["weight"][100].any()
        assert all(g.isfinite().all() and g.any() for g in grads.values())


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("loop", LOOPS)
def test_what_one_product_makes_is_made_of_narrow_factors(name: str, loop: str) -> None:
    """A sum of several stays wide until its end, and so do the logits."""
    if name in WITH_TEACHER and loop == "vocabulary":
        pytest.skip("beside a teacher there is one order")
    with Products(101, 9) as made:
        run(FUNCTIONS[name], inputs_of(name, 13, 101, 9), impl="torch", planner=take_loop(loop))
    assert made.dtypes == {
        "logits": {WIDE},
        "grad_hidden": {WIDE if loop == "vocabulary" else NARROW},
        "grad_weight": {WIDE if loop in ("chunks", "compact") else NARROW},
    }


@pytest.mark.parametrize("case", ["another CPU", "autocast", "float16"])
def test_elsewhere_all_factors_are_widened(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast the parameters are wide, and so are their gradients."""
    assert not products.narrow(torch.empty(2, 2, dtype=torch.float16), [torch.float16])
    inputs = inputs_of("ppo_loss", 13, 101, 9)
    if case == "another CPU":
        monkeypatch.setattr(products, "has_bfloat16", lambda: False)
    dtype = {"another CPU": NARROW, "autocast": WIDE, "float16": torch.float16}[case]
    inputs = {k: x.to(dtype) if x.is_floating_point() else x for k, x in inputs.items()}
    with Products(101, 9) as made, torch.autocast("cpu", NARROW, enabled=case == "autocast"):
        run(FUNCTIONS["ppo_loss"], inputs, impl="torch")
    assert made.dtypes == {"logits": {WIDE}, "grad_hidden": {WIDE}, "grad_weight": {WIDE}}


@pytest.mark.parametrize("name", ["ppo_loss", "token_stats", "reverse_kl"])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("wide", ["weight", "hidden", "bias"])
def test_a_wide_input_takes_a_wide_dz(
    name: str, loop: str, wide: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside narrow ones, as autocast allows: its gradient is not that of a rounded dz."""
    if name in WITH_TEACHER and loop == "vocabulary":
        pytest.skip("beside a teacher there is one order")
    inputs = inputs_of(name, 13, 101, 9)
    inputs = {k: x.to(WIDE) if wide in k else x for k, x in inputs.items()}
    found = []
    for has in (True, False):
        monkeypatch.setattr(products, "has_bfloat16", lambda has=has: has)
        with torch.autocast("cpu", NARROW):
            found.append(run(FUNCTIONS[name], inputs, impl="torch", planner=take_loop(loop))[1])
    for key, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][key], rtol=0, atol=0)


def test_rows_of_dz_lie_at_the_logits_of_their_row_or_before() -> None:
    z = torch.randn(4, 7)
    dz = products.over(z, NARROW)
    assert (dz.shape, dz.dtype, dz.is_contiguous()) == (z.shape, NARROW, True)
    assert all(dz[i].data_ptr() <= z[i].data_ptr() for i in range(4))
    assert dz[-1].data_ptr() + 14 <= z[2].data_ptr()
    assert products.over(z, WIDE).data_ptr() == z.data_ptr()


def test_a_second_backward_of_kept_logits_makes_them_anew() -> None:
    inputs = inputs_of("token_stats", 13, 101, 9)
    weight = inputs["weight"].requires_grad_()
    out = statistics(inputs["hidden"], weight, inputs["target"], impl="torch")
    first, second = (torch.autograd.grad(out.logprob.sum(), weight, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
