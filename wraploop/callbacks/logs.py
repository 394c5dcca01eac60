"""Logging numbers: metrics, hyperparameters and traces.

The step of everything is `learner.history.training_steps`, how many steps all training phases have
completed, which never goes back. `every_steps` counts the steps of each phase by itself. Cancelled
steps and broken epochs are not logged. Loggers stay open after a fit, so that another can go on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from wraploop.callback import Callback, on
from wraploop.callbacks.due import checked_loggers, is_due
from wraploop.callbacks.loggers import Logger, Setting, checked_configuration
from wraploop.events import EpochEnd, FitBegin, StepEnd
from wraploop.given import whole
from wraploop.phases import AbstractTrainingPhase
from wraploop.running import number

if TYPE_CHECKING:
    from wraploop.learner import Learner


class LogMetrics(Callback):
    """Logs losses and metrics: `TrainingPhase/loss` and `ValidationPhase/epoch/loss`.

    Step values are those of this process and of training phases, epoch values those of all
    phases; after a training phase, `epoch` is how many epochs it has run. What not every step
    has, a generator's loss, is logged if it was taken in the last `every_steps` steps.

    Args:
        loggers: where to; each takes numbers.
        every_steps: how often step values are logged, and so read off their device.

    Raises:
        ValueError, TypeError: `every_steps` is below 1, or of the loggers, see `checked_loggers`.
    """

    reads = ("history", "metrics")

    def __init__(self, *loggers: Logger, every_steps: int = 1) -> None:
        self.loggers = checked_loggers(self, loggers, "numbers")
        self.every_steps = whole("every_steps", every_steps)

    @on(StepEnd, AbstractTrainingPhase)
    def log_step(self, learner: Learner) -> None:
        """Logs the latest step values."""
        if not is_due(learner, self.loggers, self.every_steps):
            return
        phase, before = learner.phase, learner.history[learner.phase].steps - self.every_steps
        steps = learner.metrics[phase].steps
        new = {
            name: series for name, series in steps.items() if series.at and series.at[-1] > before
        }
        values = {f"{phase.name}/{name}": series.last for name, series in new.items()}
        for logger in self.loggers:
            logger.numbers(values, learner.history.training_steps)

    @on(EpochEnd)
    def log_epoch(self, learner: Learner) -> None:
        """Logs the epoch's values, unless it is broken."""
        if learner.running.broken:
            return
        phase, epoch = learner.phase, learner.history[learner.phase].epochs
        metrics = learner.metrics[phase].at_epoch(epoch)
        values = {f"{phase.name}/epoch/{name}": value for name, value in metrics.items()}
        if isinstance(phase, AbstractTrainingPhase):
            values["epoch"] = epoch
        for logger in self.loggers:
            logger.numbers(values, learner.history.training_steps)


class LogHyperparameters(Callback):
    """Logs learning rates, `lr/generator`, and what else changes in the optimizers.

    Every number that an optimizer keeps for a group of parameters is logged the first time and
    when it has changed, `lr` always; of several groups as `lr/generator/0`, of pairs as
    `betas.0/generator`. One optimizer alone is called `optimizer`.

    Args:
        loggers: where to; each takes numbers.
        every_steps: how often.
        configuration: numbers, strings and bools by name, logged as the first fit begins.

    Raises:
        TypeError: an entry of the configuration is something else.
    """

    reads = ("history", "optimizer")

    def __init__(
        self,
        *loggers: Logger,
        every_steps: int = 1,
        configuration: Mapping[str, Setting] | None = None,
    ) -> None:
        self.loggers = checked_loggers(self, loggers, "numbers")
        self.every_steps = whole("every_steps", every_steps)
        self._configuration = checked_configuration(configuration or {})
        self._logged: dict[str, float] = {}

    @on(FitBegin)
    def log_configuration(self, learner: Learner) -> None:
        """Logs the configuration, the first time."""
        if self._configuration:
            for logger in self.loggers:
                logger.hyperparameters(self._configuration)
        self._configuration = {}

    @on(StepEnd, AbstractTrainingPhase)
    def log(self, learner: Learner) -> None:
        """Logs learning rates, and what has changed."""
        if not is_due(learner, self.loggers, self.every_steps):
            return
        values = dict(_hyperparameters(learner.optimizers))
        new = {
            name: value
            for name, value in values.items()
            if name.startswith("lr/") or self._logged.get(name) != value
        }
        self._logged = values
        for logger in self.loggers:
            logger.numbers(new, learner.history.training_steps)


class LogTraces(Callback):
    """Logs the latest of each trace of a training phase: `TrainingPhase/traces/norm`.

    Traces of anything but numbers are passed over.

    Args:
        loggers: where to; each takes numbers.
        every_steps: how often.
    """

    reads = ("history", "traces")

    def __init__(self, *loggers: Logger, every_steps: int = 1) -> None:
        self.loggers = checked_loggers(self, loggers, "numbers")
        self.every_steps = whole("every_steps", every_steps)

    @on(StepEnd, AbstractTrainingPhase)
    def log(self, learner: Learner) -> None:
        """Logs what was traced in the last `every_steps` steps."""
        if not is_due(learner, self.loggers, self.every_steps):
            return
        phase, before = learner.phase, learner.history[learner.phase].steps - self.every_steps
        values = {
            f"{phase.name}/traces/{name}": number(trace.values[-1])
            for name, trace in learner.traces[phase].items()
            if trace.at and trace.at[-1] > before and _is_number(trace.values[-1])
        }
        for logger in self.loggers:
            logger.numbers(values, learner.history.training_steps)


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, (int, float))


def _hyperparameters(optimizers: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, optimizer in optimizers.items():
        groups = optimizer.param_groups
        for index, group in enumerate(groups):
            owner = name if len(groups) == 1 else f"{name}/{index}"
            for key, value in group.items():
                is_pair = isinstance(value, (tuple, list)) and key != "params"
                parts = enumerate(value) if is_pair else []
                items = {key: value, **{f"{key}.{i}": part for i, part in parts}}
                for item, each in items.items():
                    if _is_number(each) and not isinstance(each, bool):
                        yield f"{item}/{owner}", number(each)
