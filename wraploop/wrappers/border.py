"""The border around a wrapped module, and the four moves that cross it.

Outside the border a tensor is whole; inside, each shard has its rows of it (what is batched) or all
of it (what is not). Two pairs of moves cross, each the other's adjoint:

    going in                              coming out
    scatter: take own rows                gather: all rows, in order
    share: use the whole in every shard   sum over the shards

So if `whole = gather(parts)`, the derivative with respect to a part is a scatter of the derivative
with respect to the whole; and if a parameter is shared, its derivative is the sum of the shards'.
Whatever the step does outside the border, to outputs, inputs or parameters, is done to wholes, as
without wrapper.

Lanes (`crossing.py`) and processes (`ranks.py`) make these moves in their own ways.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from torch import Tensor

# Besides, for what has no derivative: the mean over shards, weighted by rows, and shard 0's own
Move = Literal["scatter", "share", "gather", "sum", "mean", "first"]

_ADJOINT: dict[Move, Move] = {
    "scatter": "gather",
    "gather": "scatter",
    "share": "sum",
    "sum": "share",
}


def adjoints(moves: Iterable[Move]) -> list[Move]:
    """The moves that derivatives make, where tensors make `moves`.

    Examples:
        >>> adjoints(["scatter", "share", "gather", "sum"])
        ['gather', 'sum', 'scatter', 'share']
    """
    return [_ADJOINT[move] for move in moves]


BATCHED = (
    "A wrapped module cannot be differentiated in many directions at once (is_grads_batched=True, "
    "vectorize=True). Call torch.autograd.grad once for each."
)


def weighted_mean(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The mean of the shards' `parts`; the very bits of one if they are all the same."""
    if all(part.equal(parts[0]) for part in parts[1:]):
        return parts[0]
    total = parts[0] * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total = total + part * weight
    return total
