"""Hyperparameters that change while training goes on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from typing_extensions import override

from wraploop import named
from wraploop.callback import Callback, Handler
from wraploop.callbacks.records import Series
from wraploop.callbacks.watched import Watched
from wraploop.events import EpochBegin, EpochEnd, Event, StepBegin, StepEnd
from wraploop.phases import AbstractTrainingPhase, Phase

if TYPE_CHECKING:
    from wraploop.learner import Learner


class Scheduler(Callback):
    """Sets hyperparameters of an optimizer from schedules, before each step or each epoch.

    What was set is in `learner.hyperparameters`, a `Series` for each, one value for each step or
    epoch: `learner.hyperparameters["lr"]`, of several optimizers `["generator.lr"]`. Parameter
    groups with an `"lr_scale"` get their learning rate times that.

    Args:
        optimizer: the name of the optimizer; needed where there are several.
        each: `StepBegin` or `EpochBegin`: what is counted, from 0. Steps that were cancelled and
            epochs that are broken do not count.
        phase: the phases in which it is counted.
        schedules: by the hyperparameter's name in `optimizer.param_groups`, functions of the count.

    Raises:
        ValueError: there are no schedules, or `each` is another event; when it joins a learner, an
            optimizer or hyperparameter that there is not.
        TypeError: a schedule is no function.

    Examples:
        >>> Scheduler(lr=lambda step: 0.1 / (1 + step))
        Scheduler(lr)
        >>> Scheduler("critic", each=EpochBegin, lr=lambda epoch: 0.5**epoch)
        Scheduler('critic', lr)
    """

    reads = ("optimizer",)

    def __init__(
        self,
        optimizer: str = "",
        *,
        each: type[Event] = StepBegin,
        phase: type[Phase] = AbstractTrainingPhase,
        **schedules: Callable[[int], Any],
    ) -> None:
        if not schedules or each not in (StepBegin, EpochBegin):
            raise ValueError(
                "Give schedules by name, as in `Scheduler(lr=schedule)`, with each=StepBegin or "
                f"each=EpochBegin, and got {list(schedules)} and {each}."
            )
        for name, schedule in schedules.items():
            if not callable(schedule):
                raise TypeError(
                    f"Expected as {name} a function of the count, and got {schedule!r}. "
                    f"What stays the same is `lambda count: {schedule!r}`."
                )
        self.optimizer, self.each, self.phase, self.schedules = optimizer, each, phase, schedules
        self.writes = tuple(f"hyperparameters.{_name(optimizer, name)}" for name in schedules)
        self.count = 0
        self._values: dict[str, Any] = {}

    @override
    def attach(self, learner: Learner) -> None:
        optimizer = optimizer_called(learner, self.optimizer)
        there = [name for name in optimizer.param_groups[0] if name not in ("params", "lr_scale")]
        unknown = [name for name in self.schedules if name not in there]
        if unknown:
            kind = type(optimizer).__name__
            raise ValueError(f"{kind} has no hyperparameters {unknown}; there are {there}.")
        self.count = 0
        self._records = _Records(learner, self.writes)

    @override
    def handlers(self) -> list[Handler]:
        end = StepEnd if self.each is StepBegin else EpochEnd
        return [
            (self.each, self.phase, self.schedule),
            (end, self.phase, self.advance),
        ]

    def schedule(self, learner: Learner) -> None:
        """Sets the hyperparameters."""
        groups = optimizer_called(learner, self.optimizer).param_groups
        for name, schedule in self.schedules.items():
            value = self._values[name] = schedule(self.count)
            for group in groups:
                if name not in group:
                    raise ValueError(f"{self!r} sets {name!r}, which the optimizer does not have.")
                group[name] = value * group.get("lr_scale", 1) if name == "lr" else value

    def advance(self, learner: Learner) -> None:
        """Counts, and records what was set."""
        is_step = self.each is StepBegin
        if learner.step.cancelled if is_step else learner.running.broken:
            return
        self.count += 1
        for name in self._values:  # none if it joined since the beginning
            self._records.add(_name(self.optimizer, name), self._values[name])

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "records": self._records.state_dict()}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"]
        self._records.load_state_dict(state["records"])

    def __repr__(self) -> str:
        name = f"{self.optimizer!r}, " if self.optimizer else ""
        return f"Scheduler({name}{', '.join(self.schedules)})"


class TorchScheduler(Callback):
    """Steps a scheduler from `torch.optim.lr_scheduler` after each epoch, or each step.

    Cancelled steps and broken epochs do not count, and processes do not multiply. The first
    parameter group's rate is recorded in `learner.hyperparameters`, as by `Scheduler`.

    Args:
        make: makes the scheduler when called with the optimizer, `partial(StepLR, step_size=3)`;
            or a scheduler of the learner's optimizer.
        optimizer: the name of the optimizer; needed where there are several.
        each: `EpochEnd` or `StepEnd`: after what it is stepped.
        phase: the phases in which it is.
        metric: the name of the phase's metric that `ReduceLROnPlateau` is told.

    Raises:
        ValueError: `each` is another event; when it joins a learner, an optimizer that there is
            not or that the scheduler is not of, a metric where none is needed, none where one is.
        TypeError: when it joins a learner, `make` makes something else.

    Examples:
        >>> from functools import partial
        >>> from torch.optim.lr_scheduler import CosineAnnealingLR
        >>> TorchScheduler(partial(CosineAnnealingLR, T_max=1000), each=StepEnd)
        TorchScheduler(CosineAnnealingLR)
    """

    def __init__(
        self,
        make: Callable[[Any], Any] | LRScheduler,
        optimizer: str = "",
        *,
        each: type[Event] = EpochEnd,
        phase: type[Phase] = AbstractTrainingPhase,
        metric: str = "",
    ) -> None:
        if each not in (StepEnd, EpochEnd):
            raise ValueError(f"Expected each=EpochEnd or each=StepEnd, and got {each}.")
        self.make, self.optimizer, self.each, self.phase = make, optimizer, each, phase
        self.watched = Watched(metric, phase) if metric else None
        self.reads = ("optimizer", "step.accumulated", *(("history", "metrics") if metric else ()))
        self.writes = (f"hyperparameters.{_name(optimizer, 'lr')}",)
        self.scheduler: Any = None
        self._is_loaded = False

    @override
    def attach(self, learner: Learner) -> None:
        optimizer = optimizer_called(learner, self.optimizer)
        make: Any = self.make
        self.scheduler = make if isinstance(make, LRScheduler) else make(optimizer)
        if not isinstance(self.scheduler, LRScheduler):
            raise TypeError(
                "Expected a function that makes a torch.optim.lr_scheduler from an optimizer, as "
                f"`partial(StepLR, step_size=3)`, and it made {self.scheduler!r}."
            )
        if self.scheduler.optimizer is not optimizer:
            raise ValueError(
                f"The {type(self.scheduler).__name__} is of another optimizer than the learner's. "
                "Give a function that makes it: `partial(StepLR, step_size=3)`."
            )
        if isinstance(self.scheduler, ReduceLROnPlateau) != (self.watched is not None):
            raise ValueError(
                "A `metric` is for ReduceLROnPlateau, which needs one, and no other; got "
                f"{type(self.scheduler).__name__} with {self.watched and self.watched.metric!r}."
            )
        self._records = _Records(learner, self.writes)

    @override
    def handlers(self) -> list[Handler]:
        return [(self.each, self.phase, self.advance)]

    def advance(self, learner: Learner) -> None:
        """Records the rate, and steps the scheduler."""
        if learner.step.cancelled if self.each is StepEnd else learner.running.broken:
            return
        optimizer = optimizer_called(learner, self.optimizer)
        if optimizer is not self.scheduler.optimizer:
            raise RuntimeError(
                f"{self!r} was made for an optimizer that the learner has no longer, whose rate "
                "would stay as it is. Replace the callback too, learner.callbacks.replace(...)."
            )
        rate = self.scheduler.optimizer.param_groups[0]["lr"]
        self._records.add(_name(self.optimizer, "lr"), rate)
        with warnings.catch_warnings():
            if self._is_loaded:  # the update before this was made in another process
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
            self.scheduler.step(*([self.watched.value(learner)] if self.watched else []))
        self._is_loaded = False

    @override
    def state_dict(self) -> dict[str, Any]:
        records = self._records.state_dict()
        return {"scheduler": self.scheduler.state_dict(), "records": records}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scheduler.load_state_dict(state["scheduler"])
        self._is_loaded = True
        self._records.load_state_dict(state["records"])

    def __repr__(self) -> str:
        made: Any = getattr(self.make, "func", self.make)
        made = type(made) if isinstance(made, LRScheduler) else made
        return f"TorchScheduler({getattr(made, '__name__', made)})"


def optimizer_called(learner: Learner, name: str) -> Optimizer:
    """The optimizer of this name, which need not be given where there is but one."""
    there = learner.optimizers
    if name in there:
        return there[name]
    if not there:
        raise ValueError(named.NO_OPTIMIZER)
    if name or len(there) > 1:
        said = f"There is no optimizer {name!r}" if name else "There are several optimizers"
        raise ValueError(
            f"{said}: name one of {', '.join(there)}, as optimizer={next(iter(there))!r}."
        )
    return next(iter(there.values()))


def _name(optimizer: str, hyperparameter: str) -> str:
    return hyperparameter if optimizer in ("", "optimizer") else f"{optimizer}.{hyperparameter}"


class _Records:
    """Of all hyperparameters' records, those of one scheduler."""

    def __init__(self, learner: Learner, writes: tuple[str, ...]) -> None:
        if "hyperparameters" not in vars(learner):
            learner.hyperparameters = {}
        self._all: dict[str, Series] = learner.hyperparameters
        self._names = [path.removeprefix("hyperparameters.") for path in writes]

    def add(self, name: str, value: Any) -> None:
        if isinstance(value, (float, int, Tensor)):
            series = self._all.setdefault(name, Series())
            series.append(len(series) + 1, value)

    def state_dict(self) -> dict[str, Any]:
        return {name: self._all[name].state_dict() for name in self._names if name in self._all}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in self._names:
            self._all.pop(name, None)
        self._all.update({name: Series.of(**saved) for name, saved in state.items()})
