"""What a forward has changed on a module, or on an object in one of its attributes."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .batch import map_tensors


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
        is_rows: whether it has a row for each row of the batch.
    """

    value: Any
    before: Any = None
    is_buffer: bool = False
    is_in_place: bool = False
    is_agreed: bool = False
    is_rows: bool = False

    def may_be_rows(self, rows: int, total: int) -> bool:
        """Whether it may have a row for each of the shard's `rows`, of `total` of the batch."""
        value, before = self.value, self.before
        if self.is_buffer or not isinstance(value, Tensor) or value.ndim == 0:
            return False
        kept_shape = isinstance(before, Tensor) and before.shape == value.shape
        return len(value) == rows and (self.is_rows or not kept_shape or len(value) == total)
