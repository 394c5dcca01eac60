"""The shard that the calling thread runs, and the sum over all shards.

Inside a wrapped module every tensor is one shard's. What a layer needs to know of the whole batch
it gets by one move, the sum over the shards. Its adjoint is itself: if every shard uses
`S = x_1 + ... + x_n`, the derivative with respect to `x_i` is the sum over the shards of the
derivatives with respect to their `S`. So the backward below is written with the function itself,
and derivatives of every order are right.

Where each process has a loss of its own rows, a derivative is one of that loss: times its weight it
is one of the whole batch's loss, which can be summed, and the sum divided by it is one of its own.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor
from torch.autograd import Function

_local = threading.local()


class Shard(ABC):
    """One of the parts that a batch has been cut into, as the module running on it sees it.

    Attributes:
        rows: how many rows of the batch are this shard's own; 0 while it runs a borrowed one.
        loss_weight: what a loss outside counts for in the loss of the whole batch: 1 where it is of
            all rows, else the share of this process's rows in all.
        is_whole: whether there is no other shard.
        is_lane: whether others run in this process at the same time.
        is_of_rank: whether other processes have others.
    """

    rows: int
    loss_weight: float = 1.0
    is_whole: bool = False
    is_lane: bool = False
    is_of_rank: bool = False

    @abstractmethod
    def total(self, tensor: Tensor) -> Tensor:
        """The sum of all shards' `tensor`. Every shard must call it, in the same order."""

    @abstractmethod
    def everyones(self, rows: np.ndarray) -> np.ndarray:
        """All shards' `rows` of float64, one behind the other; called as `total`."""


def current() -> Shard | None:
    """The shard that this thread runs; None outside of every wrapper."""
    return getattr(_local, "shard", None)


@contextmanager
def running(shard: Shard | None) -> Iterator[None]:
    """Makes `shard` the current one."""
    before = current()
    _local.shard = shard
    try:
        yield
    finally:
        _local.shard = before


@contextmanager
def unsplit() -> Iterator[None]:
    """A block in which wrappers in this thread run their modules on whole batches."""
    _local.is_unsplit = True
    try:
        yield
    finally:
        _local.is_unsplit = False


def is_unsplit() -> bool:
    """Whether this thread is in an `unsplit` block."""
    return getattr(_local, "is_unsplit", False)


def note(error: BaseException, text: str) -> None:
    """Adds to `error`, whose type stays what it was."""
    if hasattr(error, "add_note"):
        error.add_note(text)  # pyright: ignore[reportAttributeAccessIssue]  Python 3.11
    elif error.args and isinstance(error.args[0], str):
        error.args = (f"{error.args[0]}\n{text}", *error.args[1:])
    elif len(error.args) < 2:  # an OSError's number and text are not to be moved
        error.args = (*error.args, text)


class _SumOverShards(Function):
    @staticmethod
    def forward(ctx: Any, shard: Shard, tensor: Tensor) -> Tensor:
        ctx.shard = shard
        return shard.total(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, _sum_of_derivatives(ctx.shard, *grads)


def _sum_of_derivatives(shard: Shard, grad: Tensor) -> Tensor:
    """The sum of all shards' derivatives, each of its own loss, as one of this shard's own loss."""
    weight = shard.loss_weight
    if weight == 1:
        return sum_over_shards(shard, grad)
    own = weight * (grad if weight else grad.nan_to_num())  # a mean of no rows is NaN
    return sum_over_shards(shard, own) / (weight or 1.0)


def sum_over_shards(shard: Shard, tensor: Tensor) -> Tensor:
    """The sum of all shards' `tensor`, differentiable to every order."""
    return _SumOverShards.apply(shard, tensor)
