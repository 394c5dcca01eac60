"""What each phase's losses and metrics come to, step by step and epoch by epoch."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from typing_extensions import override

from wraploop import processes
from wraploop.callback import Callback, on
from wraploop.callbacks.meters import FunctionMeter, LossMeter, StateMeter, rows_of
from wraploop.callbacks.records import ByPhase, Series
from wraploop.events import EpochBegin, EpochEnd, StepEnd
from wraploop.given import check_names, first_make
from wraploop.phases import Phase

if TYPE_CHECKING:
    from wraploop.learner import Learner

Meter = LossMeter | StateMeter


class PhaseMetrics:
    """The metrics of one phase.

    Attributes:
        steps: by name, the value of each step in this process.
        epochs: by name, the value of each epoch over all processes.
    """

    def __init__(self) -> None:
        self.steps: dict[str, Series] = {}
        self.epochs: dict[str, Series] = {}

    def at_epoch(self, epoch: int) -> dict[str, float]:
        """What the metrics came to in one epoch, counted from 1, which may be not all of them."""
        return {
            name: series.values[series.at.index(epoch)]
            for name, series in self.epochs.items()
            if epoch in series.at
        }

    def state_dict(self) -> dict[str, Any]:
        """The numbers, as tensors."""
        return {
            kind: {name: series.state_dict() for name, series in getattr(self, kind).items()}
            for kind in ("steps", "epochs")
        }

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> PhaseMetrics:
        """What `state_dict` was taken from."""
        metrics = cls()
        for kind, saved in state.items():
            getattr(metrics, kind).update({name: Series.of(**saved[name]) for name in saved})
        return metrics

    def __repr__(self) -> str:
        return f"PhaseMetrics(epochs={self.epochs})"


class AllMetrics(ByPhase[PhaseMetrics]):
    """The metrics of all phases."""

    def __init__(self, metrics: list[Metric]) -> None:
        super().__init__(PhaseMetrics)
        self._metrics = metrics

    def names(self, phase: Phase) -> list[str]:
        """What a phase's metrics are called; none if that shows only when they are computed."""
        metrics = [each for each in self._metrics if isinstance(phase, each.phase)]
        if any(_has_state(each) for each in metrics):
            return []
        return [*phase.losses, *(each.name for each in metrics)]


class Metric:
    """A function of what a step stored, or a torchmetrics object fed with it.

    Args:
        of: returns a number when called with the values named by `reads`, or has `update`,
            `compute` and `reset`, as torchmetrics objects have.
        name: of the metric; that of the function unless given.
        phase: the phases in which it is taken.
        reads: names in `learner.step`. A step without them is passed over.

    Examples:
        >>> error_rate = Metric(lambda outputs, targets: 1 - accuracy(outputs, targets), "error")
        >>> error_rate.name
        'error'
    """

    def __init__(
        self,
        of: Callable[..., Any],
        name: str = "",
        *,
        phase: type[Phase] = Phase,
        reads: tuple[str, ...] = ("outputs", "targets"),
    ) -> None:
        if not callable(of) or isinstance(of, type):
            what = "Expected a function or a torchmetrics object"
            raise TypeError(f"{what}, and got {of!r}.{first_make(of)}")
        check_names("Metric.reads", reads)
        self.of, self.phase, self.reads = of, phase, reads
        self.name = name or getattr(of, "__name__", type(of).__name__.lower())


class Metrics(Callback):
    """Takes losses and metrics, in `learner.metrics`: `learner.metrics[TrainingPhase].epochs`.

    The losses that a phase names are always among them. An epoch's value is the mean over its
    rows, uneven last batches included, over all processes; of a torchmetrics object, what it
    computes. Steps that were cancelled and epochs that are broken have none.

    Args:
        metrics: functions of outputs and targets, torchmetrics objects, or `Metric`s.
        named: the same under names of your choice.

    Raises:
        ValueError: two have the same name.

    Examples:
        >>> metrics = Metrics(accuracy, top=Metric(lambda outputs: outputs.max(),
        ...                                        reads=("outputs",)))
        >>> metrics.names
        ['accuracy', 'top']
    """

    reads = ("history", "step")
    writes = ("metrics",)

    def __init__(self, *metrics: Any, **named: Any) -> None:
        pairs = [("", each) for each in metrics] + list(named.items())
        self.metrics = [_metric(each, name) for name, each in pairs]
        _check_names(self.names)
        self._meters: dict[str, list[Meter]] = {}
        self._saved: list[dict[str, Any]] = []  # what meters go on from, when they are made
        self._phase: Phase | None = None  # the latest, whose meters and counts are at hand

    def fresh(self) -> Metrics:
        """The same metrics, with nothing taken yet."""
        return Metrics(*self.metrics)

    @property
    def names(self) -> list[str]:
        """The names of the metrics, the losses aside."""
        return [metric.name for metric in self.metrics]

    @override
    def attach(self, learner: Learner) -> None:
        self._records = learner.metrics = AllMetrics(self.metrics)
        self._meters, self._phase = {}, None

    @override
    def state_dict(self) -> dict[str, Any]:
        records = {name: record.state_dict() for name, record in self._records.items()}
        meters = {}
        for phase, all_ in self._meters.items():
            if begun := {each.name: each.state_dict() for each in all_ if each.has_begun}:
                meters[phase] = begun
        everyones = processes.gather(meters, "the metrics so far")
        is_one = all(pickle.dumps(each) == pickle.dumps(everyones[0]) for each in everyones)
        return {"records": records, "meters": everyones[:1] if is_one else everyones}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        records = state["records"]
        self._records.put({name: PhaseMetrics.of(saved) for name, saved in records.items()})
        self._meters, self._phase = {}, None
        self._saved = _own_part(state["meters"])

    @on(EpochBegin)
    def begin(self, learner: Learner) -> None:
        """Epoch values start anew."""
        self._phase = None
        for meter in self._of_phase(learner):
            meter.begin()

    @on(StepEnd)
    def take(self, learner: Learner) -> None:
        """Takes the step's values."""
        step = learner.step
        if step.cancelled:
            return
        if learner.phase is not self._phase:
            self._phase, self._counts = learner.phase, learner.history[learner.phase]
            self._at_hand = self._of_phase(learner)
        at, rows = self._counts.steps, rows_of(vars(step))
        for meter in self._at_hand:
            meter.take(at, step, rows)

    @on(EpochEnd)
    def finish(self, learner: Learner) -> None:
        """Takes the epoch's values."""
        if learner.running.broken:
            return
        at, epochs = learner.history[learner.phase].epochs, learner.metrics[learner.phase].epochs
        meters = self._of_phase(learner)
        results = [meter.result() for meter in meters]
        for meter in meters:
            meter.begin()
        _check_names([name for result in results for name in result])
        for result in results:
            for name, value in result.items():
                epochs.setdefault(name, Series()).append(at, value)

    def _of_phase(self, learner: Learner) -> list[Meter]:
        phase, steps = learner.phase, learner.metrics[learner.phase].steps
        if phase.name not in self._meters:
            metrics = [each for each in self.metrics if isinstance(phase, each.phase)]
            _check_names([*phase.losses, *(each.name for each in metrics)])
            losses = [LossMeter(name, steps) for name in phase.losses]
            meters = self._meters[phase.name] = [*losses, *(_meter(m, steps) for m in metrics)]
            saved = [part.get(phase.name, {}) for part in self._saved]
            for each in meters:
                each.load_state_dict([part[each.name] for part in saved if each.name in part])
        return self._meters[phase.name]


def _own_part(parts: list[Any]) -> list[Any]:
    """Of what one process has taken, or each of several, what this one goes on from."""
    each_has_all = processes.draw_alike()
    if len(parts) == processes.world_size() and not each_has_all:
        return [parts[processes.rank()]]
    return parts if each_has_all or processes.rank() == 0 else []


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """The share of rows whose largest output is that of their target.

    Args:
        outputs: scores, shape `(B, classes)`.
        targets: classes, shape `(B,)`, or scores like `outputs`.

    Raises:
        ValueError: they have other shapes, or there is one score for each row: of two classes.

    Examples:
        >>> import torch
        >>> accuracy(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 0])).item()
        0.5
    """
    shape, others = tuple(outputs.shape), tuple(targets.shape)
    if len(shape) < 2 or shape[1] < 2 or others not in (shape, (shape[0], *shape[2:])):
        raise ValueError(
            f"accuracy takes scores of shape (B, classes), two at least, and classes of shape (B,) "
            f"or scores; it got {shape} and {others}. For one score a row give a function of your "
            "own, say `lambda outputs, targets: ((outputs > 0) == targets).double().mean()`."
        )
    classes = targets.argmax(1) if others == shape else targets
    return (outputs.argmax(1) == classes).double().mean()


def _metric(given: Any, name: str) -> Metric:
    if not isinstance(given, Metric):
        return Metric(given, name)
    return Metric(given.of, name or given.name, phase=given.phase, reads=given.reads)


def _meter(metric: Metric, steps: dict[str, Series]) -> Meter:
    if _has_state(metric):
        return StateMeter(metric.name, metric.reads, metric.of)
    return FunctionMeter(metric.name, metric.reads, metric.of, steps)


def _has_state(metric: Metric) -> bool:
    """Whether it is of an object with a state, as torchmetrics has them, and no function."""
    return all(hasattr(metric.of, verb) for verb in ("update", "compute", "reset"))


def _check_names(names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Two metrics are called {twice[0]!r}; name one: Metrics(other_name=...).")
