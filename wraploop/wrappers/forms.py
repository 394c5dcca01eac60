"""The form of what shards return and leave: which tensors and values stand where in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .batch import Nest, leaves_of, tensors_of
from .change import Change
from .copies import holds_tensors
from .tree import Place

ATOMS = (bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device, type(None))


def plain_values(nest: Nest) -> list[Any]:
    """The numbers, strings and the like in `nest`."""
    return [leaf for _, leaf in leaves_of(nest) if isinstance(leaf, ATOMS)]


def layout(nest: Nest) -> list[str]:
    """Where the tensors in `nest` stand, and what else there is; nothing if it is a tensor."""
    if isinstance(nest, Tensor):
        return []
    return [
        f"{path} {leaf!r}".strip() if isinstance(leaf, ATOMS) else path
        for path, leaf in leaves_of(nest)
    ]


def check_same_values(place: Place, values: list[Any]) -> None:
    """Checks that what all shards have set an attribute to is the same, but for tensors."""
    holder, name = place
    kept = [plain_values(value) for value in values]
    for other in kept[1:]:
        if other != kept[0]:
            raise ValueError(
                f"The forward sets {name!r} of {type(holder.of).__name__} to {values[0]!r} in one "
                f"shard and {values[kept.index(other)]!r} in another. Keep what depends on "
                "the rows as a tensor, with one row for each row of the batch or 0-dimensional."
            )


def check_left(changes: Mapping[Place, Change]) -> None:
    """Checks that what a shard has left in attributes can be put together.

    Raises:
        TypeError: it is a function that holds tensors of that shard.
    """
    for (holder, name), change in changes.items():
        for path, leaf in leaves_of(change.value):
            _check_holds_none(f"{name!r} of {type(holder.of).__name__}{path}", leaf)


def _check_holds_none(where: str, leaf: Any) -> None:
    if callable(leaf) and not isinstance(leaf, Tensor) and holds_tensors(leaf):
        raise TypeError(
            f"{where} is a {type(leaf).__name__} that holds tensors of its shard, which cannot be "
            "put together. Return the tensors, or keep them in attributes of the module, and make "
            "the function of them outside."
        )


def same_form(a: Change, b: Change) -> bool:
    """Whether two shards have left as many tensors, and the like."""
    mine, other = tensors_of(a.value), tensors_of(b.value)
    return len(mine) == len(other) and all(map(_alike, mine, other))


def check_alike(outputs: Sequence[Nest], where: str, joins: bool = True) -> None:
    """Checks that all shards have returned the same nest, but for the tensors' values.

    Args:
        outputs: the shards'.
        where: what to call them in an error.
        joins: whether tensors are to be joined along the first axis, and differ in no other.

    Raises:
        TypeError: something that is neither tensor nor plain value is in it.
        ValueError: the shards' nests differ.
    """
    one = outputs[0]
    if all(type(o) is Tensor and _alike(o, one, joins) for o in outputs):
        return
    first = list(leaves_of(outputs[0]))
    for path, leaf in first:
        _check_holds_none(f"{where}{path}", leaf)
        if not isinstance(leaf, (Tensor, *ATOMS)) and not callable(leaf):
            raise TypeError(
                f"{where}{path} is a {type(leaf).__name__}, which cannot be put together from the "
                "shards' parts. Return tensors, in tuples, lists, dicts, named tuples, "
                "dataclasses or attributes of objects."
            )
    for output in outputs[1:]:
        others = list(leaves_of(output))
        for (path, mine), (other_path, other) in zip(first, others, strict=False):
            if path != other_path or not _alike(mine, other, joins):
                one, another = _describe(mine), _describe(other)
                if one == another:
                    another += ", another object, which may hold what it does not show"
                raise ValueError(
                    f"{where} differs between shards: {path or 'it'} is {one} in one, "
                    f"{other_path or 'it'} is {another} in another. Return values that "
                    "depend on the rows as tensors with one row for each row of the batch."
                )
        if len(first) != len(others):
            raise ValueError(
                f"{where} has {len(first)} parts in one shard, {len(others)} in another."
            )


def _alike(mine: Any, other: Any, joins: bool = False) -> bool:
    if isinstance(mine, Tensor) or isinstance(other, Tensor):
        if type(mine) is not type(other) or mine.ndim != other.ndim or mine.dtype != other.dtype:
            return False
        return not joins or mine.is_nested or mine.shape[1:] == other.shape[1:]  # nested: refused
    return bool(mine is other or mine == other)


def _describe(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"a {leaf.dtype} tensor of shape {tuple(leaf.shape)}"
    return repr(leaf)
