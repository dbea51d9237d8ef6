"""The row operations in torch, a tile of rows at a time: impl="torch", on any device.

The same mathematics as the Triton kernels, see kernels/primitives.py and `sums`.

Three buffers of a tile are all that is held, two for a gradient alone, and one more where rows narrower than
float32 are gathered from between masked ones. On the CPU masked rows are not touched at all; elsewhere
finding them would wait for the device, so they are computed and then overwritten with zeros.

Sizes: N = O · I tokens, V vocabulary entries, n rows of a tile.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from aer_fast._policy_loss import PolicyLoss
from aer_fast._rows import sums
from aer_fast._rows.sums import UNREACHABLE
from aer_fast.kernels.layout import FIELDS, IGNORE, SUMS

# Entries of a tile. On a CPU three buffers of 2**20 to 2**21 stay in the cache between operations; smaller
# tiles cost more on a busy machine, where threads wait for each other after every operation.
CPU_TILE, DEVICE_TILE = 1 << 21, 1 << 26


def row_sums(logits: Tensor, target: Tensor, temperature: Tensor, softcap: float | None) -> Tensor:
    if logits.shape[-1] == 0:
        return sums.of_nothing(target, temperature)
    live = target != IGNORE
    return _sums(logits, target, live, temperature, softcap).where(live, 0.0)


def _sums(logits: Tensor, target: Tensor, live: Tensor, temperature: Tensor, softcap: float | None) -> Tensor:
    found = temperature.new_zeros(len(SUMS), target.numel())
    for _, rows, tile in tiles(logits, live, temperature.dtype, 3):
        found[:, rows] = tile.sums(target[rows], temperature[rows], softcap)
    return found


def token_stats_fwd(
    logits: Tensor, target: Tensor, temperature: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    live = target != IGNORE
    found = sums.finish(_sums(logits, target, live, temperature, softcap), temperature)
    logprob, entropy, state = (x.where(live, 0.0) for x in found)
    return logprob, entropy, state


def token_stats_bwd(
    logits: Tensor,
    target: Tensor,
    temperature: Tensor,
    softcap: float | None,
    state: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor,
    grad: Tensor,
    picked: Tensor | None = None,
) -> None:
    if logits.shape[-1] == 0:
        return
    live = target != IGNORE
    buffers = 2 if softcap is None else 3
    done = 0
    for o, rows, tile in tiles(logits, live, temperature.dtype, buffers, picked):
        tile.fill(state[0, rows], target[rows], temperature[rows], softcap)
        dz = tile.grad(state[:, rows], grad_logprob[rows], grad_entropy[rows], temperature[rows], softcap)
        if picked is None:
            tile.store(grad[o], dz)
        else:
            grad[o, done : done + len(dz)] = dz
            done += len(dz)
    if picked is None:
        zero_masked(grad, live)


def ppo_loss_fwd(
    logits: Tensor,
    target: Tensor,
    temperature: Tensor,
    softcap: float | None,
    loss: PolicyLoss,
    grad: Tensor | None,
) -> Tensor:
    return _ppo_loss(logits, target, temperature, softcap, loss, grad, compact=False)


def ppo_loss_compact(
    logits: Tensor,
    target: Tensor,
    temperature: Tensor,
    softcap: float | None,
    loss: PolicyLoss,
    grad: Tensor,
) -> tuple[Tensor, Tensor]:
    fields = _ppo_loss(logits, target, temperature, softcap, loss, grad, compact=True)
    return fields, fields[-1].nonzero()[:, 0]


def _ppo_loss(
    logits: Tensor,
    target: Tensor,
    temperature: Tensor,
    softcap: float | None,
    loss: PolicyLoss,
    grad: Tensor | None,
    compact: bool,
) -> Tensor:
    fields = temperature.new_zeros(len(FIELDS), target.numel())
    live = (target != IGNORE) & (loss.of("mask") != 0)
    done = 0
    for o, rows, tile in tiles(logits, live, temperature.dtype, 3):
        found = tile.sums(target[rows], temperature[rows], softcap)
        logprob, entropy, state = sums.finish(found, temperature[rows])
        tokens = loss.at(rows)
        fields[:, rows] = tokens.fields(logprob, entropy, state[1])
        if grad is None:
            continue
        dz = tile.grad(state, *tokens.grads(logprob), temperature[rows], softcap)
        if compact:
            active = (fields[-1, rows] != 0).nonzero()[:, 0]
            if active.numel() < tile.n:
                dz = torch.index_select(dz, 0, active, out=tile.spare[0][: active.numel()])
            grad[o, done : done + len(dz)] = dz
            done += len(dz)
        else:
            tile.store(grad[o], dz)
    if grad is not None and not compact:
        zero_masked(grad, live)
    return fields


def scale_grad(grad: Tensor, factor: Tensor) -> None:
    if torch.compiler.is_compiling() or grad.device.type != "cpu" or factor.item() != 1.0:
        grad.mul_(factor)


class Tile:
    """Some rows of the logits, and the buffers they are worked on in: d, e and what is to spare."""

    def __init__(self, logits: Tensor, at: Tensor | slice, buffers: Tensor, lowest: float = UNREACHABLE):
        self.logits, self.at, self.lowest = (
            logits,
            at,
            lowest,
        )  # [I, V], which of these, the d of a banned one
        self.n = at.stop - at.start if isinstance(at, slice) else at.numel()
        self.d, self.e, *self.spare = buffers[:, : self.n]

    def rows(self) -> Tensor:
        """The logits [n, V]: a view where they are consecutive, else gathered, into d if of its dtype."""
        if isinstance(self.at, slice):
            return self.logits[self.at]
        if self.logits.dtype != self.d.dtype:
            return self.logits.index_select(0, self.at)
        return torch.index_select(self.logits, 0, self.at, out=self.d)

    def fill(self, m: Tensor | None, target: Tensor, temperature: Tensor, softcap: float | None) -> Tensor:
        """Fill d with (y - m) / τ and e with exp d; return m, a largest y unless given."""
        y, d = self.rows(), self.d
        if softcap is not None:
            y = softcapped(y if y is d else d.copy_(y), softcap, self.spare[0])
        if m is None:  # finite where all is banned
            m = y.amax(-1).to(d.dtype).clamp(min=torch.finfo(d.dtype).min)
        self.here = (target >= 0) & (target < y.shape[-1])
        self.column = target.where(self.here, 0).unsqueeze(-1)
        self.y_target = self.at_target(y).to(d.dtype).where(self.here, torch.nan)
        if y.dtype == d.dtype:
            torch.sub(y, m.unsqueeze(-1), out=d)
        else:
            d.copy_(y).sub_(m.unsqueeze(-1))
        d.mul_(1.0 / temperature.unsqueeze(-1)).clamp_(min=self.lowest)
        torch.exp(d, out=self.e)
        return m

    def at_target(self, entries: Tensor) -> Tensor:
        """The entries [n, V] at each row's target, [n]; others where it lies elsewhere."""
        return entries.gather(-1, self.column).squeeze(-1)

    def put_at_target(self, entries: Tensor, values: Tensor) -> None:
        """Write values [n] to the entries at the targets that lie here."""
        values = torch.where(self.here, values, self.at_target(entries))
        entries.scatter_(-1, self.column, values.unsqueeze(-1))

    def sums(self, target: Tensor, temperature: Tensor, softcap: float | None) -> Tensor:
        """Return [SUMS, n]; d and e are filled, e with 0 at the target."""
        m = self.fill(None, target, temperature, softcap)
        d, e = self.d, self.e
        self.put_at_target(e, torch.zeros_like(m))  # the target is left out of its own sum
        product = torch.mul(e, d, out=self.spare[0])
        return torch.stack((m, sum_of(e), sum_of(product), self.y_target))

    def grad(
        self,
        state: Tensor,  # [STATE, n]
        grad_logprob: Tensor,  # [n]
        grad_entropy: Tensor,  # [n]
        temperature: Tensor,
        softcap: float | None,
    ) -> Tensor:
        """grad_logprob · ∂logprob/∂x + grad_entropy · ∂entropy/∂x, [n, V]; uses up d and e."""
        return self.capped(self.grad_of_capped(state, grad_logprob, grad_entropy, temperature), softcap)

    def grad_of_capped(
        self, state: Tensor, grad_logprob: Tensor, grad_entropy: Tensor, temperature: Tensor
    ) -> Tensor:
        """`grad` by the softcapped logits."""
        _, inv_s, mean_d, p_others = state
        g, h = grad_logprob / temperature, grad_entropy / temperature
        d_target = self.at_target(self.d)
        p_target = d_target.exp() * inv_s
        at_target = g * p_others - (h * p_target * (d_target - mean_d)).where(p_target != 0, 0.0)
        banned = (self.y_target == -torch.inf) & ~mean_d.isnan()
        at_target = at_target.masked_fill(banned, 0.0)
        a, b = (inv_s * (h * mean_d - g)).unsqueeze(-1), (-inv_s * h).unsqueeze(-1)

        dz: Tensor = self.e.mul_(torch.addcmul(a, self.d, b, out=self.d))  # e (a + b d)
        self.put_at_target(dz, at_target)
        return dz

    def capped(self, dz: Tensor, softcap: float | None) -> Tensor:
        """dz by the logits, in place, of dz by the softcapped ones; uses up d."""
        if softcap is not None:
            x = self.rows()
            w = (x if x is self.d else self.d.copy_(x)).div_(softcap).abs_().mul_(-2.0).exp_()
            dz.mul_(w).mul_(4.0).div_(w.add_(1.0).square_())  # 1 - tanh², without cancellation
        return dz

    def store(self, grad: Tensor, dz: Tensor) -> None:
        """Write the gradient to this tile's rows of grad [I, V]."""
        if isinstance(self.at, slice):
            grad[self.at].copy_(dz)
        else:
            grad.index_copy_(0, self.at, dz.to(grad.dtype))


def sum_of(entries: Tensor) -> Tensor:
    """Σ over the vocabulary of entries [n, V]."""
    # one row alone would be summed by all threads together, in another order
    return entries.sum(-1) if len(entries) > 1 else entries.expand(2, -1).sum(-1)[:1]


def tiles(
    logits: Tensor,
    live: Tensor,
    dtype: torch.dtype,
    buffers: int,
    picked: Tensor | None = None,
    *,
    entries: tuple[int, int] | None = None,
    lowest: float = UNREACHABLE,
) -> Iterator[tuple[int, Tensor | slice, Tile]]:
    """Cut the picked, else the live rows (off the CPU: all rows) into tiles: (o, rows of [N], tile).

    ``entries`` of a tile on a CPU and elsewhere.
    """
    O, I, V = logits.shape
    on_cpu = logits.device.type == "cpu"
    of_cpu, of_device = entries or (CPU_TILE, DEVICE_TILE)
    n = max(1, min(I, (of_cpu if on_cpu else of_device) // V))
    space = torch.empty(buffers, n, V, dtype=dtype, device=logits.device)
    for o in range(O):
        if on_cpu or picked is not None:
            index = live[o * I : (o + 1) * I].nonzero()[:, 0] if picked is None else picked
            chosen = [_as_slice(at) if on_cpu else at for at in torch.split(index, n)]
        else:
            chosen = [slice(i, min(i + n, I)) for i in range(0, I, n)]
        for at in chosen:
            rows = slice(o * I + at.start, o * I + at.stop) if isinstance(at, slice) else o * I + at
            if not isinstance(at, slice) or at.stop > at.start:
                yield o, rows, Tile(logits[o], at, space, lowest)


def _as_slice(index: Tensor) -> Tensor | slice:
    """Consecutive indices as a slice: rows that need not be gathered."""
    first, last = (int(index[0]), int(index[-1])) if index.numel() else (0, -1)
    return slice(first, last + 1) if last - first + 1 == index.numel() else index


def zero_masked(grad: Tensor, live: Tensor) -> None:
    """Write exact zeros to the masked rows of grad [O, I, V]."""
    masked = ~live.view(grad.shape[:2])
    if grad.device.type == "cpu":
        grad[masked] = 0.0
    else:
        grad.masked_fill_(masked.unsqueeze(-1), 0.0)  # indexing would wait for the device


def softcapped(y: Tensor, softcap: float, out: Tensor) -> Tensor:
    """softcap · tanh(y / softcap); infinite entries stay what they are."""
    torch.div(y, softcap, out=out).tanh_().mul_(softcap)
    for infinite in (torch.inf, -torch.inf):
        out.masked_fill_(y == infinite, infinite)
    return out
