"""Ending the fit when it gets no better."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from wraploop import processes
from wraploop.callback import Callback, on
from wraploop.callbacks.criteria import Criterion, NoImprovement
from wraploop.callbacks.watched import Watched
from wraploop.events import CancelFit, EpochEnd, FitBegin
from wraploop.phases import AbstractTrainingPhase, Phase

if TYPE_CHECKING:
    from wraploop.learner import Learner


class EarlyStopping(Callback):
    """Ends the fit when a criterion says so, after an epoch; all processes at the same.

    Args:
        criterion: one of `callbacks.criteria`, or a number of epochs: `NoImprovement` for so many.
        metric: the name of the metric that the criterion is told.
        phase: whose metric; unless given, that of validation where a fit has it, else of training.
        mode: `"min"` if the metric is to become small, `"max"` if large; criteria then see it with
            its sign changed.

    Raises:
        ValueError: another mode; as a fit begins, a phase that it does not run; after the first
            epoch, a metric that there is not.

    Examples:
        >>> from wraploop.callbacks.criteria import GL, Either, NumberLimit
        >>> EarlyStopping(Either(GL(alpha=5), NumberLimit(200)), metric="error")
        EarlyStopping(Either(GL(alpha=5), NumberLimit(epochs=200)), metric='error')
    """

    reads = ("history", "metrics", "phases")

    def __init__(
        self,
        criterion: Criterion | int,
        metric: str = "loss",
        *,
        phase: type[Phase] | None = None,
        mode: str = "min",
    ) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"Expected the mode 'min' or 'max', and got {mode!r}.")
        if not isinstance(criterion, (Criterion, int)):
            raise TypeError(
                f"Expected a criterion or a number of epochs, and got {criterion!r}; the metric is "
                "the second argument: EarlyStopping(6, 'accuracy')."
            )
        self.criterion = NoImprovement(criterion) if isinstance(criterion, int) else criterion
        self.watched, self.sign = Watched(metric, phase), 1 if mode == "min" else -1
        self._fresh, self._has_stopped = copy.deepcopy(self.criterion.state_dict()), False

    @override
    def attach(self, learner: Learner) -> None:
        self._begin_anew()
        self.watched.seen = 0

    @on(FitBegin)
    def begin(self, learner: Learner) -> None:
        """Checks that there is something to watch; begins anew after a fit that it has ended."""
        self.watched.check(learner, self)
        if self._has_stopped:
            self._begin_anew()

    @on(EpochEnd)
    def check(self, learner: Learner) -> None:
        """Tells the criterion, and ends the fit if it says so."""
        reasons = []
        if isinstance(learner.phase, AbstractTrainingPhase) and not learner.running.broken:
            values = learner.metrics[learner.phase]
            epoch = learner.history[learner.phase].epochs
            taken = values.at_epoch(epoch)
            trained = [taken[name] for name in learner.phase.losses[:1] if name in taken]
            reasons += map(self.criterion.update_training, trained)
        if self.watched.is_due(learner):
            reasons.append(self.criterion.update(self.sign * self.watched.value(learner)))
        reason = " and ".join(filter(None, reasons))
        if processes.any(bool(reason), "whether EarlyStopping stops"):
            reason, self._has_stopped = reason or "another process says so", True
            raise CancelFit(f"{self.watched.metric} of {learner.phase.name}: {reason}")

    def _begin_anew(self) -> None:
        self.criterion.load_state_dict(copy.deepcopy(self._fresh))
        self._has_stopped = False

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "criterion": self.criterion.state_dict(),
            "seen": self.watched.seen,
            "has_stopped": self._has_stopped,
        }

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.criterion.load_state_dict(state["criterion"])
        self.watched.seen = state["seen"]
        self._has_stopped = state.get("has_stopped", False)  # checkpoints before had none

    def __repr__(self) -> str:
        return f"EarlyStopping({self.criterion!r}, metric={self.watched.metric!r})"
