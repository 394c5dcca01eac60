"""Copies of what holds a module's parts: containers, functions, objects.

A replica's modules must reach the replica's other modules and tensors wherever the originals reach
theirs: through attributes, lists, closures, bound methods, objects of the user's. Whatever leads to
none of them is not copied, but is the same object in every replica.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import weakref
from collections import deque
from collections.abc import Callable
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from .containers import ATOMS, CONTAINERS, tuple_like
from .tree import is_plain_object

_ENDS = (*ATOMS, complex, bytes, type, ModuleType, Tensor)  # which lead nowhere
_MOST = 20_000  # things that are looked at before giving up


class Copies:
    """What replaces what.

    Args:
        replaced: by the original's id, what stands for it in the replica.
        copy_module: makes a copy of a module, and puts it into `replaced` before its parts.

    Attributes:
        objects: the objects that have been copied, and their copies.
        containers: the containers that have been copied, and their copies.
    """

    def __init__(
        self, replaced: dict[int, Any], copy_module: Callable[[nn.Module], nn.Module]
    ) -> None:
        self._replaced = replaced
        self._copy_module = copy_module
        self._leads_nowhere: set[int] = set()
        self.objects: list[tuple[Any, Any]] = []
        self.containers: list[tuple[Any, Any]] = []

    def own(self, value: Any) -> Any:
        """What stands for `value` in a module's attribute; containers and objects are its own.

        Args:
            value: that; what cannot be copied stays the same object in all replicas.
        """
        if type(value) in ATOMS:
            return value
        if id(value) not in self._replaced and type(value) in CONTAINERS:
            return self._container(value, self.own)
        if isinstance(value, tuple):
            return tuple_like(value, [*map(self.own, value)])
        copied = self.of(value)
        return self._object(value) if copied is value and is_plain_object(value) else copied

    def of(self, value: Any) -> Any:
        """What stands for `value` in the replica: itself, unless it leads to the original's parts.

        Args:
            value: anything.
        """
        if type(value) in ATOMS:
            return value
        if id(value) in self._replaced:
            return self._replaced[id(value)]
        if issubclass(type(value), nn.Module):
            return self._copy_module(value)
        return self._rebuilt(value) if self._leads(value) else value

    def _leads(self, value: Any) -> bool:
        """Whether one gets from `value` to a module, or to something replaced."""
        seen: set[int] = set()
        left = [value]
        while left and len(seen) < _MOST:
            value = left.pop()
            if id(value) in self._replaced or issubclass(type(value), nn.Module):
                return True
            if isinstance(value, _ENDS) or id(value) in seen or id(value) in self._leads_nowhere:
                continue
            seen.add(id(value))
            left += _parts(value)
        self._leads_nowhere |= seen
        return False

    def _rebuilt(self, value: Any) -> Any:
        """A thing like `value`, made of what stands for its parts."""
        if isinstance(value, tuple):
            return tuple_like(value, [*map(self.of, value)])
        if isinstance(value, frozenset):
            return type(value)(map(self.of, value))
        if isinstance(value, MethodType):
            return MethodType(value.__func__, self.of(value.__self__))
        if isinstance(value, functools.partial):
            args, keywords = self.of(value.args), self.of(value.keywords)
            return functools.partial(self.of(value.func), *args, **keywords)
        if isinstance(value, weakref.ref):
            return weakref.ref(self.of(value()))
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, (list, set, deque, dict)):
            return self._container(value, self.of)
        return self._object(value)

    def _object(self, value: Any) -> Any:
        try:
            new = copy.copy(value)
        except Exception:  # an object that cannot be copied, which is noticed if it matters
            return value
        if new is value:
            return value
        self._replaced[id(value)] = new
        self.objects.append((value, new))
        for name, part in vars(value).items():
            copied = self.of(part)
            is_own = isinstance(part, tuple) or type(part) in CONTAINERS
            vars(new)[name] = self.own(part) if is_own else copied
        return new

    def _container(self, value: Any, replace: Callable[[Any], Any]) -> Any:
        new = self._replaced[id(value)] = copy.copy(value)  # which it may contain
        self.containers.append((value, new))
        if isinstance(value, dict):
            pairs = [(self.of(key), replace(part)) for key, part in value.items()]
            new.clear()
            for key, part in pairs:  # a Counter's `update` adds up
                new[key] = part
            return new
        parts = [*map(self.of if isinstance(value, set) else replace, value)]
        new.clear()
        new.update(parts) if isinstance(value, set) else new.extend(parts)
        return new

    def _function(self, value: FunctionType) -> FunctionType:
        cells = tuple(CellType() for _ in value.__closure__ or ())
        new = FunctionType(value.__code__, value.__globals__, value.__name__, None, cells)
        self._replaced[id(value)] = new
        copies = dict(zip(map(id, value.__closure__ or ()), cells, strict=True))
        for old, content in cells_of(value):
            copies[id(old)].cell_contents = self.of(content)
        new.__defaults__ = self.of(value.__defaults__)
        new.__kwdefaults__ = self.of(value.__kwdefaults__)
        new.__dict__.update(value.__dict__)
        return new


def holds_tensors(value: Any) -> bool:
    """Whether one gets from `value`, a function say, to a tensor that no module has."""
    seen: set[int] = set()
    left = [value]
    while left and len(seen) < _MOST:
        value = left.pop()
        if isinstance(value, Tensor):
            return True
        if not isinstance(value, (nn.Module, *_ENDS)) and id(value) not in seen:
            seen.add(id(value))
            left += _parts(value)
    return False


def _parts(value: Any) -> list[Any]:
    """What `value` holds."""
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return list(iter(value))  # whose length is not asked: a subclass may have none
    if isinstance(value, FunctionType):
        return [
            *(content for _, content in cells_of(value)),
            value.__defaults__,
            value.__kwdefaults__,
        ]
    if isinstance(value, MethodType):
        return [value.__self__]
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, weakref.ref):
        return [value()]
    return list(vars(value).values()) if is_plain_object(value) else []


def cells_of(function: FunctionType) -> list[tuple[CellType, Any]]:
    """The variables that `function` has closed over and that are assigned, with their contents."""
    found = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not yet assigned
            found.append((cell, cell.cell_contents))
    return found
