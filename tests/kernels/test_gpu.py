"""What only a GPU shows: sizes beyond 2**31, streams, graphs, waiting, races, and what a backward costs.

Each test whose subject exists without a GPU also runs at a tiny size, under Triton's interpreter. On a
GPU run this file in one process: its largest tests take tens of gigabytes.
"""

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from aer_fast import merge_metrics, ppo_loss, reference, token_stats
from aer_fast._policy_loss import PolicyLoss, Settings
from aer_fast._rows import row_ops
from aer_fast.kernels.layout import CONSTANTS
from tests.helpers.heads import (
    LOOPS,
    head,
    inputs_loss,
    linear_ppo_loss,
    linear_token_loss,
    linear_token_stats,
    take_loop,
)
from tests.helpers.oracle import EPS32, assert_within_budget, max_error

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# The tiny size runs everywhere: it keeps the test itself right.
sizes = pytest.mark.parametrize("size", ["tiny", pytest.param("full", marks=needs_gpu)])
GIB = 1 << 30
QWEN = 151_936


def fits(size: str, gib: float) -> None:
    """Skip a full-sized test that this GPU, or what others leave of it, has no room for."""
    if size == "full":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] / GIB
        if free < gib:
            pytest.skip(f"needs {gib:.0f} GiB of GPU memory, {free:.0f} are free")


@pytest.fixture(autouse=True)
def _leave_memory_to_the_next() -> Iterator[None]:
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- the functions, as one


def constants(logprob: Tensor) -> dict[str, Any]:
    """What a PPO loss takes per token, all of it tensors; rows of every kind, one in eight masked."""
    N, device = len(logprob), logprob.device
    row = torch.arange(N, device=device)
    logprob = logprob.detach().clamp(min=-1000)
    return {
        "old_logprob": logprob + torch.rand(N, device=device) - 0.5,
        "advantage": (row % 5 - 2).float(),
        "mask": (row % 8 != 3).float(),
        "entropy_coef": 0.1 * (row % 3).float(),
        "ref_logprob": logprob + torch.rand(N, device=device) - 0.5,
        "importance_weight": 0.5 + torch.rand(N, device=device),
        "temperature": 0.5 + torch.rand(N, device=device),
        "denominator": torch.full((), float(N), device=device),
        "dual_clip": 3.0,
        "kl_coef": 0.05,
    }


def objective(logprob: Tensor, entropy: Tensor, advantage: Tensor) -> Tensor:
    return -advantage * logprob - 0.1 * entropy


def by_token_loss(
    hidden: Tensor, weight: Tensor, target: Tensor, advantage: Tensor, mask: Tensor, **options: Any
) -> Any:
    for name in ("old_logprob", "entropy_coef", "ref_logprob", "importance_weight", "dual_clip", "kl_coef"):
        options.pop(name, None)
    return linear_token_loss(hidden, weight, target, objective, advantage, mask=mask, **options)


def in_place(logits: Tensor, **options: Any) -> Any:
    return ppo_loss(logits * 1, inplace=True, **options)  # no leaf may be overwritten


FROM_LOGITS: dict[str, Callable[..., Any]] = {
    "token_stats": token_stats,
    "ppo_loss": ppo_loss,
    "ppo_loss in place": in_place,
}
FROM_HIDDEN: dict[str, Callable[..., Any]] = {
    "linear_token_stats": linear_token_stats,
    "linear_ppo_loss": linear_ppo_loss,
    "linear_token_loss": by_token_loss,
}
FUNCTIONS = FROM_LOGITS | FROM_HIDDEN
from_logits = pytest.mark.parametrize("name", FROM_LOGITS)
from_hidden = pytest.mark.parametrize("name", FROM_HIDDEN)
functions = pytest.mark.parametrize("name", FUNCTIONS)
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


def arguments(
    name: str, N: int, V: int, device: torch.device, dtype: torch.dtype = torch.float32, D: int = 64
) -> dict[str, Any]:
    """Inputs of a function; tensors that get a gradient are leaves."""
    inputs: dict[str, Any]
    if name in FROM_LOGITS:
        logits = (3 * torch.randn(N, V, device=device)).to(dtype)
        inputs = {"logits": logits, "target": torch.randint(V, (N,), device=device)}
    else:
        inputs = head(N, V, D, device, dtype)
    inputs["target"][1] = reference.IGNORE
    stats = token_stats if name in FROM_LOGITS else linear_token_stats
    temperature = 0.5 + torch.rand(N, device=device)
    extra = constants(stats(**inputs, temperature=temperature, impl="triton").logprob)
    extra["temperature"] = temperature
    if name.endswith("token_stats"):
        extra = {"temperature": extra["temperature"]}
    for key in ("logits", "hidden", "weight", "bias"):
        if key in inputs:
            inputs[key].requires_grad_()
    return inputs | extra


def leaves_of(inputs: dict[str, Any]) -> list[Tensor]:
    return [inputs[key] for key in ("logits", "hidden", "weight", "bias") if key in inputs]


def compute(name: str, inputs: dict[str, Any], factor: float = 1.0, **options: Any) -> list[Tensor]:
    """Values, metrics and gradients of a function; nothing is read by the host."""
    out = FUNCTIONS[name](**inputs, impl="triton", **options)
    loss = inputs_loss(out)
    grads = torch.autograd.grad(loss if factor == 1.0 else factor * loss, leaves_of(inputs))
    values = [x.detach() for x in out if isinstance(x, Tensor)]
    return [*values, *getattr(out, "metrics", {}).values(), *grads]


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for k, (a, b) in enumerate(zip(actual, expected)):
        assert a.dtype == b.dtype
        assert torch.equal(a.isnan(), b.isnan()), f"result {k}"
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), f"result {k}"


@contextmanager
def busy(device: torch.device) -> Iterator[None]:
    """Other work on the same GPU meanwhile, in small and large kernels."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream()):
        a = torch.randn(4096, 4096, device=device)
        for _ in range(20):
            a = (a @ a).clamp_(-1, 1)
            a[:64, :64].exp_().clamp_(-1, 1)
    yield
    torch.cuda.synchronize()


# ---- offsets beyond 2**31


def telling_rows(N: int, V: int) -> Tensor:
    """Both ends, and the rows around the entry of offset 2**31."""
    middle = min((1 << 31) // V, N - 2)
    return torch.tensor(sorted({0, 1, middle - 1, middle, middle + 1, N - 2, N - 1}))


def far_logits(size: str, odd: bool, device: torch.device) -> Tensor:
    """bfloat16 logits [N, V] of more than 2**31 entries, made a few rows at a time."""
    N, V = (16_384, QWEN - odd) if size == "full" else (12, 1000 - odd)
    logits = torch.empty(N, V, dtype=torch.bfloat16, device=device)
    for part in logits.split(1024):
        part.copy_(3 * torch.randn(part.shape, device=device))
    assert size == "tiny" or logits.numel() > 1 << 31
    return logits


@sizes
@pytest.mark.parametrize("odd", [False, True], ids=["aligned", "odd"])
def test_statistics_beyond_two_to_the_31(size: str, odd: bool, device: torch.device) -> None:
    fits(size, 24)
    logits = far_logits(size, odd, device)
    N, V = logits.shape
    target = torch.randint(V, (N,), device=device)
    target[-1] = V - 1  # the last entry of all
    upstream = torch.randn(2, N, device=device)
    rows = telling_rows(N, V).to(device)

    def run(x: Tensor, at: Any, impl: str = "triton") -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        stats = token_stats(leaf, target[at], impl=impl)
        loss = (upstream[:, at].to(stats[0].dtype) * torch.stack(stats)).sum()
        return [*(s.detach() for s in stats), *torch.autograd.grad(loss, leaf)]

    whole = run(logits, slice(None))
    actual = [x[rows] for x in whole]
    picked = logits[rows]
    scale = picked.abs().max().item()
    eager, exact = run(picked, rows, "reference"), run(picked.double(), rows, "reference")
    for a, e, x in zip(actual, eager, exact):
        assert_within_budget(a, e, x, terms=V, input_scale=scale)
    # and every other row is what it is in a small tensor
    for start in range(0, N, 1024 if size == "full" else 5):
        part = slice(start, min(start + (1024 if size == "full" else 5), N))
        assert_same_bits([x[part] for x in whole], run(logits[part], part))


@sizes
@pytest.mark.parametrize("odd", [False, True], ids=["aligned", "odd"])
@pytest.mark.parametrize("how", ["out of place", "in place", "strided", "strided in place"])
def test_a_loss_beyond_two_to_the_31(size: str, odd: bool, how: str, device: torch.device) -> None:
    fits(size, 32)
    logits = far_logits(size, odd, device)
    N, V = logits.shape
    if "strided" in how:  # [B, T, V], the last position of each sequence left out: its gradient is 0
        B = 16 if size == "full" else 3
        whole = logits.view(B, N // B, V)
        kept = torch.arange(N, device=device).view(B, -1)[:, :-1].flatten()
    else:
        whole, kept = logits[None], torch.arange(N, device=device)
    n = kept.numel()
    target = torch.randint(V, (n,), device=device)
    target[-1] = V - 1
    rows_of_view = whole[:, :-1] if "strided" in how else whole
    terms = constants(token_stats(rows_of_view, target.view(rows_of_view.shape[:-1])).logprob.flatten())

    def shaped(x: Any, shape: Any) -> Any:
        return x.view(shape) if isinstance(x, Tensor) and x.dim() == 1 else x

    leaf = whole.detach().requires_grad_()
    source = leaf.clone() if "in place" in how else leaf
    view = source[:, :-1] if "strided" in how else source
    options = {k: shaped(v, view.shape[:-1]) for k, v in terms.items()}
    out = ppo_loss(view, target.view(view.shape[:-1]), inplace="in place" in how, impl="triton", **options)
    version = source._version
    out.loss.backward()
    assert leaf.grad is not None
    assert "in place" not in how or version > 0  # the kernel's write is known to autograd
    del view, source
    grad = leaf.grad.view(N, V)

    def run(at: Tensor, dtype: torch.dtype, impl: str) -> tuple[Any, Tensor]:
        x = logits[kept[at]].to(dtype).requires_grad_()
        some = {k: v[at] if isinstance(v, Tensor) and v.dim() == 1 else v for k, v in terms.items()}
        part = ppo_loss(x, target[at], impl=impl, **some)
        return part, torch.autograd.grad(part.loss, x)[0]

    # of the rows that are not masked, those at the ends and around 2**31
    far = telling_rows(N, V).to(device)
    rows = torch.isin(kept, far).nonzero()[:, 0]
    scale = logits[far].abs().max().item() / 0.5
    eager, eager_grad = run(rows, torch.bfloat16, "reference")
    exact, exact_grad = run(rows, torch.float64, "reference")
    assert exact_grad.count_nonzero() > 0
    assert_within_budget(grad[kept[rows]], eager_grad, exact_grad, terms=V, input_scale=scale)
    for name in ("logprob", "entropy"):
        actual, e, x = (getattr(r, name).flatten() for r in (out, eager, exact))
        assert_within_budget(actual[rows], e, x, terms=V, input_scale=scale)
    for at in torch.arange(n, device=device).split(1024 if size == "full" else 5):
        part, part_grad = run(at, torch.bfloat16, "triton")
        assert torch.equal(grad[kept[at]], part_grad)
        assert torch.equal(out.logprob.flatten()[at], part.logprob)
        assert torch.equal(out.entropy.flatten()[at], part.entropy)
    dead = torch.ones(N, dtype=torch.bool, device=device)
    dead[kept] = False
    assert not grad[dead].any()


LINEAR_SIZES = {  # N, V, D, rows of a chunk
    "wide weight": (64, 262_144, 8320, 32),  # V · D; the sums in float32 are of two chunks
    "tall chunk": (16_384, QWEN, 64, 16_384),  # rows of a chunk times V
}


@sizes
@pytest.mark.parametrize("shape", LINEAR_SIZES)
def test_a_head_beyond_two_to_the_31(size: str, shape: str, device: torch.device) -> None:
    fits(size, 40)
    N, V, D, chunk = LINEAR_SIZES[shape] if size == "full" else (12, 301, 16, 6 if "wide" in shape else 12)
    assert size == "tiny" or max(V * D, chunk * V) > 1 << 31
    hidden = torch.randn(N, D, device=device).bfloat16()
    weight = torch.empty(V, D, dtype=torch.bfloat16, device=device)
    for part in weight.split(16_384):
        part.copy_(4 * torch.randn(part.shape, device=device) / D**0.5)
    target = torch.randint(V, (N,), device=device)
    target[0], target[-1] = 0, V - 1
    terms = constants(linear_token_stats(hidden, weight, target, impl="triton").logprob)
    hidden.requires_grad_()
    weight.requires_grad_()
    out = linear_ppo_loss(hidden, weight, target, chunk_tokens=chunk, impl="triton", **terms)
    out.loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None

    # words at both ends and around the entry of offset 2**31
    words = telling_rows(V, D).to(device)
    exact_words = torch.zeros(len(words), D, dtype=torch.float64, device=device)
    size_words = torch.zeros_like(exact_words)
    eps = torch.finfo(torch.bfloat16).eps
    for at in torch.arange(N, device=device).split(512):
        h = hidden.detach()[at].double()
        z, sizes_of_z = [], []
        for w in weight.detach().split(16_384):
            z.append(h @ w.double().T)
            sizes_of_z.append((h.abs() @ w.double().abs().T).max())
        logits = torch.cat(z, -1).requires_grad_()
        del z
        some = {k: v[at] if isinstance(v, Tensor) and v.dim() == 1 else v for k, v in terms.items()}
        exact = ppo_loss(logits, target[at], impl="reference", **some)
        (dz,) = torch.autograd.grad(exact.loss, logits)
        # as in tests/helpers/heads.py: logits are sums of D products, and dz is held in bfloat16
        coldest = terms["temperature"].min().item()
        logits_error = EPS32 * (D**0.5 * max(sizes_of_z).item() + V**0.5) / coldest
        for a, x in ((out.logprob[at], exact.logprob), (out.entropy[at], exact.entropy)):
            assert max_error(a, x) <= logits_error * max(1.0, x.abs().max().item())
        exact_hidden, size_hidden = torch.zeros_like(h), torch.zeros_like(h)
        for start in range(0, V, 16_384):
            w = weight.detach()[start : start + 16_384].double()
            d = dz[:, start : start + 16_384]
            exact_hidden += d @ w
            size_hidden += d.abs() @ w.abs()
        allowed = eps * exact_hidden.abs() + size_hidden * (eps + EPS32 * V**0.5 + 4 * logits_error)
        assert ((hidden.grad[at] - exact_hidden).abs() <= allowed.amax()).all()
        exact_words += dz[:, words].T @ h
        size_words += dz[:, words].abs().T @ h.abs()
    allowed = eps * exact_words.abs() + size_words * (eps + EPS32 * N**0.5 + 4 * logits_error)
    assert exact_words[-1].any()
    assert ((weight.grad[words] - exact_words).abs() <= allowed.amax()).all()


# ---- the same bits


@sizes
@dtypes
@functions
def test_the_same_call_gives_the_same_bits_beside_other_work(
    name: str, dtype: torch.dtype, size: str, device: torch.device
) -> None:
    N, V, repetitions = (1024, 32_003, 8) if size == "full" else (10, 301, 2)
    inputs = arguments(name, N, V, device, dtype)
    expected = compute(name, inputs)
    for k in range(repetitions):
        other = {
            key: x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
            for key, x in inputs.items()
        }
        held = torch.empty(977 * (k + 1), device=device)  # other addresses
        with busy(device):
            actual = compute(name, other)
        del held
        assert_same_bits(actual, expected)


@sizes
@from_hidden
@pytest.mark.parametrize("loop", LOOPS)
def test_every_loop_repeats_itself(name: str, loop: str, size: str, device: torch.device) -> None:
    taken = {"planner": take_loop(loop)}
    inputs = arguments(name, 64 if size == "full" else 10, 1001 if size == "full" else 101, device)
    expected = compute(name, inputs, **taken)
    for _ in range(8 if size == "full" else 2):
        with busy(device):
            assert_same_bits(compute(name, inputs, **taken), expected)


# Entries of a row: one; a few; a unit of 8 or one entry beside a whole tile; odd; vocabularies.
AWKWARD = (1, 7, 1000, 1025, 4104, 4097, 50_257, QWEN - 1, QWEN)
CAPPED = (1025, 4104, QWEN)


@pytest.mark.parametrize(
    ("V", "softcap"),
    [
        pytest.param(V, softcap, marks=[] if V < 5000 else [needs_gpu])
        for V in AWKWARD
        for softcap in ([None, 30.0] if V in CAPPED else [None])
    ],
)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
def test_overwriting_the_logits_changes_no_bit(
    V: int, dtype: torch.dtype, softcap: float | None, device: torch.device
) -> None:
    """A store that overtakes a load of its row shows now and then, as other bits: hence rows and rounds."""
    gpu = device.type == "cuda"
    N, rounds = (max(16, min(4096, (1 << 26) // V)), 50) if gpu else (4, 1)
    ops = row_ops("triton")
    logits = (3 * torch.randn(1, N, V, device=device)).to(dtype)
    target = torch.randint(V, (N,), device=device)
    target[::5] = V - 1
    temperature = 0.5 + torch.rand(N, device=device)
    logprob, _, state = ops.token_stats_fwd(logits, target, temperature, softcap)
    terms = constants(logprob)
    rows = torch.stack([terms.get(key, torch.zeros_like(logprob)) for key in CONSTANTS])
    settings = Settings(on_policy=False, clip_low=0.2, clip_high=0.2, dual_clip=torch.inf, kl_coef=0.0)
    constant = (target, temperature, softcap, PolicyLoss(rows, settings, torch.ones((), device=device)))
    expected = torch.empty_like(logits)
    expected_fields = ops.ppo_loss_fwd(logits, *constant, expected)
    upstream = (terms["advantage"], terms["entropy_coef"])
    expected_stats = torch.empty_like(logits)
    ops.token_stats_bwd(logits, target, temperature, softcap, state, *upstream, expected_stats)
    assert torch.isfinite(expected).all()
    assert V == 1 or expected.any()

    different = torch.zeros((), dtype=torch.int64, device=device)
    written = torch.empty_like(logits)
    with busy(device):
        for _ in range(rounds):
            written.copy_(logits)
            fields = ops.ppo_loss_fwd(written, *constant, written)
            different += (written != expected).sum() + (fields != expected_fields).sum()
            written.copy_(logits)
            ops.token_stats_bwd(written, target, temperature, softcap, state, *upstream, written)
            different += (written != expected_stats).sum()
    assert different == 0


# ---- streams


@needs_gpu
@functions
def test_two_streams_at_once(name: str, device: torch.device) -> None:
    """Each with its own data; what one frees early may be the other's next buffer."""
    inputs = [arguments(name, N, V, device) for N, V in ((1500, 30_001), (1100, 32_000))]
    serial = [compute(name, x) for x in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(5):
        results: list[list[Tensor]] = [[], []]
        for k, stream in enumerate(streams):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                torch.cuda._sleep(20_000_000 if k == 0 else 1_000_000)  # so that both are in flight
                for _ in range(3):
                    results[k] = compute(name, inputs[k])
        torch.cuda.synchronize()
        for actual, expected in zip(results, serial):
            assert_same_bits(actual, expected)


@needs_gpu
@functions
def test_a_backward_called_from_another_stream(name: str, device: torch.device) -> None:
    """Autograd runs it on the forward's stream; buffers of the forward must not be handed out before."""
    inputs = arguments(name, 1500, 30_001, device)
    expected = compute(name, inputs)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    for _ in range(5):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            out = FUNCTIONS[name](**inputs, impl="triton")
            loss = inputs_loss(out)
        litter = [torch.full((1500, 30_001), torch.nan, device=device) for _ in range(3)]
        torch.cuda.current_stream().wait_stream(stream)
        grads = torch.autograd.grad(loss, leaves_of(inputs))
        litter += [torch.full((1500, 30_001), torch.nan, device=device)]
        torch.cuda.synchronize()
        del litter
        assert_same_bits(list(grads), expected[-len(grads) :])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@functions
def test_a_device_that_is_not_the_current_one(name: str) -> None:
    torch.manual_seed(1)
    here = arguments(name, 50, 1001, torch.device("cuda", 0))
    expected = compute(name, here)
    there = {
        key: x.detach().to("cuda:1").requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
        for key, x in here.items()
    }
    assert torch.cuda.current_device() == 0
    actual = compute(name, there)
    assert {x.device for x in actual} == {torch.device("cuda", 1)}
    assert_same_bits([x.to("cuda:0") for x in actual], expected)


# ---- graphs


@needs_gpu
@from_logits
@dtypes
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_a_captured_step_is_the_eager_one(
    name: str, dtype: torch.dtype, factor: float, device: torch.device
) -> None:
    """New data is copied into the tensors that the graph was captured with."""
    static = arguments(name, 200, 5001, device, dtype)
    static.pop("denominator", None)  # the sum of the mask: on the device, too
    compute(name, static, factor)  # compiles
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            compute(name, static, factor)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = compute(name, static, factor)

    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        fresh = arguments(name, 200, 5001, device, dtype)
        fresh.pop("denominator", None)
        fresh["target"][seed] = reference.IGNORE
        with torch.no_grad():
            for key, x in static.items():
                if isinstance(x, Tensor):
                    x.copy_(fresh[key])
        graph.replay()
        results.append([x.clone() for x in captured])
        assert_same_bits(results[-1], compute(name, fresh, factor))
    assert not torch.equal(results[0][0], results[1][0])


# ---- waiting for the device


@contextmanager
def watching(mode: str) -> Iterator[list[warnings.WarningMessage]]:
    """What waits for the device raises ("error") or is collected ("warn")."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode(mode)  # warns that it does not see everything
        seen.clear()
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode("default")


def waits(seen: list[warnings.WarningMessage]) -> int:
    return sum("synchroniz" in str(w.message) for w in seen)


@needs_gpu
@from_logits
@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_from_logits_nothing_waits_for_the_device(
    name: str, factor: float, impl: str, device: torch.device
) -> None:
    torch.use_deterministic_algorithms(False)  # as users have it: deterministic algorithms may wait
    inputs = arguments(name, 50, 1001, device)
    numbers = inputs | {"temperature": 0.7}
    if name != "token_stats":
        numbers |= {"mask": None, "denominator": None, "entropy_coef": 0.1, "old_logprob": None}
    for case in (inputs, numbers):

        def step(case: dict[str, Any] = case) -> None:
            out = FUNCTIONS[name](**case, impl=impl)
            loss = inputs_loss(out) if name != "token_stats" else out.logprob.sum() + out.entropy.sum()
            torch.autograd.grad(loss if factor == 1.0 else factor * loss, leaves_of(case))

        step()  # compiles
        torch.cuda.synchronize()
        with watching("error"):
            step()
    with pytest.raises(RuntimeError, match="synchroniz"), watching("error"):
        inputs["target"].sum().item()  # the check can fail


@needs_gpu
@from_hidden
@pytest.mark.parametrize("loop", [None, "chunks", "compact", "vocabulary"])
def test_from_hidden_states_it_waits_once_a_call_and_once_a_chunk(
    name: str, loop: str | None, device: torch.device
) -> None:
    torch.use_deterministic_algorithms(False)  # as above
    inputs = arguments(name, 20, 1001, device)
    options: dict[str, Any] = {"planner": take_loop(loop)} if loop else {"chunk_tokens": 5}
    computed = 20 - 1 - sum(k % 8 == 3 for k in range(20)) if "mask" in inputs else 19
    chunks = -(-computed // 5)
    if loop is not None:  # of tiles of 3 and of 2 rows: there it is once a tile
        chunks += computed // 5 + (computed % 5 > 3)
    compute(name, inputs, **options)
    with watching("warn") as seen:
        out = FUNCTIONS[name](**inputs, impl="triton", **options)
        assert waits(seen) <= 1 + chunks
        assert waits(seen) >= 1  # the check can fail
        loss = inputs_loss(out) if hasattr(out, "loss") else out.logprob.sum() + out.entropy.sum()
        before = waits(seen)
        torch.autograd.grad(loss, leaves_of(inputs))
        assert waits(seen) - before <= (0 if hasattr(out, "loss") else 1)


@needs_gpu
def test_merging_metrics_waits_for_nothing(device: torch.device) -> None:
    """What lies on the CPU, and numbers, are not copied to the device, which would wait for it."""
    torch.use_deterministic_algorithms(False)  # as above
    there = {name: torch.tensor(x, device=device) for name, x in (("tokens", 3.0), ("entropy", 0.25))}
    with watching("error"):
        merged = merge_metrics([there, {"tokens": 2.0, "entropy": torch.tensor(0.5)}, there])
    assert merged["tokens"].device.type == device.type
    assert {name: x.item() for name, x in merged.items()} == {"tokens": 8.0, "entropy": 0.3125}


# ---- what a backward costs


@needs_gpu
@pytest.mark.parametrize("inplace", [True, False])
def test_an_upstream_gradient_of_1_costs_no_pass(inplace: bool, device: torch.device) -> None:
    """By the GPU's own clock, with the launches queued behind a pause: no time of the host is in it."""
    fits("full", 12)
    N, V = 8192, QWEN
    leaf = torch.randn(N, V, dtype=torch.bfloat16, device=device).requires_grad_()
    target = torch.randint(V, (N,), device=device)
    terms = constants(token_stats(leaf.detach(), target).logprob)

    def backward(factor: float) -> float:
        logits = leaf.view_as(leaf) if not inplace else leaf * 1
        loss = ppo_loss(logits, target, inplace=inplace, impl="triton", **terms).loss
        upstream = torch.full((), factor, device=device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(20_000_000)
        start.record()
        (grad,) = torch.autograd.grad(loss, logits, upstream)
        end.record()
        torch.cuda.synchronize()
        assert grad.shape == logits.shape
        elapsed: float = start.elapsed_time(end)
        return elapsed

    for factor in (1.0, 3.0):
        backward(factor)  # compiles
    free = min(backward(1.0) for _ in range(5))
    scaled = min(backward(3.0) for _ in range(5))
    assert scaled > 2 * leaf.numel() * 2 / 8e12 * 1e3  # the clock works: no memory reads and writes at 8 TB/s
    assert free < scaled / 8, f"{free:.3f} ms, one pass takes {scaled:.3f}"


@pytest.mark.parametrize("inplace", [True, False])
def test_the_kernels_write_shows_in_the_version(inplace: bool, device: torch.device) -> None:
    inputs = arguments("ppo_loss", 10, 301, device)
    logits = inputs.pop("logits") * 1
    version = logits._version
    loss = ppo_loss(logits, inplace=inplace, impl="triton", **inputs).loss
    assert (logits._version > version) == inplace
    version = logits._version
    (grad,) = torch.autograd.grad(3 * loss, logits)
    assert (grad.data_ptr() == logits.data_ptr()) == inplace
    assert (logits._version > version) == inplace


# ---- what can't be checked without waiting

BAD_TARGETS = (-1, -101, 1 << 31, (1 << 32) + 5, 1 << 62, -(1 << 62))


@pytest.mark.parametrize("impl", [pytest.param("torch", marks=needs_gpu), "triton"])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("what", ["target", "temperature", "mask"])
def test_a_value_that_can_not_be_read_breaks_its_row_and_no_other(
    name: str, impl: str, what: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is read out of bounds; a bad row is NaN, and the others keep their bits."""
    if what == "mask" and name.endswith("token_stats"):
        pytest.skip("statistics have no mask")
    if device.type == "cpu":  # as on a GPU: the values are not read there
        monkeypatch.setattr("aer_fast._validation.readable", lambda _: False)
    N, V = 24, 1001 if device.type == "cuda" else 301
    inputs = arguments(name, N, V, device)
    bad: dict[str, tuple[float, ...]] = {
        "target": (*BAD_TARGETS, V),
        "temperature": (0.0, -1.0, torch.nan),
        "mask": (-1.0, torch.nan),
    }
    rows = torch.tensor([2, 4, 9, 14, 17, 20, 22][: len(bad[what])], device=device)
    good = torch.ones(N, dtype=torch.bool, device=device)
    good[rows] = False
    good[1] = False  # masked

    def run(inputs: dict[str, Any]) -> tuple[Any, list[Tensor]]:
        out = FUNCTIONS[name](**inputs, impl=impl)
        return out, list(torch.autograd.grad(inputs_loss(out), leaves_of(inputs)))

    clean, clean_grads = run(inputs)
    broken = dict(inputs)
    broken[what] = inputs[what].clone()
    broken[what][rows] = torch.tensor(bad[what], dtype=inputs[what].dtype, device=device)
    out, grads = run(broken)
    if device.type == "cuda":
        torch.cuda.synchronize()  # an illegal access would be reported here
    if what != "mask":
        assert out.logprob[rows].isnan().all()
    assert torch.equal(out.logprob[good], clean.logprob[good])
    assert torch.equal(out.entropy[good], clean.entropy[good])
    if hasattr(out, "loss"):
        assert out.loss.isnan()
    by_row, expected = grads[0], clean_grads[0]  # of logits or of hidden states
    assert torch.equal(by_row[good], expected[good])
    assert by_row[rows].isnan().any(-1).all()


# ---- autocast


@sizes
@functions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast(name: str, dtype: torch.dtype, size: str, device: torch.device) -> None:
    """It rounds the factors of the head's product and nothing else; gradients keep the parameters' dtype."""
    N, V = (300, 32_003) if size == "full" else (10, 301)
    inputs = arguments(name, N, V, device)
    narrow = {
        key: x.detach().to(dtype).requires_grad_() if isinstance(x, Tensor) and x.requires_grad else x
        for key, x in inputs.items()
    }
    expected = compute(name, inputs if name in FROM_LOGITS else narrow)
    with torch.autocast(device.type, dtype=dtype):
        actual = compute(name, inputs)
    if name in FROM_LOGITS:
        assert_same_bits(actual, expected)
        return
    grads = len(leaves_of(inputs))
    assert_same_bits(actual[:-grads], expected[:-grads])
    for wide, rounded in zip(actual[-grads:], expected[-grads:]):
        assert wide.dtype == torch.float32
        limit = torch.finfo(dtype).eps * rounded.abs().max().item()
        assert max_error(wide, rounded) <= limit


# ---- a packed training step


def has_flash_attention() -> bool:
    if not torch.cuda.is_available() or importlib.util.find_spec("transformers") is None:
        return False
    from transformers.utils.import_utils import is_flash_attn_2_available

    return bool(is_flash_attn_2_available())  # flash-attn-4 alone leaves a folder of that name, too


KINDS = [
    "sdpa",
    "packed_sdpa",
    pytest.param(
        "flash_attention_2",
        marks=pytest.mark.skipif(not has_flash_attention(), reason="needs a GPU and the package flash_attn"),
    ),
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_training_step_is_the_padded_one(kind: str, device: torch.device) -> None:
    """Loss and gradients in bfloat16, packed, by flash-attn's varlen kernels where it is there.

    Held to what padded SDPA in bfloat16 costs against the same step in float32: both round every activation
    to bfloat16, in other places, so twice that error and one rounding of the result are allowed.
    """
    for package in ("transformers", "filelock", "typeguard"):
        pytest.importorskip(package)
    from transformers import LlamaConfig, LlamaForCausalLM

    from training.batch import Rollout, make_batch
    from training.policy import Objective, Policy, Tokens

    words = 500
    generator = torch.Generator().manual_seed(1)

    def ids(n: int) -> list[int]:
        return torch.randint(words, (n,), generator=generator).tolist()

    rollouts = [Rollout(ids(p), ids(r), False) for p, r in ((5, 40), (17, 3), (9, 90), (30, 1))]
    n = sum(len(r.response) for r in rollouts)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        tie_word_embeddings=False,
    )
    weights = LlamaForCausalLM(config).state_dict()
    terms = constants(torch.full((n,), -6.0, device=device))
    tokens = Tokens(
        old_logprob=terms["old_logprob"],
        advantage=terms["advantage"],
        mask=terms["mask"],
        entropy_coef=terms["entropy_coef"],
        importance_weight=terms["importance_weight"],
        ref_logprob=terms["ref_logprob"],
        old_value=None,
        returns=None,
    )
    objective = Objective((0.2, 0.2), None, 0.05, 0.0, 0.2)

    def step(dtype: str, packing: bool, attention: str) -> list[Tensor]:
        model = LlamaForCausalLM._from_config(config, attn_implementation=attention)
        model.load_state_dict(weights)
        policy = Policy(model, temperature=0.8, dtype=dtype, value_head=False).to(device)
        batch = make_batch(rollouts, packing=packing, pad=0, device=device)
        loss, *_ = policy(batch, tokens, objective, denominator=float(n))
        # the deterministic forms of some attention kernels are not there; the errors are compared anyway
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            loss.backward()
        grads = [p.grad for p in policy.parameters()]
        return [loss.detach(), *(g.double() for g in grads if g is not None)]

    exact = step("float32", False, "sdpa")
    padded = step("bfloat16", False, "sdpa")
    packed = step("bfloat16", True, kind)
    assert len(packed) == len(padded) == len(exact) == 1 + len(weights)
    eps = torch.finfo(torch.bfloat16).eps
    for a, e, x in zip(packed, padded, exact):
        assert torch.isfinite(a).all()
        scale = x.double().norm().item()
        assert (a - x).double().norm() <= 2 * (e - x).double().norm() + eps * scale
