"""How many epochs and steps each phase has run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from wraploop.callback import Callback, on
from wraploop.callbacks.records import ByPhase
from wraploop.events import EpochBegin, EpochEnd, StepEnd
from wraploop.phases import AbstractTrainingPhase, Phase

if TYPE_CHECKING:
    from wraploop.learner import Learner


@dataclass
class PhaseHistory:
    """What one phase has completed: cancelled steps and broken epochs do not count."""

    epochs: int = 0
    steps: int = 0
    steps_in_epoch: int = 0
    trains: bool = False


class Histories(ByPhase[PhaseHistory]):
    """The histories of all phases."""

    @property
    def training_steps(self) -> int:
        """How many steps all training phases have completed together."""
        return sum(history.steps for history in self.values() if history.trains)


class History(Callback):
    """Counts, in `learner.history`: `learner.history[TrainingPhase].epochs`."""

    writes = ("history",)

    @override
    def attach(self, learner: Learner) -> None:
        self._histories = learner.history = Histories(PhaseHistory)
        self._phase: Phase | None = None  # the latest, whose `_counts` are at hand

    @override
    def state_dict(self) -> dict[str, Any]:
        return {name: asdict(history) for name, history in self._histories.items()}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._histories.put({name: PhaseHistory(**state[name]) for name in state})
        self._phase = None

    @on(EpochBegin)
    def begin(self, learner: Learner) -> None:
        """No steps yet in this epoch."""
        learner.history[learner.phase].steps_in_epoch = 0

    @on(StepEnd)
    def count_step(self, learner: Learner) -> None:
        """One step more, unless it was cancelled."""
        if learner.step.cancelled:
            return
        if learner.phase is not self._phase:
            self._phase = learner.phase
            self._counts = self._histories[learner.phase]
            self._counts.trains = isinstance(learner.phase, AbstractTrainingPhase)
        self._counts.steps += 1
        self._counts.steps_in_epoch += 1

    @on(EpochEnd)
    def count_epoch(self, learner: Learner) -> None:
        """One epoch more, unless it is broken."""
        if not learner.running.broken:
            learner.history[learner.phase].epochs += 1
