"""Data for several processes: of every global batch, each process gets its rows.

    one process   0 1 2 3 4 5 6 | 7 8 9 10 11 12 13 | ...
    rank 0        0 1 2 3       | 7 8 9 10          | ...
    rank 1                4 5 6 |           11 12 13| ...

What decides on the batches, samplers and their random numbers, runs in every process, alike; what
is costly, reading and collating samples, runs only in the process that needs them.
"""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler

from wraploop import processes
from wraploop.later import Later, batches_after, loader_of, reads_by_index
from wraploop.processes import random_state


def shard(batches: Iterable[Any]) -> ShardedBatches:
    """The rows of each batch in `batches` that are this process's own.

    For `DistributedModel(model, batch="local")`. Together the processes get what one process would
    get, in order: of a batch of `B` rows, rank `r` has the `r`-th of nearly equal runs, as by
    `tensor_split`. With fewer rows than processes, the last have batches of no rows. In one process
    it changes nothing.

    A `DataLoader` over a map-style dataset reads only this process's samples; of everything else
    each process makes the whole batch and keeps its rows. Samplers draw what they would in one
    process, from rank 0's random state; workers draw different numbers in every process.

    Args:
        batches: a `DataLoader`, or any iterable of batches: nests of tensors, arrays and lists, of
            which the first axis counts the rows.

    Raises:
        ValueError: the loader has a `DistributedSampler`, which cuts it into shards already.

    Examples:
        >>> loader = DataLoader(torch.arange(10), batch_size=4)
        >>> [batch.tolist() for batch in shard(loader)]
        [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    """
    return ShardedBatches(batches)


class ShardedBatches:
    """What `shard` returns. It can be iterated as often as `batches`, and has its attributes.

    Attributes:
        whole: the batches that it takes its rows of.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        sampler = getattr(batches, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            raise ValueError(
                "The loader has a DistributedSampler, which cuts the data into shards already, and "
                "not into those of one process's batches. Give shard() a loader without it."
            )
        self.whole = batches
        self._loader: DataLoader[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        processes.start()
        if processes.world_size() == 1:
            return iter(self.whole)
        return self._sharded(0, _go_on)

    def after(self, count: int, ready: Callable[[], None]) -> Iterator[Any]:
        """The batches but the first `count`; see `later.batches_after`."""
        processes.start()
        if processes.world_size() == 1:
            return batches_after(self.whole, count, ready)
        if reads_by_index(self.whole) and not self.num_workers:
            return self._sharded(count, ready)
        return iter(Later(self._sharded(0, _go_on), count, ready))

    def _sharded(self, count: int, ready: Callable[[], None]) -> Iterator[Any]:
        state = _RandomState()
        if not reads_by_index(self.whole):
            return self._cut(state)
        return self._read(self._own_loader(state), state, count, ready)

    def __len__(self) -> int:
        return len(self.whole)  # pyright: ignore[reportArgumentType]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.whole, name)

    def _cut(self, state: _RandomState) -> Iterator[Any]:
        """This process's rows of whole batches."""
        for batch in state.iterated(self.whole):
            rows = _count_rows(batch)
            yield _rows(batch, own_rows(rows), rows)

    def _own_loader(self, state: _RandomState) -> Any:
        """A loader of this process's samples alone."""
        source: Any = self.whole
        is_new = self._loader is None
        if is_new:
            self._loader = loader_of(source, _OwnIndices(source.batch_sampler), torch.Generator())
        loader: Any = self._loader
        if is_new or not loader.persistent_workers:
            with state.used():  # as the loader itself would, for its workers
                seed = int(torch.empty((), dtype=torch.int64).random_(generator=source.generator))
            state.hand_back()
            loader.generator.manual_seed(seed + processes.rank())
        return loader

    def _read(
        self, loader: Any, state: _RandomState, count: int, ready: Callable[[], None]
    ) -> Iterator[Any]:
        """Batches of this process's samples alone, but the first `count`."""
        counts = loader.batch_sampler.begin(state, count, ready)
        for batch in loader:
            yield batch if counts.popleft() else _rows(batch, slice(0, 0), 1)


class _OwnIndices:
    """This process's part of each batch of indices."""

    def __init__(self, batch_sampler: Iterable[Any]) -> None:
        self._batch_sampler = batch_sampler

    def begin(self, state: _RandomState, count: int, ready: Callable[[], None]) -> deque[int]:
        """Has the next iteration draw from `state`; returns how many indices of each are its own.

        It leaves out `count` batches. What is returned is filled while the iteration goes on.
        """
        self._state, self._counts, self._left_out = state, deque[int](), (count, ready)
        return self._counts

    def __iter__(self) -> Iterator[list[Any]]:
        counts = self._counts
        for batch in Later(self._state.iterated(self._batch_sampler), *self._left_out):
            indices: list[Any] = list(batch)
            own = indices[own_rows(len(indices))]
            counts.append(len(own))
            yield own or indices[:1]  # a sample, to make a batch of no rows from

    def __len__(self) -> int:
        return len(self._batch_sampler)  # pyright: ignore[reportArgumentType]


class _RandomState:
    """The random state, rank 0's, from which all processes draw what decides on the batches."""

    def __init__(self) -> None:
        self.agree()

    def agree(self) -> None:
        """Takes rank 0's for all, which may have drawn meanwhile."""
        self._own = random_state.get()
        self._state = processes.broadcast(self._own)

    @contextmanager
    def used(self) -> Iterator[None]:
        """A block that draws from it, and leaves the process's own as it was."""
        own = random_state.get()
        random_state.put(self._state)
        try:
            yield
        finally:
            self._state = random_state.get()
            random_state.put(own)

    def iterated(self, items: Iterable[Any]) -> Iterator[Any]:
        """The `items`, while they are made drawing from it."""
        self.agree()
        with self.used():
            iterator = iter(items)
        for number in itertools.count():
            with self.used():
                item = next(iterator, _END)
            if number == 0 or item is _END:
                self.hand_back()
            if item is _END:
                return
            yield item

    def hand_back(self) -> None:
        """Has rank 0 go on from here, as one process would, unless it has drawn meanwhile."""
        own = random_state.get()
        if processes.rank() == 0 and random_state.same(own, self._own):
            random_state.put(self._state)
            self._own = self._state


_END = object()


def _go_on() -> None:
    pass


def own_rows(rows: int) -> slice:
    """Which of `rows` rows are this process's own: a run of them, as by `tensor_split`."""
    size, longer = divmod(rows, processes.world_size())
    rank = processes.rank()
    start = size * rank + min(rank, longer)
    return slice(start, start + size + (rank < longer))


def _count_rows(batch: Any) -> int:
    """How many rows the tensors and arrays in `batch` have; where there are none, its lists.

    Raises:
        ValueError: they disagree, or there is nothing that has rows.
    """
    shapes = {tuple(leaf.shape) for leaf in _leaves(batch) if hasattr(leaf, "shape") and leaf.ndim}
    rows = {shape[0] for shape in shapes} or {len(leaf) for leaf in _lists(batch)}
    if len(rows) != 1:
        raise ValueError(
            f"Cannot tell how many rows a batch has, to shard it: it is a {type(batch).__name__} "
            f"with tensors of shapes {sorted(shapes)}. The first axis of all of them must count "
            "rows, or samples be read by index, from a DataLoader over a map-style dataset."
        )
    return rows.pop()


def _leaves(batch: Any) -> Iterator[Any]:
    if isinstance(batch, (Mapping, list, tuple)):
        for child in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _leaves(child)
    else:
        yield batch


def _lists(batch: Any) -> Iterator[list[Any]]:
    """The innermost lists."""
    if isinstance(batch, (Mapping, list, tuple)):
        children = list(batch.values() if isinstance(batch, Mapping) else batch)
        below = [found for child in children for found in _lists(child)]
        yield from below or ([children] if isinstance(batch, list) else [])


def _rows(batch: Any, rows: slice, of: int) -> Any:
    """Those rows of everything in `batch` that has `of` of them."""
    if hasattr(batch, "shape"):
        return batch[rows] if batch.ndim and len(batch) == of else batch
    if isinstance(batch, Mapping):
        cut: Any = copy.copy(batch)
        cut.update({key: _rows(value, rows, of) for key, value in batch.items()})
        return cut
    if isinstance(batch, (list, tuple)):
        values = [_rows(child, rows, of) for child in batch]
        if all(new is old for new, old in zip(values, batch, strict=True)):
            return batch[rows] if len(batch) == of else batch
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch
