"""torch.compile(fullgraph=True) around the operations from logits: the same numbers as without it."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import checkpoint

from aer_fast import ppo_loss, token_stats
from aer_fast._rows import with_torch
from aer_fast.kernels.layout import CONSTANTS

# what dynamo and inductor warn of on their own
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
IMPLS = ["triton", "torch"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
V, D = 50, 16


@pytest.fixture(autouse=True)
def _nothing_is_remembered() -> Iterator[None]:
    import torch._dynamo

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], backend: Any = "aot_eager") -> Callable[..., Any]:
    result: Callable[..., Any] = torch.compile(function, fullgraph=True, backend=backend)
    return result


def batch(N: int, device: torch.device) -> dict[str, Any]:
    """Rows on either side of the clip range, some masked in either way."""
    mask = torch.ones(N, device=device)
    mask[2::5] = 0.0
    target = torch.randint(V, (N,), device=device)
    target[1] = -100
    return {
        "target": target,
        "old_logprob": -4 + torch.randn(N, device=device),
        "advantage": torch.randn(N, device=device),
        "mask": mask,
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "on-policy": {"old_logprob": None, "mask": None, "entropy_coef": 0.1},
    "everything": {
        "entropy_coef": torch.rand,
        "temperature": torch.rand,
        "importance_weight": torch.rand,
        "ref_logprob": torch.rand,
        "kl_coef": 0.05,
        "dual_clip": 3.0,
        "clip": (0.1, torch.inf),
        "softcap": 20.0,
        "denominator": 7.5,
    },
    "0-d": {
        "entropy_coef": torch.tensor(0.1),
        "temperature": torch.tensor(0.8),
        "mask": torch.tensor(True),
        "denominator": torch.tensor(7.0, dtype=torch.float64),
    },
    "inplace": {"entropy_coef": 0.1, "inplace": True},
}


def options_for(name: str, N: int, device: torch.device) -> dict[str, Any]:
    made = OPTIONS[name].items()
    return {k: 0.5 + v(N, device=device) if v is torch.rand else v for k, v in made}


class Policy(nn.Module):
    """A linear head and the loss of it."""

    def __init__(self, impl: str, **options: Any):
        super().__init__()
        self.body, self.head = nn.Linear(D, D), nn.Linear(D, V, bias=False)
        self.impl, self.options = impl, options

    def forward(self, hidden: Tensor, **inputs: Any) -> Any:
        logits = self.head(self.body(hidden).tanh())
        return ppo_loss(logits, **(inputs | self.options), impl=self.impl)

    def grads(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(self.parameters())))


def gradient(function: Callable[..., Tensor], logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    value = function(leaf, *rest)
    (grad,) = torch.autograd.grad(value, leaf)
    return value, grad


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_token_stats(impl: str, dtype: torch.dtype, device: torch.device) -> None:
    logits = (3 * torch.randn(2, 4, V, device=device)).to(dtype)
    logits[0, 1] = torch.nan
    logits[1, 2, 3] = -torch.inf
    target = torch.randint(V, (2, 4), device=device)
    target[0, 1] = -100
    temperature = torch.rand(2, 1, device=device) + 0.5
    factors = torch.randn(2, 2, 3, device=device)

    def run(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = logits[:, :-1]
        stats = token_stats(rows, target[:, :-1], temperature=temperature, softcap=20.0, impl=impl)
        return (factors * torch.stack(stats)).sum(), *stats

    outputs = []
    for function in (run, compiled(run)):
        leaf = logits.clone().requires_grad_()
        loss, *stats = function(leaf)
        outputs.append((*stats, *torch.autograd.grad(loss, leaf)))
    for expected, actual in zip(*outputs):
        assert torch.equal(actual, expected)
    *_, grad = outputs[1]
    assert (grad[0, 1] == 0).all()
    assert (grad[0, 0] != 0).any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("output", [0, 1])
def test_token_stats_of_which_one_is_used(impl: str, output: int, device: torch.device) -> None:
    logits, target = torch.randn(5, V, device=device), torch.randint(V, (5,), device=device)

    def run(logits: Tensor) -> Tensor:
        return token_stats(2 * logits, target, impl=impl)[output].sum()

    for expected, actual in zip(gradient(run, logits), gradient(compiled(run), logits)):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", OPTIONS)
def test_ppo_loss(impl: str, name: str, device: torch.device) -> None:
    hidden, inputs = torch.randn(6, D, device=device), batch(6, device)
    policy = Policy(impl, **options_for(name, 6, device)).to(device)
    expected, actual = policy(hidden, **inputs), compiled(policy)(hidden, **inputs)
    torch.testing.assert_close(actual, expected)
    assert expected.metrics["active_fraction"] > 0
    assert not any(x.requires_grad for x in (actual.logprob, actual.entropy, *actual.metrics.values()))
    torch.testing.assert_close(policy.grads(3 * actual.loss), policy.grads(3 * expected.loss))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["bf16", "fp16"])
@pytest.mark.parametrize("inplace", [False, True])
def test_ppo_loss_of_narrow_logits(
    impl: str, dtype: torch.dtype, inplace: bool, device: torch.device
) -> None:
    inputs = batch(6, device) | {"impl": impl, "inplace": inplace, "entropy_coef": 0.1}

    def run(logits: Tensor) -> Tensor:
        return ppo_loss(logits * 1, **inputs).loss

    logits = (3 * torch.randn(6, V, device=device)).to(dtype)
    for expected, actual in zip(gradient(run, logits), gradient(compiled(run), logits)):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("inplace", [False, True])
def test_masked_rows_are_never_read(impl: str, inplace: bool, device: torch.device) -> None:
    inputs = batch(7, device) | {"entropy_coef": 0.1}
    dead = torch.tensor([1, 2], device=device)
    clean = torch.randn(7, V, device=device)
    spoilt = clean.index_fill(0, dead, torch.nan)
    temperature = torch.ones(7, device=device)

    def run(logits: Tensor, advantage: Tensor, temperature: Tensor) -> Tensor:
        arguments = inputs | {"advantage": advantage, "temperature": temperature}
        return ppo_loss(logits * 1, **arguments, impl=impl, inplace=inplace).loss

    expected = gradient(run, clean, inputs["advantage"], temperature)
    constants = (x.index_fill(0, dead, torch.nan) for x in (inputs["advantage"], temperature))
    loss, grad = gradient(compiled(run), spoilt, *constants)
    torch.testing.assert_close((loss, grad), expected)
    assert (grad[dead] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("hot", [0.0, torch.inf])
def test_values_are_not_read(impl: str, hot: float, device: torch.device) -> None:
    """As on a GPU, a bad one makes its row NaN, and nothing is read out of bounds."""
    logits = torch.randn(5, 64, device=device)  # a whole tile
    target = torch.tensor([1, 64, -7, 3, 4], device=device)
    temperature = torch.tensor([1.0, 1.0, 1.0, hot, 1.0], device=device)
    stats = compiled(token_stats)(logits, target, temperature=temperature, impl=impl)
    assert torch.equal(stats.logprob.isnan(), torch.tensor([False, True, True, True, False], device=device))
    mask = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0], device=device)
    run = compiled(ppo_loss)
    assert run(logits, target, None, 1.0, mask, impl=impl).loss.isfinite()
    bad = run(logits, target, None, 1.0, temperature=temperature, impl=impl)
    assert torch.equal(bad.logprob.isnan(), stats.logprob.isnan())
    assert bad.loss.isnan()
    assert run(logits, target, None, 1.0, mask - 2 * mask[-1] * (target == 4), impl=impl).loss.isnan()
    assert run(logits, target, None, 1.0, 0 * mask, denominator=0.0, impl=impl).loss == 0
    assert run(logits, target, None, 1.0, mask, denominator=torch.tensor(0), impl=impl).loss.isnan()


@pytest.mark.parametrize("impl", IMPLS)
def test_without_a_gradient(impl: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is made where none is asked for: by the mode, or by logits that are constants."""
    from aer_fast._rows import with_triton

    grads = []
    rows = {"torch": with_torch, "triton": with_triton}[impl]
    forward = rows.ppo_loss_fwd

    def spy(*arguments: Any) -> Tensor:
        grads.append(arguments[-1])
        fields: Tensor = forward(*arguments)
        return fields

    monkeypatch.setattr(rows, "ppo_loss_fwd", spy)
    hidden, inputs = torch.randn(6, D, device=device), batch(6, device)
    policy = Policy(impl).to(device)
    run = compiled(policy)
    expected = policy(hidden, **inputs).loss.detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(run(hidden, **inputs).loss, expected)
    policy.requires_grad_(False)
    assert not run(hidden, **inputs).loss.requires_grad
    assert [grad is None for grad in grads] == [False, True, True, True]


@pytest.mark.parametrize("impl", IMPLS)
def test_new_sizes_and_numbers_are_compiled_once(impl: str, device: torch.device) -> None:
    """Rows, the coefficient that AER moves, temperature and denominator change from step to step."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    policy = Policy(impl).to(device)

    def step(N: int, numbers: dict[str, float]) -> Tensor:
        hidden, inputs = torch.randn(N, D, device=device), batch(N, device) | numbers
        actual = run(hidden, **inputs).loss
        expected: Tensor = policy(hidden, **inputs).loss
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(policy.grads(actual), policy.grads(expected))
        return expected

    run = compiled(policy, counter)
    losses = []
    for k, N in enumerate((6, 9, 12, 7)):
        numbers = {"entropy_coef": 0.1 + k, "temperature": 0.8 + k / 10, "denominator": 10 + k}
        losses.append(step(N, numbers).item())
    assert len(set(losses)) == 4
    assert counter.frame_count == 2


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("inside", [True, False])
def test_autocast_does_not_touch_the_sums(impl: str, inside: bool, device: torch.device) -> None:
    inputs = batch(6, device) | {"entropy_coef": 0.1}
    logits = torch.randn(6, V, device=device)

    def run(logits: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=inside):
            stats = token_stats(logits, inputs["target"], impl=impl)
            return ppo_loss(logits, **inputs, impl=impl).loss + stats.entropy.sum()

    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=False):
        expected = gradient(run, logits)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=not inside):
        actual = gradient(compiled(run, "eager" if not inside else "aot_eager"), logits)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_head_under_autocast(impl: str, device: torch.device) -> None:
    hidden, inputs = torch.randn(6, D, device=device), batch(6, device)
    policy = Policy(impl, entropy_coef=0.1).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        expected, actual = policy(hidden, **inputs), compiled(policy)(hidden, **inputs)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(policy.grads(actual.loss), policy.grads(expected.loss))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("inplace", [False, True])
def test_through_activation_checkpointing(impl: str, inplace: bool, device: torch.device) -> None:
    hidden, inputs = torch.randn(6, D, device=device), batch(6, device)
    policy = Policy(impl, inplace=inplace, entropy_coef=0.1).to(device)

    def run(hidden: Tensor) -> Tensor:
        loss: Tensor = checkpoint(lambda h: policy(h, **inputs).loss, hidden, use_reentrant=False)
        return loss

    expected, actual = run(hidden), compiled(run)(hidden)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(policy.grads(actual), policy.grads(expected))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_logits_that_are_needed_later_are_not_overwritten(
    impl: str, backend: str, device: torch.device
) -> None:
    """inplace=True: by another backward, by another output, or by whoever called."""
    inputs = batch(6, device) | {"entropy_coef": 0.1}

    def run(logits: Tensor, inplace: bool) -> Tensor:
        z = 2 * logits
        other = z.exp().sum()
        loss = ppo_loss(z, **inputs, impl=impl, inplace=inplace).loss
        return loss + other + (z * z).sum()

    logits = torch.randn(6, V, device=device)
    expected = gradient(run, logits, False)
    actual = gradient(compiled(run, backend), logits, True)
    torch.testing.assert_close(actual, expected)

    outside = logits.clone().requires_grad_() * 1
    compiled(lambda z: ppo_loss(z, **inputs, impl=impl, inplace=True).loss, backend)(outside)
    assert torch.equal(outside.detach(), logits)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_leaf_is_not_to_be_overwritten(backend: str, device: torch.device) -> None:
    inputs = batch(6, device)
    logits = torch.randn(6, V, device=device, requires_grad=True)
    message = "inplace=True would overwrite logits, a leaf"
    if TorchVersion(torch.__version__) < "2.9":  # whose dynamo does not quote the ValueError
        message = r"raised exception ExceptionVariable\(<class 'ValueError'>\)"
    with pytest.raises(Exception, match=message):  # dynamo's own
        compiled(lambda z: ppo_loss(z, **inputs, inplace=True).loss, backend)(logits)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("strided", [False, True])
def test_the_operators_are_what_a_graph_takes_them_for(
    impl: str, strided: bool, device: torch.device
) -> None:
    """Shapes, dtypes and strides of the results; what is written, and what shares storage with what."""
    logits = torch.randn(2, 4, V, device=device, dtype=torch.bfloat16)
    logits = logits.transpose(0, 1) if strided else logits
    N = logits.shape[:-1].numel()
    target = torch.randint(V, (N,), device=device)
    constant = torch.rand(N, device=device)
    ops = torch.ops.aer_fast

    def check(op: Any, *arguments: Any) -> Any:
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
        return op(*arguments)

    *_, state = check(ops.token_stats_fwd.default, logits, target, constant, None, impl)
    stats = (logits, target, constant, state, constant, constant)
    grad = check(ops.token_stats_bwd.default, *stats, 20.0, impl)
    assert grad.shape == logits.shape

    settings = [0.0, 0.2, 0.3, torch.inf, 0.1]  # of `_policy_loss.Settings`
    constants = torch.rand(len(CONSTANTS), N, device=device)
    arguments = (target, constant, None, constants, settings, constant.sum(), impl)
    fields, grad = check(ops.ppo_loss_fwd.default, logits, True, *arguments)
    assert check(ops.ppo_loss_fwd.default, logits, False, *arguments)[1].numel() == 0
    contiguous = logits.clone(memory_format=torch.contiguous_format)
    assert torch.equal(check(ops.ppo_loss_fwd_.default, contiguous.clone(), *arguments), fields)
    ops.ppo_loss_fwd_(contiguous, *arguments)
    assert torch.equal(contiguous, grad)


# Where the logits of the last step were made.
ADDRESS: list[int] = []


@torch.library.custom_op("aer_fast_tests::note", mutates_args=())
def note(logits: Tensor) -> Tensor:
    ADDRESS.append(logits.untyped_storage().data_ptr())
    return torch.zeros((), device=logits.device)


@note.register_fake
def _(logits: Tensor) -> Tensor:
    return torch.zeros((), device=logits.device)


@pytest.mark.parametrize("impl", IMPLS)
def test_inductor(impl: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both operations behind a head in one graph; inplace=True overwrites what the head has made."""
    from aer_fast._rows import with_triton

    rows = {"torch": with_torch, "triton": with_triton}[impl]
    forward = rows.ppo_loss_fwd
    written = []

    def spy(*arguments: Any) -> Tensor:
        logits, *_, grad = arguments
        written.append((logits.untyped_storage().data_ptr(), grad.untyped_storage().data_ptr()))
        fields: Tensor = forward(*arguments)
        return fields

    monkeypatch.setattr(rows, "ppo_loss_fwd", spy)
    hidden, inputs = torch.randn(2, 3, D, device=device), batch(6, device)
    inputs = {k: v.view(2, 3) for k, v in inputs.items()}
    body, head = nn.Linear(D, D).to(device), nn.Linear(D, V).to(device)
    parameters = [*body.parameters(), *head.parameters()]

    def run(hidden: Tensor, inplace: bool, count: float) -> tuple[Tensor, Tensor]:
        logits = head(body(hidden))
        noted = note(logits.detach())
        out = ppo_loss(logits, **inputs, denominator=count, entropy_coef=0.1, inplace=inplace, impl=impl)
        reference = token_stats(head(hidden), inputs["target"], impl=impl)
        return out.loss + noted, reference.entropy.mean() - reference.logprob.mean()

    fast = compiled(run, "inductor")
    for inplace in (False, True):
        expected, actual = run(hidden, inplace, 5.0), fast(hidden, inplace, 5.0)
        torch.testing.assert_close(actual, expected)
        grads = [torch.autograd.grad(2 * a + 3 * b, parameters) for a, b in (actual, expected)]
        torch.testing.assert_close(*grads)
        assert (written[-1] == (ADDRESS[-1], ADDRESS[-1])) == inplace
