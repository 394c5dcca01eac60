"""What copies of a module have in common with it, and its forward must not change.

Of what attributes hold, a copy has containers and objects of its own, but not what objects hold in
their attributes in turn, nor containers of classes of the user's. A forward that changes one of
those changes it once for each shard, with what that shard has.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .containers import ATOMS, same
from .internals import version_of
from .objects import attributes_of
from .tree import is_users, own_values

_MOST = 20_000  # things that are looked at before giving up
_KINDS = (OrderedDict, dict, list, tuple, set, frozenset, deque)


class Commons:
    """What stands in attributes of `holders`, but for what is their own, as it is now.

    Args:
        holders: copies of modules, and of objects in their attributes.
        own: other things that have been copied, and their parts that are the original's.
    """

    def __init__(self, holders: Iterable[Any], own: Iterable[Any]) -> None:
        self._parts: list[tuple[Any, list[Any]]] = []
        self._versions: list[tuple[Any, Tensor, int]] = []
        mine = {id(thing) for thing in own}
        seen: set[int] = set()
        left = [(None, value) for holder in holders for value in own_values(holder).values()]
        while left and len(seen) < _MOST:
            holder, value = left.pop()
            if type(value) in ATOMS or id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, Tensor):
                if holder is not None and id(value) not in mine:
                    self._versions.append((holder, value, version_of(value)))
                continue
            parts = _parts(value)
            if id(value) not in mine and not isinstance(value, tuple):
                holder = value
                self._parts.append((value, parts))
            left += [(holder, part) for part in parts]

    def check(self) -> None:
        """Checks that nothing has been changed.

        Raises:
            NotImplementedError: it has.
        """
        for thing, parts in self._parts:
            if not same(_parts(thing), parts):
                raise NotFollowed(TOO_DEEP.format(type(thing).__name__))
        for holder, tensor, version in self._versions:
            if version_of(tensor) != version:
                raise NotFollowed(TOO_DEEP.format(f"tensor in a {type(holder).__name__}"))


class NotFollowed(NotImplementedError):
    """A forward has changed what its copies have in common."""


def _parts(value: Any) -> list[Any]:
    """What `value` holds, if it is a container or an object of the user's."""
    found: list[Any] = []
    kind = next((kind for kind in _KINDS if issubclass(type(value), kind)), None)
    if kind is not None:  # asked itself, since a class of the user's may show something else
        found += kind.__iter__(value)
        found += kind.values(value) if issubclass(kind, dict) else ()
    return [*found, *attributes_of(value).values()] if is_users(value) else found


TOO_DEEP = (
    "The forward changes a {} where shards' copies of the module are not followed. They are in "
    "attributes of modules, in lists, dicts and tuples there, and in attributes of objects in "
    "these; but neither deeper inside, nor in containers of a class of their own. Keep there what "
    "the forward changes; if it does it once, when first called, call the model once before "
    "wrapping it."
)
