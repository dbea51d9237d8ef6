"""Public operation: token log-probability and policy entropy, from hidden states and the LM head."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aer_fast import reference
from aer_fast._autograd import eager, first_order
from aer_fast._exchange import checksum
from aer_fast._linear.call import Call, Head, How, Inputs, Sizes, head_of, order_rows, together
from aer_fast._linear.loops import (
    Gradients,
    Known,
    Rows,
    by_rows,
    by_vocabulary,
    chunk_messages,
    chunks_of,
    statistics,
    wants_unit,
)
from aer_fast._ranks import CLOSE, Meeting, Message, statistics_message
from aer_fast._validation import Impl
from aer_fast.reference import TokenStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@eager
def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
    memory_budget: int | None = None,
    impl: Impl = "auto",
    group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    reduce_hidden: bool = True,
) -> TokenStats:
    """`token_stats` from hidden states and the LM head; logits are held as far as the budget allows.

        logits = hidden · weightᵀ + bias

    Both outputs carry gradients to hidden, weight and bias. The forward takes one matrix product and holds
    one tile of the logits at a time. The backward takes three, because it computes the logits again, for the
    tokens whose upstream gradient is not 0.

    It takes two where the forward has kept the logits. That needs a budget with room for 4 V bytes of float32
    logits for each token that counts: on the CPU the default may have it, on a GPU only ``memory_budget``
    does. Nothing is kept where no gradient is wanted, with ``chunk_tokens``, or where ranks hold slices;
    `plan(..., operation="stats")` tells. If the loss is known before the call, `linear_token_loss` takes
    three products in all and keeps nothing.

    Args:
        hidden: [..., D], the last hidden states, float32, bfloat16 or float16; with impl "torch" or
            "reference" also float64.
        weight: [V, D], of the LM head, in the dtype of hidden. Under autocast both are cast as for any matrix
            product; their gradients come back in their own dtypes.
        target: [...], int64: the taken tokens, in [0, V). A row with target -100 is never read; its outputs
            and its gradient are 0.
        bias: [V], of the LM head, or None. An entry of -inf bans a token.
        temperature: the temperature > 0 that the tokens were sampled at: a number, a 0-d tensor, or a tensor
            of target's rank whose sizes are 1 or target's. No gradient.
        softcap: positive; None for no softcap.
        chunk_tokens: rows of a chunk. None: what `plan` chooses.
        memory_budget: bytes that the call may take above its inputs, as in `linear_ppo_loss`.
        impl: as in `token_stats`. An explicit choice never falls back to another.
        group: as in `linear_ppo_loss`. The backward must run on all ranks, with the same upstream gradient.
        vocab_size: as in `linear_ppo_loss`.
        reduce_hidden: as in `linear_ppo_loss`.

    Returns:
        A `TokenStats`: logprob and entropy, each [...], float32 (float64 for float64 hidden).

    Raises:
        ValueError: if an argument is not as above. The values of target and of a temperature tensor are not
            read on a GPU: there a bad one makes its row NaN.

    torch.compile: a graph break. The graphs before and after the call stay compiled.

    Examples:
        >>> hidden, weight = torch.zeros(2, 3, 8), torch.randn(50, 8)
        >>> stats = linear_token_stats(hidden, weight, torch.ones(2, 3, dtype=torch.long))
        >>> round(stats.entropy[0, 0].item(), 4)  # log 50
        3.912
    """
    loop = (chunk_tokens, memory_budget, impl, group, vocab_size, reduce_hidden)
    call = Call(hidden, weight, target, bias, softcap, *loop)
    return token_stats_of(call, temperature=temperature)


@together
def token_stats_of(call: Call, *, temperature: Tensor | float) -> TokenStats:
    """`linear_token_stats` of a call."""
    shape = call.target.shape
    tokens = call.tokens(temperature, None)
    if call.impl == "reference":
        target, temperature = tokens.target.view(shape), tokens.temperature.view(shape)
        return call.by_reference(reference.linear_token_stats, target, temperature=temperature)
    index, (n, _) = order_rows(tokens.live, tokens.live)
    call = call.meet("linear_token_stats", tokens, [n], partial(_messages, n=n))
    arguments = (*call.savable_factors(), tokens.target, tokens.temperature, index, call.how())
    logprob, entropy = _LinearTokenStats.apply(*arguments, torch.is_grad_enabled())
    return TokenStats(logprob.view(shape), entropy.view(shape))


def _messages(how: How, sizes: Sizes, *, n: int) -> list[Message]:
    """What the ranks of the forward will send."""
    return [*([statistics_message(n, sizes.wide)] if n else []), CLOSE]


class UpstreamRows(Rows):
    """Rows whose upstream gradients are given, and whose statistics are known."""

    def __init__(self, head: Head, known: Known, kept: Tensor | None) -> None:
        super().__init__(head)
        self.known_rows, self.kept, self.made = known, kept, kept is not None

    def tile(self, z: Tensor, at: slice, out: Tensor | None, *, compact: bool) -> Tensor | None:
        assert out is not None
        known = self.known_rows.at(at)
        rows = None if self.kept is None else known.with_gradient()
        self.ops.token_stats_bwd(z.unsqueeze(0), *self.constants(at), *known, out.unsqueeze(0), rows)
        return rows


class _LinearTokenStats(torch.autograd.Function):
    """Saves its inputs, a few numbers a row and, where the plan has room for them, the logits.

    Elsewhere the backward computes them anew; it does so, too, when it runs again: the first overwrites them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [..., D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        target: Tensor,  # [N]
        temperature: Tensor,  # [N]
        index: Tensor,  # [n]
        how: How,
        keeps: bool,  # whether there will be a backward to keep something for
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.how, ctx.spent = how, False
        with torch.autocast(hidden.device.type, enabled=False):
            n = index.numel()
            head = head_of(
                hidden, weight, bias, how=how, places=index, target=target, temperature=temperature
            )
            plan, kept = head.plan(n), None
            if keeps and n > 0:
                inputs = _inputs((hidden, weight, bias), ctx.needs_input_grad)
                whole = head.plan(n, inputs, operation="stats")
                if whole.held:
                    plan, kept = whole, head.empty(n, head.weight.shape[0])
            logprob, entropy, state = statistics(head, plan, chunks_of(range(n), plan), kept)
        ctx.save_for_backward(hidden, weight, bias, target, temperature, index, state, kept)
        full = logprob.new_zeros(2, target.numel()).index_copy_(1, index, torch.stack((logprob, entropy)))
        if how.split is not None:
            how.split.ranks.close()
        return full[0], full[1]

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *factors, target, temperature, index, state, kept = ctx.saved_tensors
        inputs = _inputs(factors, ctx.needs_input_grad)
        if all(x is None for x in inputs) or all(g is None for g in grads):
            return (None,) * 8
        # their own version counter would refuse a second backward, which is told by `spent` instead
        kept = None if kept is None or ctx.spent else kept.data
        ctx.spent = True
        split = ctx.how.split
        reduces = split is not None and split.reduces
        if reduces:
            split.ranks.expect([Meeting.message()])
        with (
            split.ranks.together() if reduces else nullcontext(),
            torch.autocast(target.device.type, enabled=False),
        ):
            zeros = torch.zeros_like(temperature)
            grad_logprob, grad_entropy = ((zeros if g is None else g)[index] for g in grads)
            known_rows = torch.ones_like(index, dtype=torch.bool)
            known = Known(state, grad_logprob, grad_entropy)
            live = known.with_gradient()
            if kept is None:  # the others are left out at once, and not tile by tile
                known, index = known.at(live), index[live]
            n = index.numel() if live.numel() else 0
            head = head_of(*factors, how=ctx.how, places=index[:n], target=target, temperature=temperature)
            plan = head.plan_alike(n, inputs, operation="stats")
            chunks = chunks_of(range(n), plan)
            if reduces:
                meeting = Meeting()
                upstream = torch.stack((grad_logprob, grad_entropy), -1)
                meeting.add("the upstream gradient", checksum(upstream, known_rows), "alike")
                meeting.hold(split.ranks)
                sent = chunk_messages(split, head, chunks, by_row=plan.order == "rows", again=True)
                split.ranks.expect([*sent, CLOSE])
            scale = None
            if wants_unit(head, plan):  # dz of about 1, whatever the loss was divided by
                scale = torch.maximum(known.grad_logprob.abs().amax(), known.grad_entropy.abs().amax())
                known = Known(known.state, known.grad_logprob / scale, known.grad_entropy / scale)
            gradients = Gradients(head, inputs, scale)
            if plan.order == "vocabulary" and n > 0:
                everything = torch.arange(n, device=live.device)
                by_vocabulary(head, plan, everything, known, gradients, most=n)
            elif plan.order == "rows":
                by_rows(UpstreamRows(head, known, kept), plan, chunks, gradients)
            made = zip(gradients.finish(), inputs)
            if reduces:
                split.ranks.close()
            return *(None if g is None or x is None else g.to(x.dtype) for g, x in made), *(None,) * 5


def _inputs(factors: Sequence[Tensor | None], needs: Sequence[bool]) -> Inputs:
    """hidden, weight and bias as far as they get a gradient."""
    hidden, weight, bias = (x if wanted else None for x, wanted in zip(factors, needs))
    return hidden, weight, bias
