"""Statistics and losses from logits of which each rank holds some columns, [..., V_r].

One exchange of four numbers a token, and no other: the gradient of our columns needs nothing of the others'.
Beside a teacher it is eight, and another of three for the divergence.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aer_fast import _distill
from aer_fast._autograd import Terminal, check_inplace, eager, first_order
from aer_fast._exchange import Alike
from aer_fast._policy_loss import policy_loss, result
from aer_fast._ranks import CLOSE, Meeting, Ranks, Split, pair_messages, statistics_message
from aer_fast._rows import as_rows, pair_ops, row_ops
from aer_fast._rows.pairs import (
    Grads,
    Pair,
    PairStats,
    Score,
    finish,
    offset_of,
    with_gradient,
    with_nan,
)
from aer_fast._validation import (
    Tokens,
    check_count,
    check_entries,
    check_flag,
    check_logits,
    check_range,
    check_softcap,
    check_tokens,
    check_vocab_size,
    resolve_impl,
)
from aer_fast.kernels.layout import IGNORE
from aer_fast.reference import DistillLoss, PPOLoss, TokenStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Columns:
    """Our columns of the logits: checked, and compared with the other ranks'."""

    def __init__(
        self,
        logits: Tensor,
        target: Tensor,
        softcap: float | None,
        vocab_size: int | None,
        impl: str,
        ranks: Ranks,
    ) -> None:
        check_logits(logits, target, whole=False)
        check_count("vocab_size", vocab_size)
        self.width, self.target, self.ranks, self.vocab_size = logits.shape[-1], target, ranks, vocab_size
        self.softcap = check_softcap(softcap)
        self.impl = resolve_impl(impl, logits)
        if self.impl == "reference":
            raise ValueError("impl='reference' is of the whole vocabulary: it takes no group")
        self.wide = torch.promote_types(logits.dtype, torch.float32)

    def tokens(self, temperature: Tensor | float, mask: Tensor | float | None) -> Tokens:
        return check_tokens(self.target, temperature, mask, None, self.wide)

    def meet(self, function: str, tokens: Tokens, *, ref_words: int | None = None, **alike: Alike) -> None:
        """Find which words our columns are of; the host waits for the device.

        ``ref_words``, of a teacher's columns: then of those words alone that both have.
        """
        meeting = Meeting()
        meeting.add("slices", self.width, "list")
        meeting.add_tokens(function, tokens, self.softcap, self.vocab_size)
        for name, value in {"the size of the dtype of sums": self.wide.itemsize, **alike}.items():
            meeting.add(name, value, "alike")
        if ref_words is not None:
            meeting.add("ref_slices", ref_words, "list")
        found, N = meeting.hold(self.ranks), tokens.target.numel()
        # at once: whoever fails from here on knows what the others wait for
        sent = [statistics_message(N, self.wide)] if ref_words is None else pair_messages(N, self.wide)
        self.ranks.expect([*sent, CLOSE])
        slices = found["slices"]
        start = sum(slices[: self.ranks.rank])
        self.V = self.most = check_vocab_size(self.vocab_size, sum(slices))
        if ref_words is not None:
            self.V, self.most = common_words(slices, found["ref_slices"], self.vocab_size, "logits")
        check_range(tokens.target, tokens.live, self.most)
        self.split = Split.of(self.ranks, slices, self.V)
        self.words = min(max(self.V - start, 0), self.width)  # the others are padding
        target = tokens.target.masked_fill(tokens.target >= self.V, 0).where(tokens.live, IGNORE)
        self.columns = self.split.local(target, self.words)
        self.live, self.temperature = tokens.live, tokens.temperature

    def statistics(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """logprob [N], entropy [N] and state [STATE, N] of rows [O, I, V_r]; 0 in those that do not count."""
        sums = row_ops(self.impl).row_sums(rows[..., : self.words], *self.constants)
        logprob, entropy, state = (
            x.where(self.live, 0.0) for x in self.split.statistics(sums, self.temperature)
        )
        return logprob, entropy, state

    def write_grad(
        self, rows: Tensor, state: Tensor, grad_logprob: Tensor, grad_entropy: Tensor, grad: Tensor
    ) -> None:
        """The gradient of all columns, padding too, to grad [O, I, V_r], which may be the rows."""
        mine = rows[..., : self.words], grad[..., : self.words]
        row_ops(self.impl).token_stats_bwd(
            mine[0], *self.constants, state, grad_logprob, grad_entropy, mine[1]
        )
        grad[..., self.words :] = 0.0

    @property
    def constants(self) -> tuple[Tensor, Tensor, float | None]:
        return self.columns, self.temperature, self.softcap


@eager
def token_stats(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: Tensor | float,
    softcap: float | None,
    impl: str,
    group: ProcessGroup,
    vocab_size: int | None,
) -> TokenStats:
    """`aer_fast.token_stats` with a group."""
    ranks = Ranks(group)
    ranks.expect([Meeting.message()])
    with ranks.together():
        columns = Columns(logits, target, softcap, vocab_size, impl, ranks)
        columns.meet("token_stats", columns.tokens(temperature, None))
        logprob, entropy = _TokenStats.apply(as_rows(logits), columns)
        ranks.close()
    return TokenStats(logprob.view(target.shape), entropy.view(target.shape))


class _TokenStats(torch.autograd.Function):
    """Saves the logits and a few numbers a row; the backward computes the softmax of our columns anew."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Columns) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        with torch.autocast(rows.device.type, enabled=False):  # sums stay float32
            logprob, entropy, state = columns.statistics(rows)
        ctx.columns = columns
        ctx.save_for_backward(rows, state)
        return logprob, entropy

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        rows, state = ctx.saved_tensors
        if not ctx.needs_input_grad[0] or all(g is None for g in grads):
            return None, None
        zeros = torch.zeros_like(state[0])
        grad_logprob, grad_entropy = (zeros if g is None else g.contiguous() for g in grads)
        grad = torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
        with torch.autocast(rows.device.type, enabled=False):
            ctx.columns.write_grad(rows, state, grad_logprob, grad_entropy, grad)
        return grad, None


@eager
def ppo_loss(
    logits: Tensor,
    target: Tensor,
    *,
    mask: Tensor | float,
    denominator: Tensor | float | None,
    temperature: Tensor | float,
    softcap: float | None,
    inplace: bool,
    impl: str,
    group: ProcessGroup,
    vocab_size: int | None,
    **terms: Any,
) -> PPOLoss:
    """`aer_fast.ppo_loss` with a group."""
    ranks = Ranks(group)
    ranks.expect([Meeting.message()])
    with ranks.together():
        check_flag("inplace", inplace)
        columns = Columns(logits, target, softcap, vocab_size, impl, ranks)
        tokens = columns.tokens(temperature, mask)
        policy = policy_loss(target, tokens, denominator, **terms)
        needs_grad = torch.is_grad_enabled() and logits.requires_grad
        if inplace and needs_grad:
            check_inplace(logits)
        fields = policy.constants
        columns.meet("ppo_loss", tokens, ref_words=None, **policy.alike(tokens.live))

        def compute() -> tuple[Tensor, tuple[Tensor | None]]:
            """Fill the fields; return the loss and, if it is wanted, the gradient of our columns."""
            nonlocal fields
            rows = as_rows(logits.detach())
            logprob, entropy, state = columns.statistics(rows)
            fields = policy.fields(logprob, entropy, state[1])
            grad = None
            if needs_grad:
                grad = rows if inplace else torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
                columns.write_grad(rows, state, *policy.grads(logprob), grad)
            return fields[0].sum() * policy.scale, (None if grad is None else grad.view(logits.shape),)

        if needs_grad:
            loss = Terminal.apply(compute, columns.impl, False, logits)
        else:
            with torch.autocast(logits.device.type, enabled=False):
                loss = compute()[0]
        ranks.close()
    return result(loss, fields, target.shape)


def common_words(
    slices: list[int], ref_slices: list[int], vocab_size: int | None, name: str
) -> tuple[int, int]:
    """The words that both of two split vocabularies have, and those of the larger one.

    Raises ValueError unless each rank holds the same of them in both; ``name`` is of what has the slices.
    """
    sizes = [check_vocab_size(vocab_size, sum(x)) for x in (slices, ref_slices)]
    V = min(sizes)
    ends = [[min(end, V) for end in itertools.accumulate(x)] for x in (slices, ref_slices)]
    if ends[0] != ends[1]:
        raise ValueError(
            f"ref_{name}'s slices must begin at the same words as {name}'s, got slices of"
            f" {ref_slices} and {slices} words by rank"
        )
    return V, max(sizes)


def pair_loss(
    split: Split, impl: str, pair: Pair, score: Score, grad: Tensor | None, *, compact: bool
) -> Tensor | None:
    """`PairOps.pair_loss` of columns that are ours: statistics and divergence are those of all ranks'."""
    rows, ops, which = row_ops(impl), pair_ops(impl), pair.divergence
    mine = rows.row_sums(pair.logits, pair.target, pair.temperature, which.softcap)
    ref_mine = rows.row_sums(pair.ref_logits, pair.target, pair.ref_temperature, which.ref_softcap)
    (logprob, entropy, state), (ref_logprob, _, ref_state) = split.pair_statistics(
        torch.cat((mine, ref_mine)), pair.temperature, pair.ref_temperature
    )
    offset = offset_of(state, ref_state, pair.target)
    pair_state = finish(split.added(ops.pair_sums(pair, state, ref_state, offset)), offset, which)
    stats = PairStats(logprob, entropy, state[1], ref_logprob, pair_state[0])
    grads = score(slice(0, pair.target.numel()), stats)
    if grad is None:
        return None
    grads = with_nan(grads, pair_state[0])
    picked = with_gradient(grads) if compact else None
    ops.pair_bwd(pair, state, ref_state, pair_state, grads, grad, picked)
    return picked


@eager
def distill_loss(
    logits: Tensor,
    ref_logits: Tensor,
    target: Tensor | None,
    *,
    mask: Tensor | float | None,
    denominator: Tensor | float | None,
    temperature: Tensor | float,
    softcap: float | None,
    inplace: bool,
    impl: str,
    group: ProcessGroup,
    vocab_size: int | None,
    **terms: Any,
) -> DistillLoss:
    """`aer_fast.distill_loss` with a group."""
    ranks = Ranks(group)
    ranks.expect([Meeting.message()])
    with ranks.together():
        check_flag("inplace", inplace)
        for name, x in (("logits", logits), ("ref_logits", ref_logits)):
            check_entries(name, x, whole=False)
        _distill.check_ref("ref_logits", ref_logits, logits, "logits")
        known = target
        if known is None:
            known = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
        columns = Columns(logits, known, softcap, vocab_size, impl, ranks)
        if columns.impl == "triton":
            resolve_impl("triton", ref_logits)
        tokens = columns.tokens(temperature, 1.0 if mask is None else mask)
        loss = _distill.distill_terms(known, tokens, denominator, softcap=columns.softcap, **terms)
        needs_grad = torch.is_grad_enabled() and logits.requires_grad
        if inplace and needs_grad:
            check_inplace(logits)
            _distill.check_apart(logits, ref_logits)
        alike = {"has_target": target is not None, **loss.alike(tokens.live)}
        columns.meet("distill_loss", tokens, ref_words=ref_logits.shape[-1], **alike)
        targets = _distill.Targets.of(target, logits, columns.V, columns.most)
        fields = loss.mask.new_zeros(len(_distill.FIELDS), tokens.live.numel())

        def score(rows: Tensor | slice, stats: PairStats) -> Grads:
            fields[:, rows], grads = loss.at(rows).score(stats)
            return grads

        def compute() -> tuple[Tensor, tuple[Tensor | None]]:
            """Fill the fields; return the loss and, if it is wanted, the gradient of our columns."""
            rows, words, grad = as_rows(logits.detach()), columns.words, None
            ref = _distill.rows_like(ref_logits.detach(), rows)
            if needs_grad:
                grad = rows if inplace else torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
            constants = columns.columns, loss.temperature, loss.ref_temperature, loss.which
            pair = Pair(rows[..., :words], ref[..., :words], *constants)
            place = None if grad is None else grad[..., :words]
            pair_loss(columns.split, columns.impl, pair, score, place, compact=False)
            if grad is not None:
                grad[..., words:] = 0.0
            return fields[0].sum() * loss.scale, (None if grad is None else grad.view(logits.shape),)

        if needs_grad:
            value: Tensor = Terminal.apply(compute, columns.impl, False, logits)
        else:
            with torch.autocast(logits.device.type, enabled=False):
                value = compute()[0]
        ranks.close()
    return _distill.result(value, fields, tokens.live, targets)
