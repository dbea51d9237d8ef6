"""How the sequences of a packed row are kept apart: attention without a mask, or flash attention's arguments.

transformers' own SDPA has a mask of T × T entries for a packed row, and computes what lies between sequences,
too, for nothing. `packed_sdpa`, registered beside it, calls the same function once for each run of
neighbouring sequences of one length, causal and without a mask: the same sums. Whatever is no packed row
(padded batches, generation, patterns that are not causal) goes to transformers' SDPA with its mask.

A prompt that several responses share stands in a packed row once: each of them attends to it and to itself.
So it is computed once for all of them, in every layer, forward and backward (as in Prefix Grouper, arXiv
2506.05433). `row_of` tells the attention of it, which the mask of transformers can't. Short responses attend
to it together, with a mask between them; for each long one it is computed again before its own tokens, as if
it were not shared: its keys and values are copied for at most as many tokens as the responses have twice.

T tokens of a packed row, H heads, C channels of a head; n sequences of L tokens.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.import_utils import is_flash_attn_2_available

from training.batch import Batch, Part, stretches
from training.config import Config

PACKED = "packed_sdpa"
FLASH = "flash_attention_2"


@dataclass(frozen=True)
class Packed:
    """What stands for the mask of a packed row."""

    parts: tuple[Part, ...]
    window: int | None  # tokens that a token attends to, itself included; None: all before it
    # those of responses, one for all layers
    masks: dict[tuple[Part, ...], Tensor] = field(default_factory=dict, compare=False, repr=False)


_row: ContextVar[tuple[Part, ...] | None] = ContextVar("parts of the row that a model runs on", default=None)


@contextmanager
def row_of(batch: Batch) -> Iterator[None]:
    """What `packed_mask` is to know of the batch that a model is run on."""
    before = _row.set(batch.parts)
    try:
        yield
    finally:
        _row.reset(before)


def packed_mask(**given: Any) -> Tensor | Packed | None:
    """The mask function of `PACKED`: a `Packed` of a packed row, else the mask of transformers' SDPA.

    Raises:
        ValueError: if prompts are shared in the row, and the mask is not that of the row.
    """
    found, parts = _packed(**given), _row.get()
    if parts is None or not any(part.prompt for part in parts):
        mask: Tensor | Packed | None = found or sdpa_mask(**given)
        return mask
    if found is None or stretches(parts) != [part.length for part in found.parts]:
        raise ValueError(f"attention {PACKED!r}: the model's mask is not that of the row it is run on")
    return replace(found, parts=parts)


def _packed(
    *,
    batch_size: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    q_length: int | None = None,
    device: torch.device | str | None = None,
    cache_position: Tensor | None = None,
    **_: Any,
) -> Packed | None:
    """The sequences of a packed row, as ``mask_function`` tells them apart, of which the mask would be made.

    It is asked along three lines of the mask: below the diagonal, false where a sequence begins; above it,
    where nothing may be attended to; and the row of the longest sequence's last token, where a window shows.
    """
    if cache_position is not None:  # of transformers 5.0; later ones say q_length and device
        q_length, device = len(cache_position), cache_position.device
    whole = batch_size == 1 and q_length == kv_length > 1 and attention_mask is None
    if allow_is_causal_skip or use_vmap or not whole:
        return None
    t = torch.arange(kv_length, device=device)

    def attends(query: Tensor, key: Tensor) -> Tensor:
        first = torch.zeros_like(key)
        return mask_function(first, first, query, key)

    if attends(t[:-1], t[1:]).any():
        return None
    starts = (~attends(t[1:], t[:-1])).nonzero().flatten() + 1
    ends = [*starts.tolist(), kv_length]
    lengths = tuple(end - start for start, end in zip([0, *ends], ends))
    longest = max(lengths)
    end = ends[lengths.index(longest)]
    seen = attends(t[end - 1].expand(longest), t[end - longest : end]).tolist()
    window = sum(seen)
    if not all(seen[longest - window :]):
        return None
    return Packed(tuple(map(Part, lengths)), window if window < longest else None)


def packed_sdpa(
    module: torch.nn.Module,
    query: Tensor,  # [1, H, T, C]
    key: Tensor,  # [1, H or fewer, T, C]
    value: Tensor,  # [1, H or fewer, T, C]
    attention_mask: Tensor | Packed | None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """The attention function of `PACKED`: [1, T, H, C].

    Raises:
        ValueError: for a softcap, a bias or a sink of the scores, of which SDPA without a mask knows nothing.
    """
    if not isinstance(attention_mask, Packed):
        whole: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **settings
        )
        return whole
    for name in ("softcap", "position_bias", "s_aux"):
        if settings.get(name) is not None:
            raise ValueError(f"attention {PACKED!r} has no {name}")
    settings["is_causal"] = True  # the mask function says so, whatever the module does
    pieces = pieces_of(attention_mask.parts)
    # not n slices, the gradient of each of which would be as long as the row
    sizes = [sum(part.length for part in piece) for piece in pieces]
    split = [x[0].split(sizes, 1) for x in (query, key, value)]
    found: list[Tensor] = []
    prompt: list[Tensor] = []  # of the sequence before, [1, H or fewer, prompt, C] each
    for piece, *run in zip(pieces, *split):
        part = piece[0]
        if is_short(part):
            mask = _mask(attention_mask, piece, query)
            out = _together(run[0], run[1], run[2], prompt[1], prompt[2], mask, settings)
        else:
            # [H, n · L, C] as [n, H, L, C], which copies nothing
            q, k, v = (x.unflatten(1, (len(piece), part.length)).transpose(0, 1) for x in run)
            if part.prompt:
                q, k, v = (torch.cat([x.expand(len(q), -1, -1, -1), y], 2) for x, y in zip(prompt, (q, k, v)))
            else:
                prompt = [q[-1:], k[-1:], v[-1:]]
            band = _band(q.shape[2], attention_mask.window, query.device)
            out = sdpa_attention_forward(module, q, k, v, band, **settings)[0]
            out = out[:, part.prompt :].flatten(0, 1)
        found.append(out)
    return torch.cat(found)[None], None


def is_short(part: Part) -> bool:
    """Whether it is a response that is shorter than half of the prompt before it."""
    return 2 * part.length < part.prompt


def pieces_of(parts: Sequence[Part]) -> list[list[Part]]:
    """The parts of a row that are computed at once: neighbours of one length, or short responses to one
    prompt which are no longer together than the prompt is."""
    pieces: list[list[Part]] = []
    for part in parts:
        before = pieces[-1] if pieces else [Part(0)]
        if is_short(part) and is_short(before[0]):
            joins = sum(x.length for x in before) + part.length <= part.prompt
        else:
            joins = part == before[0]
        if joins:
            before.append(part)
        else:
            pieces.append([part])
    return pieces


def _band(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """What the tokens of a sequence attend to, [1, 1, L, L], where that is not everything before them."""
    if window is None or window >= length:
        return None
    band = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return band.triu(1 - window)[None, None]


def _mask(packed: Packed, piece: Sequence[Part], query: Tensor) -> Tensor:
    """What responses of n tokens in all add to their scores, [n, prompt + n]: 0 or -inf."""
    key = tuple(piece)
    if key not in packed.masks:
        lengths = [part.length for part in piece]
        prompt, t = piece[0].prompt, torch.cat([torch.arange(length) for length in lengths])
        sequence = torch.arange(len(piece)).repeat_interleave(torch.tensor(lengths))
        behind = torch.cat([t[:, None] + prompt - torch.arange(prompt), t[:, None] - t], 1)
        seen = (behind >= 0) & (behind < (packed.window or behind.numel()))
        seen[:, prompt:] &= sequence[:, None] == sequence
        mask = torch.zeros(seen.shape, dtype=query.dtype).masked_fill_(~seen, -torch.inf)
        packed.masks[key] = mask.to(query.device)
    return packed.masks[key]


def _together(
    query: Tensor,  # [H, n, C]
    key: Tensor,  # [H / g, n, C]
    value: Tensor,  # [H / g, n, C]
    prompt_key: Tensor,  # [1, H / g, prompt, C]
    prompt_value: Tensor,  # [1, H / g, prompt, C]
    mask: Tensor,  # [n, prompt + n]
    settings: dict[str, Any],
) -> Tensor:
    """Attention of responses of n tokens in all to the prompt before them and each to itself: [n, H, C].

    The g heads of a group stand in a batch: with a mask, transformers would copy keys and values for each.
    """
    groups = len(key)
    heads = len(query) // groups
    k, v = (
        torch.cat([x, y[None]], 2).expand(heads, -1, -1, -1)
        for x, y in ((prompt_key, key), (prompt_value, value))
    )
    out: Tensor = torch.nn.functional.scaled_dot_product_attention(
        query.unflatten(0, (groups, heads)).transpose(0, 1),
        k,
        v,
        attn_mask=mask,
        dropout_p=settings.get("dropout", 0.0),
        scale=settings.get("scaling"),
    )
    apart: Tensor = out.transpose(0, 1).flatten(0, 1)  # [H, n, C]
    return apart.transpose(0, 1)


AttentionInterface.register(PACKED, packed_sdpa)
AttentionMaskInterface.register(PACKED, packed_mask)


def requested(config: Config, device: torch.device) -> str | None:
    """What a model is loaded with; None leaves it to transformers, which takes SDPA where a model has it."""
    if config.attention in ("auto", PACKED):
        return None
    if config.attention.startswith("flash_attention_") and device.type != "cuda":
        raise ValueError(f"attention {config.attention!r} needs a GPU")
    return config.attention


def settle(model: Any, config: Config, device: torch.device) -> None:
    """Give a causal LM of transformers, as it was loaded, what "auto" or `PACKED` stands for.

    A model that flash attention can serve tells its attention all that counts, and reads no mask itself; one
    that it can't serve keeps transformers' choice. Nothing is downloaded.

    Raises:
        ValueError: if it can't have the `PACKED` that was asked for.
    """
    auto, served = config.attention == "auto", getattr(model, "_supports_flash_attn", False)
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    if config.attention == PACKED or (auto and config.packing and device.type == "cpu"):
        if served and not capped and name_of(model) == "sdpa":
            model.set_attn_implementation(PACKED)  # does nothing to an SDPA that is the model's own
        if not auto and name_of(model) != PACKED:
            raise ValueError(f"attention {PACKED!r} can't be that of {type(model).__name__}")
    elif auto and device.type == "cuda" and config.dtype == "bfloat16" and is_flash_attn_2_available():
        # for models that are made for other versions transformers would download one of those
        versions = getattr(model, "_compatible_flash_implementations", None) or [FLASH]
        if served and FLASH in versions:
            model.set_attn_implementation(FLASH)
    if capped and name_of(model) == "sdpa":  # transformers 5.0 would leave the softcap out
        if not auto:
            raise ValueError(f"attention 'sdpa' can't be that of {type(model).__name__}: it has a softcap")
        model.set_attn_implementation("eager")


def name_of(model: Any) -> str | None:
    """The name of a model's attention, of its language model where it is more than that."""
    name: str | None = model.config.get_text_config()._attn_implementation
    return name


def flash_arguments(body: Any, batch: Batch) -> dict[str, Any]:
    """What flash attention is told of a packed row: boundaries [b + 1] on the device, and whole numbers.

    Else it looks for them in position_ids, for which the host waits in every layer. Nothing for other
    attentions, nor for a body that takes no such arguments.
    """
    if "flash" not in (name_of(body) or ""):
        return {}
    parameters = inspect.signature(body.forward).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return {}
    ends, longest = batch.boundaries, batch.longest
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
