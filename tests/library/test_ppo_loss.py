from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from aer_fast import PPOLoss, ppo_loss, reference
from aer_fast._rows import strips
from tests.helpers.oracle import assert_within_budget

pytestmark = pytest.mark.numerics
IMPLS = ["torch", "triton"]
SHAPES = [(3, 1), (1, 7), (6, 1000), (2, 2049), (2, 4096 * 2 + 8)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def batch(N: int, V: int, device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Rows of every kind: clipped at either side, dual-clipped, A = 0, masked, with a float weight."""
    logits = (3 * torch.randn(N, V, device=device)).to(dtype)
    target = torch.randint(V, (N,), device=device)
    logprob = reference.token_stats(logits.double(), target, temperature=0.8).logprob
    ratio = torch.tensor([1.1, 0.5, 1.5, 3.5, 0.9, 1.9], device=device).repeat(N)[:N]
    advantage = torch.tensor([1.0, -1.0, 2.0, -2.0, 0.0, -0.5], device=device).repeat(N)[:N]
    return {
        "logits": logits,
        "target": target,
        "old_logprob": (logprob - ratio.log()).float(),
        "advantage": advantage,
        "mask": torch.tensor([1.0, 2.0, 0.5, 1.0, 0.25, 1.0], device=device).repeat(N)[:N],
        "temperature": 0.8,
    }


def run(inputs: dict[str, Any], **options: Any) -> tuple[PPOLoss, Tensor]:
    """The result, and the gradient of the logits."""
    inputs = inputs | options
    logits = inputs.pop("logits").detach().clone().requires_grad_()
    # no leaf may be overwritten
    out = ppo_loss(logits * 1 if inputs.get("inplace") else logits, **inputs)
    out.loss.backward()
    assert logits.grad is not None
    return out, logits.grad


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bonus": {"entropy_coef": 0.02},
    "bonus per token": {"entropy_coef": "per token"},
    "everything": {
        "entropy_coef": "per token",
        "dual_clip": 3.0,
        "clip": (0.1, 0.28),
        "ref_logprob": "per token",
        "kl_coef": 0.05,
        "importance_weight": "per token",
        "denominator": 17.0,
        "softcap": 30.0,
        "temperature": "per token",
    },
    "on-policy": {"old_logprob": None, "entropy_coef": 0.02, "mask": None},
    "inplace": {"inplace": True, "entropy_coef": 0.02},
}


def options_for(name: str, inputs: dict[str, Any]) -> dict[str, Any]:
    options = dict(OPTIONS[name])
    for key, value in options.items():
        if isinstance(value, str):
            noise = torch.rand_like(inputs["advantage"])
            options[key] = inputs["old_logprob"] + noise if key == "ref_logprob" else 0.5 + noise
    return options


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("N", "V"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_matches_float64(
    impl: str, name: str, N: int, V: int, dtype: torch.dtype, device: torch.device
) -> None:
    inputs = batch(N, V, device, dtype)
    options = options_for(name, inputs)
    actual, grad = run(inputs, impl=impl, **options)
    eager, eager_grad = run(inputs, impl="reference", **options)
    exact, exact_grad = run(inputs | {"logits": inputs["logits"].double()}, impl="reference", **options)

    scale = inputs["logits"].abs().max().item() / 0.5
    assert grad.dtype == dtype
    assert actual.loss.dtype == torch.float32
    for a, e, x in (
        (actual.loss, eager.loss, exact.loss),
        (actual.logprob, eager.logprob, exact.logprob),
        (actual.entropy, eager.entropy, exact.entropy),
        (grad, eager_grad, exact_grad),
        *((actual.metrics[k], eager.metrics[k], exact.metrics[k]) for k in exact.metrics),
    ):
        assert_within_budget(a, e, x, terms=V, input_scale=scale)
    assert actual.metrics.keys() == exact.metrics.keys()


@pytest.mark.parametrize("name", ["everything", "inplace"])
@pytest.mark.parametrize("V", [205, 208])
@pytest.mark.parametrize("tile", [{"BLOCK_V": 8, "num_warps": 1}, {"BLOCK_V": 64, "num_warps": 1}], ids=str)
def test_any_tile_gives_the_same(
    name: str, V: int, tile: dict[str, int], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aer_fast.kernels import primitives

    monkeypatch.setattr(primitives, "tile_config", lambda V, align, itemsize: tile)
    test_matches_float64("triton", name, 6, V, torch.bfloat16, device)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_inplace_writes_the_gradient_over_the_logits(impl: str, device: torch.device) -> None:
    inputs = batch(6, 50, device)
    expected, expected_grad = run(inputs, impl=impl, entropy_coef=0.1)
    leaf = inputs.pop("logits").requires_grad_()
    logits = leaf * 1
    version = logits._version
    out = ppo_loss(logits, impl=impl, entropy_coef=0.1, inplace=True, **inputs)
    assert logits._version > version
    assert torch.equal(logits.detach(), expected_grad)
    assert torch.equal(out.loss, expected.loss)
    out.loss.backward()
    assert torch.equal(leaf.grad, expected_grad)


@pytest.mark.parametrize("impl", IMPLS)
def test_inplace_is_seen_by_autograd(impl: str, device: torch.device) -> None:
    """Whoever saved the logits for its own backward is told that they are gone."""
    inputs = batch(6, 50, device)
    logits = inputs.pop("logits").requires_grad_() * 1
    other = logits.exp().sum() + (logits * logits).sum()
    loss = ppo_loss(logits, impl=impl, inplace=True, **inputs).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (other + loss).backward()


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_without_grad_the_logits_stay(impl: str, device: torch.device) -> None:
    inputs = batch(6, 50, device)
    before = inputs["logits"].clone()
    with torch.no_grad():
        plain = ppo_loss(impl=impl, inplace=True, **inputs)
        inputs["logits"].requires_grad_()
        leaf = ppo_loss(impl=impl, inplace=True, **inputs)
    assert torch.equal(inputs["logits"], before)
    assert torch.equal(plain.loss, leaf.loss)
    assert not leaf.loss.requires_grad
    inputs["logits"] = before.clone()
    assert torch.equal(ppo_loss(impl=impl, inplace=True, **inputs).loss, plain.loss)
    assert torch.equal(inputs["logits"], before)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_inference_mode(impl: str, device: torch.device) -> None:
    inputs = batch(6, 50, device)
    expected = ppo_loss(impl=impl, **inputs)
    with torch.inference_mode():
        made_here = {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
        for arguments in (inputs, made_here):
            out = ppo_loss(impl=impl, **arguments)
            assert torch.equal(out.loss, expected.loss)
            assert torch.equal(out.metrics["active_fraction"], expected.metrics["active_fraction"])
    # rollouts scored under inference_mode, trained on outside
    logits = made_here.pop("logits").clone().requires_grad_()
    out = ppo_loss(logits, impl=impl, **made_here)
    out.loss.backward()
    assert torch.equal(out.loss, expected.loss)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("inplace", [True, False])
def test_a_strided_view(impl: str, inplace: bool, device: torch.device) -> None:
    base = torch.randn(2, 5, 24, device=device)
    target = torch.randint(24, (2, 4), device=device)
    advantage = torch.randn(2, 4, device=device)
    leaf = base[:, :-1].contiguous().requires_grad_()
    ppo_loss(leaf, target, None, advantage, impl=impl).loss.backward()

    whole = base.clone().requires_grad_()
    logits = (whole * 1)[:, :-1]
    ppo_loss(logits, target, None, advantage, impl=impl, inplace=inplace).loss.backward()
    assert whole.grad is not None
    assert leaf.grad is not None
    torch.testing.assert_close(whole.grad[:, :-1], leaf.grad, rtol=0, atol=1e-7)
    assert (whole.grad[:, -1] == 0).all()


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_masked_rows_are_never_read(impl: str, device: torch.device) -> None:
    inputs = batch(6, 50, device)
    inputs["mask"] = torch.tensor([True, False, True, True, True, False], device=device)
    inputs["target"][2] = -100
    live = torch.tensor([0, 3, 4], device=device)
    dead = torch.tensor([1, 2, 5], device=device)
    kept = {k: v[live] if isinstance(v, Tensor) else v for k, v in inputs.items()}
    expected, expected_grad = run(kept, impl=impl, entropy_coef=0.1)
    for name in ("logits", "old_logprob", "advantage"):
        inputs[name][dead] = torch.nan
    inputs["temperature"] = torch.full((6,), 0.8, device=device)
    inputs["temperature"][dead] = torch.nan
    inputs["target"][1] = 999
    for inplace in (False, True):
        out, grad = run(inputs, impl=impl, entropy_coef=0.1, inplace=inplace)
        torch.testing.assert_close(out.loss, expected.loss)
        torch.testing.assert_close(grad[live], expected_grad)
        assert (grad[dead] == 0).all()
        assert (out.logprob[dead] == 0).all()
        assert (out.entropy[dead] == 0).all()
        torch.testing.assert_close(out.metrics, expected.metrics)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("case", ["all masked", "all ignored", "empty", "zero denominator"])
def test_nothing_to_learn_from_gives_0_that_reaches_the_parameters(
    impl: str, case: str, device: torch.device
) -> None:
    N = 0 if case == "empty" else 6
    inputs = batch(N, 50, device)
    inputs["logits"].fill_(torch.nan)
    if case == "all ignored":
        inputs |= {"target": torch.full((N,), -100, device=device), "mask": None}
    else:
        inputs["mask"] = torch.zeros(N, device=device)
    if case == "zero denominator":
        inputs["denominator"] = torch.zeros((), device=device)
    out, grad = run(inputs, impl=impl, entropy_coef=0.1)
    assert out.loss == 0
    assert (grad == 0).all()
    assert all(value == 0 for value in out.metrics.values())


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_without_a_gradient_get_zeros(impl: str, device: torch.device) -> None:
    inputs = batch(6, 5000, device) | {"advantage": torch.tensor([1.0, 0, 0, 0, 0, 0], device=device)}
    out, grad = run(inputs, impl=impl)
    assert (grad[1:] == 0).all()
    assert (grad[0] != 0).all()
    assert out.metrics["active_fraction"].item() == pytest.approx(1 / 6)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_a_sum_over_micro_batches_is_the_whole(impl: str, device: torch.device) -> None:
    inputs = batch(6, 50, device)
    denominator = inputs["mask"].sum()
    whole, grad = run(inputs, impl=impl, entropy_coef=0.1)
    parts = []
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        part = {k: v[rows] if isinstance(v, Tensor) else v for k, v in inputs.items()}
        parts.append(run(part, impl=impl, entropy_coef=0.1, denominator=denominator))
    torch.testing.assert_close(torch.stack([p[0].loss for p in parts]).sum(), whole.loss)
    torch.testing.assert_close(torch.cat([p[1] for p in parts]), grad)
    tokens = torch.stack([p[0].metrics["tokens"] for p in parts])
    entropy = torch.stack([p[0].metrics["entropy"] for p in parts])
    torch.testing.assert_close((tokens * entropy).sum() / tokens.sum(), whole.metrics["entropy"])


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_constants_broadcast_like_the_target(impl: str, device: torch.device) -> None:
    """[B, 1], 0-d and numbers mean what their expansion means."""
    logits = torch.randn(2, 3, 20, device=device)
    target = torch.randint(20, (2, 3), device=device)
    column = torch.tensor([[1.0], [-2.0]], device=device)
    old = -3 + torch.randn(2, 3, device=device)
    short = {
        "old_logprob": old,
        "advantage": column,
        "mask": True,
        "entropy_coef": torch.tensor(0.1, device=device),
        "temperature": torch.tensor(0.9),
        "importance_weight": 0.5,
    }
    full: dict[str, Any] = {
        k: torch.as_tensor(v).to(device).expand(2, 3).contiguous() for k, v in short.items()
    }
    a, grad_a = run({"logits": logits, "target": target, **short}, impl=impl)
    b, grad_b = run({"logits": logits, "target": target, **full}, impl=impl)
    assert torch.equal(a.loss, b.loss)
    assert torch.equal(grad_a, grad_b)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("factor", [1.0, 3.0, 0.0, torch.nan])
def test_the_backward_scales_by_the_upstream_gradient(impl: str, factor: float, device: torch.device) -> None:
    inputs = batch(6, 3000, device)
    _, grad = run(inputs, impl=impl, entropy_coef=0.1)
    logits = inputs.pop("logits").requires_grad_()
    (factor * ppo_loss(logits, impl=impl, entropy_coef=0.1, **inputs).loss).backward()
    torch.testing.assert_close(logits.grad, factor * grad, equal_nan=True)


def test_the_backward_hands_out_what_the_forward_wrote(device: torch.device) -> None:
    """No copy and, where a synchronisation costs nothing, no write when the upstream gradient is 1."""
    inputs = batch(6, 3000, device)
    logits = inputs.pop("logits").requires_grad_() * 1
    loss = ppo_loss(logits, impl="torch", inplace=True, **inputs).loss
    version = logits._version
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad.data_ptr() == logits.data_ptr()
    assert device.type != "cpu" or logits._version == version


@pytest.mark.parametrize("impl", IMPLS)
def test_a_scaled_gradient_is_seen_by_autograd(impl: str, device: torch.device) -> None:
    inputs = batch(6, 50, device)
    logits = inputs.pop("logits").requires_grad_() * 1
    loss = ppo_loss(logits, impl=impl, inplace=True, **inputs).loss
    alias = logits.detach().requires_grad_()
    other = (alias * alias).sum()
    (3 * loss).backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_a_second_backward_raises(impl: str, device: torch.device) -> None:
    inputs = batch(6, 50, device)
    logits = inputs.pop("logits").requires_grad_()
    loss = ppo_loss(logits, impl=impl, **inputs).loss
    loss.backward()
    with pytest.raises(RuntimeError):
        loss.backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_retained_graph_does_not_hand_the_gradient_out_twice(impl: str, device: torch.device) -> None:
    inputs = batch(6, 50, device)
    logits = inputs.pop("logits").requires_grad_()
    loss = ppo_loss(logits, impl=impl, **inputs).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="first backward"):
        loss.backward()


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_only_the_logits_receive_a_gradient(impl: str, device: torch.device) -> None:
    inputs = batch(6, 50, device)
    constants = [inputs[name].requires_grad_() for name in ("old_logprob", "advantage", "mask")]
    coef = torch.full((6,), 0.1, device=device, requires_grad=True)
    total = torch.tensor(7.0, device=device, requires_grad=True)
    out, _ = run(inputs, impl=impl, entropy_coef=coef, denominator=total)
    assert all(x.grad is None for x in (*constants, coef, total))
    assert not any(x.requires_grad for x in (out.logprob, out.entropy, *out.metrics.values()))


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "all banned"])
@pytest.mark.parametrize("advantage", [0.0, 1.0])
def test_a_broken_row_gives_a_broken_loss(
    impl: str, bad: float, advantage: float, device: torch.device
) -> None:
    inputs = batch(6, 5000, device) | {"advantage": advantage, "denominator": 6.0}
    row = slice(None) if bad == -torch.inf else slice(10, 11)
    inputs["logits"][2, row] = bad
    out, _ = run(inputs, impl=impl)
    assert not torch.isfinite(out.loss)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", [-1e38, torch.finfo(torch.float32).min])
def test_a_huge_coefficient_leaves_entries_far_below_without_a_gradient(
    impl: str, value: float, device: torch.device
) -> None:
    """Their probability is 0, and 0 times what is not finite would be NaN."""
    logits = torch.tensor([[0.0, 1.0, 2.0, value]], device=device)
    inputs = {"logits": logits, "target": torch.tensor([0], device=device), "old_logprob": None}
    _, grad = run(inputs | {"advantage": 1.0, "entropy_coef": 10.0, "denominator": 1e-3}, impl=impl)
    assert torch.isfinite(grad).all()
    assert grad[0, 3] == 0


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_a_banned_target_has_ratio_0(impl: str, device: torch.device) -> None:
    logits = torch.randn(2, 50, device=device)
    logits[0, 7] = -torch.inf
    target = torch.tensor([7, 7], device=device)
    out, grad = run({"logits": logits, "target": target, "old_logprob": -4.0, "advantage": 1.0}, impl=impl)
    assert out.logprob[0] == -torch.inf
    assert torch.isfinite(out.loss)
    assert torch.isfinite(grad).all()
    assert (grad[0] == 0).all()


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_a_ratio_that_does_not_matter_may_overflow(impl: str, device: torch.device) -> None:
    logits = torch.randn(3, 50, device=device)
    target = torch.tensor([7, 7, 7], device=device)
    old = torch.tensor([-300.0, -300.0, -3.0], device=device)
    advantage = torch.tensor([1.0, 0.0, 1.0], device=device)
    for clip in ((0.2, 0.2), (0.2, torch.inf)):
        inputs = {"logits": logits, "target": target, "old_logprob": old, "advantage": advantage}
        out, grad = run(inputs | {"clip": clip}, impl=impl)
        if clip[1] == 0.2:  # without a bound the loss of the first token is infinite, and says so
            assert torch.isfinite(out.loss)
            assert (grad[0] == 0).all()
        assert (grad[1] == 0).all()
        assert (grad[2] != 0).all()


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_a_ratio_at_the_bound_keeps_its_gradient(impl: str, device: torch.device) -> None:
    """clip = (0, 0) on-policy: r = 1 is at both bounds, and not beyond them."""
    inputs = batch(6, 50, device) | {"old_logprob": None, "clip": (0.0, 0.0)}
    out, grad = run(inputs, impl=impl)
    _, expected = run(inputs | {"clip": (0.2, 0.2)}, impl=impl)
    assert torch.equal(grad, expected)
    assert out.metrics["clip_fraction"] == 0


@pytest.mark.parametrize("impl", IMPLS)
def test_small_log_ratios_keep_their_digits(impl: str, device: torch.device) -> None:
    """r - 1 - log r and the k3 estimator of log ratios near 1e-3 are near 5e-7, with three digits or more."""
    inputs = batch(6, 50, device) | {"mask": None, "advantage": 0.0}
    logprob = run(inputs, impl=impl)[0].logprob
    inputs["old_logprob"] = logprob - 1e-3
    inputs |= {"ref_logprob": logprob + 1e-3, "kl_coef": 1.0}
    out, _ = run(inputs, impl=impl)
    d = (logprob - inputs["old_logprob"]).double()
    assert out.metrics["approx_kl"].item() == pytest.approx((d.expm1() - d).mean().item(), rel=1e-3)
    d = (inputs["ref_logprob"] - logprob).double()
    assert out.loss.item() == pytest.approx((d.expm1() - d).mean().item(), rel=1e-3)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_does_not_touch_the_sums(impl: str, device: torch.device) -> None:
    inputs = batch(6, 3000, device)
    plain, grad = run(inputs, impl=impl, entropy_coef=0.1)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        mixed, mixed_grad = run(inputs, impl=impl, entropy_coef=0.1)
    assert torch.equal(plain.entropy, mixed.entropy)
    assert torch.equal(grad, mixed_grad)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_one_token_without_leading_dimensions(impl: str, device: torch.device) -> None:
    logits = torch.randn(5, device=device)
    out, grad = run(
        {"logits": logits, "target": torch.tensor(1, device=device), "old_logprob": None}
        | {"advantage": 1.0},
        impl=impl,
    )
    expected = logits.softmax(-1)
    expected[1] -= 1
    torch.testing.assert_close(grad, expected)
    assert out.logprob.shape == ()
    assert out.metrics["tokens"] == 1


@pytest.mark.parametrize("impl", IMPLS)
def test_the_same_call_gives_the_same_bits(impl: str, device: torch.device) -> None:
    inputs = batch(6, 9000, device)
    (a, grad_a), (b, grad_b) = (run(inputs, impl=impl, entropy_coef=0.1) for _ in range(2))
    assert torch.equal(a.loss, b.loss)
    assert torch.equal(grad_a, grad_b)


@pytest.mark.parametrize("impl", IMPLS)
def test_through_activation_checkpointing(impl: str, device: torch.device) -> None:
    inputs = batch(6, 50, device)
    hidden = inputs.pop("logits").requires_grad_()

    def head(x: Tensor) -> Tensor:
        return ppo_loss(2 * x, impl=impl, inplace=True, entropy_coef=0.1, **inputs).loss

    (plain,) = torch.autograd.grad(head(hidden), hidden)
    again = torch.utils.checkpoint.checkpoint(head, hidden, use_reentrant=False)
    (checkpointed,) = torch.autograd.grad(again, hidden)
    assert torch.equal(plain, checkpointed)


class LargestTensor(TorchDispatchMode):
    """Records the entries of the largest new tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = *args, *(kwargs or {}).values()  # one that is written to, out=, is not new
        result = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in given if isinstance(x, Tensor)}
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in known:
                self.entries = max(self.entries, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("masked", [False, True])
def test_inplace_holds_nothing_of_the_size_of_the_logits(
    impl: str, masked: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CPU_STRIP", "DEVICE_STRIP"):
        monkeypatch.setattr(strips, name, 1 << 19)
    inputs = batch(256, 32_000, device) if impl == "torch" else batch(64, 1000, device)
    inputs["mask"] = torch.rand_like(inputs["mask"]) > 0.3 if masked else None
    N, V = inputs["logits"].shape
    logits = inputs.pop("logits").requires_grad_() * 1
    with LargestTensor() as largest:
        loss = ppo_loss(logits, impl=impl, inplace=True, entropy_coef=0.1, **inputs).loss
        torch.autograd.grad(3 * loss, logits)
    # three buffers of a tile in the torch path, the [FIELDS, N] table in both
    assert largest.entries <= max(3 << 19, 10 * N)
    assert largest.entries < N * V / 5
