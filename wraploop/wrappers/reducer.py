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

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from wraploop.processes.packing import pack, size_of, unpack

from .rank import SPARSE, USED, Rank, flag_of, flags_of_all, is_small

_BUCKET = 25 << 20  # bytes
_RUN = 1 << 18  # bytes of small gradients that are copied at once, and are then still in the cache


class Bucket:
    """Gradients that are summed as one flat tensor.

    Args:
        indices: which.
        like: a tensor of the shape, dtype and device of each gradient that there is.
    """

    def __init__(self, indices: Sequence[int], like: Sequence[Tensor]) -> None:
        self.indices = indices
        self._like = [like[i] for i in indices]
        self._sizes = [tensor.numel() for tensor in self._like]
        self._runs = list(_runs([size_of(t.shape, t) for t in self._like], _RUN))
        self.shape = [sum(self._sizes)]

    def filled(self, parts: Sequence[Tensor | None], weight: float) -> Tensor:
        """The gradients times `weight`, flat; None and what is sparse count as zeros."""
        flat = self._like[0].new_empty(self.shape)
        own = [
            torch.zeros_like(like) if (part := parts[i]) is None or part.is_sparse else part
            for i, like in zip(self.indices, self._like, strict=True)
        ]
        ends = 0
        for run in self._runs:
            begins, ends = ends, ends + sum(self._sizes[run])
            into = flat[begins:ends]
            if run.stop - run.start == 1:
                torch.mul(own[run.start], weight, out=into.view(own[run.start].shape))
                continue
            torch.cat([part.reshape(-1) for part in own[run]], out=into)
            if weight != 1:
                into.mul_(weight)
        return flat

    def views(self, flat: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Which gradients are where in `flat`."""
        for i, part, like in zip(self.indices, flat.split(self._sizes), self._like, strict=True):
            yield i, part.view(like.shape)


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
        self._is_small = is_small(like, rank.channel.world_size)
        self._bucketed: list[int] = []
        self._buckets: list[Bucket] = []

    def sum(self, parts: Sequence[Tensor | None], weight: float) -> list[Tensor | None]:
        """The sums of all ranks' `parts` times their weights.

        Args:
            parts: this rank's gradients; None counts as zeros.
            weight: of this rank's; with 0 they count as None.
        """
        parts = parts if weight else [None] * len(parts)
        flags = torch.tensor([flag_of(part) for part in parts], dtype=torch.uint8)
        add_up = self._small if self._is_small else self._large
        return add_up(parts, weight, flags)

    def _small(
        self, parts: Sequence[Tensor | None], weight: float, flags: Tensor
    ) -> list[Tensor | None]:
        """As `sum`, of what is sent to everyone at once."""
        buckets = self._buckets_of(range(len(parts)))
        flats = [bucket.filled(parts, weight) for bucket in buckets]
        channel, doing = self._rank.channel, f"{self._doing} of {self._rank.name}"
        received = channel.exchange(doing, flags, *map(pack, flats))
        used, sparse = self._used_and_sparse([said[: len(flags)] for said in received])
        wholes: list[Tensor | None] = [None] * len(parts)
        start = len(flags)
        for bucket, flat in zip(buckets, flats, strict=True):
            end = start + size_of(bucket.shape, flat)
            terms = [unpack(said[start:end], bucket.shape, flat) for said in received]
            total = terms[0]
            for term in terms[1:]:
                total += term
            for i, whole in bucket.views(total):
                wholes[i] = whole if used[i] else None
            start = end
        return self._with_sparse(wholes, parts, weight, sparse)

    def _large(
        self, parts: Sequence[Tensor | None], weight: float, flags: Tensor
    ) -> list[Tensor | None]:
        """As `sum`, in a round of its own for what is used."""
        channel, doing = self._rank.channel, f"{self._doing} of {self._rank.name}"
        used, sparse = self._used_and_sparse(channel.exchange(doing, flags))
        wholes: list[Tensor | None] = [None] * len(parts)
        dense = [i for i in range(len(parts)) if used[i] and not sparse[i]]
        for bucket in self._buckets_of(dense):
            for i, whole in bucket.views(channel.sum(bucket.filled(parts, weight))):
                wholes[i] = whole
        return self._with_sparse(wholes, parts, weight, sparse)

    def _used_and_sparse(self, flags: list[Tensor]) -> tuple[list[bool], list[bool]]:
        return flags_of_all(flags, USED), flags_of_all(flags, SPARSE)

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
            self._bucketed, self._buckets = indices, list(_bucketed(indices, self._like))
        return self._buckets


def _bucketed(indices: Sequence[int], like: Sequence[Tensor]) -> Iterator[Bucket]:
    """Buckets for those gradients: of one kind each, in order, none very large."""
    kinds: dict[object, list[int]] = {}
    for i in indices:
        kinds.setdefault((like[i].dtype, like[i].device), []).append(i)
    for kind in kinds.values():
        sizes = [size_of(like[i].shape, like[i]) for i in kind]
        for run in _runs(sizes, _BUCKET):
            yield Bucket(kind[run], like)


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
