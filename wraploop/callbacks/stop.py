"""Ending the fit before a loss that is no number spoils the weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch.optim import Optimizer
from typing_extensions import override

from wraploop import processes
from wraploop.callback import on
from wraploop.callbacks.meters import count_rows
from wraploop.callbacks.updates import AroundUpdates
from wraploop.events import BackwardEnd, CancelFit, StepBegin, StepEnd
from wraploop.phases import AbstractTrainingPhase
from wraploop.running import number_in

if TYPE_CHECKING:
    from wraploop.learner import Learner


class _SilentPhase(AbstractTrainingPhase):
    """Stands for all training phases that do not say that they fire BackwardEnd."""

    @classmethod
    def __subclasshook__(cls, phase: type) -> bool:
        trains = AbstractTrainingPhase in phase.__mro__
        return trains and BackwardEnd not in (getattr(phase, "fires", ()) or ())


class StopOnNaNLoss(AroundUpdates):
    """Ends the fit when a loss is NaN or infinite, before an update can spoil the weights.

    It looks at BackwardEnd; in a phase that does not fire it, before each update; and at StepEnd
    if neither was. One rank's NaN stops every rank at the same step. Of a phase with several
    losses, those are looked at that the step has so far; a process without a row in the batch has
    no say. Reading a loss waits for the device that computes it.
    """

    reads = ("optimizer", "step")

    def __init__(self) -> None:
        super().__init__()
        self._looked = False  # in this step
        self._knows = False  # what the next update comes from

    @override
    @on(StepBegin, _SilentPhase)
    def watch(self, learner: Learner) -> None:
        self._looked = self._knows = False
        super().watch(learner)

    @on(BackwardEnd, AbstractTrainingPhase)
    def check(self, learner: Learner) -> None:
        """Looks at every loss of the step so far, unless the step is cancelled already."""
        step = learner.step
        if step.cancelled:  # other processes may know nothing of that
            return
        self._looked = self._knows = True
        stored, bad = vars(step), ""
        for name in learner.phase.losses:
            if name in stored and not math.isfinite(value := number_in(step, name)):
                said = f"{name} is {'NaN' if math.isnan(value) else 'infinite'}"
                bad = f"{bad} and {said}" if bad else said
        is_bad = bad != "" and count_rows(stored["batch"]) > 0
        if processes.any(is_bad, "whether a loss is NaN or infinite"):
            raise CancelFit(bad or "the loss of another process is NaN or infinite")

    @override
    def before(self, learner: Learner, name: str, optimizer: Optimizer) -> None:
        if self._knows:
            self._knows = False
            return
        try:
            self.check(learner)
        except CancelFit as stop:
            stop.source = self
            raise
        self._knows = False

    @override
    @on(StepEnd, _SilentPhase)
    def unwatch(self, learner: Learner) -> None:
        super().unwatch(learner)
        if not self._looked:
            self.check(learner)
