"""A batch: a nest of tensors, and how its rows are cut into shards.

A nest is a tensor, or a tuple, list, deque, mapping, named tuple or dataclass of nests, or another
object whose attributes lead to tensors (a distribution, say), and not back to it. Whatever else
stands in it belongs to no shard and goes to all of them as it is.
"""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from enum import Enum
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .containers import tuple_like
from .objects import Attributes, attributes_of, is_object, with_attributes
from .tree import is_plain_object

_PLAIN = (type, bool, int, float, str, bytes, type(None))  # no containers, in less time
_LEAVES = (Tensor, *_PLAIN)
_DATA = (*_PLAIN, torch.dtype, torch.device, Mapping, tuple, list)
_MOST = 20_000  # things that an object leads to: with more, it is something to work with

Nest = Any  # a tensor, or a container of nests; see the module's docstring
T = TypeVar("T", bound=Nest)

_MARK = "_wraploop_shared"


def shared(nest: T) -> T:
    """Marks the tensors of `nest` as not batched: every shard gets the whole of them.

    Without a wrapper the mark means nothing, so a step may be written with it once and for all.
    Mark last: what is computed from a marked tensor is not marked.

    Examples:
        >>> mask = shared(torch.ones(5, 5))
        >>> bool((mask == 1).all())
        True
    """

    def mark(tensor: Tensor, _: str) -> Tensor:
        alias = tensor.view_as(tensor)
        setattr(alias, _MARK, True)
        return alias

    return map_tensors(mark, nest)


def is_shared(tensor: Tensor) -> bool:
    """Whether every shard needs the whole of `tensor`: marked so, or without a first axis."""
    return tensor.ndim == 0 or hasattr(tensor, _MARK)


def _held(nest: Nest) -> Collection[Nest]:
    """What `nest` contains, in order; nothing if it is no container."""
    if type(nest) is tuple or type(nest) is list:
        return nest
    if type(nest) is dict:
        return nest.values()
    return [child for _, child in _children(nest) or ()]


def _children(nest: Nest) -> list[tuple[str, Nest]] | None:
    """What `nest` contains, each with the way to write it; None if it is no container."""
    if isinstance(nest, _PLAIN):
        return None
    parts = _parts(nest)
    if parts is None and is_object(nest) and _leads_to_tensors(nest):
        return _attributes(nest)
    return parts


def _parts(nest: Nest) -> list[tuple[str, Nest]] | None:
    """The same for what is made to contain something."""
    if dataclasses.is_dataclass(nest):
        return _attributes(nest)
    if isinstance(nest, Mapping):
        return [(_way(key, i), value) for i, (key, value) in enumerate(nest.items())]
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):
        return [(f".{name}", value) for name, value in zip(nest._fields, nest, strict=True)]  # pyright: ignore
    if isinstance(nest, (tuple, list, deque)):
        return [(f"[{i}]", value) for i, value in enumerate(nest)]
    return None


def _way(key: object, i: int) -> str:
    """How to write that the `key` is followed, the i-th: no two modules' reprs need differ."""
    is_long = isinstance(key, (Tensor, nn.Module))
    return f"[{type(key).__name__} {i}]" if is_long else f"[{key!r}]"


def _attributes(value: object) -> list[tuple[str, Nest]]:
    return [(f".{name}", part) for name, part in attributes_of(value).items()]


def _leads_to_tensors(value: object) -> bool:
    return any(isinstance(each, Tensor) for each in _within(value) or ())


def _is_blank(value: object) -> bool:
    """Whether `value` is an object of plain data alone, as a cache is before its first use."""
    if not is_plain_object(value) or isinstance(value, Enum):
        return False
    found = _within(value)
    return found is not None and all(isinstance(x, _DATA) or is_object(x) for x in found)


def _within(value: object) -> list[object] | None:
    """All that `value` leads to; None if that is itself, too, or very much."""
    try:
        found = [*islice(_walk(value, ()), _MOST)]
    except RecursionError:
        return None
    return found if len(found) < _MOST else None


def _changeable_children(nest: Nest) -> list[tuple[str, Nest]] | None:
    """As `_children`, of objects too in which no tensor stands yet."""
    children = _children(nest)
    return _attributes(nest) if children is None and _is_blank(nest) else children


def _walk(value: object, above: tuple[int, ...]) -> Iterator[object]:
    """As `_within`, however much; RecursionError for what leads to itself."""
    if id(value) in above:
        raise RecursionError
    if isinstance(value, _LEAVES):
        yield value
        return
    parts = _parts(value)
    if parts is None:
        parts = _attributes(value) if is_object(value) else []
    yield value
    for _, part in parts:
        yield from _walk(part, (*above, id(value)))


def _rebuild(nest: Nest, values: list[Nest]) -> Nest:
    """A container like `nest` that holds `values` instead."""
    if dataclasses.is_dataclass(nest):
        new = with_attributes(nest, values)
        if isinstance(new, dict):  # transformers' ModelOutput is both
            for name in new:
                dict.__setitem__(new, name, getattr(new, name))
        return new
    if isinstance(nest, dict):
        new = copy.copy(nest)
        new.update(zip(nest, values, strict=True))
        return new
    if isinstance(nest, Mapping):
        return type(nest)(dict(zip(nest, values, strict=True)))  # pyright: ignore[reportCallIssue]
    if hasattr(nest, "_make"):
        return nest._make(values)
    if isinstance(nest, (list, deque)):
        new = copy.copy(nest)
        new.clear()
        new.extend(values)
        return new
    if isinstance(nest, tuple):
        return tuple_like(nest, values)
    return with_attributes(nest, values)


def map_tensors(fn: Callable[[Tensor, str], Any], nest: Nest, path: str = "") -> Nest:
    """`nest` with each tensor replaced by `fn(tensor, path)`, containers rebuilt, the rest kept."""
    if isinstance(nest, Tensor):
        return fn(nest, path)
    children = _children(nest)
    if not children:
        return nest
    values = [map_tensors(fn, child, path + way) for way, child in children]
    return _with(nest, [child for _, child in children], values)


def _with(nest: Nest, children: Collection[Nest], values: list[Nest]) -> Nest:
    """`nest`, rebuilt if its `values` are others than its `children`."""
    return nest if all(map(operator.is_, values, children)) else _rebuild(nest, values)


def leaves_of(nest: Nest, path: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in `nest` that is no container, with its path, in `map_tensors`' order."""
    children = None if isinstance(nest, Tensor) else _children(nest)
    if children is None:
        yield path, nest
        return
    for way, child in children:
        yield from leaves_of(child, path + way)


def tensors_of(nest: Nest) -> list[Tensor]:
    """The tensors of `nest`, in order."""
    if isinstance(nest, Tensor):
        return [nest]
    return [tensor for child in _held(nest) for tensor in tensors_of(child)]


def with_tensors(nest: Nest, tensors: Sequence[Tensor | None]) -> Nest:
    """`nest` with its tensors replaced by `tensors`, which come in the order of `tensors_of`."""
    return _replaced(nest, iter(tensors))


def _replaced(nest: Nest, tensors: Iterator[Tensor | None]) -> Nest:
    if isinstance(nest, Tensor):
        return next(tensors)
    children = _held(nest)
    return _with(nest, children, [_replaced(child, tensors) for child in children])


def renewed(nest: Nest, tensors: Sequence[Tensor]) -> Nest:
    """The same, with all containers new: whoever changes one changes no other's."""
    return _renewed(nest, iter(tensors), {})


def _renewed(nest: Nest, tensors: Iterator[Tensor], made: dict[int, Nest]) -> Nest:
    if isinstance(nest, Tensor):
        return next(tensors)
    children = _changeable_children(nest)
    if children is None:
        return nest
    new = _rebuild(nest, [_renewed(child, tensors, made) for _, child in children])
    return made.setdefault(id(nest), new)  # one that stands in two places is one


def changeable_in(nest: Nest) -> list[Nest]:
    """`nest` and the containers in it, but for those that nobody puts anything into, in order."""
    children = None if isinstance(nest, _LEAVES) else _changeable_children(nest)
    if children is None:
        return []
    inside = [container for _, child in children for container in changeable_in(child)]
    is_fixed = isinstance(nest, Mapping) and not isinstance(nest, MutableMapping)
    return inside if is_fixed or isinstance(nest, tuple) else [nest, *inside]


def table_of(container: Nest) -> list[Nest] | deque[Nest] | MutableMapping[Any, Nest]:
    """What a container of `changeable_in` keeps its contents in."""
    is_table = isinstance(container, (list, deque, MutableMapping))
    return container if is_table else Attributes(container)


def rows_of(nest: Nest) -> int | None:
    """How many rows the batched tensors of `nest` have; None if there are none of these.

    Raises:
        ValueError: two of them disagree, or a list seems to hold one thing for each row.
    """
    counts = [tensor.size(0) for tensor in tensors_of(nest) if not is_shared(tensor)]
    rows = counts[0] if counts else None
    if counts and counts.count(counts[0]) != len(counts):
        leaves = ((path, leaf) for path, leaf in leaves_of(nest) if isinstance(leaf, Tensor))
        batched = [(path, leaf) for path, leaf in leaves if not is_shared(leaf)]
        (first, one), (path, other) = batched[0], next(x for x in batched if len(x[1]) != rows)
        raise ValueError(
            f"The inputs disagree about the number of rows: {first} of shape {tuple(one.shape)} "
            f"has {rows}, {path} of shape {tuple(other.shape)} has {len(other)}. The first axis of "
            "an input must count the batch's rows. Mark an input that every shard needs whole with "
            "`wraploop.shared(tensor)`."
        )
    _check_lists(nest, rows)
    return rows


def _check_lists(nest: Nest, rows: int | None) -> None:
    """Refuses lists that seem to have an item for each row: they go to every shard whole."""
    if not _holds_lists(nest):
        return
    for path, child in _children(nest) or []:
        if isinstance(child, Tensor):
            continue
        _check_lists(child, rows)
        if isinstance(child, list) and rows and 1 < rows == len(child) and not tensors_of(child):
            raise ValueError(
                f"The input {path} is a list of {rows} items that are no tensors, beside {rows} "
                "rows of tensors, and would go whole to every shard. If it has an item for each "
                "row, pass a tensor; if not, pass a tuple."
            )


def _holds_lists(nest: Nest) -> bool:
    inner = [child for child in _held(nest) if not isinstance(child, _LEAVES)]
    return any(isinstance(child, list) or _holds_lists(child) for child in inner)


def split(rows: int, shards: int) -> list[slice]:
    """Cuts `rows` rows into `shards` nearly equal runs, in order, as `tensor_split` does.

    Examples:
        >>> [part.stop - part.start for part in split(7, shards=3)]
        [3, 2, 2]
        >>> [part.stop - part.start for part in split(1, shards=2)]
        [1, 0]
    """
    size, longer = divmod(rows, shards)
    ends = [size * (i + 1) + min(i + 1, longer) for i in range(shards)]
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def cat_rows(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """`parts`, one behind the other along the first axis, in memory in the order of `like`."""
    whole = torch.cat([*parts])
    if like.is_contiguous() or like.layout is not torch.strided:
        return whole
    order = sorted(range(like.ndim), key=lambda axis: -like.stride(axis))
    back = sorted(range(like.ndim), key=order.__getitem__)
    return whole.permute(order).contiguous().permute(back)


def zeros_like_rows(tensor: Tensor, rows: int) -> Tensor:
    """Zeros of the shape of `tensor`, with `rows` rows."""
    return torch.zeros((rows, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)
