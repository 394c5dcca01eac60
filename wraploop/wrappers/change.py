"""What a forward has changed on a module, or on an object in one of its attributes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batch import tensors_of, with_tensors
from .containers import Path, mapped
from .tree import mark_rows


class Held:
    """What stands in an attribute that no shard has made: the original's."""

    def __init__(self, of: Any) -> None:
        self.of = of


GONE = object()  # what an attribute is that a forward has deleted


def without(value: Any, original: Callable[[Any], Any]) -> Any:
    """`value` in which all that stands for something of the original's is kept as that.

    Args:
        value: what a forward has set an attribute to.
        original: what its argument stands for; None for what a shard has made.
    """

    def keep(_: Path, leaf: Any) -> Any:
        found = original(leaf)
        return leaf if found is None else Held(found)

    def key_of(key: Any) -> Any:
        found = None if type(key) in (int, str) else original(key)
        return key if found is None else found

    return mapped(value, keep, key_of)


class Change(NamedTuple):
    """What a forward has set an attribute to.

    Attributes:
        value: that; `GONE` if it has deleted it.
        before: what it was.
        is_buffer: whether it is a buffer, or a tensor written to in place.
        is_in_place: whether it was written to in place: not batched.
        is_agreed: whether it is the same in every shard.
        rows: for each tensor in it, the axis that has a row for each row of the batch, if any.
        onto: by path, the original's containers that stand in it.
        into: by number, tensors of the original's that have been written to in place, in it.
    """

    value: Any
    before: Any = None
    is_buffer: bool = False
    is_in_place: bool = False
    is_agreed: bool = False
    rows: tuple[int | None, ...] = ()
    onto: Mapping[Path, Any] = {}
    into: Mapping[int, Tensor] = {}

    def known(self) -> Iterator[int | None]:
        """`rows`, or that none has where nobody has said so."""
        return chain(self.rows, repeat(None))

    def may_have_rows(self, rows: int, total: int) -> list[list[int]]:
        """For each tensor, the axes that may have one for each of a shard's `rows`, of `total`."""
        value, kept_shape = self.value, self.kept_shape
        found = []
        for i, (leaf, known) in enumerate(zip(tensors_of(value), self.known(), strict=False)):
            axes = range(leaf.ndim) if known is None else [known]
            if known is None and (kept_shape or i in self.into):
                axes = [axis for axis in axes if leaf.shape[axis] == total]
            if self.is_in_place:
                axes = []
            found.append([axis for axis in axes if leaf.shape[axis : axis + 1] == (rows,)])
        return found

    def is_of_all(self, total: int) -> bool:
        """Whether it says itself that it has no rows, of `total`: as a statistic set anew does."""
        if self.is_in_place:
            return True
        if not self.is_buffer or any(axis is not None for axis in self.rows):
            return False
        return self.kept_shape and total not in self.value.shape

    @property
    def kept_shape(self) -> bool:
        """Whether it was a tensor before, and is one of the same shape now."""
        value, before = self.value, self.before
        both = isinstance(value, Tensor) and isinstance(before, Tensor)
        return both and before.shape == value.shape

    def handed_back(self) -> Any:
        """`value`, now of the whole batch, as the original has it."""
        wholes = tensors_of(self.value)
        values: list[Any] = []
        for whole, axis in zip(wholes, self.known(), strict=False):
            values.append(whole.movedim(0, axis).contiguous() if axis else whole)
            if axis is not None:
                mark_rows(values[-1], axis)
        with torch.no_grad():
            for i, tensor in self.into.items():
                if values[i].data_ptr() != tensor.data_ptr():
                    tensor.copy_(values[i])
                values[i] = Held(tensor)
        value = with_tensors(self.value, values)
        return mapped(value, lambda _, leaf: leaf.of if isinstance(leaf, Held) else leaf)
