"""What the shards' outputs say about how they come out of the border."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .axes import Axes, axes_agreed, signature
from .batch import Nest, is_shared, leaves_of, tensors_of, with_tensors
from .border import Move
from .call import Call, Edit
from .change import Change
from .forms import check_alike, check_left, check_same_values, same_form
from .internals import version_of
from .observers import Observation
from .replica import Replica
from .tree import Place, Spot, Tree

PUT = "what the forward puts into its arguments"


def move_in(tensor: Tensor) -> Move:
    """How an input goes into the shards.

    Raises:
        TypeError: it is sparse or nested, and so cannot be cut into rows.
    """
    if is_shared(tensor):
        return "share"
    _check_has_rows(tensor, "An input")
    return "scatter"


def carried_moves(tree: Tree, spots: Container[Spot], rows: int) -> list[Move]:
    """How what earlier calls have left in attributes goes into the shards of `rows` rows.

    Args:
        tree: whose `carried` it is.
        spots: where tensors have a row for each row of the batch.
        rows: how many rows the batch has now.
    """
    return [
        "scatter" if spot in spots and tensor.shape[:1] == (rows,) else "share"
        for spot, tensor in tree.carried.items()
    ]


def carried_parts(
    tree: Tree, spots: Container[Spot], parts: Iterable[Tensor], start: int, rows: int, total: int
) -> dict[Spot, Tensor]:
    """What a shard has for what earlier calls have left in attributes.

    Args:
        tree: whose `carried` it is.
        spots: where tensors have a row for each row of the batch.
        parts: what has gone into the shard for each, by `carried_moves`.
        start: the shard's first row.
        rows: how many the shard has.
        total: how many the batch has.
    """
    return {
        spot: _of_other_rows(part, start, rows, total)
        if spot in spots and whole.ndim and len(whole) != total
        else part
        for (spot, whole), part in zip(tree.carried.items(), parts, strict=True)
    }


def _of_other_rows(whole: Tensor, start: int, rows: int, total: int) -> Tensor:
    """What a shard gets of what a call of another number of rows has left, with a row for each.

    A forward sees that it is another and begins anew, or takes as many rows as it has: it gets what
    stands at its rows and behind, or nothing where all are as many as its rows by chance.
    """
    if len(whole) > total:
        return whole[start:]
    return whole[:0] if len(whole) == rows > 1 else whole


def move_out(tensor: Tensor, rows: int, where: str) -> Move:
    """How an output of a shard that ran `rows` rows becomes whole.

    Args:
        tensor: the output: with `rows` rows, or 0-dimensional.
        rows: how many rows went into the shard.
        where: what to call the output in an error.

    Raises:
        ValueError: it is neither.
        TypeError: it is a 0-dimensional integer, of which there is no mean, or sparse or nested.
    """
    if tensor.ndim > 0:
        _check_has_rows(tensor, where)
        if len(tensor) != rows:
            raise ValueError(
                f"{where} has shape {tuple(tensor.shape)} where {rows} rows went in: its first "
                "axis does not count the batch's rows, so the shards' parts cannot be put together "
                "to what the whole batch gives. Return it with one row for each row of the batch."
            )
        return "gather"
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise TypeError(
            f"{where} is a 0-dimensional {tensor.dtype}: of 0-dimensional outputs the shards' mean "
            "is taken, which needs a floating dtype. Return it as a float or with one row for each "
            "row of the batch."
        )
    return "sum"


def _check_has_rows(tensor: Tensor, where: str) -> None:
    if tensor.is_nested or tensor.layout is not torch.strided:
        kind = "nested" if tensor.is_nested else f"stored as {tensor.layout}"
        raise TypeError(
            f"{where} is {kind}, which is neither cut into rows nor put together from them. Pass "
            "and return dense tensors (`to_dense()`, `to_padded_tensor()`), and make the other in "
            "the forward."
        )


class Ran(NamedTuple):
    """What one shard's run of a call has left.

    Attributes:
        output: what it returned.
        changes: what it set on its modules.
        inputs: which inputs it wrote to in place, and what they became.
        observed: what forward hooks have seen.
        edits: what it has done to the containers in its arguments, by number.
    """

    output: Nest
    changes: dict[Place, Change]
    inputs: dict[int, Tensor]
    observed: list[Observation]
    edits: dict[int, Edit]

    @property
    def nest(self) -> Nest:
        """All of it."""
        changed = [change.value for change in self.changes.values()]
        seen = [each.seen for each in self.observed]
        return self.output, changed, self.inputs, seen, self.edits

    def coming_out(self, call: Call, rows: int, weight: float) -> Iterator[tuple[Tensor, Move]]:
        """The tensors of `nest`, in order, each with the way it comes out.

        Args:
            call: what was called.
            rows: how many rows the shard ran.
            weight: the shard's share of all rows.
        """
        for path, leaf in leaves_of(self.output):
            if isinstance(leaf, Tensor):
                move = move_out(leaf, rows, f"The output{path} of {call.method!r}")
                yield leaf * weight if move == "sum" else leaf, move
        for change in self.changes.values():
            for leaf, axis in zip(tensors_of(change.value), change.known(), strict=False):
                if change.is_agreed:
                    yield leaf, "first"
                elif axis is not None:
                    yield leaf.movedim(axis, 0) if axis else leaf, "gather"
                elif not (leaf.is_floating_point() or leaf.is_complex()):
                    yield leaf, "first"
                elif leaf.requires_grad:
                    yield leaf * weight, "sum"
                else:
                    yield leaf, "mean"
        for leaf in self.inputs.values():
            yield leaf, "gather"
        for each in self.observed:
            for leaf in tensors_of(each.seen):
                if not each.joins(rows):
                    yield leaf.detach(), "first"
                else:
                    yield (leaf, "gather") if leaf.ndim else (leaf * weight, "sum")
        for path, leaf in leaves_of(self.edits):
            if isinstance(leaf, Tensor):
                move = move_out(leaf, rows, f"{PUT}{path}")
                yield leaf * weight if move == "sum" else leaf, move

    def whole(
        self, call: Call, replica: Replica, wholes: Sequence[Tensor | None], rows: int
    ) -> tuple[Nest, dict[int, Edit]]:
        """The output and `edits` of the whole batch, once everything has been handed back.

        Args:
            call: what was called.
            replica: of the original, which `changes` are handed back to.
            wholes: what the tensors of `nest` have become.
            rows: how many rows the shard ran.
        """
        if not (self.changes or self.inputs or self.observed or self.edits):
            return with_tensors(self.output, wholes), {}
        output, values, inputs, seen, edits = with_tensors(self.nest, wholes)
        pairs = zip(self.changes.items(), values, strict=True)
        replica.hand_back({place: change._replace(value=v) for (place, change), v in pairs})
        originals = call.inputs
        for i, value in inputs.items():
            originals[i].copy_(value)
        for each, whole in zip(self.observed, seen, strict=True):
            each.repeat(whole, rows)
        call.hand_back(edits)
        return output, edits


def alike(
    ran: list[Ran], taken: list[list[Tensor]], call: Call, sizes: list[int], axes: Axes
) -> list[Ran]:
    """What all lanes have left, in the same form in each.

    Changes that not every lane has made are left out.

    Args:
        ran: what each lane has left.
        taken: what each lane had for the call's inputs.
        call: what was called.
        sizes: how many rows each lane has run.
        axes: what is known of what lanes leave.

    Raises:
        ValueError, TypeError: they have returned what cannot be put together.
    """
    check_alike([mine.output for mine in ran], f"The output of {call.method!r}")
    if not any(mine.changes or mine.inputs or mine.observed or mine.edits for mine in ran):
        return ran
    check_alike([mine.edits for mine in ran], PUT)
    seen_by_hooks = [[each.seen for each in mine.observed] for mine in ran]
    check_alike(seen_by_hooks, "What forward hooks see", joins=False)
    seen = [[signature(tensor) for tensor in inputs] for inputs in taken] if ran[0].changes else []
    places = [
        place
        for place, first in ran[0].changes.items()
        if all(place in r.changes and same_form(first, r.changes[place]) for r in ran[1:])
    ]
    check_left(ran[0].changes)
    for place in places:
        check_same_values(place, [mine.changes[place].value for mine in ran])
    rows = {
        place: axes_agreed(
            [axes.said(place, r.changes[place], n) for r, n in zip(ran, sizes, strict=True)], seen
        )
        for place in places
    }
    written = sorted({i for mine in ran for i in mine.inputs})
    apart = {
        i
        for mine, n in zip(ran, sizes, strict=True)
        for i, each in enumerate(mine.observed)
        if not each.joins(n)
    }
    return [
        Ran(
            mine.output,
            {place: mine.changes[place]._replace(rows=rows[place]) for place in places},
            {i: inputs[i] for i in written},
            [each._replace(is_apart=i in apart) for i, each in enumerate(mine.observed)],
            mine.edits,
        )
        for mine, inputs in zip(ran, taken, strict=True)
    ]


def written_to(inputs: list[Tensor], before: list[int], wholes: list[Tensor]) -> dict[int, Tensor]:
    """Which of a shard's `inputs` its forward has written to in place.

    Args:
        inputs: the shard's.
        before: their versions before.
        wholes: the call's inputs.

    Raises:
        ValueError: it is one that all shards share.
    """
    found = {}
    for i, (part, version) in enumerate(zip(inputs, before, strict=True)):
        if version_of(part) != version:
            if is_shared(wholes[i]):
                raise ValueError(
                    f"The module writes in place to its input {i}, of shape {tuple(part.shape)}, "
                    "which all shards share. Pass a clone of it to what writes."
                )
            found[i] = part
    return found
