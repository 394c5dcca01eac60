"""A call of a module, apart from the module, so that it can be made on another."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

from torch import Tensor, nn

from .batch import Nest, changeable_in, renewed, table_of, tensors_of, with_tensors


class Edit(NamedTuple):
    """What a forward has done to a list, dict or object that it was passed.

    Attributes:
        removed: the keys, indices or attributes that are gone.
        put: what it has put elsewhere, by the same.
    """

    removed: tuple[Any, ...]
    put: dict[Any, Nest]


class Call:
    """A use of a module: which of its methods, with which arguments.

    Attributes:
        method: its name.
        arguments: all arguments, as one nest.
        inputs: the tensors among them, in order.
    """

    def __init__(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.method = method
        self.arguments: Nest = (args, kwargs)
        self.inputs = tensors_of(self.arguments)
        self._containers = _containers(self.arguments)

    def on(self, module: nn.Module) -> Nest:
        """Makes the call on `module`."""
        return self._run(module, self.arguments)

    def on_shard(self, module: nn.Module, inputs: list[Tensor]) -> tuple[Nest, dict[int, Edit]]:
        """Makes the call on `module`, with other `inputs`.

        Those have what the user has set on the tensors that they stand for.

        Returns:
            what that returns, and what the forward has done to its arguments' containers, by
            number: the call's own are as they were.
        """
        for mine, whole in zip(inputs, self.inputs, strict=True):
            if mine is not whole and vars(whole):
                vars(mine).update(vars(whole))
        if not self._containers:
            return self._run(module, with_tensors(self.arguments, inputs)), {}
        arguments = renewed(self.arguments, inputs)
        containers = _containers(arguments)
        before = [*map(_contents, containers)]
        output = self._run(module, arguments)
        edits = [_edit(*pair) for pair in zip(before, map(_contents, containers), strict=True)]
        return output, {i: edit for i, edit in enumerate(edits) if edit.removed or edit.put}

    def hand_back(self, edits: dict[int, Edit]) -> None:
        """Does `edits` to the call's own containers."""
        for i, (removed, put) in edits.items():
            table: Any = table_of(self._containers[i])
            for key in reversed(removed):
                del table[key]
            for key, value in put.items():
                if isinstance(table, (list, deque)) and key == len(table):
                    table.append(value)
                else:
                    table[key] = value

    def _run(self, module: nn.Module, arguments: Nest) -> Nest:
        args, kwargs = arguments
        run = module if self.method == "forward" else getattr(module, self.method)
        return run(*args, **kwargs)


def _containers(arguments: Nest) -> list[Nest]:
    args, kwargs = arguments  # `kwargs` itself the forward never sees
    found = changeable_in((*args, *kwargs.values()))
    return list({id(container): container for container in found}.values())


def _contents(container: Nest) -> dict[Any, Nest]:
    table = table_of(container)
    return dict(enumerate(table) if isinstance(table, (list, deque)) else table.items())


def _edit(before: dict[Any, Nest], now: dict[Any, Nest]) -> Edit:
    put = {k: value for k, value in now.items() if k not in before or before[k] is not value}
    return Edit(tuple(key for key in before if key not in now), put)
