"""A vocabulary that is split between the ranks of a process group: what they tell each other.

A call starts with one exchange of a few integers, so that all ranks loop alike. Then they gather the sums
over their pieces of the rows (`_rows.sums`), four numbers a token and rank, and merge them in rank order: the
same bits everywhere. Nothing that is exchanged has the size of the vocabulary.

Every message carries a flag. A rank that raises takes part in the message that the others wait for and says
so in it, and all of them raise: nobody is left waiting. For that the messages are announced (`Ranks.expect`)
before anything is computed for them.
"""

from __future__ import annotations

import functools
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from aer_fast._exchange import Alike, checksum, exchange_device, of_numbers
from aer_fast._rows import sums
from aer_fast._validation import Tokens
from aer_fast.kernels.layout import ELSEWHERE, IGNORE, PAIR_SUMS, SUMS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Message(NamedTuple):
    """``numbers`` and a flag, which all ranks get from all, or of which they get the sum."""

    summed: bool
    numbers: int
    dtype: torch.dtype


class Ranks:
    """The ranks of a group, and the messages that they are going to send in this call."""

    def __init__(self, group: ProcessGroup) -> None:
        import torch.distributed as dist

        if not isinstance(group, dist.ProcessGroup):
            raise ValueError(f"group must be a process group of torch.distributed, got {group!r:.80}")
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group must be one that this process belongs to")
        self.device = exchange_device(group)
        self.ahead: deque[Message] = deque()
        self.broken = False

    def expect(self, messages: Iterable[Message]) -> None:
        """Announce what will be sent, the same on all ranks; before anything is done that could fail."""
        self.ahead = deque(messages)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What raises in here, or has raised on another rank, raises on all ranks."""
        try:
            yield
        except _Elsewhere as fault:
            raise fault.error from None
        except Exception as error:
            if type(error).__name__ == "_StopRecomputationError":
                # not an error: activation checkpointing has what it wanted, before the last message
                if [*self.ahead] == [CLOSE]:
                    self.close()
            elif self.ahead and not self.broken:
                self._send(None)
                self._texts(text_of(error), isinstance(error, ValueError))
            raise

    def gather(self, numbers: Tensor) -> Tensor:
        """Those [k] of all ranks, [size, k], on the device where ours are."""
        assert self.ahead[0] == Message(False, numbers.numel(), numbers.dtype), (self.ahead, numbers.shape)
        return self._send(numbers.reshape(-1)).to(numbers.device)

    def sum_(self, numbers: Tensor) -> None:
        """Overwrite [k + 1] numbers, of which the last is room for the flag, with the sum over the ranks."""
        assert self.ahead[0] == Message(True, numbers.numel() - 1, numbers.dtype), (self.ahead, numbers.shape)
        numbers[-1] = 0.0
        self._send(numbers)

    def close(self) -> None:
        """The last message: a flag alone, for what has gone wrong since the one before it."""
        self.gather(torch.zeros(0, dtype=torch.int64, device=self.device))

    def _send(self, numbers: Tensor | None) -> Tensor:
        """Take part in the next message; without numbers, with a raised flag. Raises if another's is."""
        import torch.distributed as dist

        message = self.ahead[0]
        if numbers is None or not message.summed or numbers.device != self.device:
            mine = torch.zeros(message.numbers + 1, dtype=message.dtype, device=self.device)
            if numbers is None:
                mine[-1] = 1
            else:
                mine[: numbers.numel()] = numbers
        else:
            mine = numbers
        everyone = mine[:0]
        if not message.summed:
            everyone = torch.empty(self.size, len(mine), dtype=mine.dtype, device=mine.device)
        # there was memory for it: it is sent, and one that fails on the way is the last
        self.ahead.popleft()
        self.broken = True
        if message.summed:
            dist.all_reduce(mine, group=self.group)
            found = mine[:-1]
            raised = mine[-1] != 0
        else:
            dist.all_gather(list(everyone.unbind()), mine, group=self.group)
            found = everyone[:, :-1]
            raised = (everyone[:, -1] != 0).any()
        self.broken = False
        if numbers is not None:
            if raised:
                texts = self._texts(None, False)
                raise _Elsewhere(texts)
            if message.summed and mine is not numbers:
                numbers.copy_(mine)
        return found

    def _texts(self, text: str | None, is_value: bool) -> list[Any]:
        """What has gone wrong on each rank."""
        import torch.distributed as dist

        texts: list[Any] = [None] * self.size
        dist.all_gather_object(texts, None if text is None else (text, is_value), group=self.group)
        return texts


def text_of(error: Exception) -> str:
    """Its name and message, if it has one."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


class _Elsewhere(Exception):
    """Another rank has raised."""

    def __init__(self, texts: list[tuple[str, bool] | None]) -> None:
        rank, (text, is_value) = next((r, t) for r, t in enumerate(texts) if t is not None)
        kind: type[Exception] = ValueError if is_value else RuntimeError
        self.error = kind(f"rank {rank} of the group has raised {text}")


class Split(NamedTuple):
    """This rank's share of a vocabulary, in a call whose ranks have met."""

    ranks: Ranks
    start: int  # the first of its words
    V: int  # words of all ranks
    widest: int  # words of the largest share
    hidden_grad: bool = False  # whether hidden gets a gradient, on all ranks
    weight_grad: bool = False  # whether a weight gets one on some rank
    trains: bool = False  # whether anything does
    reduces: bool = False  # whether the gradient of hidden is summed over the ranks

    @classmethod
    def of(cls, ranks: Ranks, slices: list[int], V: int) -> Split:
        """Of the sizes of all slices, from which the padding of V words is left out."""
        ends = [min(sum(slices[: k + 1]), V) for k in range(ranks.size)]
        widest = max(end - start for start, end in zip([0, *ends], ends))
        return cls(ranks, start=sum(slices[: ranks.rank]), V=V, widest=widest)

    def local(self, target: Tensor, words: int) -> Tensor:
        """Global targets as columns of this rank's ``words``."""
        here = (target >= self.start) & (target < self.start + words)
        elsewhere = torch.where(target == IGNORE, IGNORE, ELSEWHERE)
        return torch.where(here, target - self.start, elsewhere)

    def statistics(self, mine: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """logprob [n], entropy [n] and state [STATE, n] of whole rows, from the sums [SUMS, n] of ours."""
        n = mine.shape[-1]
        pieces = self.ranks.gather(mine.contiguous()).view(self.ranks.size, len(SUMS), n)
        return sums.finish(sums.merge(pieces, temperature), temperature)

    def pair_statistics(
        self, mine: Tensor, temperature: Tensor, ref_temperature: Tensor
    ) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
        """`statistics` of student and teacher, from the sums [2 SUMS, n] of our pieces of both."""
        n = mine.shape[-1]
        pieces = self.ranks.gather(mine.contiguous()).view(self.ranks.size, 2, len(SUMS), n)
        both = []
        for k, one in enumerate((temperature, ref_temperature)):
            both.append(sums.finish(sums.merge(pieces[:, k], one), one))
        return tuple(both)

    def added(self, mine: Tensor) -> Tensor:
        """The sum of all ranks' numbers [k, n], in their order: the same bits everywhere."""
        pieces = self.ranks.gather(mine.contiguous()).view(self.ranks.size, *mine.shape)
        total: Tensor = functools.reduce(torch.add, pieces)
        return total


CLOSE = Message(False, 0, torch.int64)  # a flag alone


def statistics_message(rows: int, dtype: torch.dtype) -> Message:
    """What `Split.statistics` of so many rows sends."""
    return Message(False, len(SUMS) * rows, dtype)


_MOST = torch.iinfo(torch.int64).max


def pair_messages(rows: int, dtype: torch.dtype) -> list[Message]:
    """What `Split.pair_statistics` of so many rows sends, and then `Split.added` of their divergence."""
    return [Message(False, 2 * len(SUMS) * rows, dtype), Message(False, len(PAIR_SUMS) * rows, dtype)]


class Meeting:
    """What the ranks compare at the start of a call: integers, gathered once."""

    LENGTH = 32

    def __init__(self) -> None:
        self.names: list[str] = []
        self.numbers: list[Tensor | int] = []
        self.rules: list[str] = []

    def add(self, name: str, number: Alike, rule: str) -> None:
        """``rule``: "list", "alike", "any" or "least" (of those that are not None)."""
        self.names.append(name)
        number = number if isinstance(number, Tensor) else -1 if number is None else min(int(number), _MOST)
        self.numbers.append(number)
        self.rules.append(rule)

    def add_tokens(
        self, function: str, tokens: Tokens, softcap: float | None, vocab_size: int | None
    ) -> None:
        """What every function is told."""
        live = tokens.live
        self.add("the function that is called", zlib.crc32(function.encode()), "alike")
        self.add("the number of tokens", live.numel(), "alike")
        self.add("tokens that count", checksum(live), "alike")
        self.add("target", checksum(tokens.target, live), "alike")
        self.add("temperature", checksum(tokens.temperature, live), "alike")
        self.add("softcap", of_numbers(softcap), "alike")
        self.add("vocab_size", vocab_size, "alike")

    @classmethod
    def message(cls) -> Message:
        return Message(False, cls.LENGTH, torch.int64)

    def hold(self, ranks: Ranks) -> dict[str, Any]:
        """What came of each; the host waits for the device. Raises ValueError, on all ranks, for what had to
        be alike and is not."""
        mine = torch.zeros(self.LENGTH, dtype=torch.int64, device=ranks.device)
        known = [0 if isinstance(x, Tensor) else x for x in self.numbers]
        mine[: len(known)] = torch.tensor(known)
        for place, number in enumerate(self.numbers):
            if isinstance(number, Tensor):
                mine[place] = number
        table = ranks.gather(mine).T.tolist()
        results: dict[str, Any] = {}
        for name, rule, values in zip(self.names, self.rules, table):
            if rule == "alike":
                if len(set(values)) > 1:
                    raise ValueError(unlike(name, values))
                results[name] = values[0]
            elif rule == "any":
                results[name] = any(values)
            elif rule == "least":
                results[name] = min((x for x in values if x >= 0), default=None)
            else:
                results[name] = values
        return results


def unlike(name: str, values: list[int]) -> str:
    if name in ("hidden", "target", "tokens that count", "the number of tokens"):
        return (
            f"{name} must be the same on all ranks of a group that holds slices of the vocabulary, but"
            f" by rank there are {values} (numbers, or checksums). Where each rank has tokens of its own, as"
            " under FSDP, the weight is not vocabulary-parallel: pass weight.full_tensor(), or call this"
            " where it is gathered, and pass no group"
        )
    return f"{name} must be the same on all ranks of the group, got by rank (or checksums of it) {values}"


def local_hidden(hidden: Any, weight: Any, *, reduce: bool) -> tuple[Any, bool]:
    """hidden as a plain tensor, and whether the sum of the ranks' gradients of it is left to the call.

    A DTensor of the weight's mesh may be whole, Replicate(), or split, as sequence parallelism leaves it:
    then it is gathered here, and its gradient is summed and split again (a reduce-scatter). Of a weight that
    is whole on all ranks so is the gradient.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    mesh, placement = hidden.device_mesh, hidden.placements[0]
    same = hasattr(weight, "full_tensor") and weight.device_mesh == mesh
    if mesh.ndim != 1 or not same or not isinstance(placement, (Shard, Replicate)):
        raise ValueError(
            "hidden must be a plain tensor, or one split or whole on the mesh of a weight that is a DTensor,"
            f" got a DTensor of {hidden.placements} on {mesh}: pass hidden.full_tensor()"
        )
    reduce = reduce and isinstance(placement, Replicate)
    partial = isinstance(weight.placements[0], Shard) and not reduce
    whole = hidden.redistribute(placements=[Replicate()])
    return whole.to_local(grad_placements=[Partial() if partial else Replicate()]), reduce


def local_head(
    weight: Tensor, bias: Tensor | None, group: ProcessGroup | None
) -> tuple[Tensor, Tensor | None, ProcessGroup | None, bool]:
    """weight and bias as plain tensors, the group of their mesh if they are DTensors, and whether the weight
    is whole: then the group holds no slices of it, but copies."""
    whole = group is None
    if hasattr(weight, "full_tensor"):
        whole = not _is_split(weight)
        weight, group = _of_dtensor("weight", weight, group)
    if hasattr(bias, "full_tensor"):
        if _is_split(bias) == whole:
            raise ValueError("bias must be split as weight is, or whole as it is")
        bias, group = _of_dtensor("bias", bias, group)
    return weight, bias, group, whole


def _is_split(x: Any) -> bool:
    from torch.distributed.tensor import Replicate

    return any(placement != Replicate() for placement in x.placements)


def _of_dtensor(name: str, x: Any, group: ProcessGroup | None) -> tuple[Tensor, ProcessGroup | None]:
    """This rank's slice of a weight or bias that is a DTensor, and the group that holds the others.

    Its gradient becomes a DTensor of the same placement. Raises ValueError for what is no slice of the
    vocabulary, such as the parameters of FSDP2, which are split alike but whose ranks have other tokens.
    """
    from torch.distributed.tensor import Replicate, Shard

    mesh, placements = x.device_mesh, x.placements
    if _is_fsdp(x):
        raise ValueError(
            f"{name} must be a plain tensor or a slice of the vocabulary, got a DTensor of FSDP2, whose"
            " ranks have tokens of their own: call this where it is gathered, inside the forward of the"
            f" module that owns it, or pass {name}.full_tensor()"
        )
    if mesh.ndim != 1 or placements[0] not in (Shard(0), Replicate()):
        raise ValueError(
            f"{name} must be split by vocabulary, Shard(0), or whole, Replicate(), on a mesh of one"
            f" dimension, got a DTensor of {placements} on {mesh.ndim} dimensions; else pass"
            f" {name}.full_tensor()"
        )
    local = x.to_local(grad_placements=placements)
    if placements[0] == Replicate() and group is not None and name == "weight":
        raise ValueError("group must be None for a weight that is whole on all ranks, Replicate()")
    own = mesh.get_group()
    if group is not None and group != own:
        raise ValueError(f"group must be the group of {name}'s mesh, or None")
    return local, own


def _is_fsdp(x: Any) -> bool:
    """Whether x is a parameter that FSDP2 keeps in slices."""
    import sys

    state = sys.modules.get("torch.distributed._composable_state")
    for found in list(getattr(state, "_module_state_mapping", {}).values()):
        one = found() if callable(found) else found
        groups = getattr(one, "_fsdp_param_groups", None) or [getattr(one, "_fsdp_param_group", None)]
        for parameters in groups:
            if any(p.sharded_param is x for p in getattr(parameters, "fsdp_params", ())):
                return True
    return False
