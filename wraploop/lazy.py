"""Packages whose names are imported when they are first asked for (PEP 562).

Who wraps a model needs no loop, and a loop seldom needs every callback. A package's `__init__.pyi`
says the same to type checkers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any


def attach(
    package: str, names: Mapping[str, str], modules: Iterable[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """A package's `__getattr__`, `__dir__` and `__all__`.

    Args:
        package: its whole name, as its `__name__` says.
        names: of each module, those that are the package's too, with spaces between.
        modules: those that `__all__` has as they are; each other can be asked for too.
    """
    homes = {name: module for module, listed in names.items() for name in listed.split()}
    public = [*homes, *modules]
    here = vars(sys.modules[package])

    def __getattr__(name: str) -> Any:
        if name in homes:
            here[name] = getattr(import_module(f".{homes[name]}", package), name)
            return here[name]
        module = f"{package}.{name}"
        try:
            return import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return __getattr__, lambda: sorted({*here, *public}), public
