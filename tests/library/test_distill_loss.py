"""The divergence from a teacher, from logits: against float64 and 50 digits, and where it is infinite."""

import math
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor

from aer_fast import DistillLoss, distill_loss
from tests.helpers.oracle import EPS32, assert_within_budget, max_error

pytestmark = [pytest.mark.needs("mpmath"), pytest.mark.numerics]
IMPLS = ["torch", "triton"]
KINDS = ["reverse_kl", "forward_kl", "jsd"]
SHAPES = [(3, 1), (5, 1000), (2, 4096 * 2 + 8)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(logits: Tensor, ref_logits: Tensor, **options: Any) -> tuple[DistillLoss, Tensor]:
    """The result, and the gradient of the logits."""
    logits = logits.detach().clone().requires_grad_()
    out = distill_loss(logits, ref_logits, **options)
    out.loss.backward()
    assert logits.grad is not None
    return out, logits.grad


def widened(options: dict[str, Any]) -> dict[str, Any]:
    return {
        k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in options.items()
    }


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("divergence", KINDS)
@pytest.mark.parametrize(("N", "V"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("softcap", [None, 20.0], ids=["", "softcap"])
def test_matches_float64(
    impl: str,
    divergence: str,
    N: int,
    V: int,
    dtype: torch.dtype,
    softcap: float | None,
    device: torch.device,
) -> None:
    logits, ref_logits = (4 * torch.randn(2, N, V, device=device)).to(dtype)
    options = {
        "target": torch.randint(V, (N,), device=device),
        "mask": torch.rand(N, device=device) + 0.5,
        "divergence": divergence,
        "jsd_beta": 0.3,
        "coef": torch.randn(N, device=device),
        "entropy_coef": torch.rand(N, device=device),
        "temperature": 0.5 + torch.rand(N, device=device),
        "ref_temperature": 0.5 + torch.rand(N, device=device),
        "softcap": softcap,
        "ref_softcap": softcap if dtype == torch.float32 else None,
        "denominator": 3.0,
    }
    actual, grad = run(logits, ref_logits, impl=impl, **options)
    eager, eager_grad = run(logits, ref_logits, impl="reference", **options)
    exact, exact_grad = run(logits.double(), ref_logits.double(), impl="reference", **widened(options))
    assert grad.dtype == dtype
    scale = 2 * 4 * 5 / 0.5
    for name in ("loss", "divergence", "entropy", "logprob", "ref_logprob"):
        a, e, x = (getattr(out, name).detach() for out in (actual, eager, exact))
        assert a.dtype == torch.float32
        assert_within_budget(a, e, x, terms=V, input_scale=scale)
    assert_within_budget(grad, eager_grad, exact_grad, terms=V, input_scale=scale)
    for name, value in exact.metrics.items():
        torch.testing.assert_close(actual.metrics[name].double(), value, rtol=1e-4, atol=1e-5)


def exact_divergence(
    logits: list[float], ref_logits: list[float], divergence: str, beta: float
) -> tuple[mpmath.mpf, list[mpmath.mpf]]:
    """The divergence and its gradient by the logits, in arithmetic of 50 digits."""
    with mpmath.workdps(50):

        def normalised(xs: list[float]) -> list[mpmath.mpf]:
            exps = [mpmath.exp(mpmath.mpf(x)) for x in xs]
            return [e / mpmath.fsum(exps) for e in exps]

        def kl(a: list[mpmath.mpf], b: list[mpmath.mpf]) -> mpmath.mpf:
            return mpmath.fsum(x * mpmath.log(x / y) for x, y in zip(a, b))

        p, q = normalised(logits), normalised(ref_logits)
        if divergence == "forward_kl":
            return kl(q, p), [x - y for x, y in zip(p, q)]
        if divergence == "reverse_kl":
            total = kl(p, q)
            return total, [x * (mpmath.log(x / y) - total) for x, y in zip(p, q)]
        m = [beta * y + (1 - beta) * x for x, y in zip(p, q)]
        of_p = kl(p, m)
        grad = [(1 - beta) * x * (mpmath.log(x / y) - of_p) for x, y in zip(p, m)]
        return beta * kl(q, m) + (1 - beta) * of_p, grad


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("divergence", KINDS)
@pytest.mark.parametrize("apart", [1e-1, 1e-3, 1.5e-5])
def test_nearly_equal_policies_lose_no_digits(
    impl: str, divergence: str, apart: float, device: torch.device
) -> None:
    V = 300
    logits = 3 * torch.randn(1, V, device=device)
    ref_logits = logits + apart * torch.randn(1, V, device=device)
    value, grad = exact_divergence(logits[0].tolist(), ref_logits[0].tolist(), divergence, 0.25)
    assert apart > 1e-4 or 1e-12 < value < 2e-10
    out, actual = run(logits, ref_logits, impl=impl, divergence=divergence, jsd_beta=0.25)
    assert abs(out.divergence.item() / float(value) - 1) < 1e-3
    exact = torch.tensor([float(x) for x in grad], dtype=torch.float64)
    error = (actual[0].cpu().double() - exact).abs()
    assert (error / exact.abs().amax()).amax() < 1e-5


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("divergence", KINDS)
@pytest.mark.parametrize("shift", [0.0, 3.0], ids=["", "shifted"])
def test_confident_policies_keep_their_digits(
    impl: str, divergence: str, shift: float, device: torch.device
) -> None:
    V = 100
    logits = torch.randn(1, V, device=device)
    ref_logits = torch.randn(1, V, device=device) + shift
    logits[0, 7], ref_logits[0, 7] = 21.0, 20.5 + shift  # p, q = 1 - 1e-7
    value, grad = exact_divergence(logits[0].tolist(), ref_logits[0].tolist(), divergence, 0.25)
    assert 1e-9 < value < 1e-6
    out, actual = run(logits, ref_logits, impl=impl, divergence=divergence, jsd_beta=0.25)
    assert abs(out.divergence.item() / float(value) - 1) < 2e-5
    exact = torch.tensor([float(x) for x in grad], dtype=torch.float64)
    relative = (actual[0].cpu().double() - exact).abs() / exact.abs()
    assert relative[7] < 1e-5  # the sum of all others, with the other sign
    assert (actual[0].cpu().double() - exact).abs().amax() < 1e-5 * exact.abs().amax()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("gap", [8.0, 14.0, 23.0])
@pytest.mark.parametrize("target", [None, 3, 5, 7])
@pytest.mark.parametrize("floor", [None, -6.0, "banned"], ids=["", "floor", "banned"])
def test_policies_that_are_sure_of_different_tokens(
    impl: str, divergence: str, gap: float, target: int | None, floor: Any, device: torch.device
) -> None:
    """The gradient of a p near 1 is what all others add up to; by itself it cancels to rounding."""
    logits, ref_logits = torch.zeros(2, 2, 1000, device=device)
    logits[0, 3] = ref_logits[0, 5] = gap
    logits[1], ref_logits[1] = torch.randn(2, 1000, device=device)
    if floor is not None:  # what impl="torch" makes with care
        logits[0, 900:] = -torch.inf
        if divergence == "jsd":
            ref_logits[0, 950:] = -torch.inf
    options: dict[str, Any] = {"divergence": divergence}
    if floor == -6.0 and divergence == "reverse_kl":
        options["ref_logprob_floor"] = floor
    options["target"] = None if target is None else torch.tensor([target, 0], device=device)
    _, grad = run(logits, ref_logits, impl=impl, **options)
    _, exact = run(logits.double(), ref_logits.double(), impl="reference", **options)
    assert (grad.double() - exact).abs().amax(-1).div(exact.abs().amax(-1)).amax() < 1e-5
    assert abs(grad[0, 3] / exact[0, 3] - 1) < 1e-5


@pytest.mark.parametrize("divergence", KINDS)
def test_a_softcap_costs_no_digits_of_nearly_equal_policies(divergence: str, device: torch.device) -> None:
    logits = 8 + 0.2 * torch.randn(1, 100, device=device)
    ref_logits = logits + 2e-6 * torch.randn(1, 100, device=device)
    options: dict[str, Any] = {
        "divergence": divergence,
        "temperature": 0.1,
        "softcap": 30.0,
        "ref_softcap": 30.0,
    }
    out, _ = run(logits, ref_logits, impl="torch", **options)
    capped, ref_capped = (30 * torch.tanh(x[0].double() / 30) / 0.1 for x in (logits, ref_logits))
    value, _ = exact_divergence(capped.tolist(), ref_capped.tolist(), divergence, 0.5)
    assert 1e-11 < value < 1e-9
    assert abs(out.divergence.item() / float(value) - 1) < 1e-3


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("beta", [1e-5, 1e-3, 0.999, 0.99999])
def test_a_mixture_of_nearly_one_policy_alone(impl: str, beta: float, device: torch.device) -> None:
    """Its divergence is about min(β, 1 - β) times something, of which no digit is lost."""
    logits = 2 * torch.randn(1, 64, device=device)
    ref_logits = logits + 0.7 * torch.randn(1, 64, device=device)
    ref_logits[0, :8] += 6 * torch.randn(8, device=device)
    value, grad = exact_divergence(logits[0].tolist(), ref_logits[0].tolist(), "jsd", beta)
    out, actual = run(logits, ref_logits, impl=impl, divergence="jsd", jsd_beta=beta)
    assert abs(out.divergence.item() / float(value) - 1) < 2e-6
    exact = torch.tensor([float(x) for x in grad], dtype=torch.float64)
    assert (actual[0].cpu().double() - exact).abs().amax() < 2e-6 * exact.abs().amax()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
@pytest.mark.parametrize("floor", [None, -9.0], ids=["", "floor"])
def test_the_lowest_number_as_a_mask(
    impl: str, divergence: str, floor: float | None, device: torch.device
) -> None:
    """Over a temperature below 1 it is -inf, of which the student's probability is 0."""
    logits, ref_logits = torch.randn(2, 2, 50, device=device)
    options: dict[str, Any] = {"divergence": divergence, "temperature": 0.5}
    if divergence == "reverse_kl":
        options["ref_logprob_floor"] = floor
    logits[0, 7] = torch.finfo(torch.float32).min
    out, grad = run(logits, ref_logits, impl=impl, **options)
    exact, exact_grad = run(logits.double(), ref_logits.double(), impl="reference", **options)
    torch.testing.assert_close(out.divergence.double(), exact.divergence, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_mixture_that_underflows_where_the_teacher_does_not(impl: str, device: torch.device) -> None:
    logits, ref_logits = torch.zeros(2, 1, 4, device=device)
    logits[0, 0], logits[0, 1], ref_logits[0, 1] = 60.0, -60.0, -100.0
    options = {"divergence": "jsd", "jsd_beta": 1e-3}
    out, grad = run(logits, ref_logits, impl=impl, **options)
    assert grad.isfinite().all()
    exact, _ = run(logits.double(), ref_logits.double(), impl="reference", **options)
    torch.testing.assert_close(out.divergence.double(), exact.divergence, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("divergence", KINDS)
@pytest.mark.parametrize("floor", [None, -5.0], ids=["", "floor"])
@pytest.mark.parametrize("whose", ["teacher", "student"])
def test_a_row_that_is_banned_as_a_whole_is_no_number(
    impl: str, divergence: str, floor: float | None, whose: str, device: torch.device
) -> None:
    if floor is not None and divergence != "reverse_kl":
        pytest.skip("a floor is of reverse_kl")
    logits, ref_logits = torch.randn(2, 2, 9, device=device)
    (ref_logits if whose == "teacher" else logits)[1] = -torch.inf
    out, grad = run(logits, ref_logits, impl=impl, divergence=divergence, ref_logprob_floor=floor)
    assert out.divergence.isnan().tolist() == [False, True]
    assert out.loss.isnan()
    assert grad[0].isfinite().all()
    if whose == "teacher":
        assert grad[1].isnan().all()


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("divergence", KINDS)
def test_equal_policies_have_no_divergence(impl: str, divergence: str, device: torch.device) -> None:
    logits = 5 * torch.randn(3, 4, 1000, device=device)
    logits[0, 0, :10] = -torch.inf
    out, grad = run(logits, logits + 0.0, impl=impl, divergence=divergence)
    assert out.divergence.abs().amax() < 1e-13
    assert grad.abs().amax() < 1e-8
    assert out.logprob is None
    assert out.ref_logprob is None


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("x", [0.0, -200.0], ids=["mass", "too little for float32"])
def test_what_the_teacher_bans_makes_reverse_kl_infinite(impl: str, x: float, device: torch.device) -> None:
    logits, ref_logits = torch.randn(2, 3, 50, device=device)
    logits[1, 4], ref_logits[1, 4] = x, -torch.inf
    out, grad = run(logits, ref_logits, impl=impl)
    assert out.divergence.isposinf().tolist() == [False, True, False]
    assert out.loss == math.inf
    assert grad[[0, 2]].isfinite().all()
    if impl != "reference" or x == 0:
        assert not grad[1].isfinite().any()
    for divergence in ("forward_kl", "jsd"):
        out, grad = run(logits, ref_logits, impl=impl, divergence=divergence)
        assert out.divergence.isfinite().all()
        assert grad.isfinite().all()


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_a_floor_bounds_reverse_kl(impl: str, device: torch.device) -> None:
    logits, ref_logits = torch.randn(2, 3, 50, device=device)
    ref_logits[:, :5] = -torch.inf
    ref_logits[:, 5:9] = -30.0
    logits[:, 3], logits[:, 4] = -torch.inf, -300.0
    out, grad = run(logits, ref_logits, impl=impl, ref_logprob_floor=-12.0)
    logp = logits.double().log_softmax(-1).requires_grad_()
    logq = ref_logits.double().log_softmax(-1).clamp(min=-12.0)
    expected = (logp.exp() * (logp.masked_fill(logp == -torch.inf, 0.0) - logq)).sum(-1)
    torch.testing.assert_close(out.divergence.double(), expected.detach(), rtol=2e-6, atol=0.0)
    by_logit = logp.exp() * (logp.masked_fill(logp == -torch.inf, 0.0) - logq - expected[:, None])
    torch.testing.assert_close(grad.double(), by_logit.detach() / 3, rtol=1e-5, atol=1e-8)
    unbounded, _ = run(logits[:, 5:], ref_logits[:, 5:], impl=impl, ref_logprob_floor=-500.0)
    without, _ = run(logits[:, 5:], ref_logits[:, 5:], impl=impl)
    torch.testing.assert_close(unbounded.divergence, without.divergence, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_what_the_student_bans_makes_forward_kl_infinite_without_a_gradient(
    impl: str, device: torch.device
) -> None:
    logits, ref_logits = torch.randn(2, 2, 50, device=device)
    logits[0, 4] = -torch.inf
    out, grad = run(logits, ref_logits, impl=impl, divergence="forward_kl", coef=2.0)
    assert out.divergence.isposinf().tolist() == [True, False]
    assert out.loss == math.inf
    p, q = logits.double().softmax(-1), ref_logits.double().softmax(-1)
    expected = (p - q).where(logits > -torch.inf, 0.0)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-8)
    for divergence in ("reverse_kl", "jsd"):
        out, grad = run(logits, ref_logits, impl=impl, divergence=divergence)
        assert out.divergence.isfinite().all()
        assert grad.isfinite().all()
        assert grad[0, 4] == 0


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("divergence", KINDS)
def test_what_both_ban_adds_nothing(impl: str, divergence: str, device: torch.device) -> None:
    logits, ref_logits = torch.randn(2, 2, 50, device=device)
    few, few_grad = run(logits[:, :40], ref_logits[:, :40], impl=impl, divergence=divergence)
    logits[:, 40:] = ref_logits[:, 40:] = -torch.inf
    out, grad = run(logits, ref_logits, impl=impl, divergence=divergence)
    torch.testing.assert_close(out.divergence, few.divergence, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(grad[:, :40], few_grad, rtol=1e-5, atol=1e-8)
    assert (grad[:, 40:] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("divergence", KINDS)
def test_very_different_logits_neither_overflow_nor_vanish(
    impl: str, divergence: str, device: torch.device
) -> None:
    logits, ref_logits = torch.randn(2, 2, 50, device=device)
    logits[0, 3], ref_logits[0, 9] = 1e4, 1e4
    options = {"divergence": divergence, "temperature": 0.01, "ref_temperature": 0.5}
    out, grad = run(logits, ref_logits, impl=impl, **options)
    exact, exact_grad = run(logits.double(), ref_logits.double(), impl="reference", **options)
    torch.testing.assert_close(out.divergence.double(), exact.divergence, rtol=1e-5, atol=1e-7)
    # the gradient of reverse_kl is a difference of two numbers of the size of the divergence
    rounding = EPS32 * exact.divergence.amax().item() / 0.01
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-4, atol=1e-5 + rounding)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("sizes", [(40, 50), (50, 40)], ids=["teacher larger", "student larger"])
def test_the_first_entries_that_both_have_count(
    impl: str, sizes: tuple[int, int], device: torch.device
) -> None:
    logits, ref_logits = (
        torch.randn(2, 3, sizes[0], device=device),
        torch.randn(2, 3, sizes[1], device=device),
    )
    target = torch.tensor([[0, 39, 40], [49, -100, 41]], device=device)
    out, grad = run(logits, ref_logits, target=target, impl=impl)
    few, few_grad = run(logits[..., :40], ref_logits[..., :40], mask=target != -100, impl=impl)
    torch.testing.assert_close(out.divergence, few.divergence)
    torch.testing.assert_close(grad[..., :40], few_grad)
    assert (grad[..., 40:] == 0).all()
    for values, x in ((out.logprob, logits), (out.ref_logprob, ref_logits)):
        assert values is not None
        expected = x[..., :40].log_softmax(-1).gather(-1, target.clamp(0, 39)[..., None])[..., 0]
        expected = torch.where(target >= 40, -torch.inf, expected).where(target != -100, 0.0)
        torch.testing.assert_close(values, expected)
    fewer = distill_loss(logits, ref_logits, impl=impl, vocab_size=30)
    torch.testing.assert_close(
        fewer.divergence, distill_loss(logits[..., :30], ref_logits[..., :30], impl=impl).divergence
    )


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_the_ends_of_jsd_are_the_two_kls(impl: str, device: torch.device) -> None:
    logits, ref_logits = torch.randn(2, 3, 50, device=device)
    for beta, divergence in ((0, "forward_kl"), (1.0, "reverse_kl")):
        mixed, mixed_grad = run(logits, ref_logits, divergence="jsd", jsd_beta=beta, impl=impl)
        out, grad = run(logits, ref_logits, divergence=divergence, impl=impl)
        assert torch.equal(mixed.divergence, out.divergence)
        assert torch.equal(mixed_grad, grad)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("divergence", KINDS)
def test_masked_rows_are_never_read(impl: str, divergence: str, device: torch.device) -> None:
    logits, ref_logits = torch.randn(2, 2, 4, 30, device=device)
    mask = torch.tensor([[1.0, 0.0, 2.0, 1.0], [0.0, 1.0, 0.0, 0.0]], device=device)
    target = torch.randint(30, (2, 4), device=device)
    target[0, 3], target[1, 0] = -100, 10**6  # masked by the target; a target that does not count
    dead = (mask == 0) | (target == -100)
    logits[dead], ref_logits[dead] = torch.nan, torch.nan
    options = {"target": target, "mask": mask, "divergence": divergence, "impl": impl}
    out, grad = run(logits, ref_logits, **options)
    assert out.loss.isfinite()
    assert (grad[dead] == 0).all()
    assert grad.isfinite().all()
    values = (out.divergence, out.entropy, out.logprob, out.ref_logprob)
    assert all(x is not None and (x[dead] == 0).all() for x in values)
    assert out.metrics["tokens"] == 3
    expected = (mask * out.divergence).sum() / 4
    torch.testing.assert_close(out.loss, expected)
    nothing, grad = run(logits, ref_logits, **(options | {"mask": torch.zeros_like(mask)}))
    assert nothing.loss == 0
    assert (grad == 0).all()


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_a_coefficient_of_0_is_no_divergence(impl: str, device: torch.device) -> None:
    logits, ref_logits = torch.randn(2, 2, 30, device=device)
    ref_logits[0, 0] = -torch.inf
    out, grad = run(logits, ref_logits, coef=torch.tensor([0.0, 1.0], device=device), impl=impl)
    assert out.loss.isfinite()
    assert out.divergence[0] == math.inf
    assert out.metrics["active_fraction"] == 0.5
    if impl != "reference":
        assert (grad[0] == 0).all()
        assert grad.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("divergence", KINDS)
@pytest.mark.parametrize("of", ["student", "teacher"])
def test_nan_never_becomes_a_number(
    impl: str, value: float, divergence: str, of: str, device: torch.device
) -> None:
    logits, ref_logits = torch.randn(2, 2, 3000, device=device)
    (logits if of == "student" else ref_logits)[0, 2999] = value
    out, _ = run(logits, ref_logits, divergence=divergence, impl=impl)
    assert not out.divergence[0].isfinite()
    assert out.divergence[1].isfinite()
    assert not out.loss.isfinite()


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_in_place(impl: str, device: torch.device) -> None:
    leaf, ref_logits = torch.randn(2, 3, 4, 30, device=device)
    expected_out, expected = run(leaf, ref_logits, impl=impl, entropy_coef=0.1, vocab_size=20)
    before = ref_logits.clone()
    leaf.requires_grad_()
    logits = leaf * 1.0
    out = distill_loss(logits, ref_logits, impl=impl, entropy_coef=0.1, vocab_size=20, inplace=True)
    assert logits._version > 0
    out.loss.backward()
    torch.testing.assert_close(leaf.grad, expected)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(out.loss, expected_out.loss)
    assert torch.equal(ref_logits, before)
    with pytest.raises(ValueError, match="leaf"):
        distill_loss(leaf, ref_logits, impl=impl, inplace=True)
    made = leaf * 1
    with pytest.raises(ValueError, match="would overwrite ref_logits"):
        distill_loss(made, made.detach(), impl=impl, inplace=True)
    nothing = distill_loss(leaf[:0] * 1, ref_logits[:0].clone(), impl=impl, inplace=True)
    assert nothing.loss == 0  # two tensors without memory share none


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_of_both_are_read(impl: str, device: torch.device) -> None:
    wide, ref_wide = torch.randn(3, 5, 30, device=device), torch.randn(5, 3, 27, device=device)
    logits, ref_logits = wide[:, :-1, :24], ref_wide.transpose(0, 1)[:, 1:, :24]
    out, grad = run(logits, ref_logits, impl=impl)
    expected, expected_grad = run(logits.contiguous(), ref_logits.contiguous(), impl=impl)
    torch.testing.assert_close(out.divergence, expected.divergence)
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("impl", IMPLS)
def test_sequences_with_more_and_more_live_rows(impl: str, device: torch.device) -> None:
    leaf, ref_logits = torch.randn(2, 3, 6, 24, device=device)
    leaf.requires_grad_()
    mask = torch.arange(5, device=device) <= 2 * torch.arange(3, device=device).unsqueeze(1)
    found = []
    for one in (impl, "reference"):
        out = distill_loss(leaf[:, :-1], ref_logits[:, :-1], mask=mask, impl=one)  # which do not merge
        found.append((out.divergence, *torch.autograd.grad(out.loss, leaf)))
    torch.testing.assert_close(*found)


def test_float64_stays_float64() -> None:
    logits, ref_logits = torch.randn(2, 3, 50, dtype=torch.float64)
    for divergence in KINDS:
        out, grad = run(logits, ref_logits, impl="torch", divergence=divergence)
        exact, exact_grad = run(logits, ref_logits, impl="reference", divergence=divergence)
        assert out.divergence.dtype == torch.float64
        assert max_error(out.divergence, exact.divergence) < 1e-13
        assert max_error(grad, exact_grad) < 1e-13


def test_only_the_student_gets_a_gradient() -> None:
    logits, ref_logits = torch.randn(2, 3, 50).unbind()
    ref_logits.requires_grad_()
    out = distill_loss(logits, ref_logits)
    assert not out.loss.requires_grad
    out, _ = run(logits, ref_logits)
    assert ref_logits.grad is None
    with torch.no_grad():
        assert not distill_loss(logits.requires_grad_(), ref_logits).loss.requires_grad


GOOD: dict[str, Any] = {"logits": torch.zeros(2, 3, 10), "ref_logits": torch.zeros(2, 3, 10)}


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"logits": torch.zeros(2, 3, 0)}, "logits must be .* V >= 1"),
        ({"logits": [1.0]}, "logits must be a tensor"),
        ({"ref_logits": None}, "ref_logits must be a tensor"),
        ({"ref_logits": torch.zeros(2, 3, 10, dtype=torch.int64)}, "ref_logits must be float32"),
        (
            {"ref_logits": torch.zeros(3, 2, 10)},
            r"ref_logits must have the leading shape of logits, \(2, 3\)",
        ),
        ({"target": torch.zeros(2, 3)}, "target must be int64"),
        ({"target": torch.zeros(3, 2, dtype=torch.int64)}, "target must have the shape"),
        ({"target": torch.full((2, 3), 10)}, r"target must be in \[0, V=10\)"),
        ({"mask": torch.full((2, 3), -1.0)}, "mask must be >= 0"),
        ({"divergence": "kl"}, "divergence must be one of reverse_kl, forward_kl, jsd, got 'kl'"),
        ({"divergence": "jsd", "jsd_beta": 1.5}, "jsd_beta must be within"),
        ({"jsd_beta": None}, "jsd_beta must be a finite number"),
        ({"coef": torch.zeros(2)}, "coef must be a number"),
        ({"entropy_coef": math.nan}, "entropy_coef must be a finite number"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"ref_temperature": -1.0}, "ref_temperature must be positive"),
        ({"ref_temperature": torch.zeros(2, 3)}, "ref_temperature must be positive"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"ref_softcap": -3.0}, "ref_softcap must be positive"),
        ({"ref_logprob_floor": 0.5}, "ref_logprob_floor must be negative"),
        ({"ref_logprob_floor": -9.0, "divergence": "jsd"}, "None unless divergence is 'reverse_kl'"),
        ({"denominator": -1.0}, "denominator must be positive"),
        ({"inplace": 1}, "inplace must be True or False"),
        ({"vocab_size": 11}, "vocab_size must be at most"),
        ({"vocab_size": 0}, "vocab_size must be an integer >= 1"),
    ],
)
def test_bad_arguments_are_named(impl: str, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distill_loss(**(GOOD | {"impl": impl} | wrong))
