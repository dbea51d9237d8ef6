"""Argument checks: one clear ValueError, before anything is computed.

Values are read only on the CPU, and not under torch.compile; reading them on a GPU would wait for the device,
and a graph that is being traced has none. There the kernels answer a bad target, temperature or mask with
NaN instead.
"""

from __future__ import annotations

import importlib.util
import math
from numbers import Integral, Real
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from aer_fast.reference import IGNORE

Impl = Literal["auto", "triton", "torch", "reference"]

_INT64 = torch.iinfo(torch.int64).max
_LARGEST = torch.finfo(torch.float32).max
_HAS_TRITON = importlib.util.find_spec("triton") is not None  # which torch.compile could not ask
_HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


def resolve_impl(impl: str, logits: Tensor) -> str:
    """Return "triton", "torch" or "reference". An explicit choice never falls back."""
    if impl not in get_args(Impl):
        raise ValueError(f"impl must be one of {', '.join(get_args(Impl))}, got {impl!r}")
    if impl == "auto":
        fits = logits.is_cuda and logits.dtype != torch.float64
        impl = "triton" if fits and _HAS_TRITON else "torch"
    if impl == "triton":
        if not _HAS_TRITON:
            raise ValueError("impl='triton' needs the package triton, which is not installed")
        from aer_fast.kernels.primitives import INTERPRETED

        if not (logits.is_cuda or INTERPRETED):
            raise ValueError(
                f"impl='triton' needs tensors on a GPU, got {logits.device}"
                " (or TRITON_INTERPRET=1 in the environment before triton is imported)"
            )
        if logits.dtype not in _HALF_AND_SINGLE:
            raise ValueError(f"impl='triton' takes float32, bfloat16 or float16, got {logits.dtype}")
    return impl


def check_logits(logits: Tensor, target: Tensor, *, whole: bool = True) -> None:
    """logits [..., V] floating point; target [...] int64 on the same device.

    Not ``whole``: some columns of them, or none.
    """
    check_tensor("target", target)
    check_entries("logits", logits, whole=whole)
    check_target(target, logits, "logits without V")


def check_entries(name: str, logits: Tensor, *, whole: bool = True) -> None:
    """[..., V] floating point, with V >= 1 where they are ``whole``."""
    check_tensor(name, logits)
    if logits.dtype not in (*_HALF_AND_SINGLE, torch.float64):
        raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {logits.dtype}")
    if logits.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got layout {logits.layout}")
    if logits.dim() == 0 or (whole and logits.shape[-1] == 0):
        raise ValueError(f"{name} must be [..., V] with V >= 1, got {tuple(logits.shape)}")


def check_target(target: Tensor, like: Tensor, what: str) -> None:
    """int64, on the device and in the leading shape of ``like``."""
    if target.dtype != torch.int64:
        raise ValueError(f"target must be int64, got {target.dtype}")
    if target.shape != like.shape[:-1]:
        shape = tuple(like.shape[:-1])
        raise ValueError(f"target must have the shape of {what}, {shape}, got {tuple(target.shape)}")
    check_device("target", target, like)


def unpadded(logits: Tensor, vocab_size: int | None) -> Tensor:
    """The logits of the words alone."""
    check_count("vocab_size", vocab_size)
    V = check_vocab_size(vocab_size, logits.shape[-1])
    return logits if logits.shape[-1] == V else logits[..., :V]


def readable(x: Tensor) -> bool:
    """Whether the host may look at the values of x: not on a GPU, and not while a graph is being traced."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


class Tokens(NamedTuple):
    """What every function is told of a token, checked, [N]."""

    target: Tensor
    temperature: Tensor
    mask: Tensor | None  # weights >= 0; None for a function without
    live: Tensor  # bool: unmasked


def check_tokens(
    target: Tensor,
    temperature: Tensor | float,
    mask: Tensor | float | None,
    V: int | None,
    dtype: torch.dtype,
    *,
    kernel: bool = False,
) -> Tokens:
    """Targets of live tokens in [0, V), their temperatures positive and finite, mask >= 0, or None.

    Of an unknown V targets are checked later, by `check_range`.

    Where values may not be read, a bad temperature or mask becomes NaN, and so its row. A bad target gives
    NaN by itself, as no piece of the row holds it. ``kernel``: a Triton kernel does all that on its own.
    """
    flat = savable(target).reshape(-1)
    live, weight = flat != IGNORE, None
    if mask is not None:
        weight = per_token("mask", mask, target, dtype)
        if isinstance(mask, Tensor) or not mask:
            live = live & (weight != 0)
    if readable(target):
        if V is not None:
            check_range(flat, live, V)
        if weight is not None and not (weight >= 0).all():
            raise ValueError(f"mask must be >= 0, got {weight[~(weight >= 0)][0].item()}")
    elif not kernel and weight is not None and isinstance(mask, Tensor) and mask.dtype != torch.bool:
        weight = weight.where(weight >= 0, torch.nan)
    checked = temperatures("temperature", temperature, target, live, dtype, kernel=kernel)
    return Tokens(flat, checked, weight, live)


def temperatures(
    name: str,
    value: Tensor | float,
    target: Tensor,
    live: Tensor,
    dtype: torch.dtype,
    *,
    kernel: bool = False,
) -> Tensor:
    """[N], positive and finite where live."""
    found = per_token(name, value, target, dtype)
    if readable(target):
        bad = live & ~((found >= torch.finfo(dtype).tiny) & found.isfinite())  # 1 / τ is finite, too
        if bad.any():
            why = " whose inverse is not" if found[bad][0] > 0 and found[bad][0].isfinite() else ""
            raise ValueError(f"{name} must be positive and finite, got {found[bad][0].item()}{why}")
    elif not kernel and isinstance(value, Tensor):
        # in few operations: a device is idle while they are launched. A number was checked
        found = found.where((found > 0) & (found < math.inf), torch.nan)
    return found


def check_range(target: Tensor, live: Tensor, V: int) -> None:
    """Targets in [0, V), where they may be read."""
    if not readable(target):
        return
    bad = live & ((target < 0) | (target >= V))
    if bad.any():
        raise ValueError(f"target must be in [0, V={V}) or {IGNORE} (ignored), got {target[bad][0].item()}")


def check_vocab_size(vocab_size: int | None, words: int) -> int:
    """The number of words of a head that may be padded to ``words``."""
    if vocab_size is not None and vocab_size > words:
        raise ValueError(
            f"vocab_size must be at most the {words} entries that the head has, got {vocab_size}"
        )
    return words if vocab_size is None else int(vocab_size)


def check_softcap(softcap: float | None, name: str = "softcap") -> float | None:
    if softcap is None:
        return None
    check_number(name, softcap)
    if softcap <= 0:
        raise ValueError(f"{name} must be positive or None, got {softcap}")
    return float(softcap)


def per_token(name: str, value: Tensor | float, target: Tensor, dtype: torch.dtype) -> Tensor:
    """A number, a 0-d tensor or a tensor that broadcasts against target, as a constant [N]."""
    if isinstance(value, Tensor):
        if not (value.is_floating_point() or (name == "mask" and value.dtype == torch.bool)):
            kinds = "bool or floating point" if name == "mask" else "floating point"
            raise ValueError(f"{name} must be {kinds}, got {value.dtype}")
        check_broadcast(name, value, target)
        if value.dim() > 0 or value.device.type != "cpu":
            check_device(name, value, target)
            return savable(value).to(dtype).expand(target.shape).reshape(-1).contiguous()
        if not readable(value):
            return filled((target.numel(),), value.detach(), dtype, target.device)
        value = float(value.item())  # as torch does: a 0-d CPU tensor goes with any device
        if math.isfinite(value):
            check_number(name, value)
    elif not (name == "mask" and isinstance(value, bool)):
        check_number(name, value)
    if name.endswith("temperature") and not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
    if name == "mask" and not value >= 0:
        raise ValueError(f"mask must be >= 0, got {value}")
    return filled((target.numel(),), value, dtype, target.device)


def filled(shape: tuple[int, ...], value: Tensor | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor full of a number, or of a 0-d tensor on the CPU that is not to be read."""
    if torch.compiler.is_compiling():  # torch.full would be compiled anew for every number
        return (torch.ones(shape, dtype=dtype, device=device) * value).to(dtype)
    return torch.full(shape, float(value), dtype=dtype, device=device)


def check_broadcast(name: str, value: Tensor, target: Tensor) -> None:
    """0-d, or of the rank of target with sizes 1 or equal."""
    check_tensor(name, value)
    fits = value.dim() == target.dim() and all(s in (1, n) for s, n in zip(value.shape, target.shape))
    if value.dim() > 0 and not fits:
        raise ValueError(
            f"{name} must be a number, a 0-d tensor or have the rank of target with sizes 1 or"
            f" {tuple(target.shape)}, got {tuple(value.shape)}"
        )


def savable(constant: Tensor) -> Tensor:
    """The constant without its history; a copy if it was made under inference_mode and grad mode is on."""
    constant = constant.detach()
    if torch.compiler.is_compiling():  # there it can't be asked how it was made
        return constant
    return constant.clone() if constant.is_inference() and torch.is_grad_enabled() else constant


def denominator_scale(denominator: Tensor | float | None, weight: Tensor, live: Tensor) -> Tensor:
    """1 / denominator as a 0-d tensor; 0 when no token is live."""
    if denominator is None:
        total = weight.sum()  # 0 when none is live, and NaN where a weight is
        return torch.where(total == 0, total, 1.0 / total)
    if isinstance(denominator, Tensor):
        if denominator.dim() != 0:
            raise ValueError(f"denominator must be a number or a 0-d tensor, got {tuple(denominator.shape)}")
        if readable(denominator):
            return denominator_scale(denominator.item(), weight, live)
        if denominator.device.type == "cpu":
            total = filled((), denominator.detach(), weight.dtype, weight.device)
        else:
            check_device("denominator", denominator, weight)
            total = denominator.detach().to(weight.dtype)
    else:
        check_number("denominator", denominator)
        if denominator < 0 or (denominator == 0 and readable(live) and live.any()):
            raise ValueError(f"denominator must be positive, got {denominator}")
        if denominator > 0 and not torch.compiler.is_compiling():  # nothing is asked of the device
            scale = (1.0 / torch.tensor(float(denominator), dtype=weight.dtype)).item()
            if scale < math.inf:  # or 0 tokens would not give 0
                return filled((), scale, weight.dtype, weight.device)
        total = filled((), denominator, weight.dtype, weight.device)
    return (1.0 / total).where(total > 0, torch.nan).where(live.any(), 0.0)


def is_number(value: object) -> bool:
    """A finite real number that float32 can hold."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return abs(float(value)) <= _LARGEST
    except OverflowError:  # an integer beyond float64
        return False


def check_number(name: str, value: object) -> None:
    if not is_number(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
    if hasattr(value, "full_tensor"):
        raise ValueError(f"{name} must be a plain tensor, got a DTensor: pass {name}.full_tensor()")


def check_device(name: str, value: Tensor, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {value.device}")


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    whole: bool = True,
    prefix: str = "",
) -> None:
    """hidden [..., D], weight [V, D] and bias [V] of one dtype and device; target [...] int64.

    Not ``whole``: a slice of a vocabulary, which may be empty. ``prefix`` is of the first three's names.
    """
    names = [f"{prefix}{name}" for name in ("hidden", "weight", "bias")]
    for name, value in zip((*names, "target"), (hidden, weight, bias, target)):
        if not (name == names[2] and value is None):
            check_tensor(name, value)
    if hidden.dtype not in (*_HALF_AND_SINGLE, torch.float64):
        raise ValueError(f"{names[0]} must be float32, bfloat16, float16 or float64, got {hidden.dtype}")
    if hidden.layout != torch.strided:
        raise ValueError(f"{names[0]} must be a dense tensor, got layout {hidden.layout}")
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"{names[0]} must be [..., D] with D >= 1, got {tuple(hidden.shape)}")
    D = hidden.shape[-1]
    if weight.dim() != 2 or (whole and weight.shape[0] == 0) or weight.shape[1] != D:
        raise ValueError(f"{names[1]} must be [V, D] with V >= 1 and D={D}, got {tuple(weight.shape)}")
    V = weight.shape[0]
    if bias is not None and bias.shape != (V,):
        mine = "" if whole else " of this rank's slice"
        raise ValueError(f"{names[2]} must be [V] with V={V}{mine}, got {tuple(bias.shape)}")
    casts = hidden.dtype != torch.float64 and torch.is_autocast_enabled(hidden.device.type)
    for name, value in zip(names[1:], (weight, bias)):
        if value is None:
            continue
        if value.layout != torch.strided:
            raise ValueError(f"{name} must be a dense tensor, got layout {value.layout}")
        if value.dtype != hidden.dtype and not (casts and value.dtype in _HALF_AND_SINGLE):
            raise ValueError(f"{name} must have the dtype of {names[0]}, {hidden.dtype}, got {value.dtype}")
        check_device(name, value, hidden)
    check_target(target, hidden, f"{names[0]} without D")


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_count(name: str, value: object) -> None:
    """None, or an integer of at least 1."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
        raise ValueError(f"{name} must be an integer >= 1 or None, got {value!r}")


def check_size(name: str, value: object, least: int, most: int | None = None) -> None:
    """An integer of at least ``least`` and at most ``most``, and of int64."""
    number = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
    if number is None or not least <= number <= (_INT64 if most is None else most):
        bound = f">= {least}" if most is None else f"within [{least}, {most}]"
        got = "one beyond int64" if number is not None and abs(number) > _INT64 else repr(value)
        raise ValueError(f"{name} must be an integer {bound}, got {got}")


def token_tensor(k: int, value: object, target: Tensor, dtype: torch.dtype) -> Tensor:
    """The k-th tensor of an objective: of any dtype, a number, 0-d or broadcast against target; [N]."""
    name = f"token_tensors[{k}]"
    if not isinstance(value, Tensor):
        check_number(name, value)
        kind = torch.int64 if isinstance(value, Integral) and abs(int(value)) <= _INT64 else dtype
        return torch.full((target.numel(),), value, dtype=kind, device=target.device)  # type: ignore[call-overload,no-any-return]
    check_broadcast(name, value, target)
    if value.dim() > 0:
        check_device(name, value, target)
    return savable(value).to(target.device).expand(target.shape).reshape(-1)


def check_boundaries(cu_seqlens: Tensor | None, N: int) -> Tensor | None:
    """None, or integers ascending from 0 to N, on the CPU; read by the host."""
    if cu_seqlens is None:
        return None
    check_tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or len(cu_seqlens) == 0:
        raise ValueError(
            f"cu_seqlens must be [S + 1] int32 or int64, got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        )
    places = cu_seqlens.detach().cpu().long()
    if places[0] != 0 or places[-1] != N or (places.diff() < 0).any():
        raise ValueError(f"cu_seqlens must ascend from 0 to the number of tokens, {N}, got {places.tolist()}")
    return places
