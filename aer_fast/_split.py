"""Statistics and the policy loss from logits of which each rank holds some columns, [..., V_r].

One exchange of four numbers a token, and no other: the gradient of our columns needs nothing of the others'.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aer_fast._autograd import Terminal, check_inplace, eager, first_order
from aer_fast._exchange import Alike
from aer_fast._policy_loss import policy_loss, result
from aer_fast._ranks import CLOSE, Meeting, Ranks, Split, statistics_message
from aer_fast._rows import as_rows, row_ops
from aer_fast._validation import (
    Tokens,
    check_count,
    check_flag,
    check_logits,
    check_range,
    check_softcap,
    check_tokens,
    check_vocab_size,
    resolve_impl,
)
from aer_fast.kernels.layout import IGNORE
from aer_fast.reference import PPOLoss, TokenStats

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

    def meet(self, function: str, tokens: Tokens, **alike: Alike) -> None:
        """Find which words our columns are of; the host waits for the device."""
        meeting = Meeting()
        meeting.add("slices", self.width, "list")
        meeting.add_tokens(function, tokens, self.softcap, self.vocab_size)
        for name, value in {"the size of the dtype of sums": self.wide.itemsize, **alike}.items():
            meeting.add(name, value, "alike")
        slices = meeting.hold(self.ranks)["slices"]
        # at once: whoever fails from here on knows what the others wait for
        self.ranks.expect([statistics_message(tokens.target.numel(), self.wide), CLOSE])
        start = sum(slices[: self.ranks.rank])
        V = check_vocab_size(self.vocab_size, sum(slices))
        check_range(tokens.target, tokens.live, V)
        self.split = Split.of(self.ranks, slices, V)
        self.words = min(max(V - start, 0), self.width)  # the others are padding
        target = tokens.target.where(tokens.live, IGNORE)
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
    group: "ProcessGroup",
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
    group: "ProcessGroup",
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
        columns.meet("ppo_loss", tokens, **policy.alike(tokens.live))

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
