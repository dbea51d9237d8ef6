"""How peers are imported whose packages need a cluster of others."""

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any


def enter(package: str) -> None:
    """Make a package's submodules importable without running its own code, unless that has run already."""
    parent, _, _ = package.rpartition(".")
    if parent:
        enter(parent)
    if package in sys.modules:
        return
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ImportError(f"no module {package}")
    sys.modules[package] = importlib.util.module_from_spec(spec)


def stand_in(module: str, **names: Any) -> None:
    """What a peer imports from a module when it runs, where that module is there and can't be imported.

    TRL's backward asks a module that imports datasets how to gather a head that DeepSpeed has sharded.
    """
    parent = module.rpartition(".")[0]
    if importlib.util.find_spec(parent) is None:
        return
    try:
        importlib.import_module(module)
    except ImportError:
        enter(parent)
        made = sys.modules[module] = ModuleType(module)
        vars(made).update(names)
