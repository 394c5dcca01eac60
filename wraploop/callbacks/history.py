"""How many epochs and steps each phase has run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from wraploop.callback import Callback, on
from wraploop.callbacks.records import ByPhase
from wraploop.events import EpochBegin, EpochEnd, StepEnd

if TYPE_CHECKING:
    from wraploop.learner import Learner


@dataclass
class PhaseHistory:
    """What one phase has completed: cancelled steps and broken epochs do not count."""

    epochs: int = 0
    steps: int = 0
    steps_in_epoch: int = 0


class History(Callback):
    """Counts, in `learner.history`: `learner.history[TrainingPhase].epochs`."""

    writes = ("history",)

    def attach(self, learner: Learner) -> None:
        """Starts from nothing."""
        learner.history = ByPhase(PhaseHistory)

    @on(EpochBegin)
    def begin(self, learner: Learner) -> None:
        """No steps yet in this epoch."""
        learner.history[learner.phase].steps_in_epoch = 0

    @on(StepEnd)
    def count_step(self, learner: Learner) -> None:
        """One step more, unless it was cancelled."""
        if not learner.step.cancelled:
            counts = learner.history[learner.phase]
            counts.steps += 1
            counts.steps_in_epoch += 1

    @on(EpochEnd)
    def count_epoch(self, learner: Learner) -> None:
        """One epoch more, unless it is broken."""
        if not learner.running.broken:
            learner.history[learner.phase].epochs += 1
