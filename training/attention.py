"""How the sequences of a packed row are kept apart: attention without a mask, or flash attention's arguments.

transformers' own SDPA has a mask of T × T entries for a packed row, and computes what lies between sequences,
too, for nothing. `packed_sdpa`, registered beside it, calls the same function once for each run of
neighbouring sequences of one length, causal and without a mask: the same sums. Whatever is no packed row
(padded batches, generation, patterns that are not causal) goes to transformers' SDPA with its mask.

T tokens of a packed row, H heads, C channels of a head; n sequences of L tokens.
"""

import inspect
from collections.abc import Callable
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils.import_utils import is_flash_attn_2_available

from training.batch import Batch
from training.config import Config

PACKED = "packed_sdpa"
FLASH = "flash_attention_2"


class Packed(NamedTuple):
    """What stands for the mask of a packed row."""

    lengths: tuple[int, ...]  # of its sequences
    window: int | None  # tokens that a token attends to, itself included; None: all before it


def packed_mask(**given: Any) -> Tensor | Packed | None:
    """The mask function of `PACKED`: a `Packed` of a packed row, else the mask of transformers' SDPA."""
    found: Tensor | Packed | None = _packed(**given) or sdpa_mask(**given)
    return found


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
    return Packed(lengths, window if window < longest else None)


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
    runs = [(length, len(list(sequences))) for length, sequences in groupby(attention_mask.lengths)]
    # not n slices, the gradient of each of which would be as long as the row
    sizes = [length * count for length, count in runs]
    split = [x[0].split(sizes, 1) for x in (query, key, value)]
    parts = []
    for (length, count), *run in zip(runs, *split):
        # [H, n · L, C] as [n, H, L, C], which copies nothing
        q, k, v = (x.unflatten(1, (count, length)).transpose(0, 1) for x in run)
        mask = None
        if attention_mask.window is not None and length > attention_mask.window:
            band = torch.ones(1, 1, length, length, dtype=torch.bool, device=query.device)
            mask = band.tril().triu(1 - attention_mask.window)
        parts.append(sdpa_attention_forward(module, q, k, v, mask, **settings)[0].flatten(0, 1))
    return torch.cat(parts)[None], None


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
