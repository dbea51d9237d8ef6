"""What the linear functions have in common: their arguments, checked, and the rows that count.

Sizes: N tokens, V vocabulary entries, D hidden; n rows that count, in the order they are computed.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from aer_fast._autograd import Terminal
from aer_fast._exchange import Alike, checksum, of_dtype, take
from aer_fast._linear.plan import Plan, plan
from aer_fast._ranks import Meeting, Message, Ranks, Split, local_head, local_hidden
from aer_fast._split import common_words
from aer_fast._validation import (
    Tokens,
    check_count,
    check_flag,
    check_head,
    check_range,
    check_softcap,
    check_tokens,
    check_vocab_size,
    resolve_impl,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

R = TypeVar("R")

# hidden, weight and bias as the caller passed them, or their gradients; None for those that get none.
Inputs = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Call:
    """The arguments that all linear functions take. Raises ValueError for what is wrong with one."""

    hidden: Tensor  # [..., D]
    weight: Tensor  # [V, D]
    target: Tensor  # [...]
    bias: Tensor | None  # [V]
    softcap: float | None
    chunk_tokens: int | None
    memory_budget: int | None
    impl: str
    group: ProcessGroup | None = None
    vocab_size: int | None = None
    reduce_hidden: bool = True
    planner: Callable[..., Plan] = plan  # a test may ask for a loop by another one
    ranks: Ranks | None = field(init=False, default=None)  # the group's ranks, if there is one
    whole: bool = field(init=False, default=True)  # the weight, on all ranks if there are any
    ref_D: int | None = field(init=False, default=None)  # a teacher's D, if there is one
    most: int = field(init=False, default=0)  # words of the larger of two vocabularies, once they have met
    lost: bool = field(init=False, default=False)  # whether the other one lacks words of ours
    split: Split | None = field(init=False, default=None)  # what `meet` has found

    def __post_init__(self) -> None:
        self._expect_a_meeting()
        with self.together():
            if hasattr(self.hidden, "full_tensor"):
                hidden, reduce = local_hidden(self.hidden, self.weight, reduce=self.reduce_hidden)
                self._set(hidden=hidden, reduce_hidden=reduce)
            weight, bias, group, whole = local_head(self.weight, self.bias, self.group)
            self._set(weight=weight, bias=bias, group=group, whole=whole)
        self._expect_a_meeting()  # the group may be that of a DTensor
        with self.together():
            check_head(self.hidden, self.weight, self.bias, self.target, whole=whole)
            check_count("chunk_tokens", self.chunk_tokens)
            check_count("memory_budget", self.memory_budget)
            check_count("vocab_size", self.vocab_size)
            check_flag("reduce_hidden", self.reduce_hidden)
            self._set(softcap=check_softcap(self.softcap), impl=resolve_impl(self.impl, self.hidden))
            if whole:
                self._set_words(0, self.weight.shape[0])
            if group is not None and self.impl == "reference":
                raise ValueError("impl='reference' is of the whole vocabulary: it takes no group")

    def _expect_a_meeting(self) -> None:
        if self.group is not None and self.ranks is None:
            self._set(ranks=Ranks(self.group))
            assert self.ranks is not None
            self.ranks.expect([Meeting.message()])

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _set_words(self, start: int, words: int) -> int:
        """Leave out the padding of a head that begins at word ``start`` of ``words``; return their number."""
        V = check_vocab_size(self.vocab_size, words)
        mine = min(max(V - start, 0), self.weight.shape[0])
        if mine < self.weight.shape[0]:
            bias = None if self.bias is None else self.bias[:mine]
            self._set(weight=self.weight[:mine], bias=bias)
        return V

    def together(self) -> AbstractContextManager[None]:
        """In here an error of one rank is an error of all."""
        return nullcontext() if self.ranks is None else self.ranks.together()

    def meet(
        self,
        function: str,
        tokens: Tokens,
        counts: list[int],
        messages: Callable[[How, Sizes], list[Message]],
        *,
        ref_words: int | None = None,
        **alike: Alike,
    ) -> Call:
        """The call as its ranks agree on it, with the words that are ours; itself, without a group.

        ``ref_words``, of a teacher's slice: then with those words alone that both have.

        ``function`` is the one called, ``counts`` are those of `order_rows`, ``messages`` says what will be
        sent, and ``alike`` is what else must be the same on all ranks. Raises ValueError for what is not.
        """
        if self.ranks is None:
            return self
        live = tokens.live
        hidden, weight, bias = self.inputs()
        meeting = Meeting()
        meeting.add("slices", self.weight.shape[0], "list")
        meeting.add_tokens(function, tokens, self.softcap, self.vocab_size)
        same: dict[str, Alike] = {
            "D": self.hidden.shape[-1],
            "hidden": checksum(self.hidden, live),
            "bias": self.bias is None,
            "the dtype": of_dtype(self.dtype),
            "the dtype of weight": of_dtype(self.weight.dtype),
            "impl": self.impl == "torch",
            "reduce_hidden": self.reduce_hidden,
            "hidden.requires_grad": hidden is not None,
        }
        for name, value in (same | alike).items():
            meeting.add(name, value, "alike")
        if ref_words is not None:
            meeting.add("ref_slices", ref_words, "list")
        if self.whole:  # no more is exchanged; but with other tokens its gradient would not be whole
            meeting.hold(self.ranks)
            check_range(tokens.target, tokens.live, max(self.weight.shape[0], ref_words or 0))
            alone = copy.copy(self)
            alone._set(ranks=None)
            return alone
        for count in counts:
            meeting.add("the number of tokens with a gradient", count, "alike")
        meeting.add("weight_grad", weight is not None, "any")
        meeting.add("bias_grad", bias is not None, "any")
        meeting.add("chunk_tokens", self.chunk_tokens, "least")
        meeting.add("memory_budget", self.memory_budget, "least")
        found = meeting.hold(self.ranks)

        met, rank = copy.copy(self), self.ranks.rank
        slices = found["slices"]
        V = most = check_vocab_size(self.vocab_size, sum(slices))
        if ref_words is not None:
            words, (V, most) = V, common_words(slices, found["ref_slices"], self.vocab_size, "weight")
            met._set(lost=words > V)
        split = Split.of(self.ranks, slices, V)._replace(
            hidden_grad=hidden is not None,
            weight_grad=found["weight_grad"],
            trains=hidden is not None or found["weight_grad"] or found["bias_grad"],
            reduces=hidden is not None and self.reduce_hidden,
        )
        met._set(vocab_size=V, most=most)
        met._set(split=split, chunk_tokens=found["chunk_tokens"], memory_budget=found["memory_budget"])
        # at once: whoever fails from here on knows what the others wait for
        self.ranks.expect(messages(met.how(), met.sizes(live.numel())))
        met._set_words(sum(slices[:rank]), sum(slices))
        check_range(tokens.target, tokens.live, most)
        return met

    def sizes(self, tokens: int) -> Sizes:
        words, D = self.weight.shape
        dtypes = self.weight.dtype, self.hidden.dtype, self.wide
        return Sizes(words, D, tokens, self.hidden.device.type, *dtypes)

    @property
    def wide(self) -> torch.dtype:
        """The dtype of constants, and of sums."""
        return torch.promote_types(self.hidden.dtype, torch.float32)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype hidden and weight are multiplied in: autocast's, as for any product, or their own."""
        return multiplied_in(self.hidden)

    def tokens(self, temperature: Tensor | float, mask: Tensor | float | None) -> Tokens:
        V = None if self.ranks is not None else self.weight.shape[0]
        return check_tokens(self.target, temperature, mask, V, self.wide)

    def by_reference(self, function: Callable[..., R], *args: Any, **options: Any) -> R:
        """A function of the specification, of hidden and weight in the dtype they are multiplied in."""
        hidden, weight, bias = (None if x is None else x.to(self.dtype) for x in self.savable_factors())
        with torch.autocast(self.hidden.device.type, enabled=False):
            return function(hidden, weight, *args, bias=bias, softcap=self.softcap, **options)

    @property
    def factors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.hidden, self.weight, self.bias

    def savable_factors(self) -> tuple[Tensor | None, ...]:
        """Copies of what was made under inference_mode, which no backward could save."""
        copies = torch.is_grad_enabled()
        return tuple(x.clone() if copies and x is not None and x.is_inference() else x for x in self.factors)

    def inputs(self) -> Inputs:
        """The factors that get a gradient."""

        def wants(x: Tensor | None) -> Tensor | None:
            return x if torch.is_grad_enabled() and x is not None and x.requires_grad else None

        return wants(self.hidden), wants(self.weight), wants(self.bias)

    def beside(self, D: int) -> Call:
        """The call with a teacher of this hidden size."""
        call = copy.copy(self)
        call._set(ref_D=D)
        return call

    def narrowed(self, V: int) -> Call:
        """The first words alone."""
        if self.weight.shape[0] == V:
            return self
        call = copy.copy(self)
        call._set(weight=self.weight[:V], bias=None if self.bias is None else self.bias[:V])
        return call

    def terminal(self, compute: Callable[[], tuple[Tensor, Inputs]]) -> Tensor:
        """The loss of ``compute``, which returns it and the gradients of `inputs`."""
        if any(x is not None for x in self.inputs()):
            loss: Tensor = Terminal.apply(compute, self.impl, True, *self.factors)
            return loss
        with torch.autocast(self.hidden.device.type, enabled=False):
            return compute()[0]

    def how(self) -> How:
        """To be asked before autocast is left."""
        loop = (self.chunk_tokens, self.memory_budget, self.planner)
        return How(self.softcap, self.impl, self.dtype, *loop, self.split, self.ref_D)


def multiplied_in(hidden: Tensor) -> torch.dtype:
    """The dtype of a product with hidden: autocast's, or its own."""
    kind = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


def together(of_call: Callable[..., R]) -> Callable[..., R]:
    """A function of a call in which an error of one rank is an error of all."""

    @functools.wraps(of_call)
    def function(call: Call, *args: Any, **options: Any) -> R:
        with call.together():
            return of_call(call, *args, **options)

    return function


class How(NamedTuple):
    """What of a call is no tensor."""

    softcap: float | None
    impl: str
    dtype: torch.dtype  # the factors'
    chunk_tokens: int | None
    memory_budget: int | None
    planner: Callable[..., Plan]
    split: Split | None
    ref_D: int | None  # a teacher's D

    def planner_of(self, sizes: Sizes) -> Callable[..., Plan]:
        """Of a number of rows, and which gradients there are."""
        split = self.split
        return functools.partial(
            self.planner,
            V=sizes.words if split is None else split.widest * split.ranks.size,
            ranks=1 if split is None else split.ranks.size,
            reduce_hidden=split is None or split.reduces,
            D=sizes.D,
            tokens=sizes.tokens,
            dtype=self.dtype,
            device="cpu" if sizes.device == "cpu" else "cuda",  # or another accelerator
            param_dtype=sizes.param_dtype,
            hidden_dtype=sizes.hidden_dtype,
            softcap=self.softcap is not None,
            impl="triton" if self.impl == "triton" else "torch",
            chunk_tokens=self.chunk_tokens,
            memory_budget=self.memory_budget,
            ref_D=self.ref_D,
        )

    def plan_alike(self, planner: Callable[..., Plan], rows: int, **options: Any) -> Plan:
        """The plan for so many rows, the same on all ranks."""
        assert self.split is not None
        split = self.split
        grads = {
            "grad_hidden": split.hidden_grad,
            "grad_weight": split.weight_grad,
            "grad_bias": split.trains,
        }
        return planner(rows, **grads, **options)


class Sizes(NamedTuple):
    """What of a head is a size or a dtype; its words are our slice's."""

    words: int
    D: int
    tokens: int
    device: str
    param_dtype: torch.dtype  # of the weight, whatever autocast makes of it
    hidden_dtype: torch.dtype  # likewise of hidden
    wide: torch.dtype  # of sums


class Head(NamedTuple):
    """The language-model head, or our slice of it, and the rows it is applied to."""

    hidden: Tensor  # [..., D], as the caller has it
    weight: Tensor  # [V, D], in the dtype it is multiplied in
    bias: Tensor | None  # [V]
    softcap: float | None
    impl: str
    places: Tensor  # [n], the rows' places among the N
    target: Tensor  # [n], columns of our slice
    temperature: Tensor  # [n]
    planner: Callable[..., Plan]  # of a number of rows, and which gradients there are
    how: How

    @property
    def D(self) -> int:
        return self.weight.shape[1]

    @property
    def split(self) -> Split | None:
        """The share of the vocabulary that this head is."""
        return self.how.split

    @property
    def wide(self) -> torch.dtype:
        """The dtype of logits and of sums."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    def plan(self, rows: int, inputs: Inputs = (None, None, None), **options: Any) -> Plan:
        """The plan for so many rows, with gradients for the inputs that are not None."""
        names = ("grad_hidden", "grad_weight", "grad_bias")
        grads = {name: x is not None for name, x in zip(names, inputs)}
        return self.planner(rows, **grads, **options)

    def plan_alike(self, rows: int, inputs: Inputs, **options: Any) -> Plan:
        """The plan for so many rows and the inputs' gradients, the same on all ranks."""
        if self.how.split is None:
            return self.plan(rows, inputs, **options)
        return self.how.plan_alike(self.planner, rows, **options)

    def take(self, index: Tensor) -> Tensor:
        """hidden [k, D] of the tokens at ``index``, in the dtype it is multiplied in."""
        return take(self.hidden, index, self.D).to(self.weight.dtype)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.wide, device=self.hidden.device)

    def empty_dz(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.weight.dtype, device=self.hidden.device)


def head_of(
    hidden: Tensor,  # [..., D]
    weight: Tensor,
    bias: Tensor | None,
    *,
    how: How,
    places: Tensor,  # [n]
    target: Tensor,  # [N] and so is the next
    temperature: Tensor,
) -> Head:
    """The head on the rows at ``places``, without history."""
    split, target = how.split, target[places]
    words, D = weight.shape
    dtypes = weight.dtype, hidden.dtype, temperature.dtype
    sizes = Sizes(words, D, temperature.numel(), hidden.device.type, *dtypes)
    planner = how.planner_of(sizes)
    return Head(
        hidden.detach(),
        weight.detach().to(how.dtype),
        None if bias is None else bias.detach().to(how.dtype),
        how.softcap,
        how.impl,
        places,
        target if split is None else split.local(target, weight.shape[0]),
        temperature[places],
        planner,
        how,
    )


def order_rows(first: Tensor, live: Tensor, *counted: Tensor) -> tuple[Tensor, list[int]]:
    """The places of the live rows, those of ``first`` (which are live) before the others; how many of each.

    The one time that the host waits for the device.
    """
    rank = live.to(torch.uint8) + first
    counts = torch.stack((first, live, *counted)).sum(-1).tolist()
    return rank.argsort(stable=True, descending=True)[: counts[1]], counts
