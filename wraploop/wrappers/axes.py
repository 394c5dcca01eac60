"""Along which axis the tensors that forwards leave count the batch's rows."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from wraploop.processes.channel import fingerprint

from .batch import Nest, tensors_of
from .change import Change
from .tree import Place


class Axes:
    """Along which axis the tensors that forwards leave have a row for each row of the batch.

    What the whole batch leaves says so, in the calls that are made on it too; else a tensor with as
    many as the shard has rows is taken for one, if shards leave different ones.

    Args:
        total: how many rows the batch has.
        learned: by place, those of each tensor left there, or None; added to.
    """

    def __init__(self, total: int, learned: dict[Place, list[int | None]]) -> None:
        self._total = total
        self._learned = learned

    def learn(self, wholes: dict[Place, Nest], changes: dict[Place, Change], rows: int) -> None:
        """Compares what the whole batch leaves with what a shard of `rows` rows does."""
        for place in (wholes.keys() & changes.keys()) if 0 < rows < self._total else ():
            tensors, expected = tensors_of(changes[place].value), tensors_of(wholes[place])
            if len(tensors) == len(expected):
                pairs = zip(tensors, expected, strict=True)
                self._learned[place] = [self._axis(mine, whole, rows) for mine, whole in pairs]

    def _axis(self, mine: Tensor, whole: Tensor, rows: int) -> int | None:
        for axis in range(mine.ndim):
            shape = [*mine.shape]
            shape[axis] = self._total
            if mine.shape[axis] == rows and whole.shape == tuple(shape):
                return axis
        return None

    def is_of_all(self, place: Place, change: Change) -> bool:
        """Whether a change says that it has no rows, and the whole batch has not denied it."""
        has_rows = any(axis is not None for axis in self._learned.get(place, ()))
        return change.is_of_all(self._total) and not has_rows

    def _fitting(
        self, axis: int | None, leaf: Tensor, known: tuple[int | None, ...], rows: int
    ) -> list[int]:
        """The axis that the whole batch has said, if it counts the rows here and none is known."""
        if axis is None or leaf.shape[axis : axis + 1] != (rows,):
            return []
        return [axis] if all(each in (None, axis) for each in known) else []

    def said(self, place: Place, change: Change, rows: int) -> list[tuple[int, float]]:
        """For each tensor that a shard leaves, its axes that may count rows, as bits, and a number.

        The number is the same in shards that leave the same.
        """
        learned, found = self._learned.get(place), []
        tensors = tensors_of(change.value)
        learned = learned if learned and len(learned) == len(tensors) else None
        for i, axes in enumerate(change.may_have_rows(rows, self._total)):
            number = math.nan
            if learned:
                axes = self._fitting(learned[i], tensors[i], change.rows[i : i + 1], rows)
            elif axes:
                number = fingerprint(tensors[i]) if axes[0] else signature(tensors[i])
            found.append((sum(1 << axis for axis in axes), number))
        return found


def axes_agreed(
    said: Sequence[Sequence[tuple[int, float]]], inputs: Sequence[Sequence[float]]
) -> tuple[int | None, ...]:
    """Along which axis each tensor that all shards leave counts rows, if it does.

    Args:
        said: each shard's, see `Axes`.
        inputs: each shard's `signature`s of its inputs.
    """
    found: list[int | None] = []
    for shards in zip(*said, strict=True):
        common = functools.reduce(operator.and_, (bits for bits, _ in shards))
        has_rows = common and depend_on_rows([number for _, number in shards], inputs)
        found.append((common & -common).bit_length() - 1 if has_rows else None)
    return tuple(found)


def signature(tensor: Tensor) -> float:
    """A number that tensors share if they are the same; NaN, shared with none, if all rows are."""
    return math.nan if _has_like_rows(tensor) else fingerprint(tensor)


def _has_like_rows(tensor: Tensor) -> bool:
    if tensor.ndim == 0 or len(tensor) == 0:
        return False
    tensor = tensor.detach()
    return torch.equal(tensor[0], tensor[-1]) and bool(tensor.eq(tensor[:1]).all())


def depend_on_rows(signatures: Sequence[float], inputs: Sequence[Sequence[float]]) -> bool:
    """Whether what shards have set an attribute to differs with their rows.

    A table or a mask that has as many rows as the shards by chance is the same in all of them.

    Args:
        signatures: each shard's, of the attribute.
        inputs: each shard's, of its inputs.
    """
    differs = any(value != signatures[0] for value in signatures)
    return differs or all(mine == inputs[0] for mine in inputs)
