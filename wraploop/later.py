"""Iterating over batches from a later one on, without training on those before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset


class Later:
    """Items but the first `count`; `ready` is called when these have been taken and left out.

    Iterating raises:
        ValueError: there are not as many.
    """

    def __init__(self, items: Iterable[Any], count: int, ready: Callable[[], None]) -> None:
        self._items, self._count, self._ready = items, count, ready

    def __iter__(self) -> Iterator[Any]:
        return self._after(iter(self._items))

    def _after(self, iterator: Iterator[Any]) -> Iterator[Any]:
        there = sum(1 for _ in islice(iterator, self._count))
        if there < self._count:
            raise ValueError(
                f"The checkpoint was made after {self._count} batches of an epoch, and now there "
                f"are only {there}. Resume with the data that it was made with."
            )
        self._ready()
        yield from iterator


def batches_after(batches: Any, count: int, ready: Callable[[], None]) -> Iterator[Any]:
    """The batches but the first `count`, as `Later` gives them.

    A loader over a map-style dataset without workers reads no sample of those. Everything else is
    read: only so have workers drawn what they had.
    """
    if hasattr(type(batches), "after"):  # as `shard` has it
        return batches.after(count, ready)
    if reads_by_index(batches) and not batches.num_workers:
        sampler = Later(batches.batch_sampler, count, ready)
        return iter(loader_of(batches, sampler, batches.generator))
    return iter(Later(batches, count, ready))


def reads_by_index(batches: Any) -> bool:
    """Whether samples are read one by one, by indices that a batch sampler gives."""
    if not isinstance(batches, DataLoader) or batches.batch_sampler is None:
        return False
    if type(batches).__iter__ is not DataLoader.__iter__:  # what it does there is not known
        return False
    return not isinstance(batches.dataset, IterableDataset)


def loader_of(
    loader: Any, batch_sampler: Any, generator: torch.Generator | None
) -> DataLoader[Any]:
    """A loader like `loader`, with another batch sampler and generator."""
    workers = {}
    if loader.num_workers:
        workers = {
            "prefetch_factor": loader.prefetch_factor,
            "persistent_workers": loader.persistent_workers,
            "multiprocessing_context": loader.multiprocessing_context,
        }
    return DataLoader(
        loader.dataset,
        batch_sampler=batch_sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        generator=generator,
        **workers,
    )
