"""The loop: `fit` runs epochs, `epoch` runs steps, `run_step` runs a phase's step on a batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import nn
from torch.optim import Optimizer

from wraploop.callback import Call, Callback, Callbacks
from wraploop.callbacks import defaults
from wraploop.events import (
    Cancel,
    CancelEpoch,
    CancelFit,
    CancelStep,
    EpochBegin,
    Event,
    FitBegin,
    StepBegin,
    graver,
)
from wraploop.phases import Batch, Phase, TrainingPhase, ValidationPhase

Batches: TypeAlias = Iterable[Batch]
Models: TypeAlias = nn.Module | Mapping[str, nn.Module]
OptimizerLike: TypeAlias = Optimizer | Callable[[list[nn.Parameter]], Optimizer]
Optimizers: TypeAlias = OptimizerLike | Mapping[str, OptimizerLike]


class Learner:
    """Owns models, loss, optimizers and data; runs phases over batches; calls callbacks.

    What was begun is ended exactly once, innermost first, whether it was cancelled or failed.
    What callbacks write is found here too, under its name: `learner.history`.

    Args:
        model: a module, or modules by name; then `learner.model.critic` is one of them.
        loss_fn: called with outputs and targets by the standard phases.
        optimizer: an optimizer; or a factory, called with a list of parameters, once for each
            model; or a mapping of either, with names of models.
        data: `(training, validation)`, or batches by name, or one iterable, for training.
        callbacks: called in the order that follows from what they read and write.
        default_callbacks: history, metrics, progress bar, epoch table and NaN stop come first,
            save where `callbacks` has one of the kind.

    Attributes:
        step: the state of the running step, or of the last.
        phase: the running phase, `None` between epochs.
        running: the running `Epoch`, `None` between epochs.
        event: the event that callbacks are being called for.
        stopped: the `CancelFit` that ended the last fit, else `None`.

    Raises:
        TypeError, ValueError: something of the wrong kind, an unknown name, an optimizer that
            holds none of the model's parameters, callbacks that allow no order.

    Examples:
        >>> import torch
        >>> from wraploop.callbacks.history import History
        >>> batches = [(torch.ones(8, 1), torch.ones(8, 1))] * 16
        >>> learner = Learner(
        ...     nn.Linear(1, 1), nn.functional.mse_loss, optimizer=torch.optim.SGD, data=batches,
        ...     callbacks=[History()], default_callbacks=False,
        ... )
        >>> learner.fit(2)
        >>> learner.history[TrainingPhase].steps
        32
    """

    def __init__(
        self,
        model: Models,
        loss_fn: Callable[..., Any] | None = None,
        *,
        optimizer: Optimizers,
        data: Batches | Mapping[str, Batches] | None = None,
        callbacks: Iterable[Callback] = (),
        default_callbacks: bool = True,
    ) -> None:
        self.model: Any = _named_models(model)
        self.optimizer: Any = _built_optimizers(self.model, optimizer)
        self.loss_fn: Callable[..., Any] = loss_fn or _no_loss_fn
        self.data: dict[str, Batches] = _named_data(data)
        self.step = StepState()
        self.phase: Any = None  # a Phase while one runs
        self.running: Any = None  # an Epoch while one runs
        self.event: Event | None = None
        self.stopped: CancelFit | None = None
        self._due: list[type[Event]] = []  # the ends of what was begun, innermost last
        self._in_step = False
        self.callbacks = Callbacks(self, _with_defaults(callbacks, default_callbacks))
        self._calls = self.callbacks.table(None)

    def fit(self, epochs: int, phases: Iterable[Phase | tuple[Phase, Batches]] = ()) -> None:
        """Runs each phase over its batches, one after the other, `epochs` times.

        Args:
            epochs: how often.
            phases: phases, or pairs of a phase and its batches; without, training and, where
                there is data for it, validation.

        Raises:
            ValueError: there are no batches for a phase.
        """
        plan = self._plan(phases)
        self.stopped, due = None, len(self._due)
        try:
            try:
                self.handle(FitBegin())
                for _ in range(epochs):
                    for phase, batches in plan:
                        self.epoch(phase, batches)
            except BaseException as error:
                self.stopped = error if isinstance(error, CancelFit) else None
                self._end(due, error)
            else:
                self._end(due)
        except CancelFit as cancel:
            self.stopped = cancel.with_traceback(None)
            self.stopped.__context__ = None

    def epoch(self, phase: Phase, batches: Batches | None = None) -> None:
        """Runs a phase over batches, the learner's own unless given."""
        with self.run_epoch(phase, self._batches(phase) if batches is None else batches) as epoch:
            for batch in epoch:
                self.run_step(phase, batch)

    @contextmanager
    def run_epoch(self, phase: Phase, batches: Batches | None = None) -> Iterator[Epoch]:
        """An epoch whose loop is the body: `with learner.run_epoch(phase): ...`.

        The models are in the phase's mode, EpochBegin and EpochEnd are fired, and CancelEpoch
        leaves the body. If a callback cancels at EpochBegin already, the body is entered all the
        same, as Python cannot skip it: its first `run_step` leaves it without having run a step,
        and iterating over the epoch gives no batches.

        Args:
            phase: decides mode and callbacks, and is not called.
            batches: what iterating over the epoch gives, and how long the progress bar is.

        Examples:
            >>> import torch
            >>> learner = Learner(
            ...     nn.Linear(1, 1), nn.L1Loss(), optimizer=torch.optim.SGD, default_callbacks=False
            ... )
            >>> phase = TrainingPhase()
            >>> with learner.run_epoch(phase):
            ...     for _ in range(3):
            ...         state = learner.run_step(phase, (torch.ones(8, 1), torch.ones(8, 1)))
            >>> state.outputs.shape
            torch.Size([8, 1])
        """
        epoch, due = Epoch(_checked(phase), batches), len(self._due)
        with self._inside(phase, epoch):
            try:
                try:
                    self._begin(epoch)
                    yield epoch
                except BaseException as error:
                    epoch._end(error)
                    self._end(due, error)
                else:
                    epoch._end(None)
                    self._end(due)
            except CancelEpoch:
                pass

    def run_step(self, phase: Phase, batch: Batch) -> StepState:
        """Runs one step of a phase on a batch and returns its state, which is `learner.step`.

        A cancelled step returns as well, with `cancelled` set. A step run inside a step puts the
        outer one's state back.
        """
        if phase is not self.phase:
            with self._inside(_checked(phase), self.running):
                return self.run_step(phase, batch)
        if self.running is not None and self.running.skipped:
            raise CancelEpoch
        nested, due = self._in_step, len(self._due)
        outer = self.step if nested else None  # else the last step's tensors would live on
        self.step = state = StepState()
        state.batch, self._in_step = batch, True
        try:
            try:
                self.handle(StepBegin())
                phase.step(self, state.batch)
            except BaseException as error:
                state.cancelled = True
                self._end(due, error)
            else:
                self._end(due)
        except CancelStep:
            pass
        finally:
            self._in_step = nested
            if outer is not None:
                self.step = outer
            if state.cancelled:
                phase.abandon(self)
        return state

    def handle(self, event: Event) -> None:
        """Calls the callbacks that answer an event.

        All of them are called, also after one that cancels; then the strongest cancellation acts.
        An error acts at once.
        """
        kind = type(event)
        if kind.end is not None:
            self._due.append(kind.end)
        elif kind in self._due:
            self._due.remove(kind)
        calls = self._calls[kind]
        if calls:
            self._call(calls, event)

    @property
    def models(self) -> dict[str, nn.Module]:
        """The models by name, also if there is but one: then it is called `model`."""
        return dict(self.model) if isinstance(self.model, Named) else {"model": self.model}

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """The optimizers by name, also if there is but one: then it is called `optimizer`."""
        several = isinstance(self.optimizer, Named)
        return dict(self.optimizer) if several else {"optimizer": self.optimizer}

    @property
    def params(self) -> Any:
        """The model's parameters, or those of each model: `learner.params.critic`."""
        params = {name: list(model.parameters()) for name, model in self.models.items()}
        return Named("model", params) if isinstance(self.model, Named) else params["model"]

    if TYPE_CHECKING:

        def __setattr__(self, name: str, value: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"The learner has no {name!r}. What callbacks write is there once they are among its "
            "callbacks, as `history` is with History()."
        )

    def __repr__(self) -> str:
        models = ", ".join(self.models)
        return f"Learner(models: {models}; data: {', '.join(self.data)}; {self.callbacks!r})"

    def _call(self, calls: Iterable[Call], event: Event) -> None:
        outer, self.event, cancel = self.event, event, None
        try:
            for call in calls:
                try:
                    call(self)
                except Cancel as error:
                    error.source = error.source or getattr(call, "__self__", call)
                    cancel = graver(cancel, error)
            if cancel is not None:
                raise self._in_place(cancel)
        finally:
            self.event = outer
            del cancel  # its traceback holds this frame

    def _in_place(self, cancel: Cancel) -> Exception:
        """The cancellation, if what it cancels is running."""
        what = "step" if isinstance(cancel, CancelStep) else "epoch"
        running = self._in_step if what == "step" else self.running is not None
        if running or isinstance(cancel, CancelFit):
            return cancel
        name, event = type(cancel).__name__, type(self.event).__name__
        return RuntimeError(f"{cancel.source!r} raised {name} at {event}, when no {what} runs.")

    def _end(self, due: int, cause: BaseException | None = None) -> None:
        """Fires the ends that came due since, innermost first; raises what is gravest."""
        try:
            while len(self._due) > due:
                try:
                    end = self._due.pop()()
                    if self._calls[type(end)]:
                        self._call(self._calls[type(end)], end)
                except BaseException as error:
                    cause = graver(cause, error)
            if cause is not None:
                raise cause
        finally:
            del cause  # its traceback holds this frame

    def _begin(self, epoch: Epoch) -> None:
        try:
            self.handle(EpochBegin())
        except CancelEpoch:
            epoch.cancelled = epoch.skipped = True

    @contextmanager
    def _inside(self, phase: Phase, running: Epoch | None) -> Iterator[None]:
        """Makes a phase the running one, with the modes that it wants."""
        outer = self.phase, self.running, self._calls
        calls = self.callbacks.table(type(phase))
        self.phase, self.running, self._calls = phase, running, calls
        try:
            with phase.mode(self.models.values()):
                yield
        finally:
            self.phase, self.running, self._calls = outer

    def _plan(self, phases: Iterable[Phase | tuple[Phase, Batches]]) -> list[tuple[Phase, Batches]]:
        standard = [TrainingPhase()] + [ValidationPhase()] * ("validation" in self.data)
        pairs = [each if isinstance(each, tuple) else (each, None) for each in phases or standard]
        return [
            (_checked(phase), self._batches(phase) if batches is None else batches)
            for phase, batches in pairs
        ]

    def _batches(self, phase: Phase) -> Batches:
        if _checked(phase).data not in self.data:
            raise ValueError(
                f"{phase.name} has no batches: it runs over {phase.data!r} data, and there is "
                f"{', '.join(map(repr, self.data)) or 'none'}. Give some to Learner(data=...) or "
                "to the call: `epoch(phase, batches)`, `fit(epochs, [(phase, batches)])`."
            )
        return self.data[phase.data]


class StepState:
    """The state of one step: its batch, whether it was cancelled, and whatever is stored in it."""

    cancelled = False

    def __getattr__(self, name: str) -> Any:
        stored = ", ".join(vars(self)) or "nothing"
        raise AttributeError(f"The step has no {name!r} so far; it has {stored}.")

    if TYPE_CHECKING:

        def __setattr__(self, name: str, value: Any) -> None: ...

    def __repr__(self) -> str:
        return f"StepState({', '.join(vars(self))})"


class Epoch:
    """One run of a phase over batches; iterating over it gives the batches.

    Attributes:
        phase: the phase that runs.
        batches: what it runs over, `None` in a loop of one's own that did not say.
        cancelled: `CancelEpoch` was raised in it.
        skipped: `CancelEpoch` was raised as it began, so that it runs no step.
        broken: an error or `CancelFit` cut it off, so that it does not count.
    """

    def __init__(self, phase: Phase, batches: Batches | None) -> None:
        self.phase, self.batches = phase, batches
        self.cancelled = self.skipped = self.broken = False
        self._begun_s = time.perf_counter()

    @property
    def seconds(self) -> float:
        """How long it has been running."""
        return time.perf_counter() - self._begun_s

    def __iter__(self) -> Iterator[Batch]:
        if self.skipped:
            return
        if self.batches is None:
            raise ValueError("This epoch was given no batches: `run_epoch(phase, batches)`.")
        empty = True
        for batch in self.batches:
            empty = False
            yield batch
        if empty and isinstance(self.batches, Iterator):
            raise ValueError(
                f"The batches of {self.phase.name} are an iterator that is used up. "
                "Give something that starts afresh every epoch: a DataLoader, or a list."
            )

    def _end(self, error: BaseException | None) -> None:
        self.skipped = False  # steps run at EpochEnd do run
        self.cancelled = self.cancelled or isinstance(error, CancelEpoch)
        self.broken = error is not None and not isinstance(error, CancelEpoch)


class Named(Mapping[str, Any]):
    """Things of one kind by name: `models.critic` is `models["critic"]`.

    Raises:
        ValueError: a name that cannot be an attribute, or is one already.
        AttributeError: asked for, or given, a name that there is not.

    Examples:
        >>> rates = Named("rate", {"generator": 1e-4, "critic": 4e-4})
        >>> rates.critic, rates["generator"], list(rates)
        (0.0004, 0.0001, ['generator', 'critic'])
    """

    def __init__(self, kind: str, things: Mapping[str, Any]) -> None:
        for name in things:
            if not str(name).isidentifier() or name.startswith("_") or hasattr(Named, name):
                raise ValueError(f"Cannot name a {kind} {name!r}: choose another identifier.")
        vars(self).update(things, _kind=kind, _names=tuple(things))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise AttributeError(self._unknown(name))

    def __setattr__(self, name: str, thing: Any) -> None:
        if name not in self._names:
            raise AttributeError(self._unknown(name))
        vars(self)[name] = thing

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(self._unknown(name))
        return vars(self)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses to be taken for one of its members."""
        raise TypeError(
            f"There are several {self._kind}s, {', '.join(self)}: name the one to call, "
            f"as in `learner.{self._kind}.{self._names[0]}(...)`, in a phase of your own."
        )

    def __repr__(self) -> str:
        return f"Named({self._kind!r}, {dict(self)})"

    def _unknown(self, name: str) -> str:
        return f"There is no {self._kind} {name!r}; there are {', '.join(self)}."


def _named_models(model: Any) -> nn.Module | Named:
    several = isinstance(model, (Mapping, nn.ModuleDict))
    models = dict(model.items()) if several else {"model": model}
    if not models:
        raise ValueError("Expected a model, or models by name, and got none.")
    for name, each in models.items():
        if not isinstance(each, nn.Module):
            raise TypeError(f"Expected a torch.nn.Module as {name!r}, and got {each!r}.")
    return Named("model", models) if several else model


def _built_optimizers(model: nn.Module | Named, optimizer: Any) -> Optimizer | Named:
    models = dict(model) if isinstance(model, Named) else {"model": model}
    if isinstance(optimizer, Optimizer):
        params = [p for each in models.values() for p in each.parameters()]
        return _built_optimizer(" or ".join(models), params, optimizer)
    if not isinstance(model, Named):
        return _built_optimizer("model", list(model.parameters()), optimizer)
    given = optimizer if isinstance(optimizer, Mapping) else dict.fromkeys(models, optimizer)
    unknown = [name for name in given if name not in models]
    if unknown:
        raise ValueError(f"Optimizers for {unknown}, but the models are {list(models)}.")
    built = {n: _built_optimizer(n, list(models[n].parameters()), o) for n, o in given.items()}
    return Named("optimizer", built)


def _built_optimizer(name: str, params: list[nn.Parameter], optimizer: Any) -> Optimizer:
    if not params:
        raise ValueError(f"Nothing to optimize: {name} has no parameters. Give it no optimizer.")
    if not isinstance(optimizer, Optimizer) and callable(optimizer):
        optimizer = optimizer(params)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"Expected for {name} an optimizer or a factory of one, as is "
            f"`functools.partial(torch.optim.Adam, lr=1e-3)`, and got {optimizer!r}. "
            "A mapping of optimizers goes with a mapping of models."
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in params):
        raise ValueError(
            f"The {type(optimizer).__name__} given for {name} holds none of its parameters. "
            "Make it from the parameters of the model that the learner gets, or give a factory."
        )
    return optimizer


def _named_data(data: Any) -> dict[str, Batches]:
    if data is None:
        return {}
    if isinstance(data, tuple):
        if len(data) not in (1, 2):
            raise ValueError(
                f"A tuple of data is (training, validation), and got {len(data)} items. "
                "Give batches themselves as a list, other kinds of data by name, in a mapping."
            )
        data = dict(zip(("training", "validation"), data, strict=False))
    named = dict(data) if isinstance(data, Mapping) else {"training": data}
    for name, batches in named.items():
        if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
            raise TypeError(f"Expected batches as {name} data, an iterable, and got {batches!r}.")
    return named


def _with_defaults(callbacks: Iterable[Callback], default_callbacks: bool) -> list[Callback]:
    given = list(callbacks)
    standard = defaults() if default_callbacks else []
    missing = [each for each in standard if not any(isinstance(c, type(each)) for c in given)]
    return [*missing, *given]


def _checked(phase: Any) -> Phase:
    if isinstance(phase, Phase):
        return phase
    hint = " Make one of it first: add parentheses." if isinstance(phase, type) else ""
    raise TypeError(f"Expected a Phase, and got {phase!r}.{hint}")


def _no_loss_fn(*_: Any) -> Any:
    raise TypeError(
        "This phase needs a loss function, and the learner has none: Learner(model, loss_fn, ...)."
    )
