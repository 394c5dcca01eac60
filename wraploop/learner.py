"""The loop: `fit` runs epochs, `epoch` runs steps, `run_step` runs a phase's step on a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar
from warnings import warn

import torch
from torch import nn

from wraploop import named
from wraploop.callback import Callback, Callbacks, WrittenBy, check_mark
from wraploop.callbacks.defaults import for_evaluation, with_defaults
from wraploop.callbacks.function import FunctionCallback
from wraploop.callbacks.strict import Strict
from wraploop.checkpoint import read_alike, save
from wraploop.ending import Due, end, ending
from wraploop.events import (
    CancelEpoch,
    CancelFit,
    CancelStep,
    EpochBegin,
    Event,
    FitBegin,
    FitEnd,
    StepBegin,
    StepEnd,
)
from wraploop.fired import check_fired
from wraploop.given import whole
from wraploop.phases import (
    AbstractTrainingPhase,
    Batch,
    Phase,
    ValidationPhase,
    checked_phase,
    standard_phases,
)
from wraploop.plan import plan
from wraploop.plots import plot_metrics
from wraploop.position import Position
from wraploop.resuming import Resumption, resumption_of
from wraploop.running import Batches, Epoch, StepState
from wraploop.state import put_state, state_of
from wraploop.swap import Swap, swap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_Function = TypeVar("_Function", bound=Callable[..., Any])


class Learner:
    """Owns models, loss, optimizers and data; runs phases over batches; calls callbacks.

    What was begun is ended exactly once, innermost first, whether it was cancelled or failed.
    What callbacks write is found here too, under its name: `learner.history`.

    Args:
        model: a module, or modules by name; then `learner.model.critic` is one of them.
        loss_fn: called with outputs and targets by the standard phases.
        optimizer: an optimizer; or a factory, called with a list of parameters, once for each
            model; or a mapping of either, with names of models. Evaluating needs none.
        data: `(training, validation)`, or batches by name, or one iterable, for training.
        callbacks: called in the order that follows from what they read and write.
        default_callbacks: adds history, metrics, progress bar, epoch table and NaN stop, each
            unless `callbacks` has one of its kind.
        strict: callbacks that read or write what they have not declared raise `UndeclaredAccess`.

    Attributes:
        step: the state of the running step, or of the last; `in_step` tells which.
        phase, running: the running phase and `Epoch`, `None` between epochs.
        phases: those that the running fit runs, or the last.
        event: the event that callbacks are being called for.
        stopped: the `CancelFit` that ended the last fit, else `None`.
        position: where the running fit is, or the last, `None` before the first.

    Raises:
        TypeError, ValueError: see `named` for models, optimizers and data, `Callbacks` for these.

    Examples:
        >>> from wraploop.callbacks.history import History
        >>> from wraploop.phases import TrainingPhase
        >>> batches = [(torch.ones(8, 1), torch.ones(8, 1))] * 16
        >>> learner = Learner(
        ...     nn.Linear(1, 1), nn.functional.mse_loss, optimizer=torch.optim.SGD, data=batches,
        ...     callbacks=[History()], default_callbacks=False,
        ... )
        >>> learner.fit(2)
        >>> learner.history[TrainingPhase].steps
        32
    """

    history: Any = WrittenBy("History()")
    metrics: Any = WrittenBy("Metrics()")
    hyperparameters: Any = WrittenBy("Scheduler(...)")
    traces: Any = WrittenBy("Traces(...)")
    timings: Any = WrittenBy("Timings()")

    def __init__(
        self,
        model: named.Models,
        loss_fn: Callable[..., Any] | None = None,
        *,
        optimizer: named.Optimizers | None = None,
        data: Batches | Mapping[str, Batches] | None = None,
        callbacks: Iterable[Callback] = (),
        default_callbacks: bool = True,
        strict: bool = False,
    ) -> None:
        self.model: Any = named.models(model)
        self.optimizer: Any = named.optimizers(self.model, optimizer)
        self.loss_fn: Callable[..., Any] = named.loss_fn(loss_fn)
        self.data = data
        self.step, self.in_step = StepState(), False
        self.phase: Any = None  # a Phase while one runs
        self.running: Any = None  # an Epoch while one runs
        self.phases: list[Phase] = standard_phases(self.data)
        self.event: Event | None = None
        self.stopped: CancelFit | None = None
        self.position: Position | None = None
        self._due: Due = []
        self._fits = 0  # that have ended, but those within another
        self._resumption: Resumption | None = None
        callbacks = with_defaults(callbacks) if default_callbacks else callbacks
        self.callbacks = Callbacks(self, callbacks, watchers=(Strict(),) if strict else ())

    def fit(
        self,
        epochs: int,
        phases: Iterable[Phase | tuple[Phase, Batches]] = (),
        *,
        resume: str | PathLike[str] | None = None,
    ) -> None:
        """Runs each phase over its batches, one after the other, `epochs` times.

        Args:
            epochs: how often, those before a resumption included.
            phases: phases, or pairs of a phase and its batches; without, training and, where
                there is data for it, validation. Batches are those that there are now.
            resume: a checkpoint that was saved in such a fit, the first of a program say, from
                which it goes on, also from the middle of an epoch; `"auto"` for the newest whole
                one of the `Checkpoints` callback, if there is any. See `resuming`.

        Raises:
            TypeError, ValueError: `epochs` is no count, `phases` no list of phases, there are no
                batches for one, a callback answers an event that none of the phases fires, or the
                checkpoint is of another fit.
            OSError: there is no such checkpoint.
        """
        epochs = whole("epochs", epochs, least=0)
        planned = named.planned(phases, self.data)
        if any(isinstance(phase, AbstractTrainingPhase) for phase, _ in planned):
            held = named.optimizers(self.model, self.optimizer)  # which raises if they do not fit
            named.check_held(self.model, held)
        self.callbacks.check_joined()
        check_fired(self.callbacks, [phase for phase, _ in planned])
        within_a_fit = FitEnd in self._due
        outer = self.phases, self.position, self._resumption
        position = Position(self._fits, planned)
        resumption = resumption_of(self, resume, position)
        self.phases, self.stopped = [phase for phase, _ in planned], None
        self.position, self._resumption = position, resumption
        try:
            with ending(self._due, self.callbacks, self._stop):
                self.handle(FitBegin())
                if resumption:
                    resumption.in_fit(self)
                for phase, batches in position.remaining(epochs):
                    self.epoch(phase, batches)
                # a fit within this one may have set it
                self.stopped = CancelFit(position.stopped) if position.stopped else None
        except CancelFit as cancel:
            self._stop(cancel.with_traceback(None))
            cancel.__context__ = None  # it would keep tensors alive
        finally:
            if within_a_fit:
                self.phases, self.position, self._resumption = outer
        self._fits += not within_a_fit

    def epoch(self, phase: Phase, batches: Batches | None = None) -> None:
        """Runs a phase over batches, the learner's own unless given."""
        batches = named.batches(phase, self.data) if batches is None else batches
        with self.run_epoch(phase, batches) as epoch:
            for batch in epoch:
                self.run_step(phase, batch)

    def evaluate(
        self, phase: Phase | None = None, batches: Batches | None = None
    ) -> dict[str, float]:
        """Runs an epoch of validation by itself, and returns its metrics by name.

        History and records stay as they are, and of the callbacks only metrics, progress and those
        that change a step take part: it saves, stops and logs nothing.

        Args:
            phase: `ValidationPhase` unless given.
            batches: the learner's own unless given.

        Examples:
            >>> batches = [(torch.ones(4, 2), torch.zeros(4, 1))]
            >>> learner = Learner(
            ...     nn.Linear(2, 1), nn.L1Loss(), optimizer=torch.optim.SGD, data=([], batches)
            ... )
            >>> list(learner.evaluate())
            ['loss']
        """
        phase = phase or ValidationPhase()
        with self.using(callbacks=for_evaluation(self.callbacks.listed)):
            self.epoch(phase, batches)
            return self.metrics[phase].at_epoch(1)

    @contextmanager
    def run_epoch(self, phase: Phase, batches: Batches | None = None) -> Iterator[Epoch]:
        """An epoch whose loop is the body: `with learner.run_epoch(phase): ...`.

        The models are in the phase's mode, EpochBegin and EpochEnd are fired, and CancelEpoch
        leaves the body. Cancelled at EpochBegin already, the body is entered all the same, as
        Python cannot skip it: iterating gives no batches, and the first `run_step` leaves it.

        Args:
            phase: decides mode and callbacks, and is not called.
            batches: what iterating over the epoch gives, and how long the progress bar is.

        Raises:
            ValueError: the phase trains, and an optimizer holds none of its model's parameters.

        Examples:
            >>> from wraploop.phases import TrainingPhase
            >>> learner = Learner(
            ...     nn.Linear(1, 1), nn.L1Loss(), optimizer=torch.optim.SGD, default_callbacks=False
            ... )
            >>> phase, batch = TrainingPhase(), (torch.ones(1), torch.ones(1))
            >>> with learner.run_epoch(phase):
            ...     for _ in range(3):
            ...         state = learner.run_step(phase, batch)
            >>> state.outputs.shape
            torch.Size([1])
        """
        epoch = Epoch(phase, batches)
        is_fits = self.position is not None and self.position.enter(epoch)
        try:
            with self._inside(phase, epoch), ending(self._due, self.callbacks, epoch.cut):
                try:
                    self.handle(EpochBegin())
                except CancelEpoch:
                    epoch.cancelled = epoch.skipped = True
                if isinstance(phase, AbstractTrainingPhase):  # others may have been put in place
                    named.check_held(self.model, self.optimizer)
                if is_fits and self._resumption:
                    self._resumption.in_epoch(self)
                yield epoch
                epoch.skipped, epoch.is_over = False, True  # at EpochEnd steps may run
        except CancelEpoch:
            pass

    def run_step(self, phase: Phase, batch: Batch) -> StepState:
        """Runs one step of a phase on a batch and returns its state, which is `learner.step`.

        A cancelled step returns as well, with `cancelled` set. A step run inside a step puts the
        outer one's state back.
        """
        if phase is not self.phase:
            with self._inside(phase, self.running):
                if isinstance(phase, AbstractTrainingPhase):
                    named.check_held(self.model, self.optimizer)
                return self.run_step(phase, batch)
        if self.running is not None and self.running.skipped:
            raise CancelEpoch
        outer = self.step if self.in_step else None
        state = StepState()
        state.batch = batch
        self.step, self.in_step = state, True
        callbacks, due, begun = self.callbacks, self._due, len(self._due)
        try:
            try:  # as `with ending(...)` does, in less time
                calls, _ = callbacks.table[StepBegin]
                if calls:
                    callbacks.call(StepBegin(), calls)
                if phase.step(self, state.batch) is not None:
                    warn(_RETURNED.format(phase.name), stacklevel=2)
            except BaseException as error:
                state.cancelled = True
                if self.running is not None and not isinstance(error, (CancelStep, CancelEpoch)):
                    self.running.give_back()  # no step was made of it
                due.insert(len(due) - begun, StepEnd)
                end(due, begun, callbacks, error)
                raise
            if len(due) > begun:
                due.insert(len(due) - begun, StepEnd)
                end(due, begun, callbacks)
            else:
                calls, _ = callbacks.table[StepEnd]
                if calls:
                    callbacks.call(StepEnd(), calls)
        except CancelStep:
            pass
        finally:
            self.step, self.in_step = outer or state, outer is not None
            if state.cancelled:
                phase.abandon(self)
        return state

    def handle(self, event: Event) -> None:
        """Calls the callbacks that answer an event.

        All of them are called, also after one that cancels; then the strongest cancellation acts.
        An error acts at once.
        """
        kind = type(event)
        calls, due = self.callbacks.table[kind]
        if due is not None:
            self._due.insert(0, due)
        elif kind in self._due:
            self._due.remove(kind)
        if calls:
            self.callbacks.call(event, calls)

    def on(
        self,
        event: type[Event],
        phase: type[Phase] = Phase,
        *,
        reads: tuple[str, ...] = (),
        writes: tuple[str, ...] = (),
    ) -> Callable[[_Function], _Function]:
        """Has a function called with the learner at an event: a decorator.

        Args:
            event: when it is called; subclasses match.
            phase: in which phases; subclasses match.
            reads: names of what it reads, as of any callback.
            writes: names of what it writes.

        Examples:
            >>> from wraploop.events import FitEnd
            >>> learner = Learner(nn.Linear(1, 1), optimizer=torch.optim.SGD, data=[])
            >>> @learner.on(FitEnd, reads=("phases",))
            ... def say(learner):
            ...     print(learner.phases[0].name, "is done")
            >>> learner.fit(0)
            TrainingPhase is done
        """
        check_mark(event, phase)  # as it would show too late, and not at all without parentheses

        def add(function: _Function) -> _Function:
            callback = FunctionCallback(function, event, phase, reads=reads, writes=writes)
            self.callbacks.add(callback)
            return function

        return add

    @contextmanager
    def using(self, *averages: Swap, **swapped: Any) -> Iterator[None]:
        """While open, other models, optimizers, data or callbacks; then all is put back.

        What callbacks of the block write, such as a history of its own, ends with it too.

        Args:
            averages: what puts something else in place of the weights: an `EMA`.
            swapped: `model`, `optimizer`, `loss_fn`, `data` and `callbacks`, as `Learner` takes
                them; what is not named stays. `callbacks` replace all that there are.

        Raises:
            TypeError: another name.

        Examples:
            >>> learner = Learner(nn.Linear(1, 1), optimizer=torch.optim.SGD)
            >>> with learner.using(optimizer=torch.optim.Adam, callbacks=[]):
            ...     type(learner.optimizer).__name__, len(learner.callbacks)
            ('Adam', 0)
            >>> type(learner.optimizer).__name__
            'SGD'
        """
        for average in averages:
            if not hasattr(average, "in_use"):
                raise TypeError(
                    "Expected what puts averages in place of weights, an EMA, and got "
                    f"{average!r}. Anything else is given by name: using(callbacks=[...])."
                )
        with swap(self, swapped), ExitStack() as stack:
            for average in averages:
                stack.enter_context(average.in_use(self))
            yield

    def calls(self, callback: Callback) -> bool:
        """Whether it is one of the learner's callbacks now."""
        return any(each.unwrapped is callback for each in self.callbacks)

    @property
    def data(self) -> dict[str, Batches]:
        """Batches by name; set as `Learner` takes them."""
        data: dict[str, Batches] = vars(self)["data"]
        return data

    @data.setter
    def data(self, data: Batches | Mapping[str, Batches] | None) -> None:
        vars(self)["data"] = named.data(data)

    @property
    def models(self) -> dict[str, nn.Module]:
        """The models by name, also if there is but one: then it is called `model`."""
        return named.by_name(self.model, "model")

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimizers by name, also if there is but one: then it is called `optimizer`."""
        return named.by_name(self.optimizer, "optimizer") if self.optimizer is not None else {}

    @property
    def params(self) -> Any:
        """The model's parameters, or those of each model: `learner.params.critic`."""
        return named.params(self.model)

    if TYPE_CHECKING:  # callbacks may write anything; at run time `__getattr__` would be slow

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has: everything but the last step's state, which leads to graphs."""
        return {**vars(self), "step": StepState(), "in_step": False}

    def state_dict(self) -> dict[str, Any]:
        """All that training needs to go on exactly from here; see `state`. On every process.

        Its tensors are the learner's own, and change with it.
        """
        return state_of(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` has returned; where the fit was, `fit(resume=...)` does.

        Raises:
            ValueError, RuntimeError: it does not fit; nothing has been changed then.
        """
        put_state(self, state)

    def save(self, path: str | PathLike[str]) -> None:
        """Writes what `state_dict` returns to a folder, on rank 0; see `checkpoint`.

        Every process has to call it, and goes on when it is written.

        Raises:
            OSError: it cannot be written; what was there is as it was.
            TypeError: a callback's state is more than tensors, numbers and text.
        """
        save(self, path)

    def load(self, path: str | PathLike[str]) -> None:
        """Takes over what `save` has written, from the same folder on every process.

        Models, optimizers, callbacks and random states; callbacks that are not in it start afresh.
        To go on with a fit, in the middle of an epoch too, use `fit(..., resume=path)`.

        Raises:
            OSError: there is no checkpoint.
            ValueError: it is damaged, or of other models or optimizers.
            RuntimeError: weights do not fit. Nothing has been changed in any of these cases.
        """
        put_state(self, read_alike(path))

    def plot(self) -> Figure:
        """Draws metrics over epochs; see `plots.plot_metrics`."""
        return plot_metrics(self)

    def plan(self, phases: Iterable[Phase] = ()) -> str:
        """What there is, and which callbacks answer which event in which order.

        Args:
            phases: of the epochs; those of the last fit unless given.
        """
        return plan(self, list(phases) or self.phases)

    def __str__(self) -> str:
        return self.plan()

    def __repr__(self) -> str:
        models = ", ".join(self.models)
        return f"Learner(models: {models}; data: {', '.join(self.data)}; {self.callbacks!r})"

    @contextmanager
    def _inside(self, phase: Phase, running: Epoch | None) -> Iterator[None]:
        """While open, a phase is the running one, and the models are in its mode."""
        outer = self.phase, self.running
        self.phase, self.running = checked_phase(phase), running
        self.callbacks.choose_table(type(phase))
        try:
            with phase.mode(self.models.values()):
                yield
        finally:
            self.phase, self.running = outer
            self.callbacks.choose_table(type(self.phase))

    def _stop(self, error: BaseException) -> None:
        self.stopped = error if isinstance(error, CancelFit) else None
        assert self.position is not None
        self.position.broken = self.stopped is None
        self.position.stopped = self.stopped and self.stopped.reason


_RETURNED = (
    "{}.step returned something, which nothing uses. It has to call `loss.backward()` and "
    "`optimizer.step()` itself, and to put into `learner.step` what callbacks should see."
)
