import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from aer_fast import reference, token_stats
from tests.helpers.oracle import EPS32, assert_within_budget, max_error

pytestmark = pytest.mark.numerics
IMPLS = ["torch", "triton"]
# V: one entry, below one tile, odd, a ragged tail after a whole tile, several tiles in units of 8.
# Larger vocabularies repeat the multi-tile regime and add only time.
SHAPES = [(3, 1), (1, 7), (5, 1000), (2, 2049), (2, 4096 * 2 + 8)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def stats_and_grad(logits: Tensor, target: Tensor, upstream: Tensor, **options: Any) -> list[Tensor]:
    """(logprob, entropy, grad_logits) of a weighted sum, so that both gradients are exercised."""
    logits = logits.detach().clone().requires_grad_()
    logprob, entropy = token_stats(logits, target, **options)
    (upstream.to(logprob.dtype) * torch.stack([logprob, entropy])).sum().backward()
    assert logits.grad is not None
    return [logprob.detach(), entropy.detach(), logits.grad]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("N", "V"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("offset", [0.0, 300.0, -300.0], ids=["centred", "up", "down"])
@pytest.mark.parametrize("softcap", [None, 30.0], ids=["", "softcap"])
def test_matches_float64(
    impl: str, N: int, V: int, dtype: torch.dtype, offset: float, softcap: float | None, device: torch.device
) -> None:
    logits = (4 * torch.randn(N, V, device=device) + offset).to(dtype)
    target = torch.randint(V, (N,), device=device)
    temperature = 0.5 + torch.rand(N, device=device)
    upstream = torch.randn(2, N, device=device)
    options = {"temperature": temperature, "softcap": softcap}

    actual = stats_and_grad(logits, target, upstream, impl=impl, **options)
    eager = stats_and_grad(logits, target, upstream, impl="reference", **options)
    exact = stats_and_grad(logits.double(), target, upstream, impl="reference", **options)

    assert [x.dtype for x in actual] == [torch.float32, torch.float32, dtype]
    scale = (logits.abs().max() / temperature.min()).item()
    for a, e, x in zip(actual, eager, exact):
        assert_within_budget(a, e, x, terms=V, input_scale=scale)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_softcap_far_above_the_logits_costs_no_digits(impl: str, device: torch.device) -> None:
    logits = 4 * torch.randn(4, 1000, device=device)
    target = torch.randint(1000, (4,), device=device)
    upstream = torch.randn(2, 4, device=device)
    for softcap in (40.0, 1e5):  # logits on either side of where the series of tanh ends, and all before it
        actual = stats_and_grad(logits, target, upstream, impl=impl, softcap=softcap)
        eager = stats_and_grad(logits, target, upstream, impl="reference", softcap=softcap)
        exact = stats_and_grad(logits.double(), target, upstream, impl="reference", softcap=softcap)
        for a, e, x in zip(actual, eager, exact):
            assert_within_budget(a, e, x, terms=1000, input_scale=logits.abs().max().item())


def test_float64_stays_float64() -> None:
    logits = torch.randn(3, 50, dtype=torch.float64)
    target = torch.randint(50, (3,))
    upstream = torch.randn(2, 3, dtype=torch.float64)
    torch_rows = stats_and_grad(logits, target, upstream, impl="torch", temperature=0.7)
    exact = stats_and_grad(logits, target, upstream, impl="reference", temperature=0.7)
    for a, x in zip(torch_rows, exact):
        assert a.dtype == torch.float64
        assert max_error(a, x) < 1e-13


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 3, 2)], ids=str)
def test_any_leading_shape(impl: str, shape: tuple[int, ...], device: torch.device) -> None:
    logits = torch.randn(*shape, 11, device=device, requires_grad=True)
    target = torch.randint(11, shape, device=device)
    stats = token_stats(logits, target, impl=impl)
    expected = logits.detach().log_softmax(-1)
    assert stats.logprob.shape == stats.entropy.shape == shape
    for index in product(*map(range, shape)):
        torch.testing.assert_close(stats.logprob[index], expected[index][target[index]])
        torch.testing.assert_close(stats.entropy[index], -(expected[index].exp() * expected[index]).sum())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("wide", [24, 27], ids=["aligned", "odd stride"])
def test_a_sliced_sequence_is_read_by_its_strides(impl: str, wide: int, device: torch.device) -> None:
    logits = torch.randn(3, 5, wide, device=device)
    target = torch.randint(24, (3, 4), device=device)
    upstream = torch.randn(2, 3, 4, device=device)
    view = logits[:, :-1, :24]
    assert not view.is_contiguous()
    actual = stats_and_grad_of_view(view, target, upstream, impl)
    exact = stats_and_grad(view.double().contiguous(), target, upstream, impl="reference")
    for a, x in zip(actual, exact):
        assert max_error(a, x) < 2e-6


def stats_and_grad_of_view(view: Tensor, target: Tensor, upstream: Tensor, impl: str) -> list[Tensor]:
    view.requires_grad_()
    stats = token_stats(view, target, impl=impl)
    (upstream * torch.stack(stats)).sum().backward()
    assert view.grad is not None
    return [stats.logprob.detach(), stats.entropy.detach(), view.grad]


@pytest.mark.parametrize("impl", IMPLS)
def test_a_transposed_vocabulary_and_four_dimensions_are_right_too(impl: str, device: torch.device) -> None:
    logits = torch.randn(17, 2, 3, 4, device=device).permute(3, 1, 2, 0)[:, :, 1:]
    target = torch.randint(17, logits.shape[:-1], device=device)
    actual = token_stats(logits, target, impl=impl)
    exact = reference.token_stats(logits.double(), target)
    assert max_error(actual.logprob, exact.logprob) < 2e-6
    assert max_error(actual.entropy, exact.entropy) < 2e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_stride_0_and_missing_upstream_gradients(impl: str, device: torch.device) -> None:
    logits = torch.randn(4, 33, device=device)
    target = torch.randint(33, (4,), device=device)
    for pick in ("logprob", "entropy"):
        fast, exact = (x.clone().requires_grad_() for x in (logits, logits.double()))
        getattr(token_stats(fast, target, impl=impl), pick).sum().backward()  # an expanded gradient
        getattr(reference.token_stats(exact, target), pick).sum().backward()
        assert fast.grad is not None
        assert exact.grad is not None
        assert max_error(fast.grad, exact.grad) < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_can_run_again_on_a_retained_graph(impl: str, device: torch.device) -> None:
    logits = torch.randn(4, 33, device=device, requires_grad=True)
    logprob, entropy = token_stats(logits, torch.randint(33, (4,), device=device), impl=impl)
    loss = (logprob - entropy).sum()
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(first, second)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_ignored_rows_are_never_read(impl: str, device: torch.device) -> None:
    logits = torch.randn(4, 33, device=device)
    logits[1] = torch.nan
    logits.requires_grad_()
    target = torch.tensor([3, -100, 5, -100], device=device)
    stats = token_stats(logits, target, impl=impl)
    stats.logprob.sum().backward()
    assert logits.grad is not None
    for x in (stats.logprob, stats.entropy):
        assert (x[[1, 3]] == 0).all()
        assert (x[[0, 2]] != 0).all()
    assert (logits.grad[[1, 3]] == 0).all()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("softcap", [None, 5.0], ids=["", "softcap"])
def test_banned_tokens_contribute_nothing_and_receive_nothing(
    impl: str, softcap: float | None, device: torch.device
) -> None:
    kept = torch.randn(4, 100, dtype=torch.float64, device=device)
    logits = torch.full((4, 5000), -torch.inf, device=device)
    logits[:, 4500:4600] = kept.float()
    logits.requires_grad_()
    target = 4500 + torch.randint(100, (4,), device=device)
    target[3] = 7  # a banned target
    stats = token_stats(logits, target, softcap=softcap, impl=impl)
    (stats.logprob + stats.entropy).sum().backward()
    assert logits.grad is not None

    exact = kept.clone().requires_grad_()
    inside = (target - 4500).clamp(min=0)
    kept_stats = reference.token_stats(exact, inside, softcap=softcap)
    # a banned target: d logprob / dz = -p, without the one-hot
    logz = (exact if softcap is None else softcap * torch.tanh(exact / softcap)).logsumexp(-1)
    torch.where(target == 7, -logz, kept_stats.logprob).add(kept_stats.entropy).sum().backward()
    assert exact.grad is not None

    assert max_error(stats.logprob[:3], kept_stats.logprob[:3]) < 1e-5
    assert stats.logprob[3] == -torch.inf
    assert max_error(stats.entropy, kept_stats.entropy) < 1e-5
    assert max_error(logits.grad[:, 4500:4600], exact.grad) < 1e-5
    assert (logits.grad[:, :4500] == 0).all()
    assert (logits.grad[:, 4600:] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("gap", [8.0, 8.8, 10.0, 12.0, 17.0, 24.635, 40.0, 80.0])
@pytest.mark.parametrize("place", [0, 4999])
def test_a_confident_token_keeps_relative_accuracy(
    impl: str, gap: float, place: int, device: torch.device
) -> None:
    """p(target) = 1 - 4999 e^-gap, 1 - 1e-7 at 24.635: logprob, entropy and 1 - p to a few ulps."""
    logits = torch.zeros(1, 5000, device=device)
    logits[0, place] = gap
    logits.requires_grad_()
    target = torch.tensor([place], device=device)
    stats = token_stats(logits, target, impl=impl)
    (grad,) = torch.autograd.grad(stats.logprob, logits)

    others = 4999 * torch.tensor(-gap, dtype=torch.float64).exp()
    logprob = -torch.log1p(others)
    entropy = torch.log1p(others) + others * gap / (1 + others)
    for actual, exact in (
        (stats.logprob, logprob),
        (stats.entropy, entropy),
        (grad[0, place], others / (1 + others)),
    ):
        assert abs(actual.item() / exact.item() - 1) < 2e-6
    assert abs(grad.double().sum().item()) <= 4e-6 * others.item()


@pytest.mark.parametrize(("impl", "bound"), [("torch", 2e-6), ("triton", 3e-6)])
@pytest.mark.parametrize("each", [False, True], ids=["a number", "of each"])
def test_a_confident_token_keeps_it_at_any_temperature(
    impl: str, bound: float, each: bool, device: torch.device
) -> None:
    """p(target) is about 1 - 1e-7, at temperatures whose factors are rounded up and down."""
    for i in range(60):
        temperature = 0.3 + 0.027 * i
        logits = torch.zeros(1, 1000, device=device)
        logits[0, 500] = (23.02 + 1.6 * (i % 7) / 7) * temperature
        target = torch.tensor([500], device=device)
        tau = torch.tensor([temperature], device=device)
        stats = token_stats(logits, target, temperature=tau if each else temperature, impl=impl)
        gap = logits[0, 500].double().item() / tau.double().item()
        exact = -math.log1p(999 * math.exp(-gap))
        assert abs(stats.logprob.item() / exact - 1) < bound


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("softcap", [None, 5.0], ids=["", "softcap"])
def test_a_broken_row_is_not_finite_and_spoils_no_other(
    impl: str, bad: float, softcap: float | None, device: torch.device
) -> None:
    logits = torch.randn(3, 5000, device=device)
    target = torch.tensor([1, 2, 3], device=device)
    clean = token_stats(logits, target, softcap=softcap, impl=impl)
    logits[1, 4321] = bad
    stats = token_stats(logits, target, softcap=softcap, impl=impl)
    for x, y in zip(stats, clean):
        assert not torch.isfinite(x[1])
        assert torch.equal(x[[0, 2]], y[[0, 2]])
    logits[1] = -torch.inf
    assert not torch.isfinite(token_stats(logits, target, softcap=softcap, impl=impl).logprob[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_the_most_negative_logits_are_ordinary_numbers(impl: str, device: torch.device) -> None:
    lowest = torch.finfo(torch.float32).min
    logits = torch.full((2, 6000), lowest, device=device)
    logits[0, :10] = 1.0
    logits.requires_grad_()
    target = torch.tensor([3, 3], device=device)
    for temperature in (1.0, 0.1):
        stats = token_stats(logits, target, temperature=temperature, impl=impl)
        size = torch.tensor([10.0, 6000.0], device=device)
        torch.testing.assert_close(stats.logprob, -size.log())
        torch.testing.assert_close(stats.entropy, size.log())
        (grad,) = torch.autograd.grad((stats.logprob + stats.entropy).sum(), logits)
        expected = torch.zeros_like(grad)
        expected[0, :10] -= 0.1 / temperature
        expected[1] -= 1 / 6000 / temperature
        expected[:, 3] += 1 / temperature
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("shape", [(0,), (2, 0)], ids=str)
def test_an_empty_batch_reaches_the_logits(impl: str, shape: tuple[int, ...], device: torch.device) -> None:
    empty = torch.empty(*shape, 10, device=device, requires_grad=True)
    stats = token_stats(empty, torch.empty(shape, dtype=torch.long, device=device), impl=impl)
    stats.logprob.sum().backward()
    assert empty.grad is not None
    assert empty.grad.shape == (*shape, 10)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_does_not_touch_the_sums(impl: str, device: torch.device) -> None:
    logits = torch.randn(3, 999, device=device)
    target = torch.randint(999, (3,), device=device)
    upstream = torch.randn(2, 3, device=device)
    plain = stats_and_grad(logits, target, upstream, impl=impl)
    with torch.autocast(device.type, dtype=torch.bfloat16):  # the backward included
        mixed = stats_and_grad(logits, target, upstream, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed))


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_do_not_depend_on_each_other(impl: str, device: torch.device) -> None:
    logits = torch.randn(7, 999, device=device)
    target = torch.randint(999, (7,), device=device)
    together = token_stats(logits, target, impl=impl)
    alone = token_stats(logits[4:5], target[4:5], impl=impl)
    for a, b in ((together.logprob[4:5], alone.logprob), (together.entropy[4:5], alone.entropy)):
        if impl == "torch" and device.type == "cuda":  # there torch sums in an order that depends on the rows
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_under_a_softcap_the_largest_numbers_are_numbers(
    impl: str, softcap: float, device: torch.device
) -> None:
    largest = torch.finfo(torch.float32).max
    logits = torch.tensor([[1.0, -largest, 2.0, -torch.inf, 0.1 * largest, 0.0]], device=device)
    target = torch.tensor([1], device=device)
    actual = token_stats(logits, target, softcap=softcap, impl=impl)
    exact = reference.token_stats(logits.double(), target, softcap=softcap)
    for a, e in zip(actual, exact):
        assert max_error(a, e) <= 2 * EPS32 * max(1.0, e.abs().item())


@pytest.mark.parametrize("impl", IMPLS)
def test_small_logits_under_a_softcap_keep_their_digits(impl: str, device: torch.device) -> None:
    logits = torch.tensor([[1e-2, 0.0]], device=device)
    actual = token_stats(logits, torch.tensor([0], device=device), softcap=30.0, impl=impl)
    exact = reference.token_stats(logits.double(), torch.tensor([0], device=device), softcap=30.0)
    assert max_error(actual.logprob, exact.logprob) < 5 * EPS32 * math.log(2)  # five roundings of log 2


@pytest.mark.parametrize("impl", IMPLS)
def test_there_is_no_second_derivative(impl: str, device: torch.device) -> None:
    logits = torch.randn(2, 9, device=device, requires_grad=True)
    stats = token_stats(logits, torch.tensor([1, 2], device=device), impl=impl)
    upstream = torch.ones(2, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad((upstream * stats.entropy).sum(), logits, create_graph=True)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_constants_made_under_inference_mode(impl: str, device: torch.device) -> None:
    logits = torch.randn(2, 9, device=device)
    target = torch.tensor([1, 2], device=device)
    upstream = torch.randn(2, 2, device=device)
    temperature = torch.full((2,), 0.7, device=device)
    expected = stats_and_grad(logits, target, upstream, temperature=temperature, impl=impl)
    with torch.inference_mode():
        target, temperature = target.clone(), temperature.clone()
        token_stats(logits, target, temperature=temperature, impl=impl)
    actual = stats_and_grad(logits, target, upstream, temperature=temperature, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_saturated_softcap_keeps_relative_accuracy(impl: str, device: torch.device) -> None:
    logits = torch.tensor([[300.0, 305.0, 310.0], [200.0, 190.0, 180.0]], device=device)
    target = torch.tensor([0, 1], device=device)
    upstream = torch.ones(2, 2, device=device)
    actual = stats_and_grad(logits, target, upstream, softcap=30.0, impl=impl)[2].double()
    # by hand, in float64: torch's own derivative of tanh cancels there, too
    z = (30 * torch.tanh(logits.double() / 30)).cpu()
    p = z.softmax(-1)
    entropy = -(p * p.log()).sum(-1, keepdim=True)
    dz = torch.nn.functional.one_hot(target.cpu(), 3) - p - p * (p.log() + entropy)
    exact = dz / torch.cosh(logits.double().cpu() / 30) ** 2
    torch.testing.assert_close(actual.cpu(), exact, rtol=1e-4, atol=0)


def test_offsets_beyond_two_to_the_31(device: torch.device) -> None:
    """Rows so far apart that their offset does not fit in int32; only the pages they touch exist."""
    far, V = (3 << 29) + 1, 23  # the stride fits in int32, twice the stride does not; both odd: ALIGN = 1
    storage = torch.UntypedStorage(2 * (2 * far + 2 * V), device=device)
    for shape, strides in (((3, V), (far, 1)), ((3, 2, V), (far, V, 1)), ((2, 3, V), (V, far, 1))):
        logits = torch.empty(0, dtype=torch.bfloat16, device=device).set_(storage, 0, shape, strides)
        logits.copy_(torch.randn(shape))
        target = torch.randint(V, shape[:-1], device=device)
        actual = token_stats(logits, target, impl="triton")
        exact = reference.token_stats(logits.contiguous().double(), target)
        assert max_error(actual.logprob, exact.logprob) < 1e-5
