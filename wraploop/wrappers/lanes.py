"""Lanes: the shards of one process, each run by a thread of its own.

    calling thread   lane 0 ──────────────┐
    worker 1         lane 1 ───────────┐  │   wait for all, then go on
    worker 2         lane 2 ────────┐  │  │

On CPU the autograd engine runs a backward in the thread that calls it, so a backward is parallel
when each lane differentiates its own graph in its own thread. Sums over lanes are taken in the
order of the lanes, so that every run gives the same bits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from . import shard as shards
from .batch import cat_rows, zeros_like_rows
from .border import Move, weighted_mean
from .internals import foreach_add
from .shard import Shard
from .threads import Disagreement, Threads

T = TypeVar("T")


class Meeting:
    """Where the lanes of a pass meet: each brings something and takes what becomes of all."""

    def __init__(self, lanes: int, parent: Shard | None) -> None:
        self._parent = parent
        self.is_of_rank = parent is not None and parent.is_of_rank
        self._brought: list[Any] = [None] * lanes
        self._missing = lanes
        self._round = 0
        self._ended = False
        self._changed = threading.Condition()

    def begin(self) -> None:
        """Makes it ready for another pass, before any lane runs."""
        self._brought = [None] * len(self._brought)
        self._missing = len(self._brought)
        self._ended = False

    def total(self, lane: int, tensor: Tensor) -> Tensor:
        """The sum of what all lanes bring, in the order of the lanes."""
        return self._met(lane, tensor, self._total).to(tensor.device, copy=True)

    def everyones(self, lane: int, rows: np.ndarray) -> np.ndarray:
        """What all lanes bring, in the order of the lanes, one behind the other."""
        return self._met(lane, rows, self._everyones)

    def _met(self, lane: int, brought: T, together: Callable[[list[T]], T]) -> T:
        with self._changed:
            this_round = self._round
            self._brought[lane] = brought
            self._missing -= 1
            if self._missing == 0:
                self._whole = together(self._brought)
                self._missing = len(self._brought)
                self._round += 1
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._round != this_round or self._ended)
            if self._round == this_round:
                raise Disagreement(
                    "A shard waits for a statistic of the whole batch (BatchNorm, batch_mean) that "
                    "another shard has not computed: the module must use the same such layers for "
                    "every row."
                )
            return self._whole

    def _total(self, brought: list[Tensor]) -> Tensor:
        _check_shapes([*map(_shape, brought)])
        total = brought[0]
        for tensor in brought[1:]:
            total = total + tensor.to(total.device)
        return self._parent.total(total) if self._parent else total

    def _everyones(self, brought: list[np.ndarray]) -> np.ndarray:
        _check_shapes([_shape(rows)[1:] for rows in brought])  # a wrapper inside brings several
        rows = np.concatenate(brought)
        return self._parent.everyones(rows) if self._parent else rows

    def leave(self) -> None:
        """Says that a lane is through; whoever waits for it now, or will, gets an error."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()


def _shape(brought: Tensor | np.ndarray) -> tuple[int, ...]:
    return tuple(brought.shape)


def _check_shapes(shapes: list[tuple[int, ...]]) -> None:
    """Checks that all lanes are at the same layer."""
    if len(set(shapes)) > 1:
        raise ValueError(
            f"Shards are at different statistics of the whole batch, of shapes {shapes}: the "
            "module must use the same layers of such (BatchNorm, batch_mean) for every row."
        )


class Lane(Shard):
    """One lane of a `LaneGroup`, as the module running in it sees it.

    It holds no group, which holds it: every call would leave a cycle, and sums, to the collector.
    """

    is_lane = True

    def __init__(self, meeting: Meeting, index: int, rows: int, loss_weight: float) -> None:
        self.meeting = meeting
        self.index = index
        self.rows = rows
        self.loss_weight = loss_weight
        self.is_of_rank = meeting.is_of_rank

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of all shards' `tensor`."""
        return self.meeting.total(self.index, tensor)

    def everyones(self, rows: np.ndarray) -> np.ndarray:
        """All shards' `rows`, one behind the other."""
        return self.meeting.everyones(self.index, rows)


class Lanes(NamedTuple):
    """Where lanes run.

    Attributes:
        devices: one for each lane; None is where the module is.
        output_device: where outputs are put together; None is where they are.
        operator_threads: how many threads each lane's operators use; None leaves it alone.
    """

    devices: Sequence[torch.device | None]
    output_device: torch.device | None = None
    operator_threads: int | None = None


class LaneGroup:
    """The lanes that one batch goes through, in forward and again in backward.

    Args:
        rows: the run of rows of each lane; none is empty.
        lanes: where they run.
        threads: who runs them.

    Attributes:
        sizes: how many rows each lane has.
        weights: each lane's share of all rows.
        took_s: how many seconds lane 0 has worked in the last pass.
    """

    took_s = 0.0

    def __init__(self, rows: list[slice], lanes: Lanes, threads: Threads) -> None:
        self._rows = rows
        self.sizes = [part.stop - part.start for part in rows]
        self.weights = [size / sum(self.sizes) for size in self.sizes]
        self._where = lanes
        self._threads = threads
        self._parent = shards.current()
        # While an outer shard runs a borrowed row, no row is this group's own.
        owned = self._parent is None or self._parent.rows > 0
        weight = self._parent.loss_weight if self._parent else 1.0
        rows_of_lanes = [size if owned else 0 for size in self.sizes]
        meeting = self._meeting = Meeting(len(rows), self._parent)
        self._lanes = [Lane(meeting, i, rows, weight) for i, rows in enumerate(rows_of_lanes)]
        for lane in self._lanes:
            lane.is_whole = len(rows) == 1 and self._parent is None

    def run(self, work: Callable[[int], T]) -> list[T]:
        """`work(lane)` of every lane, at the same time; the results in order.

        Raises:
            Exception: what the first failing lane raised, when all lanes have ended.
        """
        self._meeting.begin()
        pieces = [partial(self._run_lane, work, lane) for lane in self._lanes]
        # Interrupted, a lane may not have begun, or not have said that it is through.
        leave = self._meeting.leave
        return self._threads.run(pieces, self._where.operator_threads, leave)

    def turn(self) -> AbstractContextManager[Any]:
        """A block in which no other thread uses what the lanes have; a lane itself never waits."""
        return self._threads.turn() if shards.current() is None else nullcontext()

    def _run_lane(self, work: Callable[[int], T], lane: Lane) -> T:
        begun_s = time.perf_counter()
        try:
            with shards.running(lane):
                return work(lane.index)
        except Exception as error:
            size, lanes = self.sizes[lane.index], len(self.sizes)
            shards.note(error, f"Raised in shard {lane.index} of {lanes}, which has {size} rows.")
            raise
        finally:
            self._meeting.leave()
            if lane.index == 0:
                self.took_s = time.perf_counter() - begun_s

    def go_in(self, whole: Tensor, move: Move, lane: int) -> Tensor:
        """What `lane` gets of `whole`: its rows ("scatter") or all of it ("share")."""
        whole = whole.data  # whose version is its own: other lanes may write to their rows
        part = whole[self._rows[lane]] if move == "scatter" else whole
        device = self._where.devices[lane]
        return part if device is None else part.to(device, non_blocking=True)

    def come_out(
        self, parts: list[list[Tensor | None]], moves: Sequence[Move], like: list[Tensor]
    ) -> list[Tensor | None]:
        """Whole tensors from the lanes' parts.

        Args:
            parts: `parts[lane][i]`; None counts as zeros.
            moves: for each `i`, whether the whole is all rows ("gather") or the sum ("sum").
            like: for each `i` a tensor of the shape and dtype of lane 0's part.

        Returns:
            For each `i` the whole; None where every lane's part is None.
        """
        columns = [self._home(column) for column in zip(*parts, strict=True)]
        wholes: list[Tensor | None] = [None] * len(columns)
        sums = []
        for i, (column, move) in enumerate(zip(columns, moves, strict=True)):
            if column[0] is None and all(part is None for part in column):
                continue
            if move == "first":
                wholes[i] = column[0]
            elif move == "mean":
                wholes[i] = weighted_mean([p for p in column if p is not None], self.weights)
            elif move == "gather":
                wholes[i] = cat_rows(self._without_gaps(column, like[i]), like[i])
            else:
                sums.append(i)
        if sums:
            for i, total in zip(sums, _sums([columns[i] for i in sums]), strict=True):
                wholes[i] = total
        return wholes

    def _home(self, column: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        home = self._where.output_device
        if home is None:
            return list(column)
        return [None if part is None else part.to(home, non_blocking=True) for part in column]

    def _without_gaps(self, column: list[Tensor | None], like: Tensor) -> list[Tensor]:
        device = next(part.device for part in column if part is not None)
        return [
            zeros_like_rows(like, size).to(device) if part is None else part
            for part, size in zip(column, self.sizes, strict=True)
        ]


def _sums(columns: list[list[Tensor | None]]) -> list[Tensor]:
    """The sum of each column, in its order, without what is None."""
    present = [[part for part in column if part is not None] for column in columns]
    totals = [column[0] for column in present]
    for lane in range(1, max(map(len, present), default=0)):
        rest = [i for i, column in enumerate(present) if len(column) > lane]
        added = foreach_add([totals[i] for i in rest], [present[i][lane] for i in rest])
        for i, total in zip(rest, added, strict=True):
            totals[i] = total
    return totals
