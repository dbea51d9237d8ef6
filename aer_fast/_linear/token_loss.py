"""Public operation: any loss of log-probability and entropy, fused with the LM head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aer_fast import reference
from aer_fast._autograd import eager
from aer_fast._exchange import checksum
from aer_fast._linear.call import Call, Head, Inputs, head_of, order_rows, together
from aer_fast._linear.loops import TokenRows, loss_pass, messages
from aer_fast._validation import Impl, check_boundaries, denominator_scale, token_tensor
from aer_fast.reference import PPOLoss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@eager
def linear_token_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    objective: Callable[..., Tensor],
    *token_tensors: Tensor | float,
    mask: Tensor | float | None = None,
    denominator: Tensor | float | None = None,
    bias: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_tokens: int | None = None,
    memory_budget: int | None = None,
    impl: Impl = "auto",
    group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    reduce_hidden: bool = True,
) -> PPOLoss:
    """A loss of your own, of logprob and entropy, fused with the LM head as in `linear_ppo_loss`.

        logits = hidden · weightᵀ + bias
        loss = Σ mask · objective(logprob, entropy, *token_tensors) / denominator

    The batch is taken piece by piece. For each piece the objective is called on the n unmasked tokens in it
    and differentiated; then the gradients of hidden, weight and bias are computed, before the logits of the
    piece are gone. That takes three matrix products, two with a frozen weight. Tokens to which the objective
    gives no gradient take part in one.

    Shapes: D is the hidden size, V the size of the vocabulary, [...] the shape of target, for example [B, T].
    An argument marked [...] is a number, a 0-d tensor, or a tensor of target's rank whose sizes are 1 or
    target's.

    Args:
        hidden: [..., D], the last hidden states, float32, bfloat16 or float16; with impl "torch" or
            "reference" also float64.
        weight: [V, D], of the LM head, in the dtype of hidden, or under autocast.
        target: [...], int64: the taken tokens, in [0, V). -100 masks a token.
        objective: called with logprob [n] and entropy [n], float32 with gradients, and the token tensors [n];
            returns a loss for each token, [n]. It must treat tokens one by one, or with ``cu_seqlens``
            sequences one by one. It may be called several times, also where its gradient is not needed.
        *token_tensors: [...], of any dtype, passed to the objective. They are constants: neither they nor
            anything else that the objective uses gets a gradient.
        mask: [...], bool or weights >= 0; None for 1. The objective does not see tokens with mask 0.
        denominator: a number or a 0-d tensor. None: the sum of ``mask`` over the tokens whose target is not
            -100. Without a token the loss is 0.
        bias: [V], of the LM head, or None.
        temperature: [...], the temperature > 0 that the tokens were sampled at.
        softcap: positive; None for no softcap.
        cu_seqlens: [S + 1], integers that ascend from 0 to the number of tokens, read by the host. Sequence s
            is the tokens from cu_seqlens[s] to cu_seqlens[s + 1] of the flattened target. It is never cut,
            for losses with one ratio per sequence; one that is longer than a chunk makes the chunk larger.
        chunk_tokens: rows of a chunk. None: what `plan` chooses.
        memory_budget: bytes that the call may take above its inputs, as in `linear_ppo_loss`.
        impl: as in `token_stats`.
        group: as in `linear_ppo_loss`. The objective is called on all ranks, with the same numbers.
        vocab_size: as in `linear_ppo_loss`.
        reduce_hidden: as in `linear_ppo_loss`.

    Returns:
        A `PPOLoss`: the loss, to call backward on once; logprob and entropy, each [...], detached, 0 where
        masked; and metrics with ``tokens``, ``entropy`` (mean) and ``active_fraction`` (share of tokens with
        a gradient). All are float32 (float64 for float64 hidden).

    Raises:
        ValueError: if an argument is not as above, or the objective does not return [n]. The values of
            target, temperature and mask are not read on a GPU: there a bad one makes the loss NaN.

    On a GPU the host waits for the device once a call, to learn how many rows count, and once a tile.

    torch.compile: a graph break. The graphs before and after the call stay compiled.

    Examples:
        CISPO (2506.13585): the clipped ratio is a constant weight of the log-probability.

        >>> def cispo(logprob, entropy, old_logprob, advantage):
        ...     ratio = (logprob.detach() - old_logprob).exp()
        ...     return -ratio.clamp(max=5.0) * advantage * logprob
        >>> hidden = torch.zeros(2, 3, 8, requires_grad=True)
        >>> weight = torch.randn(50, 8, requires_grad=True)
        >>> target = torch.ones(2, 3, dtype=torch.long)
        >>> old_logprob, advantage = torch.full((2, 3), -3.912), torch.tensor([[1.0], [-0.5]])
        >>> out = linear_token_loss(hidden, weight, target, cispo, old_logprob, advantage)
        >>> out.loss.backward()
        >>> round(out.loss.item(), 3)  # mean of A log 50
        0.978
    """
    loop = (chunk_tokens, memory_budget, impl, group, vocab_size, reduce_hidden)
    call = Call(hidden, weight, target, bias, softcap, *loop)
    return token_loss_of(
        call,
        objective,
        token_tensors,
        mask=mask,
        denominator=denominator,
        temperature=temperature,
        cu_seqlens=cu_seqlens,
    )


@together
def token_loss_of(
    call: Call,
    objective: Callable[..., Tensor],
    token_tensors: Sequence[Tensor | float],
    *,
    mask: Tensor | float | None,
    denominator: Tensor | float | None,
    temperature: Tensor | float,
    cu_seqlens: Tensor | None,
) -> PPOLoss:
    """`linear_token_loss` of a call."""
    if not callable(objective):
        raise ValueError(f"objective must be callable, got {type(objective).__name__}")
    target = call.target
    tokens = call.tokens(temperature, 1.0 if mask is None else mask)
    weights = tokens.mask
    assert weights is not None
    constants = [token_tensor(k, x, target, call.wide) for k, x in enumerate(token_tensors)]
    boundaries = check_boundaries(cu_seqlens, target.numel())
    live = tokens.live
    scale = denominator_scale(denominator, weights.where(live, 0.0), live)
    if call.impl == "reference":
        shaped = [x.view(target.shape) for x in (tokens.target, weights, tokens.temperature)]
        return call.by_reference(
            reference.linear_token_loss,
            shaped[0],
            objective,
            *(x.view(target.shape) for x in constants),
            mask=shaped[1],
            temperature=shaped[2],
            denominator=denominator,
        )
    index, (n, _) = order_rows(live, live)
    ends = None
    if boundaries is not None:
        counted = torch.nn.functional.pad(live.cumsum(0), (1, 0))
        ends = counted[boundaries.to(counted.device)].tolist()
    call = call.meet(
        "linear_token_loss",
        tokens,
        [n],
        partial(messages, first=n, n=n, ends=ends),
        cu_seqlens=None if boundaries is None else checksum(boundaries),
        mask=checksum(weights, live),
        denominator=checksum(scale.view(1)),
        token_tensors=sum(
            (checksum(x, live, salt=k) for k, x in enumerate(constants)),
            scale.new_zeros((), dtype=torch.int64),
        ),
    )
    inputs, how = call.inputs(), call.how()
    fields = weights.new_zeros(4, target.numel())  # loss, logprob, entropy, active

    def compute() -> tuple[Tensor, Inputs]:
        """Fill the fields; return the loss and the gradients that are wanted."""
        head = head_of(
            *call.factors, how=how, places=index, target=tokens.target, temperature=tokens.temperature
        )
        rows = ObjectiveRows(head, objective, weights[index], [x[index] for x in constants])
        grads = loss_pass(rows, inputs, n, scale, ends=ends)
        fields.index_copy_(1, index, rows.fields)
        return rows.fields[0].sum() * scale, grads

    loss = call.terminal(compute)
    metrics = reference.objective_metrics(live, fields[2], fields[3])
    return PPOLoss(loss, fields[1].view(target.shape), fields[2].view(target.shape), metrics)


class ObjectiveRows(TokenRows):
    """A loss that is differentiated when its rows are there."""

    def __init__(
        self, head: Head, objective: Callable[..., Tensor], mask: Tensor, constants: list[Tensor]
    ) -> None:
        super().__init__(head)
        self.objective, self.mask, self.constant_rows = objective, mask, constants
        self.fields = mask.new_zeros(4, head.places.numel())

    def largest_grad(self) -> Tensor:
        return self.mask.amax()

    def score(self, at: slice, logprob: Tensor, entropy: Tensor, top1_prob: Tensor) -> tuple[Tensor, Tensor]:
        constants = [x[at] for x in self.constant_rows]
        loss, by_logprob, by_entropy = reference.objective_grads(
            self.objective, self.mask[at], logprob, entropy, constants
        )
        active = (by_logprob != 0) | (by_entropy != 0)
        self.fields[:, at] = torch.stack((loss, logprob, entropy, active.to(loss.dtype)))
        assert self.scale is not None
        return self.scale * by_logprob, self.scale * by_entropy
