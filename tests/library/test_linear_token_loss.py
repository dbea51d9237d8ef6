from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from aer_fast import reference
from tests.helpers.heads import (
    LOOPS,
    assert_matches_float64,
    head,
    linear_ppo_loss,
    linear_token_loss,
    linear_token_stats,
    run,
    take_loop,
    widened,
)

pytestmark = pytest.mark.numerics
IMPLS = ["torch", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def cispo(logprob: Tensor, entropy: Tensor, old_logprob: Tensor, advantage: Tensor) -> Tensor:
    """2506.13585: the clipped ratio is a constant weight of the log-probability."""
    ratio = (logprob.detach() - old_logprob).exp()
    return -ratio.clamp(max=1.5) * advantage * logprob


def reinforce_on_uncertain_tokens(
    logprob: Tensor, entropy: Tensor, advantage: Tensor, threshold: Tensor
) -> Tensor:
    """2506.01939: only tokens of high entropy learn."""
    return torch.where(entropy.detach() >= threshold, -advantage * logprob, 0.0)


def uncertain_distillation(logprob: Tensor, entropy: Tensor, teacher_logprob: Tensor) -> Tensor:
    """Follow the teacher's token where unsure; the gradient of the entropy takes part."""
    return (teacher_logprob - logprob).square() * (1 + entropy).log()


OBJECTIVES: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...]]] = {
    "cispo": (cispo, ("old", "advantage")),
    "reinforce": (reinforce_on_uncertain_tokens, ("advantage", 3.5)),
    "distillation": (uncertain_distillation, ("old",)),
}


def batch(N: int, V: int, D: int, device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    inputs: dict[str, Any] = head(N, V, D, device, dtype)
    inputs["mask"] = torch.tensor([1.0, 2.0, 0.5, 0.0, 1.0], device=device).repeat(N)[:N]
    return inputs


def objective_call(name: str, inputs: dict[str, Any]) -> Callable[..., Any]:
    """linear_token_loss with its positional arguments filled in."""
    objective, wanted = OBJECTIVES[name]
    N = len(inputs["target"])
    device = inputs["target"].device
    tensors = {"old": -3 + torch.randn(N, device=device), "advantage": torch.randn(N, device=device)}
    chosen = [tensors[x] if isinstance(x, str) else x for x in wanted]

    def call(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Any:
        return linear_token_loss(hidden, weight, target, objective, *chosen, **options)

    return call


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_matches_float64(
    impl: str,
    name: str,
    loop: str,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    taken = {"planner": take_loop(loop)}
    inputs = batch(13, 101, 9, device, dtype)
    call = objective_call(name, inputs)
    assert_matches_float64(call, inputs, impl, softcap=5.0, temperature=0.8, denominator=9.0, **taken)
    assert_matches_float64(call, inputs | {"bias": None}, impl, frozen=("weight",), **taken)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_an_objective_of_ours_is_linear_ppo_loss(impl: str, device: torch.device) -> None:
    inputs = batch(13, 101, 9, device)
    old, advantage = -3 + torch.randn(13, device=device), torch.randn(13, device=device)

    def clipped(logprob: Tensor, entropy: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
        ratio = (logprob - old).exp()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        return -surrogate - 0.02 * entropy

    def call(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Any:
        return linear_token_loss(hidden, weight, target, clipped, old, advantage, **options)

    out, grads = run(call, inputs, impl=impl)
    expected, expected_grads = run(
        linear_ppo_loss, inputs, impl=impl, old_logprob=old, advantage=advantage, entropy_coef=0.02
    )
    torch.testing.assert_close(out[:3], expected[:3])
    torch.testing.assert_close(grads, expected_grads)
    for name in ("tokens", "entropy", "active_fraction"):
        torch.testing.assert_close(out.metrics[name], expected.metrics[name])


def gspo(
    logprob: Tensor, entropy: Tensor, old_logprob: Tensor, advantage: Tensor, sequence: Tensor
) -> Tensor:
    """2507.18071: one ratio per sequence, the geometric mean of its tokens' ratios."""
    _, s = sequence.unique_consecutive(return_inverse=True)
    length = torch.bincount(s)
    log_ratio = logprob.new_zeros(len(length)).index_add(0, s, logprob - old_logprob) / length
    ratio = log_ratio.exp()[s]
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("chunk_tokens", [None, 1, 4, 7])
def test_a_ratio_per_sequence_needs_whole_sequences(
    impl: str,
    loop: str,
    chunk_tokens: int | None,
    device: torch.device,
) -> None:
    """Sequences of all lengths, some wholly masked, one longer than a chunk, one empty."""
    taken = {"planner": take_loop(loop)}
    lengths = [3, 1, 0, 9, 2, 2, 1, 5]
    N = sum(lengths)
    inputs = batch(N, 101, 9, device)
    inputs["mask"][13:15] = 0.0
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    old, advantage = -3 + torch.randn(N, device=device), torch.randn(len(lengths), device=device)[sequence]
    seen: list[list[int]] = []

    def call(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Any:
        arguments = (hidden, weight, target, gspo, old, advantage, sequence)
        return linear_token_loss(*arguments, cu_seqlens=cu_seqlens, **options)

    def spying(logprob: Tensor, entropy: Tensor, sequence: Tensor) -> Tensor:
        seen.append(sequence.unique().tolist())
        return -logprob

    assert_matches_float64(call, inputs, impl, chunk_tokens=chunk_tokens, **taken)
    run(
        lambda hidden, weight, target, **options: linear_token_loss(
            hidden, weight, target, spying, sequence, cu_seqlens=cu_seqlens, **options
        ),
        inputs,
        impl=impl,
        **taken,
        chunk_tokens=chunk_tokens,
    )
    pieces = [s for piece in seen for s in piece]
    assert len(pieces) == len(set(pieces)), "a sequence was cut"
    seen.clear()
    with torch.no_grad():
        factors = (inputs["hidden"], inputs["weight"], inputs["target"])
        options = {"cu_seqlens": cu_seqlens, "chunk_tokens": chunk_tokens, "impl": impl}
        linear_token_loss(*factors, spying, sequence, mask=inputs["mask"], **options)
    without = [s for piece in seen for s in piece]
    assert sorted(without) == sorted(set(pieces)), "a sequence was cut without gradients"
    if loop == "planned" and chunk_tokens is not None:
        assert len(seen) > 2


def test_the_top_entropy_quantile_from_a_pass_before(device: torch.device) -> None:
    """Two passes: which tokens are uncertain, then REINFORCE on those alone."""
    inputs = batch(40, 101, 9, device)
    with torch.no_grad():
        before = linear_token_stats(inputs["hidden"], inputs["weight"], inputs["target"], bias=inputs["bias"])
    threshold = before.entropy.quantile(0.8)
    advantage = torch.ones(40, device=device)

    def call(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Any:
        arguments = (hidden, weight, target, reinforce_on_uncertain_tokens, advantage, threshold)
        return linear_token_loss(*arguments, **options)

    out, grads = run(call, inputs | {"mask": None})
    learning = before.entropy >= threshold
    assert learning.sum() == 8
    assert out.metrics["active_fraction"].item() == pytest.approx(0.2)
    assert ((grads["hidden"] != 0).any(-1) == learning).all()


def test_dpo_from_logprobs_per_token(device: torch.device) -> None:
    """2305.18290: a loss of sums over sequences, outside, by linear_token_stats."""
    inputs = head(12, 101, 9, device, torch.float32)
    target = inputs["target"].view(4, 3)
    target[:, -1] = -100
    reference_logprob = -3 * torch.ones(4, device=device)

    def dpo(stats: Any) -> Tensor:
        gain = stats.logprob.sum(-1) - reference_logprob
        return -torch.nn.functional.logsigmoid(0.1 * (gain[:2] - gain[2:])).mean()

    grads = []
    for impl, dtype in (("auto", torch.float32), ("reference", torch.float64)):
        hidden = inputs["hidden"].view(4, 3, 9).to(dtype).requires_grad_()
        weight = inputs["weight"].detach().to(dtype).requires_grad_()
        dpo(linear_token_stats(hidden, weight, target, impl=impl)).backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        grads.append((hidden.grad, weight.grad))
    for actual, exact in zip(*grads):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-7)
    assert (grads[0][0][:, -1] == 0).all()


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_token_tensors_are_constants_of_any_dtype_that_broadcast(impl: str, device: torch.device) -> None:
    hidden, weight = torch.randn(2, 3, 8, device=device), torch.randn(50, 8, device=device)
    target = torch.randint(50, (2, 3), device=device)
    rows = torch.tensor([[1], [2]], device=device)
    flags = torch.tensor([[True, False, True], [False, True, True]], device=device)
    slope = torch.tensor(2.0, requires_grad=True)
    seen = []

    def objective(logprob: Tensor, entropy: Tensor, *constants: Tensor) -> Tensor:
        seen.append([x.cpu() for x in constants])
        return -logprob * constants[2] * constants[1]

    hidden.requires_grad_()
    out = linear_token_loss(hidden, weight, target, objective, rows, flags, slope, 7, impl=impl)
    out.loss.backward()
    assert slope.grad is None
    ints, bools, floats, number = seen[0]
    assert ints.tolist() == [1, 1, 1, 2, 2, 2]
    assert ints.dtype == torch.int64
    assert bools.tolist() == flags.flatten().tolist()
    assert floats.tolist() == [2.0] * 6
    assert number.tolist() == [7] * 6
    logprob = reference.linear_token_stats(hidden.detach(), weight, target).logprob
    torch.testing.assert_close(out.loss, (-2 * logprob * flags).sum() / 6)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_token_tensors_made_under_inference_mode(impl: str, device: torch.device) -> None:
    inputs = batch(13, 101, 9, device)
    with torch.inference_mode():
        advantage = torch.randn(13, device=device)

    def call(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Any:
        arguments = (hidden, weight, target, lambda logprob, entropy, a: -logprob * a, advantage)
        return linear_token_loss(*arguments, **options)

    out, grads = run(call, inputs, impl=impl)
    assert grads["weight"].any()
    with torch.inference_mode():
        assert torch.equal(call(**inputs, impl=impl).loss, out.loss)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_a_number_is_as_exact_as_the_computation(impl: str) -> None:
    inputs = widened(head(6, 50, 8, torch.device("cpu"), torch.float32))
    arguments = (inputs["hidden"], inputs["weight"], inputs["target"])
    out = linear_token_loss(*arguments, lambda logprob, entropy, a: a + 0 * logprob, 0.1, impl=impl)
    assert out.loss.item() == pytest.approx(0.1, rel=1e-15)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_an_objective_without_a_gradient(impl: str, device: torch.device) -> None:
    inputs = batch(13, 101, 9, device)

    def call(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Any:
        return linear_token_loss(hidden, weight, target, lambda logprob, _: logprob.detach(), **options)

    out, grads = run(call, inputs, impl=impl)
    assert out.metrics["active_fraction"] == 0
    assert all((g == 0).all() for g in grads.values())
    assert set(grads) == {"hidden", "weight", "bias"}


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("case", ["all masked", "empty"])
def test_nothing_to_learn_from(impl: str, case: str, device: torch.device) -> None:
    N = 0 if case == "empty" else 5
    inputs = batch(N, 101, 9, device)
    inputs["mask"] = torch.zeros(N, device=device)
    inputs["hidden"].fill_(torch.nan)
    out, grads = run(objective_call("cispo", inputs), inputs, impl=impl)
    assert out.loss == 0
    assert all(value == 0 for value in out.metrics.values())
    assert set(grads) == {"hidden", "weight", "bias"}
    assert all((g == 0).all() for g in grads.values())


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("result", [torch.ones(()), torch.ones(2, 3), torch.ones(6, dtype=torch.long), 1.0])
def test_an_objective_must_return_a_loss_per_token(impl: str, result: Any, device: torch.device) -> None:
    inputs = head(6, 50, 8, device, torch.float32)
    arguments = (inputs["hidden"], inputs["weight"], inputs["target"])
    with pytest.raises(ValueError, match=r"objective must return .* \(6,\), got"):
        linear_token_loss(*arguments, lambda logprob, entropy: result, impl=impl)
