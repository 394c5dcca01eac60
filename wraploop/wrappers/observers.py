"""Forward hooks that look at activations and keep them where the wrapper cannot see.

Inside, such a hook sees one shard's rows. So it is called there, for what it may do to the forward,
and what it has kept is forgotten; then it is called once more, with the whole batch's activations,
which come out of the border as outputs do.
"""

from __future__ import annotations

import dis
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

from .batch import tensors_of
from .containers import CONTAINERS, items
from .copies import cells_of
from .noise import kept_random_state

_ITS_GRADIENT = (
    "A forward hook on a {} registers a hook on a tensor that it sees. It sees the whole batch's, "
    "which no gradient passes through: the shards' do. Register hooks on what the model returns, "
    "or register a full backward hook on the layer, which sees a shard's gradients."
)
_DEPTH, _MOST = 4, 256  # how far to look, and at how many things in a container


class Observation(NamedTuple):
    """What a forward hook, which has changed nothing or keeps things, has seen.

    Attributes:
        hook: the hook.
        module: the original's module that it is on.
        seen: arguments and output, as it was called with.
        is_apart: whether some shard's cannot be put together with the others'.
    """

    hook: Callable[..., Any]
    module: nn.Module
    seen: tuple[Any, ...]
    is_apart: bool = False

    def joins(self, rows: int) -> bool:
        """Whether shards' parts, of `rows` rows, can be put together."""
        tensors = tensors_of(self.seen)
        return not self.is_apart and all(
            len(t) == rows if t.ndim else t.is_floating_point() for t in tensors
        )

    def repeat(self, seen: tuple[Any, ...], rows: int) -> None:
        """Calls the hook with the whole batch's activations.

        Args:
            seen: these; one shard's, if they cannot be put together.
            rows: how many rows the shard had.

        Raises:
            ValueError: they cannot, and the hook has kept some.
            NotImplementedError: the hook wants to see their gradients.
        """
        with kept_random_state():
            self.hook(self.module, *seen)
        if any(tensor._backward_hooks for tensor in tensors_of(seen)):
            raise NotImplementedError(_ITS_GRADIENT.format(type(self.module).__name__))
        if not self.joins(rows):
            kept = {id(item) for c in _containers(self.hook, _DEPTH) for item in items(c)}
            for tensor in tensors_of(seen):
                if id(tensor) in kept:
                    raise ValueError(
                        f"A forward hook keeps a tensor of shape {tuple(tensor.shape)} that a "
                        f"{type(self.module).__name__} has made of {rows} rows. Its first axis "
                        "does not count rows, so the shards' parts cannot be put together."
                    )


class Observer:
    """Stands for a forward hook in a copy of a module, and takes down what it sees.

    Args:
        inside: the hook, or a copy of it that reaches the copy's modules.
        hook: the hook.
        module: the original's module that it is on.
        log: where to take it down.
    """

    # No part of what is copied with a module
    __slots__ = ("hook", "inside", "keeps", "log", "module")

    def __init__(
        self,
        inside: Callable[..., Any],
        hook: Callable[..., Any],
        module: nn.Module,
        log: list[Observation],
    ) -> None:
        self.inside = inside
        self.hook = hook
        self.module = module
        self.log = log
        self.keeps = _keeps(hook)

    def __call__(self, copy: nn.Module, *seen: Any) -> Any:
        """The hook's own answer."""
        result = self.inside(copy, *seen)
        if result is None or result is seen[-1] or self.keeps:
            self.log.append(Observation(self.hook, self.module, seen))
        return result


class Keepsakes:
    """What hooks hold in containers and variables, to be as it is now again.

    Args:
        hooks: these.
        tables: the modules' tables that they stand in, as they may remove themselves.
    """

    def __init__(self, hooks: list[Callable[..., Any]], tables: list[dict[int, Any]]) -> None:
        self._tables = [(table, table.copy()) for table in tables]
        found = {id(c): c for hook in hooks for c in _containers(hook, _DEPTH)}
        self._kept = [(container, container.copy()) for container in found.values()]
        functions = [hook for hook in hooks if isinstance(hook, FunctionType)]
        self._cells = [pair for function in functions for pair in cells_of(function)]
        self._globals = [
            (function.__globals__, name, function.__globals__[name])
            for function in functions
            for name in function.__code__.co_names
            if name in function.__globals__
        ]

    def restore(self) -> None:
        """Makes it so."""
        for cell, contents in self._cells:
            cell.cell_contents = contents
        for names, name, value in self._globals:
            if names[name] is not value:
                names[name] = value
        for table, hooks in self._tables:
            if list(table) != list(hooks):
                table.clear()
                table.update(hooks)
        for container, kept in self._kept:
            container.clear()
            if isinstance(container, (list, deque)):
                container.extend(kept)
            else:
                container.update(kept)


def is_observer(hook: Callable[..., Any], inside: Callable[..., Any], holders: list[Any]) -> bool:
    """Whether `hook` may keep things outside of the module.

    Args:
        hook: a forward hook.
        inside: its copy, which reaches a copy of the module.
        holders: whose attributes count as inside.
    """
    module = getattr(hook, "__module__", None) or type(hook).__module__
    if module.startswith("torch."):
        return False
    if inside is hook:
        return True
    known = {id(value) for holder in holders for value in (vars(holder), *vars(holder).values())}
    return any(id(container) not in known for container in _containers(hook, _DEPTH))


def _keeps(hook: Callable[..., Any]) -> bool:
    """Whether `hook` has a container or a variable outside of it to keep things in."""
    steps = dis.get_instructions(hook) if isinstance(hook, FunctionType) else ()
    assigns = any(step.opname in ("STORE_DEREF", "STORE_GLOBAL") for step in steps)
    return assigns or any(True for _ in _containers(hook, _DEPTH))


def _containers(value: Any, depth: int) -> Iterator[Any]:
    """The containers that `value`, a hook, may keep things in."""
    if depth == 0 or isinstance(value, (Tensor, nn.Module, type, ModuleType)):
        return
    if isinstance(value, CONTAINERS):
        yield value
        children = list(value.values()) if isinstance(value, dict) else list(value)
    elif isinstance(value, FunctionType):
        cells = [content for _, content in cells_of(value)]
        named = [value.__globals__.get(name) for name in value.__code__.co_names]
        children = [*cells, *(child for child in named if isinstance(child, CONTAINERS))]
    elif isinstance(value, MethodType):
        children = [value.__self__]
    elif isinstance(value, Observer):
        children = [value.log, value.inside, value.hook]
    elif isinstance(value, partial):
        children = [value.func, *value.args, *value.keywords.values()]
    else:
        children = [vars(value)] if hasattr(value, "__dict__") else []
    for child in children[:_MOST]:
        yield from _containers(child, depth - 1)
