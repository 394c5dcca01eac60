"""Bringing gradients together once for each optimizer step, and not in every backward.

Each backward leaves a rank's own part in `.grad`, times the number of ranks. Before an optimizer
steps, what is there is divided by that number and summed: so what was the same on all ranks, and
not brought together, stays what it was.
"""

from __future__ import annotations

import functools
import itertools
import weakref
import zlib
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from wraploop.processes.channel import Channel

from .rank import Rank
from .recent import keep
from .reducer import Reducer

_MOST_REDUCERS = 4

ReduceAt = Literal["backward", "step"]


class AtStep:
    """Brings together what backwards have left, when an optimizer steps.

    Args:
        channel: the way to the other processes.
        name: what is run, for errors.
        reduce_dtype: what gradients are sent as; None is as they are.

    Attributes:
        left: by id, the leaves whose `.grad` is to be brought together.
    """

    def __init__(self, channel: Channel, name: str, reduce_dtype: torch.dtype | None) -> None:
        self.left: dict[int, Tensor] = {}
        self._reducers: dict[tuple[Any, ...], Reducer] = {}
        self._rank = Rank(channel, [0] * channel.world_size, name, reduce_dtype=reduce_dtype)
        register_once()
        _made[next(_numbers)] = self

    def bring_together(self, optimizer: torch.optim.Optimizer) -> None:
        """Sums the gradients of those of its parameters that backwards have left apart."""
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        which = [i in stepped for i in self.left]
        leaves = [*itertools.compress(self.left.values(), which)]
        for leaf in leaves:
            del self.left[id(leaf)]
        if leaves:
            sum_left(self._rank, leaves, self._reducer_for(leaves, which))

    def _reducer_for(self, leaves: list[Tensor], which: list[bool]) -> Reducer:
        """The one that has summed gradients of that kind before: it keeps the memory for them."""
        kind = (*which, *((leaf.shape, leaf.dtype, leaf.device) for leaf in leaves))
        said = f"{len(leaves)} of {len(which)} (#{zlib.crc32(bytes(which)):08x})"
        reducer = self._reducers.get(kind) or reducer_for(self._rank, leaves, said)
        keep(self._reducers, kind, reducer, _MOST_REDUCERS)
        return reducer


_made: weakref.WeakValueDictionary[int, AtStep] = weakref.WeakValueDictionary()
_numbers = itertools.count()


@functools.cache
def register_once() -> None:
    """Has each be told of each step. No hook is ever removed: torch may be going through them."""
    register_optimizer_step_pre_hook(_before_step)


def _before_step(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Brings together what there is, and what a closure makes within the step."""
    _bring_together(optimizer)
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if not callable(closure):
        return None

    @functools.wraps(closure)
    def then_together() -> Any:
        loss = closure()
        _bring_together(optimizer)
        return loss

    if len(args) > 1:
        return (args[0], then_together, *args[2:]), kwargs
    return args, {**kwargs, "closure": then_together}


def _bring_together(optimizer: torch.optim.Optimizer) -> None:
    for each in list(_made.values()):  # in the order they were made in, on every rank
        each.bring_together(optimizer)


def reducer_for(rank: Rank, leaves: list[Tensor], which: str = "all") -> Reducer:
    """What sums what backwards have left in the leaves' `.grad`; `which` is alike on every rank."""
    doing = f"what backwards have left, {which}"
    return Reducer(rank, doing, [leaf.detach() for leaf in leaves])


def sum_left(rank: Rank, leaves: list[Tensor], reducer: Reducer) -> None:
    """Brings together what backwards have left in the leaves' `.grad`."""
    wholes = reducer.sum([_taken(leaf) for leaf in leaves], 1 / rank.channel.world_size)
    for leaf, whole in zip(leaves, wholes, strict=True):
        leaf.grad = whole


def taken_part(rank: Rank, leaf: Tensor) -> Tensor | None:
    """This rank's part of what a backward has left in the leaf's `.grad`, which is None then."""
    left = _taken(leaf)
    return None if left is None else left / rank.channel.world_size


def _taken(leaf: Tensor) -> Tensor | None:
    left, leaf.grad = leaf.grad, None
    return left
