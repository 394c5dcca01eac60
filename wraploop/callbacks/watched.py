"""The metric that a callback goes by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wraploop.phases import AbstractTrainingPhase, AbstractValidationPhase, Phase

if TYPE_CHECKING:
    from wraploop.callback import Callback
    from wraploop.learner import Learner


class Watched:
    """A metric of one phase, epoch by epoch, of those epochs before which something was trained.

    An evaluation, an epoch of validation by itself, so is not taken for news.

    Args:
        metric: its name; with `None`, there is none, only the epochs.
        phase: the phase; unless given, validation where a fit has it, else training.
    """

    def __init__(self, metric: str | None, phase: type[Phase] | None) -> None:
        self.metric, self.phase = metric, phase
        self.seen = 0  # training steps when it was last due

    def check(self, learner: Learner, watcher: Callback) -> None:
        """Checks that the fit runs the phase, and takes the metric as far as that is known.

        Args:
            learner: the learner.
            watcher: the callback that goes by the metric.

        Raises:
            ValueError: it does not.
        """
        for phase in learner.phases if self.metric is not None else ():
            names = learner.metrics.names(phase)
            if isinstance(phase, self._kind(learner)) and names and self.metric not in names:
                raise ValueError(
                    f"{phase.name} has no metric {self.metric!r}; it has {', '.join(names)}. "
                    f"{watcher!r} goes by it: name another there."
                )
        if not any(isinstance(phase, self._kind(learner)) for phase in learner.phases):
            what = "The end" if self.metric is None else repr(self.metric)
            raise ValueError(
                f"{what} of {self._kind(learner).__name__} is watched, and this fit runs "
                f"{', '.join(phase.name for phase in learner.phases)}. {watcher!r} goes by it: "
                "name another phase there."
            )

    def is_due(self, learner: Learner) -> bool:
        """Whether the epoch that ends has the metric, and tells something new."""
        if learner.running.broken or not isinstance(learner.phase, self._kind(learner)):
            return False
        before, self.seen = self.seen, learner.history.training_steps
        return self.seen != before

    def value(self, learner: Learner) -> float:
        """What it has come to in the epoch that ends.

        Raises:
            ValueError: it has not been taken; names those that have.
        """
        assert self.metric is not None
        epoch = learner.history[learner.phase].epochs
        values = learner.metrics[learner.phase].at_epoch(epoch)
        if self.metric not in values:
            raise ValueError(
                f"{learner.phase.name} has no metric {self.metric!r} in epoch {epoch}; "
                f"it has {', '.join(values) or 'none, as no step of it came to its end'}."
            )
        return values[self.metric]

    def _kind(self, learner: Learner) -> type[Phase]:
        if self.phase is not None:
            return self.phase
        validates = any(isinstance(phase, AbstractValidationPhase) for phase in learner.phases)
        return AbstractValidationPhase if validates else AbstractTrainingPhase
