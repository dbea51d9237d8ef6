"""How the sequences of a packed row are kept apart: attention without a mask, or flash attention's arguments.

transformers' own SDPA has a mask of T × T entries for a packed row, and computes what lies between sequences,
too, for nothing. `packed_sdpa`, registered beside it, calls the same function once for each run of
neighbouring sequences of one length, causal and without a mask: the same sums. Whatever is no packed row
(padded batches, generation, patterns that are not causal) goes to transformers' SDPA with its mask.

A prompt that several responses share stands in a packed row once: each of them attends to it and to itself.
So it is computed once for all of them, in every layer, forward and backward (as in Prefix Grouper, arXiv
2506.05433). `row_of` tells the attention of it, which the mask of transformers can't.

T tokens of a packed row, H heads, C channels of a head; n sequences of L tokens.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import groupby
from typing import Any, NamedTuple

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


class Packed(NamedTuple):
    """What stands for the mask of a packed row."""

    parts: tuple[Part, ...]
    window: int | None  # tokens that a token attends to, itself included; None: all before it


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
    return found._replace(parts=parts)


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
    runs = [(part, len(list(alike))) for part, alike in groupby(attention_mask.parts)]
    # not n slices, the gradient of each of which would be as long as the row
    sizes = [part.length * count for part, count in runs]
    split = [x[0].split(sizes, 1) for x in (query, key, value)]
    found: list[Tensor] = []
    prompt: list[Tensor] = []  # keys and values [1, H or fewer, prompt, C] of the sequence before
    for (part, count), *run in zip(runs, *split):
        # [H, n · L, C] as [n, H, L, C], which copies nothing
        q, k, v = (x.unflatten(1, (count, part.length)).transpose(0, 1) for x in run)
        band = _band(part, attention_mask.window, query.device)
        if part.prompt:
            k, v = (torch.cat([x.expand(count, -1, -1, -1), y], 2) for x, y in zip(prompt, (k, v)))
            out = _go_on(q, k, v, band, settings)
        else:
            mask = None if band is None else band[None, None]
            out = sdpa_attention_forward(module, q, k, v, mask, **settings)[0]
            prompt = [k[-1:], v[-1:]]
        found.append(out.flatten(0, 1))
    return torch.cat(found)[None], None


def _band(part: Part, window: int | None, device: torch.device) -> Tensor | None:
    """What the queries of a part attend to, [L, prompt + L]; None: that is everything, or, of a part that
    begins a sequence, everything before them."""
    length, total = part.length, part.prompt + part.length
    narrow = window is not None and total > window
    if not narrow and (not part.prompt or length == 1):
        return None
    band = torch.ones(length, total, dtype=torch.bool, device=device).tril(part.prompt)
    return band.triu(part.prompt + 1 - window) if window is not None else band


def _go_on(
    query: Tensor,  # [n, H, L, C]
    key: Tensor,  # [n, H / g, prompt + L, C]
    value: Tensor,  # [n, H / g, prompt + L, C]
    band: Tensor | None,  # [L, prompt + L]
    settings: dict[str, Any],
) -> Tensor:
    """Attention of responses to the prompt before them and to themselves: [n, L, H, C].

    The g heads of a group stand below each other as if they were more tokens: with a mask, transformers would
    copy keys and values for each of them.
    """
    heads, groups = query.shape[1], key.shape[1]
    out: Tensor = torch.nn.functional.scaled_dot_product_attention(
        query.unflatten(1, (groups, -1)).flatten(2, 3),
        key,
        value,
        attn_mask=None if band is None else band.repeat(heads // groups, 1),
        dropout_p=settings.get("dropout", 0.0),
        scale=settings.get("scaling"),
    )
    apart: Tensor = out.unflatten(2, (heads // groups, -1)).flatten(1, 2)  # [n, H, L, C]
    return apart.transpose(1, 2)


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
