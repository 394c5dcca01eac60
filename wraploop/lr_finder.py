"""Finding a learning rate: the loss over a sweep of rates, on copies."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from wraploop import named, processes
from wraploop.callback import Callback, on
from wraploop.callbacks.defaults import changes_steps
from wraploop.callbacks.meters import rows_of
from wraploop.callbacks.scheduler import optimizer_called
from wraploop.events import CancelEpoch, StepBegin, StepEnd
from wraploop.given import check_numbers, whole
from wraploop.phases import Phase, TrainingPhase
from wraploop.plots import plot_lr_find
from wraploop.rehearsal import rehearsed
from wraploop.running import Batches, number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from wraploop.learner import Learner

_KEPT = 0.98  # of the mean loss at each step


class LRSweep(NamedTuple):
    """What `lr_find` has found.

    Attributes:
        rates: the learning rate of each step, rising.
        losses: the loss of each step.
        smoothed: their exponential mean, corrected for its start.
        suggestions: `"steepest"`, where the smoothed loss falls fastest over the logarithm of the
            rate, and `"minimum / 10"`, a tenth of the rate where it is lowest.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]

    @property
    def suggestions(self) -> dict[str, float]:
        """Rates to try, by name; none if the loss never fell."""
        low = min(range(len(self.smoothed)), key=self.smoothed.__getitem__, default=0)
        if low == 0:
            return {}
        falls = [self.smoothed[i + 1] - self.smoothed[i] for i in range(low)]
        steepest = min(range(low), key=falls.__getitem__)  # rates are evenly spaced logarithmically
        return {"steepest": self.rates[steepest], "minimum / 10": self.rates[low] / 10}

    def plot(self) -> Figure:
        """Draws losses over rates, with the suggestions."""
        return plot_lr_find(self.rates, self.losses, self.smoothed, self.suggestions)

    def __str__(self) -> str:
        tried = f"{len(self.rates)} rates"
        if self.rates:
            tried += f" from {self.rates[0]:.2e} to {self.rates[-1]:.2e}"
        found = [f"{name}: {rate:.2e}" for name, rate in self.suggestions.items()]
        return f"{tried}; {', '.join(found) or 'no suggestion, as the loss never fell'}"


def lr_find(
    learner: Learner,
    phase: Phase | None = None,
    batches: Batches | None = None,
    *,
    optimizer: str = "",
    loss: str = "",
    start: float = 1e-7,
    end: float = 10.0,
    steps: int = 100,
    stop_factor: float = 4.0,
) -> LRSweep:
    """Trains with a rate that rises from step to step, and tells how the loss went.

    Everything happens to copies: the learner, its models, optimizers and history, and all random
    states are bit for bit what they were. Of its callbacks those take part, as copies, that change
    a step (that write `step.` something: `ToDevice`, `ClipGradients`, `AccumulateGradients`).

    Args:
        learner: the learner.
        phase: what is trained; `TrainingPhase` unless given.
        batches: its batches, gone through as often as needed; the learner's own unless given.
        optimizer: the name of the one whose rate rises, where there are several; the others keep
            theirs.
        loss: the name of the loss in `learner.step`; the first of the phase's unless given.
        start: the first rate.
        end: the last rate.
        steps: how many, with rates evenly spaced on a logarithmic scale.
        stop_factor: it stops early where the smoothed loss has risen above its lowest by so many
            times that, less one; or is no number.

    Raises:
        ValueError: impossible rates or steps, an unknown optimizer, batches that can be gone
            through only once, or steps that store no such loss.
        NotCopyable: something cannot be copied.

    Source: Smith, Cyclical Learning Rates, 2017, section 3.3.
    """
    phase = phase or TrainingPhase()
    batches = named.batches(phase, learner.data) if batches is None else batches
    whole("steps", steps, least=2)
    check_numbers(start=start, end=end, stop_factor=stop_factor)
    if not 0 < start < end:
        raise ValueError(f"Expected 0 < start < end, and got {start=}, {end=}.")
    if isinstance(batches, Iterator):
        raise ValueError("The batches are an iterator, which a sweep would use up. Give a list.")
    optimizer_called(learner, optimizer)
    rates = [start * (end / start) ** (step / (steps - 1)) for step in range(steps)]
    sweep = _Sweep(rates, optimizer, loss or phase.losses[0], stop_factor)
    helpers = [copy.deepcopy(c) for c in learner.callbacks.listed if changes_steps(c)]
    with rehearsed(learner, phase, callbacks=[*helpers, sweep]) as rehearsed_phase:
        with learner.run_epoch(rehearsed_phase, batches):
            for batch in _over_and_over(batches):
                learner.run_step(rehearsed_phase, batch)
    if not sweep.losses:
        raise ValueError(f"No step of {phase.name} has come to its end with a {sweep.loss!r}.")
    return LRSweep(rates[: len(sweep.losses)], sweep.losses, sweep.smoothed)


class _Sweep(Callback):
    """Sets the rate before each step, takes the loss after it, and ends the epoch in time."""

    reads = ("step", "optimizer")

    def __init__(self, rates: list[float], optimizer: str, loss: str, stop_factor: float) -> None:
        self.rates, self.optimizer, self.loss, self.stop_factor = (
            rates,
            optimizer,
            loss,
            stop_factor,
        )
        self.losses: list[float] = []
        self.smoothed: list[float] = []
        self._mean = 0.0
        self._steps = 0

    @on(StepBegin)
    def set_rate(self, learner: Learner) -> None:
        """Sets the rate."""
        for group in optimizer_called(learner, self.optimizer).param_groups:
            group["lr"] = self.rates[len(self.losses)] * group.get("lr_scale", 1)

    @on(StepEnd)
    def take(self, learner: Learner) -> None:
        """Takes the loss, that of all processes."""
        self._steps += 1
        stored = vars(learner.step)
        if self.loss in stored and not learner.step.cancelled:
            self._add(_mean_over_processes(number(stored[self.loss]), stored))
        is_done = len(self.losses) == len(self.rates) or self._is_diverged()
        if is_done or self._steps >= 100 * len(self.rates):  # few steps have the loss, or none
            raise CancelEpoch

    def _add(self, loss: float) -> None:
        self.losses.append(loss)
        self._mean = _KEPT * self._mean + (1 - _KEPT) * loss
        self.smoothed.append(self._mean / (1 - _KEPT ** len(self.losses)))

    def _is_diverged(self) -> bool:
        if not self.smoothed:
            return False
        lowest = min(self.smoothed)
        risen = self.smoothed[-1] - lowest > (self.stop_factor - 1) * abs(lowest)
        return risen or not math.isfinite(self.losses[-1])


def _mean_over_processes(loss: float, stored: dict[str, Any]) -> float:
    if processes.world_size() == 1:
        return loss
    rows = rows_of(stored)
    total = processes.sum(loss * rows if rows else 0.0, "the loss of lr_find")
    return total / max(processes.sum(rows, "the rows of lr_find"), 1)


def _over_and_over(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError("There are no batches to try rates on.")
