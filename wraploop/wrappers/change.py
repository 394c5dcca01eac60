"""What a forward has changed on a module, or on an object in one of its attributes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, repeat
from typing import Any, NamedTuple

from torch import Tensor

from .batch import map_tensors, tensors_of


class Held:
    """A tensor that a container held before the forward, and that no shard has made."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def without(value: Any, held: list[Any]) -> Any:
    """`value` with each tensor that is one of `held` kept from being seen as the shard's."""
    ids = {id(item) for item in held}
    return map_tensors(lambda t, _: Held(t) if id(t) in ids else t, value) if ids else value


def restored(value: Any) -> Any:
    """`value` with what `without` kept."""
    if isinstance(value, Held):
        return value.tensor
    if isinstance(value, list):
        return [restored(item) for item in value]
    if isinstance(value, dict):
        return type(value)((key, restored(item)) for key, item in value.items())
    return value


class Change(NamedTuple):
    """What a forward has set an attribute to.

    Attributes:
        value: that.
        before: what it was.
        is_buffer: whether it is a buffer, or a tensor written to in place: not batched.
        is_in_place: whether it was written to in place.
        is_agreed: whether it is the same in every shard.
        have_rows: for each tensor in it, whether that has a row for each row of the batch.
    """

    value: Any
    before: Any = None
    is_buffer: bool = False
    is_in_place: bool = False
    is_agreed: bool = False
    have_rows: tuple[bool, ...] = ()

    @property
    def is_rows(self) -> bool:
        """Whether it is a tensor with a row for each row of the batch."""
        return isinstance(self.value, Tensor) and any(self.have_rows)

    def known(self) -> Iterator[bool]:
        """`have_rows`, or that none has where nobody has said so."""
        return chain(self.have_rows, repeat(False))

    def may_have_rows(self, rows: int, total: int) -> list[bool]:
        """For each tensor whether it may have one for each of a shard's `rows`, of `total`."""
        value, before = self.value, self.before
        kept_shape = isinstance(value, Tensor) and isinstance(before, Tensor)
        kept_shape = kept_shape and before.shape == value.shape
        may = not self.is_buffer and (self.is_rows or not kept_shape or value.shape[:1] == (total,))
        return [may and leaf.shape[:1] == (rows,) for leaf in tensors_of(value)]
