"""Triton's interpreter, without what it does again and again.

It puts its own functions in the place of those of triton.language for every kernel it launches, and again, on
top of these, for every device function that the kernel calls: half of its time. Here a launch does it once.
"""

from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def replace_once_a_launch() -> None:
    """From now on; without effect on a Triton that does it in another way."""
    try:
        replace, nothing = interpreter._patch_lang, interpreter._LangPatchScope
    except AttributeError:
        return
    everywhere = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    launched: list[Any] = []

    class Scope(nothing):  # type: ignore[misc, valid-type]
        def restore(self) -> None:
            launched.pop().restore()

    def once(function: Any) -> Any:
        if launched:  # a device function: its kernel has done it
            return nothing()
        launched.append(replace(everywhere))
        return Scope()

    interpreter._patch_lang = once
