"""Containers that a module keeps things in: lists, dicts, deques and tuples, one inside the other.

Of what stands in them a path says where: the keys and numbers on the way to it, none for a value
that is no container.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

CONTAINERS = (list, dict, OrderedDict, set, deque, defaultdict, Counter)  # that may be changed
Path = tuple[Any, ...]
ATOMS = (bool, int, float, str, type(None))  # which are many, where there are many things


def items(container: Any) -> list[Any]:
    """What `container` contains."""
    return list(container.values()) if isinstance(container, dict) else list(iter(container))


def contents(value: Any) -> list[Any]:
    """What `value` contains, if it is a container that may be changed."""
    return items(value) if type(value) in CONTAINERS else []


def same(a: Iterable[Any], b: Iterable[Any]) -> bool:
    """Whether `a` and `b` are made of the same objects."""
    a, b = list(iter(a)), list(iter(b))
    return len(a) == len(b) and all(map(operator.is_, a, b))


def parts(value: Any) -> Iterable[tuple[Any, Any]]:
    """What `value` contains in an order of its own, by key or number; nothing if it does not."""
    if isinstance(value, tuple) or type(value) in (list, deque):
        return enumerate(value)
    return value.items() if isinstance(value, dict) and type(value) in CONTAINERS else ()


def containers_in(value: Any) -> list[Any]:
    """The containers in `value`, itself among them, that may be changed; each once."""
    return [*{id(container): container for _, container in containers_at(value)}.values()]


def leaves(value: Any, path: Path = (), above: tuple[int, ...] = ()) -> Iterator[tuple[Path, Any]]:
    """What stands in `value` and is no container with an order, with its path."""
    inside = list(parts(value)) if id(value) not in above else ()
    if not inside:
        yield path, value
    for key, part in inside:
        if type(part) in ATOMS:
            yield (*path, key), part
        else:
            yield from leaves(part, (*path, key), (*above, id(value)))


def mapped(
    value: Any, fn: Callable[[Path, Any], Any], keys: Callable[[Any], Any] = lambda key: key
) -> Any:
    """`value` with each of its `leaves` replaced by `fn(path, leaf)`; new, if it may be changed.

    Args:
        value: that.
        fn: that.
        keys: makes the new ones' keys of the old ones'.
    """
    return _mapped(value, fn, keys, (), {})


def _mapped(
    value: Any,
    fn: Callable[[Path, Any], Any],
    keys: Callable[[Any], Any],
    path: Path,
    made: dict[int, Any],
) -> Any:
    if id(value) in made:
        return made[id(value)]
    if isinstance(value, tuple):
        new = [_mapped(part, fn, keys, (*path, i), made) for i, part in enumerate(value)]
        return tuple_like(value, new)
    if type(value) not in CONTAINERS:
        return fn(path, value)
    if isinstance(value, set):
        return copy.copy(value)
    new = made[id(value)] = copy.copy(value)  # which it may contain
    found = [(keys(key), _mapped(part, fn, keys, (*path, key), made)) for key, part in parts(value)]
    _fill(new, found)
    return new


def tuple_like(value: tuple[Any, ...], parts: list[Any]) -> Any:
    """A tuple like `value` of `parts`: itself, if they are its own."""
    if same(parts, value):
        return value
    try:  # not by a constructor of the user's, which may take something else
        return tuple.__new__(type(value), parts)
    except TypeError:  # a class written in C, as torch's are
        return type(value)(parts)


def _fill(container: Any, found: list[tuple[Any, Any]]) -> None:
    container.clear()
    if isinstance(container, dict):
        for key, part in found:  # a Counter's `update` adds up
            container[key] = part
    else:
        container.extend(part for _, part in found)


def containers_at(
    value: Any, path: Path = (), above: tuple[int, ...] = ()
) -> Iterator[tuple[Path, Any]]:
    """The containers in `value`, itself among them, that may be changed, with their paths."""
    if id(value) in above:
        return
    if type(value) in CONTAINERS:
        yield path, value
    for key, part in parts(value):
        if type(part) in CONTAINERS or isinstance(part, tuple):
            yield from containers_at(part, (*path, key), (*above, id(value)))


def put_into(olds: Mapping[Path, Any], value: Any) -> Any:
    """`value`, but with the containers `olds` in their paths, which now hold what it holds there.

    Args:
        olds: these, each of the type of the one that it takes the place of.
        value: in which no container is one of them.
    """
    return _put_into(olds, value, (), {})


def _put_into(olds: Mapping[Path, Any], value: Any, path: Path, put: dict[int, Any]) -> Any:
    if id(value) in put:
        return put[id(value)]
    if isinstance(value, tuple):
        new = [_put_into(olds, part, (*path, i), put) for i, part in enumerate(value)]
        return tuple_like(value, new)
    if type(value) not in CONTAINERS:
        return value
    old = put[id(value)] = olds.get(path, value)
    if isinstance(value, set):
        held = [*value]
        old.clear()
        old.update(held)
        return old
    _fill(old, [(key, _put_into(olds, part, (*path, key), put)) for key, part in parts(value)])
    return old
