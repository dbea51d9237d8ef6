"""Another forward for a single module, which whatever copies the module copies with it.

A forward kept on the instance is a method bound to that instance. Pickle does not find it again, and a copy
of its ``__dict__``, such as DataParallel's replicas, still computes with the weights of the first. Here the
module gets a class made of its own: a forward on a class is told which module it is called on.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from types import MethodType
from typing import Any

# Called with the module, the forward it had, bound to it, the settings, and what the module is called with.
Forward = Callable[..., Any]

_STATE = "_aer_fused"  # on the instance
_BASE = "_aer_base"  # on a class that was made here: what it was made of


@dataclass(frozen=True)
class _State:
    """What a module carries; nothing of the module itself, so copies may share it."""

    settings: Any
    before: Callable[..., Any] | None  # the forward somebody had put on the instance before
    bound: bool  # whether that was a method of the instance; ``before`` is its function

    def before_of(self, module: Any) -> Any:
        return MethodType(self.before, module) if self.before is not None and self.bound else self.before

    def original(self, module: Any, base: Any) -> Callable[..., Any]:
        """The forward that the module, of class ``base``, had."""
        if self.before is None:
            return MethodType(base.forward, module)

        def call(*args: Any, **kwargs: Any) -> Any:
            before = _in_before.set(_in_before.get() | {id(module)})
            try:
                return self.before_of(module)(*args, **kwargs)
            finally:
                _in_before.reset(before)

        return call


# The modules whose ``before`` is running: what that finds at type(module).forward is what it was made for.
_in_before: ContextVar[frozenset[int]] = ContextVar("_in_before", default=frozenset())


def settings_of(module: Any) -> Any:
    """What `put_forward` was given for the module; None if it has no other forward."""
    state: _State | None = getattr(module, _STATE, None)
    return None if state is None else state.settings


def put_forward(module: Any, forward: Forward, settings: Any) -> None:
    """Give the module another forward, a function of a module (for pickle), instead of one from here."""
    if settings_of(module) is not None:
        take_forward(module)
    before = module.__dict__.pop("forward", None)
    bound = isinstance(before, MethodType) and before.__self__ is module
    setattr(module, _STATE, _State(settings, before.__func__ if bound else before, bound))
    base: Any = type(module)
    if not any(_BASE in vars(cls) for cls in base.__mro__):
        module.__class__ = _class_with(base, forward)


def take_forward(module: Any) -> None:
    """Undo `put_forward`."""
    state: _State = module.__dict__.pop(_STATE)
    # where FSDP2 has made a class of this one that stays: without a state its forward is the base's
    module.__class__ = vars(type(module)).get(_BASE, type(module))
    if _is_own(module):
        del module.forward
    if state.before is not None and "forward" not in module.__dict__:
        module.forward = state.before_of(module)


def is_covered(module: Any) -> bool:
    """Whether somebody has put a forward on the instance since."""
    return "forward" in module.__dict__ and not _is_own(module)


def _is_own(module: Any) -> bool:
    """Whether the forward on the instance is one from here, bound: accelerate leaves it when it unwraps."""
    function = getattr(module.__dict__.get("forward"), "__func__", None)
    return function is not None and _BASE in vars(function)


@functools.cache
def _class_with(base: Any, forward: Forward) -> Any:
    """A subclass of ``base`` with its name, which logs, configurations and transformers' registries go by."""

    @functools.wraps(base.forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        state: _State | None = getattr(self, _STATE, None)
        if state is None or (state.before is not None and id(self) in _in_before.get()):
            return base.forward(self, *args, **kwargs)
        return forward(self, state.original(self, base), state.settings, *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        made = base.__reduce_ex__(self, max(int(protocol), 2))
        return (_new, (base, forward), *made[2:]) if type(self) is cls else made

    # `generate` reads what a forward takes; what unwraps functions (accelerate) must not get below this one
    call.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    del call.__wrapped__
    setattr(call, _BASE, base)
    names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    cls: Any = type(base)(
        base.__name__, (base,), names | {_BASE: base, "forward": call, "__reduce_ex__": reduce}
    )
    return cls


def _new(base: Any, forward: Forward) -> Any:
    """A module of the class, to be filled by pickle or copy."""
    cls = _class_with(base, forward)
    return cls.__new__(cls)
