"""A rank's shard of a batch, and putting together what all ranks have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from operator import or_
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wraploop.processes.channel import Channel, PeerError
from wraploop.processes.packing import pack, size_of, unpack, unpack_sparse

from .batch import cat_rows, zeros_like_rows
from .border import Move, weighted_mean
from .shard import Shard, note

_SMALL = 1 << 18  # bytes that may come in when everyone's terms of a sum are sent to everyone
USED, _DIFFERENTIABLE, SPARSE = 1, 2, 4


class Rank(Shard):
    """This process's shard of one batch.

    Args:
        channel: the way to the other processes.
        counts: how many rows of the batch each rank has; for what is not batched, 0.
        name: what is run, for errors.
        loss_weight: see `Shard`.
        is_local: whether each rank makes a loss of its own rows.
        synced: whether derivatives are summed over the ranks, or stay each rank's own.
        unsynced: by id, the leaves whose `.grad` holds what was not summed.
        until_step: whether that waits for the optimizer's step.
        reduce_dtype: what large gradients are sent as; None is as they are.

    Attributes:
        rows: how many rows are this rank's own.
        size: how many it runs: one, borrowed, if none is its own.
        weight: its share of all rows.
        drawn_from: what this rank's module drew random numbers from; after coming out, any's.
    """

    is_of_rank = True
    drawn_from = 0

    def __init__(
        self,
        channel: Channel,
        counts: Sequence[int],
        name: str,
        *,
        loss_weight: float = 1.0,
        is_local: bool = False,
        synced: bool = True,
        unsynced: dict[int, Tensor] | None = None,
        until_step: bool = False,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        self.channel = channel
        self.name = name
        self.loss_weight = loss_weight
        self.is_local = is_local
        self.synced = synced
        self.unsynced = {} if unsynced is None else unsynced
        self.until_step = until_step
        self.reduce_dtype = reduce_dtype
        self.counts = list(counts)
        self.rows = self.counts[channel.rank]
        self.size = max(1, self.rows)
        self.weight = self.rows / max(1, sum(self.counts))

    def tell(self, error: BaseException, has: str) -> None:
        """Tells the others of an `error` here, unless it is from them or ends everything anyway.

        Args:
            error: what was raised.
            has: how many rows this rank has, for the note on the error.
        """
        if isinstance(error, Exception) and not isinstance(error, PeerError):
            note(error, f"Raised in rank {self.channel.rank}, which has {has}.")
            self.channel.fail(error)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of all ranks' `tensor`."""
        doing = f"a statistic of the whole batch {tuple(tensor.shape)} in {self.name}"
        terms = self.channel.exchange(doing, pack(tensor))
        return _total([unpack(term, tensor.shape, tensor) for term in terms])

    def everyones(self, rows: np.ndarray) -> np.ndarray:
        """All ranks' `rows`, one behind the other."""
        doing = f"a batch norm over all shards ({rows.shape[1]} numbers) in {self.name}"
        received = self.channel.gather(doing, rows.tobytes())
        return np.concatenate([np.frombuffer(each) for each in received]).reshape(-1, rows.shape[1])

    def take(self, whole: Tensor, move: Move, *, borrow: bool) -> Tensor:
        """This rank's part of `whole`: its own rows ("scatter"), or all ("share").

        A rank with no rows gets one all the same, so that its graph exists: the first row if it
        may `borrow`, else a row of zeros.
        """
        if move == "share":
            return whole
        if self.rows:
            start = sum(self.counts[: self.channel.rank])
            return whole.data[start : start + self.rows]  # with a version of its own
        return whole.data[:1] if borrow else zeros_like_rows(whole, 1)

    @torch.no_grad()
    def put_together(
        self, doing: str, parts: Sequence[Tensor | None], moves: Sequence[Move], like: list[Tensor]
    ) -> tuple[list[Tensor | None], list[bool]]:
        """Whole tensors from all ranks' parts, not differentiable.

        Args:
            doing: what this is for.
            parts: this rank's; None counts as zeros.
            moves: for each part, "gather" or "sum"; "first" stays on its rank.
            like: for each part a tensor of its dtype and, but for the rows, its shape.

        Returns:
            The wholes, None where every rank's part is None; and which of them have a derivative.
        """
        apart = self._apart(moves, like)
        sent = [
            part[: self.rows] if move == "gather" else part
            for i, (part, move) in enumerate(zip(parts, moves, strict=True))
            if part is not None and i not in apart and not part.is_sparse
        ]
        own = bytes([self.drawn_from, *map(flag_of, parts)])
        doing = f"{doing} of {self.name}"
        received = self.channel.exchange(doing, own, *map(pack, sent))
        self.drawn_from = reduce(or_, (said[0] for said in received))
        received = [said[1:] for said in received]
        bits = USED, _DIFFERENTIABLE, SPARSE
        used, differentiable, sparse = flags_of_all(received, len(parts), bits)

        wholes: list[Tensor | None] = [
            _detached(part) if m == "first" else None for part, m in zip(parts, moves, strict=True)
        ]
        terms = [self._terms(rank, said, moves, like, apart) for rank, said in enumerate(received)]
        for i, (move, column) in enumerate(zip(moves, zip(*terms, strict=True), strict=True)):
            if sparse[i]:
                wholes[i] = self.sparse_sum(doing, parts[i], like[i])
            elif used[i] and i not in apart:
                wholes[i] = self._joined(column, move, like[i])
        sums = [i for i in apart if used[i] and not sparse[i] and moves[i] == "sum"]
        for i, total in self._sums({i: parts[i] for i in sums}, like):
            wholes[i] = total
        return wholes, differentiable

    def _joined(self, parts: Sequence[Tensor], move: Move, like: Tensor) -> Tensor:
        if move == "gather":
            return cat_rows(parts, like)
        if move == "sum":
            return _total(parts)
        return weighted_mean(parts, [count / max(1, sum(self.counts)) for count in self.counts])

    def _apart(self, moves: Sequence[Move], like: list[Tensor]) -> set[int]:
        """What is not sent to everyone: what stays here, and sums large enough to be reduced."""
        sums = [like[i] for i, move in enumerate(moves) if move == "sum"]
        large = not is_small(sums, self.channel.world_size)
        return {i for i, move in enumerate(moves) if move == "first" or (move == "sum" and large)}

    def _terms(
        self, rank: int, said: Tensor, moves: Sequence[Move], like: list[Tensor], apart: set[int]
    ) -> list[Tensor]:
        """The parts that `rank` has sent; zeros for those that it has not."""
        terms = []
        start = len(moves)
        rows = self.counts[rank]
        for i, (move, model) in enumerate(zip(moves, like, strict=True)):
            shape = (rows, *model.shape[1:]) if move == "gather" else model.shape
            if i in apart:
                terms.append(model)
            elif said[i] & USED and not said[i] & SPARSE:
                end = start + size_of(shape, model)
                terms.append(unpack(said[start:end], shape, model))
                start = end
            else:
                terms.append(model.new_zeros(shape))
        return terms

    def sparse_sum(self, doing: str, part: Tensor | None, like: Tensor) -> Tensor:
        """The sum of sparse parts, sparse."""
        nothing = torch.empty(0, dtype=torch.uint8)
        packed = self.channel.exchange(f"{doing}, sparse", nothing if part is None else pack(part))
        return _total([unpack_sparse(said, like) for said in packed if len(said)]).coalesce()

    def _sums(
        self, parts: dict[int, Tensor | None], like: list[Tensor]
    ) -> Iterator[tuple[int, Tensor]]:
        """The sums of large parts, all of one dtype at once."""
        kinds: dict[Any, list[int]] = {}
        for i in sorted(parts):
            kinds.setdefault((like[i].dtype, like[i].device), []).append(i)
        for indices in kinds.values():
            dense = [
                (torch.zeros_like(like[i]) if (part := parts[i]) is None else part).reshape(-1)
                for i in indices
            ]
            flat = self.channel.sum(torch.cat(dense))
            totals = flat.split([like[i].numel() for i in indices])
            yield from ((i, t.view_as(like[i])) for i, t in zip(indices, totals, strict=True))


def is_small(tensors: Sequence[Tensor], world_size: int) -> bool:
    """Whether it is quickest to send them to everyone."""
    return (world_size - 1) * sum(size_of(t.shape, t) for t in tensors) <= _SMALL


def flags_of_all(received: Sequence[Tensor], count: int, bits: Sequence[int]) -> list[list[bool]]:
    """For each of `bits`, for each part whether some rank has set it in its flag.

    Args:
        received: what the ranks have sent, which begins with the flags of `count` parts.
        count: how many.
        bits: which bits to look at.
    """
    flags = [bytes(said[:count].numpy()) for said in received]
    if flags.count(flags[0]) == len(flags):
        return [[bool(flag & bit) for flag in flags[0]] for bit in bits]
    columns = list(zip(*flags, strict=True))
    return [[any(flag & bit for flag in column) for column in columns] for bit in bits]


def _total(terms: Sequence[Tensor]) -> Tensor:
    """The sum of the ranks' terms, in the order of ranks."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _detached(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.detach()


def flag_of(part: Tensor | None) -> int:
    """What is to be known of a part: whether there is one, with a derivative, sparse."""
    if part is None:
        return 0
    flag = USED | (_DIFFERENTIABLE if part.requires_grad else 0)
    return flag | (SPARSE if part.is_sparse else 0)
