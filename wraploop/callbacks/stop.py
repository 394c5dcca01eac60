"""Callbacks that end the fit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from wraploop import processes
from wraploop.callback import Callback, on
from wraploop.callbacks.meters import count_rows
from wraploop.callbacks.records import number
from wraploop.events import BackwardEnd, CancelFit
from wraploop.phases import AbstractTrainingPhase

if TYPE_CHECKING:
    from wraploop.learner import Learner


class StopOnNaNLoss(Callback):
    """Ends the fit when a loss is NaN, before the optimizer can spoil the weights.

    One rank's NaN stops every rank at the same step. Of a phase with several losses, those are
    looked at that the step has so far; a process without a row in the batch has no say. Reading
    a loss waits for the device that computes it.
    """

    reads = ("step.batch", "step.loss")

    @on(BackwardEnd, AbstractTrainingPhase)
    def check(self, learner: Learner) -> None:
        """Looks at every loss of the step so far, unless the step is cancelled already."""
        if learner.step.cancelled:  # other processes may know nothing of that
            return
        stored = vars(learner.step)
        bad = ""
        for name in learner.phase.losses:
            if name in stored and math.isnan(number(stored[name])):
                bad = f"{bad} and {name}" if bad else name
        if processes.any(bad != "" and count_rows(learner.step.batch) > 0):
            raise CancelFit(f"{bad or 'the loss of another process'} is NaN")
