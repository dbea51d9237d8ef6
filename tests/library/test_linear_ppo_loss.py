from typing import Any

import pytest
import torch
from torch import Tensor

from aer_fast import ppo_loss, reference
from tests.helpers.heads import (
    LOOPS,
    assert_matches_float64,
    head,
    linear_ppo_loss,
    run,
    take_loop,
    widened,
)

pytestmark = pytest.mark.numerics
IMPLS = ["torch", "triton"]
SHAPES = [(1, 7, 3), (13, 101, 9), (6, 2049, 33)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def batch(N: int, V: int, D: int, device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Rows of every kind: clipped at either side, dual-clipped, A = 0, masked, with a float weight."""
    inputs: dict[str, Any] = head(N, V, D, device, dtype)
    exact = {k: v.double() for k, v in inputs.items() if k != "target"}
    logprob = reference.linear_token_stats(target=inputs["target"], **exact).logprob

    def rows(*values: float) -> Tensor:
        return torch.tensor(values, device=device).repeat(N)[:N]

    return inputs | {
        "old_logprob": (logprob - rows(1.1, 0.5, 1.5, 3.5, 0.9, 1.9).log()).float(),
        "advantage": rows(1.0, -1.0, 2.0, -2.0, 0.0, -0.5),
        "mask": rows(1.0, 2.0, 0.5, 1.0, 0.25, 1.0, 0.0),
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bonus": {"entropy_coef": 0.02, "bias": None},
    "bonus for some": {"entropy_coef": "some"},
    "everything": {
        "entropy_coef": "some",
        "dual_clip": 3.0,
        "clip": (0.1, 0.28),
        "ref_logprob": "noise",
        "kl_coef": 0.05,
        "importance_weight": "noise",
        "denominator": 17.0,
        "softcap": 5.0,
        "temperature": "noise",
    },
    "on-policy": {"old_logprob": None, "entropy_coef": 0.02, "mask": None},
}


def options_for(name: str, inputs: dict[str, Any]) -> dict[str, Any]:
    options = dict(OPTIONS[name])
    for key, value in options.items():
        noise = torch.rand_like(inputs["advantage"])
        if value == "some":
            options[key] = torch.where(torch.arange(len(noise), device=noise.device) % 3 == 1, 0.0, noise)
        elif value == "noise":
            options[key] = inputs["old_logprob"] + noise if key == "ref_logprob" else 0.5 + noise
    return options


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(("N", "V", "D"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_matches_float64(
    impl: str,
    name: str,
    loop: str,
    N: int,
    V: int,
    D: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    taken = {"planner": take_loop(loop)}
    inputs = batch(N, V, D, device, dtype)
    assert_matches_float64(linear_ppo_loss, inputs, impl, **options_for(name, inputs), **taken)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    "frozen",
    [("weight", "bias"), ("hidden",), ("hidden", "weight"), ("hidden", "weight", "bias")],
    ids=["head", "body", "all but the bias", "everything"],
)
def test_a_frozen_part_changes_nothing_for_the_others(
    impl: str, loop: str, frozen: tuple[str, ...], device: torch.device
) -> None:
    taken = {"planner": take_loop(loop)}
    inputs = batch(13, 101, 9, device)
    assert_matches_float64(linear_ppo_loss, inputs, impl, frozen, entropy_coef=0.02, **taken)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("chunk_tokens", [1, 2, 12, 13, 1000])
def test_chunks_of_any_size(impl: str, chunk_tokens: int, device: torch.device) -> None:
    inputs = batch(13, 101, 9, device)
    assert_matches_float64(linear_ppo_loss, inputs, impl, entropy_coef=0.02, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loop", LOOPS)
def test_all_rows_clipped(impl: str, loop: str, device: torch.device) -> None:
    taken = {"planner": take_loop(loop)}
    inputs = batch(13, 101, 9, device)
    inputs["old_logprob"] -= 3
    inputs["advantage"] = torch.ones(13, device=device)
    out, grads = run(linear_ppo_loss, inputs, impl=impl, **taken)
    assert out.metrics["clip_fraction_high"] == 1
    assert out.metrics["active_fraction"] == 0
    assert all((g == 0).all() for g in grads.values())
    assert_matches_float64(linear_ppo_loss, inputs, impl, **taken)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", ["all masked", "all ignored", "empty", "zero denominator"])
def test_nothing_to_learn_from_gives_0_that_reaches_the_parameters(
    impl: str,
    loop: str,
    dtype: torch.dtype,
    case: str,
    device: torch.device,
) -> None:
    taken = {"planner": take_loop(loop)}
    N = 0 if case == "empty" else 6
    inputs = batch(N, 50, 8, device, dtype)
    inputs["hidden"].fill_(torch.nan)
    if case == "all ignored":
        inputs |= {"target": torch.full((N,), -100, device=device), "mask": None}
    else:
        inputs["mask"] = torch.zeros(N, device=device)
    if case == "zero denominator":
        inputs["denominator"] = torch.zeros((), device=device)
    out, grads = run(linear_ppo_loss, inputs, impl=impl, **taken, entropy_coef=0.1)
    assert out.loss == 0
    assert set(grads) == {"hidden", "weight", "bias"}
    assert all((g == 0).all() and g.dtype == dtype for g in grads.values())
    assert all(value == 0 for value in out.metrics.values())


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("loop", LOOPS)
def test_masked_rows_are_never_read(impl: str, loop: str, device: torch.device) -> None:
    taken = {"planner": take_loop(loop)}
    inputs = batch(13, 101, 9, device)
    inputs["mask"] = torch.ones(13, dtype=torch.bool, device=device)
    dead = torch.tensor([1, 2, 5, 12], device=device)
    inputs["mask"][dead] = False
    inputs["target"][2] = -100
    kept = {
        k: v[inputs["mask"]] if v is not None and v.dim() and len(v) == 13 else v for k, v in inputs.items()
    }
    expected, expected_grads = run(linear_ppo_loss, kept, impl=impl, **taken, entropy_coef=0.1)
    for name in ("hidden", "old_logprob", "advantage"):
        inputs[name][dead] = torch.nan
    inputs["target"][1] = 999
    out, grads = run(linear_ppo_loss, inputs, impl=impl, **taken, entropy_coef=0.1)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.metrics, expected.metrics)
    torch.testing.assert_close(grads["weight"], expected_grads["weight"])
    torch.testing.assert_close(grads["bias"], expected_grads["bias"])
    torch.testing.assert_close(grads["hidden"][inputs["mask"]], expected_grads["hidden"])
    for x in (grads["hidden"], out.logprob, out.entropy):
        assert (x[dead] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_it_is_ppo_loss_of_the_logits(impl: str, device: torch.device) -> None:
    """Also in [B, T, D], with constants that broadcast."""
    inputs = batch(12, 101, 9, device)
    shaped = {k: v.view(3, 4, *v.shape[1:]) for k, v in inputs.items() if k not in ("weight", "bias")}
    shaped["advantage"] = shaped["advantage"][:, :1]
    factors = (shaped.pop("hidden"), inputs["weight"], inputs["bias"])
    hidden, weight, bias = (x.requires_grad_() for x in factors)
    expected = ppo_loss(hidden @ weight.T + bias, impl=impl, entropy_coef=0.1, **shaped)
    expected_grads = torch.autograd.grad(expected.loss, (hidden, weight, bias))
    out = linear_ppo_loss(hidden, weight, bias=bias, impl=impl, entropy_coef=0.1, **shaped)
    grads = torch.autograd.grad(out.loss, (hidden, weight, bias))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("loop", LOOPS)
def test_active_leaves_out_rows_that_cannot_have_a_gradient(
    impl: str, loop: str, device: torch.device
) -> None:
    taken = {"planner": take_loop(loop)}
    inputs = batch(13, 101, 9, device)
    coef = torch.zeros(13, device=device)
    coef[4] = 0.1  # A = 0, but a bonus
    silent = (inputs["advantage"] == 0) & (coef == 0) & (inputs["mask"] != 0)
    assert silent.any()
    full, grads = run(linear_ppo_loss, inputs, impl=impl, **taken, entropy_coef=coef)
    inputs["hidden"][silent] = torch.nan  # not read
    out, active_grads = run(linear_ppo_loss, inputs, impl=impl, **taken, entropy_coef=coef, stats="active")
    torch.testing.assert_close(out.loss, full.loss)
    torch.testing.assert_close(active_grads, grads)
    computed = (inputs["mask"] != 0) & ~silent
    torch.testing.assert_close(out.entropy, full.entropy.where(computed, 0.0))
    torch.testing.assert_close(out.logprob, full.logprob.where(computed, 0.0))
    assert out.metrics["tokens"] == computed.sum()
    torch.testing.assert_close(out.metrics["entropy"], full.entropy[computed].mean())
    with torch.no_grad():
        torch.testing.assert_close(
            linear_ppo_loss(**inputs, impl=impl, **taken, entropy_coef=coef, stats="active"), out
        )


@pytest.mark.parametrize("impl", IMPLS)
def test_with_a_kl_no_row_is_silent(impl: str, device: torch.device) -> None:
    inputs = batch(13, 101, 9, device) | {"kl_coef": 0.1, "ref_logprob": -3.0}
    inputs["advantage"] = torch.zeros(13, device=device)
    out, _ = run(linear_ppo_loss, inputs, impl=impl, stats="active")
    assert out.metrics["active_fraction"] == 1
    assert_matches_float64(linear_ppo_loss, inputs, impl, stats="active")


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("advantage", [0.0, 1.0])
def test_a_broken_row_gives_a_broken_loss(
    impl: str,
    loop: str,
    bad: float,
    advantage: float,
    device: torch.device,
) -> None:
    taken = {"planner": take_loop(loop)}
    inputs = batch(13, 101, 9, device)
    inputs["hidden"][3] = bad
    inputs["advantage"][3] = advantage
    out, grads = run(linear_ppo_loss, inputs, impl=impl, **taken)
    assert not torch.isfinite(out.loss)
    if advantage:
        assert grads["hidden"][3].isnan().any()


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_bias_of_minus_infinity_bans_a_token(impl: str, loop: str, device: torch.device) -> None:
    taken = {"planner": take_loop(loop)}
    inputs = batch(13, 101, 9, device)
    banned = torch.tensor([0, 33, 34, 100], device=device)  # at the edges of slices, too
    inputs["target"] = inputs["target"].clamp(1, 32)
    allowed = torch.ones(101, dtype=torch.bool, device=device)
    allowed[banned] = False
    new = allowed.cumsum(0) - 1
    kept = inputs | {
        "weight": inputs["weight"][allowed],
        "bias": inputs["bias"][allowed],
        "target": new[inputs["target"]],
    }
    expected, expected_grads = run(linear_ppo_loss, kept, impl=impl, **taken, entropy_coef=0.1)
    inputs["bias"][banned] = -torch.inf
    out, grads = run(linear_ppo_loss, inputs, impl=impl, **taken, entropy_coef=0.1)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(grads["hidden"], expected_grads["hidden"])
    torch.testing.assert_close(grads["weight"][allowed], expected_grads["weight"])
    assert (grads["weight"][banned] == 0).all()
    assert (grads["bias"][banned] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_sum_over_micro_batches_is_the_whole(impl: str, device: torch.device) -> None:
    inputs = batch(13, 101, 9, device)
    denominator = inputs["mask"].sum()
    whole, grads = run(linear_ppo_loss, inputs, impl=impl, entropy_coef=0.1)
    parts = []
    for rows in (slice(0, 1), slice(1, 8), slice(8, 13)):
        part = {k: v[rows] if k not in ("weight", "bias") else v for k, v in inputs.items() if v is not None}
        parts.append(run(linear_ppo_loss, part, impl=impl, entropy_coef=0.1, denominator=denominator))
    torch.testing.assert_close(torch.stack([p[0].loss for p in parts]).sum(), whole.loss)
    torch.testing.assert_close(torch.cat([p[1]["hidden"] for p in parts]), grads["hidden"])
    torch.testing.assert_close(sum(p[1]["weight"] for p in parts), grads["weight"])


def test_logits_of_bfloat16_are_not_rounded(device: torch.device) -> None:
    """ℓ from bfloat16 inputs is right to 2e-5 of float64 on the same inputs, where others are off by 6e-2."""
    inputs = head(64, 1000, 512, device, torch.bfloat16)
    exact = {k: v.double() if k != "target" else v for k, v in inputs.items()}
    with torch.no_grad():
        expected = reference.linear_ppo_loss(old_logprob=None, advantage=1.0, **exact)
        out = linear_ppo_loss(old_logprob=None, advantage=1.0, **inputs)
    assert (out.logprob - expected.logprob).abs().max() < 2e-5
    assert (out.entropy - expected.entropy).abs().max() < 2e-5


def test_the_gradient_of_the_weight_is_rounded_once(device: torch.device) -> None:
    """A sum over many chunks in bfloat16 would lose what the last of them add."""
    inputs = head(128, 50, 16, device, torch.bfloat16) | {"old_logprob": None, "advantage": 1.0}
    _, one = run(linear_ppo_loss, inputs, chunk_tokens=128)
    _, many = run(linear_ppo_loss, inputs, chunk_tokens=1)
    _, exact = run(linear_ppo_loss, widened(inputs))
    for name in ("weight", "bias"):
        half_ulp = torch.finfo(torch.bfloat16).eps / 2 * exact[name].abs().max()
        for grads in (one, many):
            assert (grads[name] - exact[name]).abs().max() <= 1.01 * half_ulp


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loop", LOOPS)
def test_small_gradients_survive_float16(impl: str, loop: str, device: torch.device) -> None:
    """Divided by 10⁶ tokens, dz is below what float16 holds; the sums over it are not."""
    taken = {"planner": take_loop(loop)}
    inputs = batch(13, 101, 9, device, torch.float16)
    _, grads = run(linear_ppo_loss, inputs, impl=impl, **taken)
    _, small = run(linear_ppo_loss, inputs, impl=impl, **taken, denominator=2.0**12 * inputs["mask"].sum())
    for name in grads:
        ulp = 2.0**-24  # float16's smallest number
        assert (small[name].float() * 2**12 - grads[name].float()).abs().max() <= 2**12 * ulp


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("factor", [2.0**-15, 2.0**15])
@pytest.mark.parametrize("name", ["mask", "advantage"])
def test_float16_holds_gradients_of_any_size(
    impl: str, loop: str, factor: float, name: str, device: torch.device
) -> None:
    """A factor of the gradient and the denominator may be as large or small as they like, if they cancel."""
    taken = {"planner": take_loop(loop)}
    inputs = batch(13, 101, 9, device, torch.float16)
    _, grads = run(linear_ppo_loss, inputs, impl=impl, **taken, denominator=1.0)
    inputs[name] = inputs[name] * factor
    _, scaled = run(linear_ppo_loss, inputs, impl=impl, **taken, denominator=factor)
    for key, grad in grads.items():
        assert torch.equal(grad, scaled[key])


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_hidden_and_weight_of_any_strides(impl: str, device: torch.device) -> None:
    inputs = batch(12, 101, 9, device)
    plain, grads = run(linear_ppo_loss, inputs, impl=impl)
    wide = torch.randn(3, 5, 9, device=device)
    wide[:, :-1] = inputs["hidden"].view(3, 4, 9)
    wide.requires_grad_()
    weight = inputs["weight"].T.contiguous().T.requires_grad_()
    constants = {k: inputs[k].view(3, 4) for k in ("target", "old_logprob", "advantage", "mask")}
    out = linear_ppo_loss(wide[:, :-1], weight, bias=inputs["bias"], impl=impl, **constants)
    torch.testing.assert_close(out.loss, plain.loss)
    for actual, name in zip(torch.autograd.grad(out.loss, (wide, weight)), ("hidden", "weight")):
        actual = actual[:, :-1].reshape(12, 9) if name == "hidden" else actual
        torch.testing.assert_close(actual, grads[name])


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_a_mask_without_dimensions(impl: str, device: torch.device) -> None:
    inputs = batch(12, 101, 9, device)
    expected, _ = run(linear_ppo_loss, inputs | {"mask": None}, impl=impl)
    for mask in (True, 1.0, torch.tensor(True), torch.tensor(1.0)):
        out, _ = run(linear_ppo_loss, inputs | {"mask": mask}, impl=impl)
        assert torch.equal(out.loss, expected.loss)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_negative_coefficient_trains_rows_without_advantage(impl: str, device: torch.device) -> None:
    inputs = batch(13, 101, 9, device) | {"advantage": 0.0}
    out, grads = run(linear_ppo_loss, inputs, impl=impl, entropy_coef=-0.1, stats="active")
    assert out.metrics["active_fraction"] == 1
    assert grads["weight"].any()
    inputs["advantage"] = torch.zeros(13, device=device)
    assert_matches_float64(linear_ppo_loss, inputs, impl, entropy_coef=-0.1)


def test_the_gradient_of_the_bias_is_a_wide_sum_in_triton_too(device: torch.device) -> None:
    inputs = head(128, 50, 16, device, torch.bfloat16) | {"old_logprob": None, "advantage": 1.0}
    _, one = run(linear_ppo_loss, inputs, impl="triton", chunk_tokens=128)
    _, many = run(linear_ppo_loss, inputs, impl="triton", chunk_tokens=1)
    ulp = torch.finfo(torch.bfloat16).eps * one["bias"].abs().max()
    assert (one["bias"] - many["bias"]).abs().max() <= ulp
