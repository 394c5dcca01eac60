"""Sums of gradients over the ranks, in flat buckets.

Gradients are many tensors, large and small. They are copied, times the weight of this rank's loss,
into a few flat ones, summed there, and handed on as views of them:

    gradients   g_0 ... g_k │ g_k+1 ... g_n        copied once
    buckets     ─────────── │ ───────────── + what the other ranks have
    sums        s_0 ... s_k │ s_k+1 ... s_n        views

What each rank has, and in which form, goes ahead in an exchange: a parameter that no rank used gets
None; one that some used gets the sum, on every rank.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from wraploop.processes.packing import pack, size_of, unpack

from .internals import foreach_copy, unflatten
from .rank import SPARSE, USED, Rank, flag_of, flags_of_all, is_small

_BUCKET = 25 << 20  # bytes
_LARGE = 1 << 20  # bytes
_MOST_BLOCKS = 2
_RUN = 1 << 18  # bytes of small gradients that are copied at once, and are then still in the cache


class Bucket:
    """Gradients that are summed as one flat tensor.

    Args:
        indices: which.
        like: a tensor of the shape, dtype and device of each gradient that there is.
        new: makes a buffer of at least so many bytes.
    """

    def __init__(
        self, indices: Sequence[int], like: Sequence[Tensor], new: Callable[[int], Any] = bytearray
    ) -> None:
        self.indices = indices
        self._like = [like[i] for i in indices]
        self._runs = list(_runs([size_of(t.shape, t) for t in self._like], _RUN))
        self._sizes = [sum(t.numel() for t in self._like[run]) for run in self._runs]
        self._memory = Memory(sum(self._sizes), self._like[0], new)

    def filled(self, parts: Sequence[Tensor | None], weight: float) -> tuple[Tensor, list[Tensor]]:
        """The gradients times `weight`, flat, and each gradient's place in that.

        Gradients that are None, or sparse, count as zeros.
        """
        flat = self._memory.empty()
        places = unflatten(flat, self._like)
        own = [
            torch.zeros_like(like) if (part := parts[i]) is None or part.is_sparse else part
            for i, like in zip(self.indices, self._like, strict=True)
        ]
        for run, piece in zip(self._runs, flat.split(self._sizes), strict=True):
            if run.stop - run.start == 1:
                torch.mul(own[run.start], weight, out=places[run.start])
                continue
            foreach_copy(places[run], own[run])
            if weight != 1:
                piece.mul_(weight)
        return flat, places


class Memory:
    """Memory for flat tensors, used again once nothing refers to it: new pages cost a copy's time.

    The system is asked for large tensors' memory at each step otherwise, and gives it page by page.
    The gradients of a step are views of such memory, and whoever keeps one keeps all of it.

    Args:
        length: of the tensors.
        like: of the same dtype and device.
        new: makes a buffer of at least so many bytes.
    """

    def __init__(self, length: int, like: Tensor, new: Callable[[int], Any] = bytearray) -> None:
        self._length = length
        self._like = like.new_empty(0)
        size = size_of([length], like)
        self._size = size if size >= _LARGE and like.device.type == "cpu" else 0
        self._new = new
        self._blocks: list[Any] = []

    def empty(self) -> Tensor:
        """A tensor of one axis whose memory nothing else refers to."""
        for i in range(len(self._blocks)):
            if _references(self._blocks, i) == _UNREFERRED:
                return self._tensor(self._blocks[i])
        if not self._size or len(self._blocks) == _MOST_BLOCKS:
            return self._like.new_empty(self._length)
        self._blocks.append(self._new(self._size))
        return self._tensor(self._blocks[-1])

    def _tensor(self, block: Any) -> Tensor:
        return torch.frombuffer(block, dtype=self._like.dtype, count=self._length)


def _references(blocks: list[Any], i: int) -> int:
    return sys.getrefcount(blocks[i])


_UNREFERRED = _references([bytearray()], 0)  # the list's, and what asking takes in this Python


class Reducer:
    """Sums gradients over the ranks.

    Args:
        rank: this rank's shard.
        doing: what this is for, in errors.
        like: for each gradient a tensor of its shape, dtype and device.
    """

    def __init__(self, rank: Rank, doing: str, like: list[Tensor]) -> None:
        self._rank = rank
        self._doing = doing
        self._like = like
        self._is_small = not rank.reduce_dtype and is_small(like, rank.channel.world_size)
        self._bucketed: list[int] = []
        self._buckets: list[Bucket] = []

    def sum(self, parts: Sequence[Tensor | None], weight: float) -> list[Tensor | None]:
        """The sums of all ranks' `parts` times their weights.

        Args:
            parts: this rank's gradients; None counts as zeros.
            weight: of this rank's; with 0 they count as None.
        """
        parts = parts if weight else [None] * len(parts)
        flags = bytes(map(flag_of, parts))
        add_up = self._small if self._is_small else self._large
        return add_up(parts, weight, flags)

    def _small(
        self, parts: Sequence[Tensor | None], weight: float, flags: bytes
    ) -> list[Tensor | None]:
        """As `sum`, of what is sent to everyone at once."""
        buckets = self._buckets_of(range(len(parts)))
        filled = [bucket.filled(parts, weight) for bucket in buckets]
        received = self._exchange(flags, *(pack(flat) for flat, _ in filled))
        used, sparse = flags_of_all(received, len(parts), (USED, SPARSE))
        wholes: list[Tensor | None] = [None] * len(parts)
        start = len(parts)
        for bucket, (flat, places) in zip(buckets, filled, strict=True):
            end = start + size_of(flat.shape, flat)
            first, *others = (unpack(said[start:end], flat.shape, flat) for said in received)
            flat.copy_(first)
            for term in others:
                flat += term
            for i, whole in zip(bucket.indices, places, strict=True):
                wholes[i] = whole if used[i] else None
            start = end
        return self._with_sparse(wholes, parts, weight, sparse)

    def _large(
        self, parts: Sequence[Tensor | None], weight: float, flags: bytes
    ) -> list[Tensor | None]:
        """As `sum`, in a round of its own for what is used."""
        used, sparse = flags_of_all(self._exchange(flags), len(parts), (USED, SPARSE))
        wholes: list[Tensor | None] = [None] * len(parts)
        dense = [i for i in range(len(parts)) if used[i] and not sparse[i]]
        for bucket in self._buckets_of(dense):
            flat, places = bucket.filled(parts, weight)
            self._sum(flat)
            for i, whole in zip(bucket.indices, places, strict=True):
                wholes[i] = whole
        return self._with_sparse(wholes, parts, weight, sparse)

    def _sum(self, flat: Tensor) -> None:
        dtype = self._rank.reduce_dtype
        if dtype is None or not flat.is_floating_point():
            self._rank.channel.sum(flat)
        else:
            flat.copy_(self._rank.channel.sum(flat.to(dtype)))

    def _exchange(self, *payload: Tensor | bytes) -> list[Tensor]:
        # Said otherwise than where they are put together one by one, as under create_graph.
        doing = f"{self._doing} of {self._rank.name}, in buckets"
        return self._rank.channel.exchange(doing, *payload)

    def _with_sparse(
        self,
        wholes: list[Tensor | None],
        parts: Sequence[Tensor | None],
        weight: float,
        sparse: list[bool],
    ) -> list[Tensor | None]:
        for i in (i for i, is_sparse in enumerate(sparse) if is_sparse):
            part = parts[i]
            own = None if part is None else part * weight
            wholes[i] = self._rank.sparse_sum(self._doing, own, self._like[i])
        return wholes

    def _buckets_of(self, indices: Iterable[int]) -> list[Bucket]:
        """The buckets for those gradients, the same on every rank."""
        indices = list(indices)
        if self._bucketed != indices:
            self._bucketed, self._buckets = indices, list(self._new_buckets(indices))
        return self._buckets

    def _new_buckets(self, indices: Sequence[int]) -> Iterator[Bucket]:
        """Buckets for those gradients: of one kind each, in order, none very large."""
        like = self._like
        kinds: dict[object, list[int]] = {}
        for i in indices:
            kinds.setdefault((like[i].dtype, like[i].device), []).append(i)
        for kind in kinds.values():
            sizes = [size_of(like[i].shape, like[i]) for i in kind]
            for run in _runs(sizes, _BUCKET):
                yield Bucket(kind[run], like, self._rank.channel.memory)


def _runs(sizes: list[int], most: int) -> Iterator[slice]:
    """Runs of what follows each other, each of at most `most` in all, or of one."""
    start, total = 0, 0
    for i, size in enumerate(sizes):
        if i > start and total + size > most:
            yield slice(start, i)
            start, total = i, 0
        total += size
    if sizes:
        yield slice(start, len(sizes))
