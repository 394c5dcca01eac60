"""Objects that a batch may stand in: attributes of theirs lead to tensors.

Such an object of the user's, or a distribution of torch's, is taken apart like a dict of attributes
and put together again, with other tensors in it.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Iterator, MutableMapping, Sequence
from types import MemberDescriptorType
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform

from .tree import is_plain_object

_BATCH_SHAPE = "_batch_shape"  # of a distribution: how many rows its tensors have, once more
_UNBROADCASTED = "_unbroadcasted_"  # begins the names of those that may have none


def is_object(value: Any) -> bool:
    """Whether `value` has attributes that a batch may stand in."""
    return is_plain_object(value) or isinstance(value, (Distribution, Transform))


def attributes_of(value: Any) -> dict[str, Any]:
    """The attributes of `value`, but for what follows from the others."""
    if not isinstance(value, (Distribution, Transform)):
        slots = {name: getattr(value, name) for name in _slots(type(value)) if hasattr(value, name)}
        return getattr(value, "__dict__", {}) | slots
    prefixed = [name for name in vars(value) if name.startswith(_UNBROADCASTED)]
    broadcasted = {name: getattr(value, name.removeprefix(_UNBROADCASTED)) for name in prefixed}
    return {
        name: broadcasted.get(name, part)
        for name, part in vars(value).items()
        if name != _BATCH_SHAPE and not isinstance(part, weakref.ref)  # a transform's inverse
    }


@functools.cache
def _slots(cls: type[Any]) -> list[str]:
    """The attributes that objects of `cls` keep outside of `__dict__`."""
    members = {name: member for base in cls.__mro__ for name, member in vars(base).items()}
    slots = [n for n, member in members.items() if isinstance(member, MemberDescriptorType)]
    return [name for name in slots if name != "__dict__"]


class Attributes(MutableMapping[str, Any]):
    """The attributes of an object, as a dict of them.

    Args:
        value: the object.
    """

    def __init__(self, value: Any) -> None:
        self._value = value

    def __getitem__(self, name: str) -> Any:
        return attributes_of(self._value)[name]

    def __setitem__(self, name: str, part: Any) -> None:
        object.__setattr__(self._value, name, part)  # which no class forbids

    def __delitem__(self, name: str) -> None:
        object.__delattr__(self._value, name)

    def __iter__(self) -> Iterator[str]:
        return iter(attributes_of(self._value))

    def __len__(self) -> int:
        return len(attributes_of(self._value))


def with_attributes(value: Any, parts: Sequence[Any]) -> Any:
    """An object like `value` whose `attributes_of` are `parts`."""
    before = attributes_of(value)
    new = copy.copy(value)
    table = Attributes(new)
    for name, part in zip(before, parts, strict=True):
        table[name] = part
    if isinstance(value, Distribution) and value.batch_shape:
        rows = _rows_now(value.batch_shape[0], [*before.values()], parts)
        vars(new)[_BATCH_SHAPE] = torch.Size([rows, *value.batch_shape[1:]])
    return new


def _rows_now(rows: int, before: Sequence[Any], now: Sequence[Any]) -> int:
    """How many rows `now` has of what had so many `before`."""
    for old, new in zip(before, now, strict=True):
        if isinstance(old, Distribution) and old.batch_shape[:1] == (rows,):
            return new.batch_shape[0]
        if isinstance(old, Tensor) and old.shape[:1] == (rows,) and isinstance(new, Tensor):
            return len(new)
    return rows
