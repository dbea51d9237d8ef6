"""Public operation: the clipped PPO loss with an entropy bonus, from hidden states and the LM head."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from aer_fast import reference
from aer_fast._autograd import eager
from aer_fast._exchange import of_numbers
from aer_fast._linear.call import Call, Head, Inputs, head_of, order_rows, together
from aer_fast._linear.loops import TokenRows, loss_pass, messages
from aer_fast._linear.teacher import Teacher
from aer_fast._policy_loss import PolicyLoss, by_reference, policy_loss, result
from aer_fast._rows.pairs import Divergence, Grads, Pair, PairStats, within
from aer_fast._validation import Impl, check_number
from aer_fast.kernels.layout import FIELDS
from aer_fast.reference import PPOLoss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@eager
def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    old_logprob: Tensor | float | None,
    advantage: Tensor | float,
    mask: Tensor | float | None = None,
    *,
    bias: Tensor | None = None,
    entropy_coef: Tensor | float = 0.0,
    clip: tuple[float, float] = (0.2, 0.2),
    dual_clip: float | None = None,
    ref_logprob: Tensor | float | None = None,
    kl_coef: float = 0.0,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    importance_weight: Tensor | float | None = None,
    denominator: Tensor | float | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float | None = None,
    stats: Literal["all", "active"] = "all",
    chunk_tokens: int | None = None,
    memory_budget: int | None = None,
    impl: Impl = "auto",
    group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    reduce_hidden: bool = True,
) -> PPOLoss:
    """`ppo_loss` from hidden states and the LM head; the logits never exist as a whole.

        logits = hidden · weightᵀ + bias
        loss = Σ mask L / denominator

    L is the loss of a token, as in `ppo_loss`. The gradients of hidden, weight and bias are computed along
    with it, chunk by chunk. That takes three matrix products; two with a frozen weight; one where no gradient
    is wanted. The logits are float32 whatever the dtype of hidden and weight. So are the sums of the
    gradients, which are rounded once.

    A masked row costs nothing. A row without a gradient costs one product instead of three: one whose
    advantage, entropy coefficient and KL are 0, and, where `plan` finds that it pays, one that clipping
    leaves without a gradient.

    Shapes: D is the hidden size, V the size of the vocabulary, [...] the shape of target, for example [B, T].
    An argument marked [...] is a number, a 0-d tensor, or a tensor of target's rank whose sizes are 1 or
    target's. All of these are constants: only hidden, weight and bias get gradients.

    Args:
        hidden: [..., D], the last hidden states, float32, bfloat16 or float16; with impl "torch" or
            "reference" also float64.
        weight: [V, D], of the LM head, in the dtype of hidden. Under autocast both are cast as for any matrix
            product; their gradients come back in their own dtypes.
        target: [...], int64: the taken tokens, in [0, V). -100 masks a token. Masked rows are never read.
        old_logprob: [...], or None for on-policy, as in `ppo_loss`.
        advantage: [...], the advantage A.
        mask: [...], bool or weights >= 0; None for 1.
        bias: [V], of the LM head, or None. An entry of -inf bans a token.
        entropy_coef: [...], weight of the entropy bonus. Positive values reward entropy.
        clip: (ε_low, ε_high), each >= 0; inf for no bound on that side.
        dual_clip: above 1; None for no dual clip.
        ref_logprob: [...], log-probability under the reference policy, at the same temperature. Needed if
            kl_coef > 0 and there is no ref_hidden; beside ref_hidden it only adds a metric.
        kl_coef: weight of the KL, >= 0: of the k3 estimate from ref_logprob, or of the exact KL from
            ref_hidden.
        ref_hidden: [..., D_ref], hidden states of the reference policy. With them kl_coef weighs the exact
            KL(π‖π_ref) of the whole vocabulary, with its exact gradient, at the temperature and softcap of
            the policy. This takes one more product.
        ref_weight: [V_ref, D_ref], LM head of the reference policy, with V_ref >= V. Goes with ref_hidden.
        ref_bias: [V_ref], bias of that head, or None.
        importance_weight: [...], corrects for a sampler that differs from the trainer; None for 1.
        denominator: a number or a 0-d tensor, such as the number of tokens of all micro-batches on all ranks.
            None: the sum of ``mask`` over the tokens whose target is not -100. Without a token the loss is 0.
        temperature: [...], the temperature > 0 that the tokens were sampled at.
        softcap: positive; None for no softcap.
        stats: "all", or "active" to leave out the rows that cannot have a gradient (advantage 0, coefficient
            0, no KL). Their logprob and entropy come back as 0, and the metrics cover the other rows only:
            never feed `AdaptiveEntropy` from those.
        chunk_tokens: rows of a chunk. None: what `plan` chooses.
        memory_budget: bytes that the call may take above its inputs, gradients included. None: the default of
            `plan`. A small budget may cost a fourth product.
        impl: as in `token_stats`. An explicit choice never falls back to another.
        group: process group of torch.distributed whose ranks hold the vocabulary in slices, in rank order.
            Then weight [V_r, D] and bias [V_r] are this rank's slice, of any size, 0 included. All other
            arguments are whole and the same on all ranks, and token ids are global. All ranks must call. Not
            needed for a weight that is a DTensor, Shard(0) on a mesh of one dimension. See docs/linear.md.
        vocab_size: size of the vocabulary, where the head is padded beyond it. The entries that follow have
            probability 0 and gradient 0. None: there is no padding.
        reduce_hidden: sum the gradient of hidden over the group. False leaves that to a caller who scatters
            the sum.

    Returns:
        A `PPOLoss`, as from `ppo_loss`. With ref_hidden its metrics also have ``ref_kl``, and with
        ref_logprob beside it ``ref_kl_k3``. The backward of the loss hands out the gradients, scaled where
        the upstream gradient is not 1. It can run once.

    Raises:
        ValueError: if an argument is not as above; with ``group``, on all ranks if on one, and if the ranks
            have different tokens. The values of tensors are not read on a GPU: there a bad target,
            temperature or mask makes the loss NaN.

    On a GPU the host waits for the device once a call, to learn how many rows count, and once a tile where
    rows that clipping leaves without a gradient are dropped.

    torch.compile: a graph break. The graphs before and after the call stay compiled.

    Examples:
        >>> import torch
        >>> hidden = torch.zeros(2, 3, 8, requires_grad=True)
        >>> weight = torch.randn(50, 8, requires_grad=True)
        >>> target = torch.ones(2, 3, dtype=torch.long)
        >>> advantage = torch.tensor([[1.0], [-1.0]])
        >>> out = linear_ppo_loss(hidden, weight, target, None, advantage, entropy_coef=0.01)
        >>> out.loss.backward()
        >>> round(out.loss.item(), 5)  # -0.01 log 50: the surrogate is 0 on average
        -0.03912
    """
    loop = (chunk_tokens, memory_budget, impl, group, vocab_size, reduce_hidden)
    call = Call(hidden, weight, target, bias, softcap, *loop)
    return policy_loss_of(
        call,
        mask=mask,
        temperature=temperature,
        denominator=denominator,
        stats=stats,
        old_logprob=old_logprob,
        advantage=advantage,
        entropy_coef=entropy_coef,
        clip=clip,
        dual_clip=dual_clip,
        ref_logprob=ref_logprob,
        kl_coef=kl_coef,
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
        ref_bias=ref_bias,
        importance_weight=importance_weight,
    )


@together
def policy_loss_of(
    call: Call,
    *,
    mask: Tensor | float | None,
    temperature: Tensor | float,
    denominator: Tensor | float | None,
    stats: str,
    kl_coef: float,
    ref_logprob: Tensor | float | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    **terms: Any,  # of `policy_loss`
) -> PPOLoss:
    """`linear_ppo_loss` of a call."""
    if stats not in ("all", "active"):
        raise ValueError(f"stats must be 'all' or 'active', got {stats!r}")
    tokens = call.tokens(temperature, 1.0 if mask is None else mask)
    exact = None
    if ref_hidden is not None or ref_weight is not None or ref_bias is not None:
        exact = ExactKL.of(call, kl_coef, ref_hidden, ref_weight, ref_bias)
        kl_coef = 0.0
    policy = policy_loss(call.target, tokens, denominator, kl_coef=kl_coef, ref_logprob=ref_logprob, **terms)
    trainable = tokens.live
    if exact is None or exact.coef == 0:
        trainable = trainable & policy.may_have_gradient()
    computed = tokens.live if stats == "all" else trainable
    if call.impl == "reference":
        return call.by_reference(
            partial(by_reference, reference.linear_ppo_loss),
            loss=policy,
            tokens=tokens,
            computed=computed,
            target=call.target,
            denominator=denominator,
            **({} if exact is None else exact.by_reference(call, policy, ref_logprob)),
        )
    clippable = trainable & policy.clippable() if exact is None else torch.zeros_like(trainable)
    index, counts = order_rows(trainable, computed, clippable)
    n_first, n, n_clippable = counts
    sent = partial(messages, first=n_first, n=n, clippable=n_clippable)
    alike = policy.alike(tokens.live)
    ref_words = None
    if exact is not None:
        call, ref_words = call.beside(exact.reference.weight.shape[1]), len(exact.reference.weight)
        alike |= exact.reference.alike(tokens.live) | {"kl_coef": of_numbers(exact.coef)}
    call = call.meet("linear_ppo_loss", tokens, counts, sent, ref_words=ref_words, **alike)
    if exact is not None:
        exact = exact.narrowed(call)
    inputs, how = call.inputs(), call.how()
    fields = policy.constants.new_zeros(len(FIELDS) + 1, tokens.target.numel())

    def compute() -> tuple[Tensor, Inputs]:
        """Fill the fields; return the loss and the gradients that are wanted."""
        head = head_of(
            *call.factors, how=how, places=index, target=tokens.target, temperature=tokens.temperature
        )
        rows = PolicyRows(head, policy.at(index), exact)
        grads = loss_pass(rows, inputs, n_first, policy.scale, clippable=n_clippable)
        fields.index_copy_(1, index, rows.fields)
        return rows.fields[0].sum() * policy.scale, grads

    out = result(call.terminal(compute), fields[:-1], call.target.shape)
    if exact is None:
        return out
    token = fields[FIELDS.index("token")] != 0
    metrics = out.metrics | {"ref_kl": fields[-1].sum() / token.sum().clamp(min=1)}
    if ref_logprob is not None:
        metrics["ref_kl_k3"] = reference.k3(policy.of("ref_logprob"), out.logprob.view(-1), token)
    return out._replace(metrics=metrics)


class ExactKL(NamedTuple):
    """The KL of the policy from a reference policy, over the whole vocabulary."""

    coef: float
    reference: Teacher
    which: Divergence

    @classmethod
    def of(
        cls, call: Call, coef: float, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None
    ) -> ExactKL:
        """Raises ValueError for what is wrong with an argument."""
        if hidden is None or weight is None:
            raise ValueError("ref_hidden and ref_weight must both be given, or neither and no ref_bias")
        check_number("kl_coef", coef)
        if coef < 0:
            raise ValueError(f"kl_coef must be >= 0, got {coef}")
        which = Divergence("reverse_kl", 1.0, -math.inf, call.softcap, call.softcap)
        return cls(float(coef), Teacher.of(call, hidden, weight, bias), which)

    def narrowed(self, call: Call) -> ExactKL:
        """With the words of the policy alone. Raises ValueError if the reference lacks one."""
        V, words = call.weight.shape[0], len(self.reference.weight)
        if words < V or call.lost:
            raise ValueError(f"ref_weight must have the V={V} words of weight at least, got {words}")
        return self._replace(reference=self.reference.narrowed(V))

    def by_reference(
        self, call: Call, policy: PolicyLoss, ref_logprob: Tensor | float | None
    ) -> dict[str, Any]:
        """Arguments of the specification."""
        given = None if ref_logprob is None else policy.of("ref_logprob").view(call.target.shape)
        reference = self.narrowed(call).reference
        return {"kl_coef": self.coef, "ref_logprob": given, **reference.by_reference()}


class PolicyRows(TokenRows):
    """The policy loss, which has a kernel of its own."""

    def __init__(self, head: Head, policy: PolicyLoss, exact: ExactKL | None) -> None:
        super().__init__(head)
        self.policy = policy
        self.exact = None if exact is None else exact._replace(reference=exact.reference.cast())
        # and the exact KL
        self.fields = policy.constants.new_zeros(len(FIELDS) + 1, head.places.numel())

    def largest_grad(self) -> Tensor:
        largest = self.policy.largest_grad()
        return largest if self.exact is None else largest + self.policy.of("mask").amax() * self.exact.coef

    def at(self, rows: slice | Tensor) -> PolicyLoss:
        assert self.scale is not None
        return self.policy.at(rows)._replace(scale=self.scale)

    def score(self, at: slice, logprob: Tensor, entropy: Tensor, top1_prob: Tensor) -> tuple[Tensor, Tensor]:
        policy = self.at(at)
        self.fields[:-1, at] = policy.fields(logprob, entropy, top1_prob)
        return policy.grads(logprob)

    def score_with_kl(self, at: slice | Tensor, stats: PairStats, coef: float) -> Grads:
        policy = self.at(at)
        mask, kl = policy.of("mask"), stats.divergence
        fields = policy.fields(stats.logprob, stats.entropy, stats.top1_prob)
        grads = *policy.grads(stats.logprob), policy.scale * mask * coef
        if coef > 0:
            fields[0] += (mask * coef * kl).where(mask != 0, 0.0)
            fields[FIELDS.index("active_fraction")] = (mask != 0).to(fields.dtype)
        self.fields[:, at] = torch.cat((fields, kl.where(mask != 0, 0.0).unsqueeze(0)))
        return grads

    def tile(self, z: Tensor, at: slice, out: Tensor | None, *, compact: bool) -> Tensor | None:
        if self.exact is not None:
            return self.tile_with_kl(z, at, out, self.exact, compact=compact)
        if self.head.split is not None:
            return super().tile(z, at, out, compact=compact)
        arguments = (z.unsqueeze(0), *self.constants(at), self.at(at))
        grad, rows = None if out is None else out.unsqueeze(0), None
        if compact and grad is not None:
            self.fields[:-1, at], rows = self.ops.ppo_loss_compact(*arguments, grad)
        else:
            self.fields[:-1, at] = self.ops.ppo_loss_fwd(*arguments, grad)
        return rows

    def tile_with_kl(
        self, z: Tensor, at: slice, out: Tensor | None, exact: ExactKL, *, compact: bool
    ) -> Tensor | None:
        def score(rows: Tensor | slice, stats: PairStats) -> Grads:
            if isinstance(rows, slice):
                rows = slice(at.start + rows.start, at.start + rows.stop)
                return self.score_with_kl(rows, stats, exact.coef)
            return self.score_with_kl(within(at, rows), stats, exact.coef)

        target, temperature, _ = self.constants(at)
        self.room = exact.reference.logits(self.head.places[at], self.room)
        pair = Pair(z.unsqueeze(0), self.room.unsqueeze(0), target, temperature, temperature, exact.which)
        return exact.reference.tile(self.head, pair, score, out, compact=compact)
