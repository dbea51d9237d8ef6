"""The sums over a piece of a row, and what pieces come to together."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from aer_fast import ppo_loss, reference, token_stats
from aer_fast._rows import row_ops, strips, sums
from aer_fast.kernels.layout import ELSEWHERE, SUMS
from tests.helpers.oracle import assert_within_budget

pytestmark = pytest.mark.numerics
V = 1001
# Where a row is cut. Pieces of one entry, none, all of them, a tile and a half.
CUTS = [(), (500,), (1, 1000), (0, 0, 700), (250, 251, 251, 900)]


def batch(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, V], targets and temperatures: confident, banned, ignored, in the first and last piece."""
    logits = 4 * torch.randn(8, V, device=device)
    logits[:, 251:900] -= 100.0
    logits[0, 3] = 30.0
    logits[1, :500] = -torch.inf  # whole pieces
    logits[2, 7] = -torch.inf
    logits[3, 500:] = -torch.inf
    target = torch.tensor([3, 700, 7, 0, V - 1, reference.IGNORE, 251, 250], device=device)
    return logits, target, torch.linspace(0.4, 1.6, 8, device=device)


def pieces_of(
    impl: str,
    logits: Tensor,
    target: Tensor,
    temperature: Tensor,
    cuts: tuple[int, ...],
    softcap: float | None,
) -> list[Tensor]:
    found = []
    for start, stop in pairwise((0, *cuts, V)):
        here = torch.where((target >= start) & (target < stop), target - start, ELSEWHERE)
        here = here.where(target != reference.IGNORE, reference.IGNORE)
        piece = logits[:, start:stop].unsqueeze(0)
        found.append(row_ops(impl).row_sums(piece, here, temperature, softcap))
        assert found[-1].shape == (len(SUMS), len(logits))
    return found


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("order", ["first to last", "last to first", "in pairs"])
def test_pieces_merge_to_the_row(
    impl: str, softcap: float | None, cuts: tuple[int, ...], order: str, device: torch.device
) -> None:
    logits, target, temperature = batch(device)
    pieces = pieces_of(impl, logits, target, temperature, cuts, softcap)
    if order == "last to first":
        pieces.reverse()
    while len(pieces) > 1:
        first, second, *others = pieces
        together = sums.merge(torch.stack((first, second)), temperature)
        pieces = [*others, together] if order == "in pairs" else [together, *others]
    logprob, entropy, state = sums.finish(pieces[0], temperature)
    live = target != reference.IGNORE
    rows = (logits[live], target[live])
    options = {"temperature": temperature[live], "softcap": softcap}
    eager = reference.token_stats(*rows, **options)
    exact = reference.token_stats(rows[0].double(), rows[1], **options)
    banned = eager.logprob.isinf()
    assert torch.equal(logprob[live] == -torch.inf, banned)
    for a, e, x in zip((logprob[live], entropy[live]), eager, exact):
        assert_within_budget(a[~banned], e[~banned], x[~banned], terms=V, input_scale=200.0)
    # not exact.logprob[0]: a log of 1 + 1e-12 has four digits left, in float64 too
    y = logits[0].double() if softcap is None else softcap * (logits[0].double() / softcap).tanh()
    d = (y - y[target[0]]) / temperature[0].double()
    confident = -d.exp().where(torch.arange(V, device=device) != target[0], 0.0).sum().log1p()
    torch.testing.assert_close(logprob[0].double(), confident, rtol=1e-5, atol=0)  # relative: -1e-20, -1e-8

    # the state is the one that the gradient takes
    grads = []
    for impl_state in (
        state,
        row_ops(impl).token_stats_fwd(logits.unsqueeze(0), target, temperature, softcap)[2],
    ):
        grad = torch.empty_like(logits).unsqueeze(0)
        ones = torch.ones_like(temperature)
        row_ops(impl).token_stats_bwd(
            logits.unsqueeze(0), target, temperature, softcap, impl_state, ones, 0.1 * ones, grad
        )
        grads.append(grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_target_that_no_piece_holds_and_a_row_of_nothing_give_nan(impl: str, device: torch.device) -> None:
    logits, target, temperature = batch(device)
    target[0], target[1] = V, ELSEWHERE
    logits[6] = -torch.inf
    first, second = pieces_of(impl, logits, target, temperature, (400,), None)
    logprob, entropy, state = sums.finish(sums.merge(torch.stack((first, second)), temperature), temperature)
    bad = torch.tensor([0, 1, 6], device=device)
    assert logprob[bad].isnan().all()
    assert entropy[bad].isnan().all()
    assert state[1:, bad[:2]].isnan().all()
    good = torch.tensor([3, 4, 7], device=device)
    assert torch.isfinite(logprob[good]).all()
    assert torch.isfinite(entropy[good]).all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_an_ignored_row_is_not_read(impl: str, device: torch.device) -> None:
    logits, target, temperature = batch(device)
    logits[5] = torch.nan
    (piece,) = pieces_of(impl, logits, target, temperature, (), None)
    assert (piece[:, 5] == 0).all()
    piece[3, 2] = 0.0  # a banned target
    assert torch.isfinite(piece).all()


@pytest.mark.parametrize("V", [1, 3])
def test_a_row_of_banned_entries_alone_has_no_gradient_that_looks_well(V: int) -> None:
    logits = torch.full((1, V), -torch.inf, requires_grad=True)
    stats = token_stats(logits, torch.tensor([0]), impl="torch")
    (grad,) = torch.autograd.grad(stats.logprob.sum(), logits)
    assert stats.logprob.isnan().all()
    assert grad.isnan().all()
    out = ppo_loss(logits.detach(), torch.tensor([0]), None, 1.0, impl="torch")
    assert out.metrics["top1_prob"].isnan()


@pytest.mark.parametrize("strip", [2, 6, 8])
@pytest.mark.parametrize("gathered", [False, True], ids=["whole", "gathered"])
def test_rows_that_ban_an_entry_behind_rows_that_ban_none(
    strip: int, gathered: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Banned entries are looked for from the first strip on that has one; none before it needs it."""
    monkeypatch.setattr(strips, "CPU_STRIP", strip * 50)
    logits = 4 * torch.randn(12, 50, device=device)
    logits[5, 7:] = logits[9, 3] = -torch.inf
    target = torch.randint(7, (12,), device=device)
    target[9] = 3  # a banned one
    if gathered:
        target[[0, 4, 10]] = reference.IGNORE
    advantage = torch.linspace(-1, 2, 12, device=device).where(target != 3, 0.0)
    found = []
    for impl in ("torch", "reference"):
        leaf = logits.detach().requires_grad_()
        stats = token_stats(leaf, target, impl=impl)
        (stats.logprob.where(target != 3, 0.0) + 0.3 * stats.entropy).sum().backward()
        other = logits.detach().requires_grad_()
        out = ppo_loss(other, target, None, advantage, target != 3, entropy_coef=0.3, impl=impl)
        out.loss.backward()
        assert out.loss.isfinite()
        found.append((*stats, leaf.grad, out.loss, out.entropy, other.grad))
    torch.testing.assert_close(*found)
