"""A model beside the one that is trained, whose logits are made tile by tile as well."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aer_fast._distill import check_ref
from aer_fast._exchange import Alike, checksum, of_dtype, take
from aer_fast._linear import products
from aer_fast._linear.call import Call, Head, multiplied_in
from aer_fast._ranks import local_head
from aer_fast._rows import pair_ops
from aer_fast._rows.pairs import Pair, Score
from aer_fast._split import pair_loss
from aer_fast._validation import check_head, check_tensor, check_vocab_size, resolve_impl, savable


class Teacher(NamedTuple):
    """Hidden states and head of a model that gets no gradient."""

    hidden: Tensor  # [..., D_ref], as the caller has it
    weight: Tensor  # [V_ref, D_ref]
    bias: Tensor | None  # [V_ref]
    dtype: torch.dtype  # that they are multiplied in

    @classmethod
    def of(cls, call: Call, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Teacher:
        """Raises ValueError for what is wrong with one."""
        check_tensor("ref_hidden", hidden)
        check_ref("ref_hidden", hidden, call.hidden, "hidden")
        weight, bias, group, whole = local_head(weight, bias, None)
        if group is not None and (group != call.group or whole != call.whole):
            raise ValueError("ref_weight must be split between the ranks as weight is, or whole as it is")
        check_head(hidden, weight, bias, call.target, whole=call.whole, prefix="ref_")
        if call.impl == "triton":
            resolve_impl(call.impl, hidden)
        bias = None if bias is None else savable(bias)
        made = cls(savable(hidden), savable(weight), bias, multiplied_in(hidden))
        return made.narrowed(check_vocab_size(call.vocab_size, len(weight))) if call.whole else made

    def alike(self, live: Tensor) -> dict[str, Alike]:
        """What ranks that hold slices of its head compare."""
        return {
            "ref_hidden": checksum(self.hidden, live),
            "the hidden size of the teacher": self.hidden.shape[-1],
            "ref_bias": self.bias is None,
            "the dtype of the teacher": of_dtype(self.dtype),
        }

    def narrowed(self, V: int) -> Teacher:
        """The first words alone."""
        return self._replace(weight=self.weight[:V], bias=None if self.bias is None else self.bias[:V])

    def cast(self) -> Teacher:
        """With a head of the dtype that it is multiplied in."""
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return self._replace(weight=self.weight.to(self.dtype), bias=bias)

    def by_reference(self) -> dict[str, Tensor | None]:
        """Arguments of the specification."""
        cast = self.cast()
        return {"ref_hidden": self.hidden.to(self.dtype), "ref_weight": cast.weight, "ref_bias": cast.bias}

    def tile(
        self, head: Head, pair: Pair, score: Score, out: Tensor | None, *, compact: bool
    ) -> Tensor | None:
        """Score these rows of student and teacher, as `Rows.tile`; of all ranks' slices, if there are any."""
        grad = None if out is None else out.unsqueeze(0)
        if head.split is None:
            return pair_ops(head.impl).pair_loss(pair, score, grad, compact=compact)
        return pair_loss(head.split, head.impl, pair, score, grad, compact=True)

    def logits(self, places: Tensor, room: Tensor | None) -> Tensor:
        """[t, V], at least float32, of the tokens at ``places``; in the ``room`` of an earlier tile, if any.

        A CPU takes as long to hand out new memory as the row operations take for two passes over it.
        """
        hidden = take(self.hidden, places, self.hidden.shape[-1]).to(self.dtype)
        weight, bias = self.weight, self.bias
        wide = torch.promote_types(self.dtype, torch.float32)
        if room is None or len(room) < len(places):
            room = torch.empty(len(places), len(weight), dtype=wide, device=hidden.device)
        return products.logits(hidden, weight, bias, room[: len(places)])
