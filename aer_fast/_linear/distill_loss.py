"""Public operation: the whole-vocabulary divergence from a teacher, from two hidden states and heads."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from aer_fast import reference
from aer_fast._autograd import eager
from aer_fast._distill import FIELDS, DistillTerms, Targets, by_reference, distill_terms, result
from aer_fast._linear.call import Call, Head, Inputs, head_of, order_rows, together
from aer_fast._linear.loops import RowLoss, loss_pass, messages
from aer_fast._linear.teacher import Teacher
from aer_fast._rows.pairs import Grads, Pair, PairStats
from aer_fast._validation import (
    Impl,
    check_range,
    check_tokens,
)
from aer_fast.reference import DistillLoss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@eager
def linear_distill_loss(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    target: Tensor | None = None,
    mask: Tensor | float | None = None,
    *,
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl",
    jsd_beta: float = 0.5,
    coef: Tensor | float = 1.0,
    entropy_coef: Tensor | float = 0.0,
    temperature: Tensor | float = 1.0,
    ref_temperature: Tensor | float | None = None,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    ref_logprob_floor: float | None = None,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    denominator: Tensor | float | None = None,
    chunk_tokens: int | None = None,
    memory_budget: int | None = None,
    impl: Impl = "auto",
    group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    reduce_hidden: bool = True,
) -> DistillLoss:
    """`distill_loss` from hidden states and LM heads; the logits of neither model ever exist as a whole.

        logits = hidden · weightᵀ + bias
        ref_logits = ref_hidden · ref_weightᵀ + ref_bias

    A tile of each one's logits is made, turned into divergence and gradient, and dropped. That takes four
    matrix products; three with a frozen weight; two where no gradient is wanted. The logits are float32
    whatever the dtype of hidden states and weights. So are the sums of the gradients, which are rounded once.
    A teacher on another machine sends its hidden states, which are some 70 times smaller than its logits.

    Shapes: [...] is the shape of the rows, for example [B, T]; an argument marked [...] is as in
    `distill_loss`. Only hidden, weight and bias get gradients.

    Args:
        hidden: [..., D], the student's last hidden states, float32, bfloat16 or float16; with impl "torch" or
            "reference" also float64.
        weight: [V, D], of the student's LM head, in the dtype of hidden, or under autocast.
        ref_hidden: [..., D_ref], the teacher's hidden states of the same tokens, of any of these dtypes.
        ref_weight: [V_ref, D_ref], of the teacher's LM head, in the dtype of ref_hidden, or under autocast.
            V_ref may differ from V, see `distill_loss`.
        target: [...], int64, or None, as in `distill_loss`.
        mask: [...], bool or weights >= 0; None for 1. Masked rows are never read.
        divergence: "reverse_kl", "forward_kl" or "jsd", as in `distill_loss`.
        jsd_beta: β of jsd, within [0, 1].
        coef: [...], weight of the divergence.
        entropy_coef: [...], weight of the student's entropy. Positive values reward entropy.
        temperature: [...], the student's temperature, > 0.
        ref_temperature: [...], the teacher's temperature, > 0; None for the student's.
        softcap: the student's, positive; None for no softcap.
        ref_softcap: the teacher's, positive; None for no softcap. It is not taken from the student.
        ref_logprob_floor: below 0, for reverse_kl: log q counts as at least this, as in `distill_loss`.
        bias: [V], of the student's head, or None. An entry of -inf bans a token.
        ref_bias: [V_ref], of the teacher's head, or None. An entry of -inf bans a token.
        denominator: as in `ppo_loss`.
        chunk_tokens: rows of a chunk. None: what `plan` chooses.
        memory_budget: bytes that the call may take above its inputs, as in `linear_ppo_loss`. The smallest
            budget takes one row at a time.
        impl: as in `token_stats`. An explicit choice never falls back to another.
        group: as in `linear_ppo_loss`. Then ref_weight and ref_bias are slices, too, which begin at the same
            token.
        vocab_size: as in `distill_loss`.
        reduce_hidden: as in `linear_ppo_loss`.

    Returns:
        A `DistillLoss`, as from `distill_loss`. The backward of the loss hands out the gradients of hidden,
        weight and bias, scaled where the upstream gradient is not 1. It can run once.

    Raises:
        ValueError: if an argument is not as above. The values of tensors are not read on a GPU: there a bad
            target, temperature or mask makes the loss NaN.

    On a GPU the host waits for the device once a call, to learn how many rows count.

    torch.compile: a graph break. The graphs before and after the call stay compiled.

    Examples:
        >>> hidden, weight = torch.zeros(2, 3, 8, requires_grad=True), torch.randn(50, 8)
        >>> ref_hidden, ref_weight = torch.zeros(2, 3, 16), torch.randn(50, 16)
        >>> ref_bias = torch.zeros(50)
        >>> ref_bias[0] = 1.0
        >>> out = linear_distill_loss(hidden, weight, ref_hidden, ref_weight, ref_bias=ref_bias)
        >>> out.loss.backward()
        >>> round(out.loss.item(), 5)
        0.01379
    """
    known = target
    if target is None:  # what is wrong with hidden is said where all ranks hear it
        like = hidden if isinstance(hidden, Tensor) else torch.empty(0)
        known = torch.zeros(like.shape[:-1], dtype=torch.int64, device=like.device)
    loop = (chunk_tokens, memory_budget, impl, group, vocab_size, reduce_hidden)
    call = Call(hidden, weight, known, bias, softcap, *loop)  # type: ignore[arg-type]
    return distill_loss_of(
        call,
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
        ref_bias=ref_bias,
        has_target=target is not None,
        mask=mask,
        temperature=temperature,
        denominator=denominator,
        divergence=divergence,
        jsd_beta=jsd_beta,
        coef=coef,
        entropy_coef=entropy_coef,
        ref_temperature=ref_temperature,
        ref_softcap=ref_softcap,
        ref_logprob_floor=ref_logprob_floor,
    )


@together
def distill_loss_of(
    call: Call,
    *,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    mask: Tensor | float | None,
    temperature: Tensor | float,
    denominator: Tensor | float | None,
    has_target: bool = True,
    **terms: Any,  # of `distill_terms`
) -> DistillLoss:
    """`linear_distill_loss` of a call."""
    teacher = Teacher.of(call, ref_hidden, ref_weight, ref_bias)
    tokens = check_tokens(call.target, temperature, 1.0 if mask is None else mask, None, call.wide)
    loss = distill_terms(call.target, tokens, denominator, softcap=call.softcap, **terms)
    first = tokens.live & loss.may_have_gradient()
    counts = [0, 0]
    if call.impl != "reference":
        index, counts = order_rows(first, tokens.live)
        call = call.beside(ref_hidden.shape[-1]).meet(
            "linear_distill_loss",
            tokens,
            counts,
            partial(messages, first=counts[0], n=counts[1]),
            ref_words=len(teacher.weight),
            has_target=has_target,
            **teacher.alike(tokens.live),
            **loss.alike(tokens.live),
        )
    sizes = call.weight.shape[0], teacher.weight.shape[0]
    V, most = (min(sizes), max(sizes)) if call.split is None else (call.split.V, call.most)
    if call.split is None:
        call = call.narrowed(V)
    teacher = teacher.narrowed(call.weight.shape[0])
    check_range(tokens.target, tokens.live, most)
    targets = Targets.of(call.target if has_target else None, call.hidden, V, most)
    if call.impl == "reference":
        return call.by_reference(
            reference.linear_distill_loss,
            denominator=denominator,
            **teacher.by_reference(),
            **by_reference(loss, targets, tokens.live),
        )
    inputs, how, target = call.inputs(), call.how(), targets.inside.reshape(-1)
    fields = loss.mask.new_zeros(len(FIELDS), tokens.live.numel())

    def compute() -> tuple[Tensor, Inputs]:
        """Fill the fields; return the loss and the gradients that are wanted."""
        head = head_of(*call.factors, how=how, places=index, target=target, temperature=tokens.temperature)
        rows = DistillRows(head, teacher.cast(), loss.at(index))
        grads = loss_pass(rows, inputs, counts[0], loss.scale)
        fields.index_copy_(1, index, rows.fields)
        return rows.fields[0].sum() * loss.scale, grads

    return result(call.terminal(compute), fields, tokens.live, targets)


class DistillRows(RowLoss):
    """The divergence from a teacher, whose logits are made beside the student's."""

    def __init__(self, head: Head, teacher: Teacher, loss: DistillTerms) -> None:
        super().__init__(head)
        self.teacher, self.loss = teacher, loss
        self.fields = loss.mask.new_zeros(len(FIELDS), head.places.numel())

    def largest_grad(self) -> Tensor:
        return self.loss.largest_grad()

    def tile(self, z: Tensor, at: slice, out: Tensor | None, *, compact: bool) -> Tensor | None:
        assert self.scale is not None
        loss, fields = self.loss.at(at)._replace(scale=self.scale), self.fields[:, at]

        def score(rows: Tensor | slice, stats: PairStats) -> Grads:
            fields[:, rows], grads = loss.at(rows).score(stats)
            return grads

        self.room = self.teacher.logits(self.head.places[at], self.room)
        pair = Pair(
            z.unsqueeze(0),
            self.room.unsqueeze(0),
            self.head.target[at],
            loss.temperature,
            loss.ref_temperature,
            loss.which,
        )
        return self.teacher.tile(self.head, pair, score, out, compact=compact)
