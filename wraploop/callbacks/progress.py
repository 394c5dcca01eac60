"""A progress bar for each epoch."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from wraploop import processes
from wraploop.callback import Callback, on
from wraploop.events import EpochBegin, EpochEnd, StepEnd
from wraploop.running import number_in

if TYPE_CHECKING:
    from wraploop.learner import Epoch, Learner


class ProgressBar(Callback):
    """Shows how far each epoch is, how fast it goes, and the losses; on rank 0, if it has stderr.

    Its length is that of the batches that are run over; without one it counts.

    Args:
        losses_every_s: how often the losses are read, in seconds.
        options: for `tqdm`, as in `ProgressBar(file=sys.stdout)`.
    """

    reads = ("history", "step")

    def __init__(self, losses_every_s: float = 0.5, **options: Any) -> None:
        self.losses_every_s = losses_every_s
        self.options = {"leave": False, "unit": "step", **options}
        self._bars: dict[Epoch | None, tqdm[Any]] = {}
        self._read_s = self._told_s = 0.0
        self._tell_every_s = self.options.get("mininterval", 0.1)

    @on(EpochBegin)
    def open(self, learner: Learner) -> None:
        """Opens a bar, on rank 0."""
        if processes.is_main_process() and self.options.get("file", sys.stderr) is not None:
            name = f"{learner.phase.name} {learner.history[learner.phase].epochs + 1}"
            total = _length(learner.running.batches)
            self._bars[learner.running] = tqdm(desc=name, total=total, **self.options)

    @on(StepEnd)
    def advance(self, learner: Learner) -> None:
        """One step further, if it is a step of the epoch's phase."""
        running = learner.running
        bar = self._bars.get(running)
        if bar is None or learner.phase is not running.phase:
            return
        bar.n = max(bar.n + 1, running.taken)  # which is more where a fit goes on
        now_s = time.perf_counter()
        if now_s - self._told_s < self._tell_every_s:  # as tqdm itself would, in less time
            return
        self._told_s = now_s
        if now_s - self._read_s > self.losses_every_s:
            self._read_s = now_s
            bar.set_postfix(_losses(learner), refresh=False)
        bar.update(0)

    @on(EpochEnd)
    def close(self, learner: Learner) -> None:
        """Closes the bar."""
        bar = self._bars.pop(learner.running, None)
        if bar is not None:
            bar.close()


def _length(batches: Any) -> int | None:
    try:
        return len(batches)
    except TypeError:  # no `len`, or a DataLoader over an iterable without one
        return None


def _losses(learner: Learner) -> dict[str, float]:
    step = learner.step
    return {name: number_in(step, name) for name in learner.phase.losses if name in vars(step)}
