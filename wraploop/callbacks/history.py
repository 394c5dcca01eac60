"""How many epochs and steps each phase has run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from wraploop.callback import Callback, on
from wraploop.callbacks.records import ByPhase
from wraploop.events import EpochBegin, EpochEnd, StepEnd
from wraploop.phases import AbstractTrainingPhase

if TYPE_CHECKING:
    from wraploop.learner import Learner


@dataclass
class PhaseHistory:
    """What one phase has completed: cancelled steps and broken epochs do not count."""

    epochs: int = 0
    steps: int = 0
    steps_in_epoch: int = 0


class Histories(ByPhase[PhaseHistory]):
    """The histories of all phases.

    Attributes:
        training_steps: how many steps all training phases have completed together.
    """

    def __init__(self) -> None:
        super().__init__(PhaseHistory)
        self.training_steps = 0


class History(Callback):
    """Counts, in `learner.history`: `learner.history[TrainingPhase].epochs`."""

    writes = ("history",)

    @override
    def attach(self, learner: Learner) -> None:
        self._histories = learner.history = Histories()

    @override
    def state_dict(self) -> dict[str, Any]:
        phases = {name: asdict(history) for name, history in self._histories.items()}
        return {"phases": phases, "training_steps": self._histories.training_steps}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        histories = self._histories
        histories.training_steps = state["training_steps"]
        histories.put({name: PhaseHistory(**counts) for name, counts in state["phases"].items()})

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
            if isinstance(learner.phase, AbstractTrainingPhase):
                learner.history.training_steps += 1

    @on(EpochEnd)
    def count_epoch(self, learner: Learner) -> None:
        """One epoch more, unless it is broken."""
        if not learner.running.broken:
            learner.history[learner.phase].epochs += 1
