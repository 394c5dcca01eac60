"""A table with a row for each epoch."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from wraploop import processes
from wraploop.callback import Callback, on
from wraploop.events import EpochEnd, FitBegin

if TYPE_CHECKING:
    from wraploop.learner import Learner

_WIDTH = 11  # of a column of numbers, at least


class EpochTable(Callback):
    """Prints a row of metrics for each phase and epoch; on rank 0.

    The header is printed again where a new metric turns up. A metric without a value in this
    epoch shows as `-`.

    Args:
        digits: significant digits of a metric.
    """

    reads = ("history", "metrics")

    def __init__(self, digits: int = 5) -> None:
        self.digits = digits
        self._columns: list[str] = []

    @on(FitBegin)
    def begin(self, learner: Learner) -> None:
        """A new table, with a header of its own."""
        self._columns = []

    @on(EpochEnd)
    def row(self, learner: Learner) -> None:
        """Prints the epoch's row, unless it is broken."""
        if learner.running.broken or not processes.is_main_process():
            return
        epoch = learner.history[learner.phase].epochs
        values = learner.metrics[learner.phase].at_epoch(epoch)
        new = [name for name in values if name not in self._columns]
        self._columns += new
        if new:
            self._print("epoch", "phase", [*self._columns, "seconds"])
        metrics = [self._format(values.get(name)) for name in self._columns]
        self._print(str(epoch), learner.phase.name, [*metrics, f"{learner.running.seconds:.1f}"])

    def _format(self, value: float | None) -> str:
        return "-" if value is None else f"{value:.{self.digits}g}"

    def _print(self, epoch: str, phase: str, cells: list[str]) -> None:
        names = [*self._columns, "seconds"]
        columns = [f"{c:>{max(len(n), _WIDTH)}}" for c, n in zip(cells, names, strict=True)]
        if sys.stdout is not None:  # as it is where there is none, for `print` too
            tqdm.write(f"{epoch:>5}  {phase:<20}" + "  ".join(columns))
