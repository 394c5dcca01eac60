"""Callbacks: what else happens in a loop, when, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from wraploop.events import (
    Cancel,
    CancelEpoch,
    CancelStep,
    EpochBegin,
    Event,
    FitBegin,
    FitEnd,
    graver,
)
from wraploop.given import check_names, first_make
from wraploop.order import in_order
from wraploop.phases import Phase

if TYPE_CHECKING:
    from wraploop.learner import Learner

Call = Callable[["Learner"], Any]  # a callback's method, ready to be called with the learner
Handler = tuple[type[Event], type[Phase], Call]
_Method = TypeVar("_Method", bound=Callable[..., Any])
_Kind = TypeVar("_Kind", bound="Callback")


def on(event: type[Event], phase: type[Phase] = Phase) -> Callable[[_Method], _Method]:
    """Marks a callback's method to be called, with the learner, at an event in a phase.

    Subclasses of both match: `@on(Event)` is called at everything. Marks can be stacked.
    While it is called, `learner.event` and `learner.phase` say what happened where.

    Raises:
        TypeError: not an event class, not a phase class, or a phase for `FitBegin`, `FitEnd`.

    Examples:
        >>> from wraploop.events import StepEnd
        >>> from wraploop.phases import AbstractTrainingPhase
        >>> class CountSteps(Callback):
        ...     count = 0
        ...
        ...     @on(StepEnd, AbstractTrainingPhase)
        ...     def add(self, learner):
        ...         self.count += 1
    """
    check_mark(event, phase)

    def mark(method: _Method) -> _Method:
        vars(method).setdefault("marks", []).append((event, phase))
        return method

    return mark


class Callback:
    """What else happens in a loop: methods marked with `@on`.

    A callback declares what it reads and writes, as attributes of the learner, `"metrics"` or
    `"step.loss"`. Who writes comes before who reads; the rest keeps the order of the list.

    Attributes:
        reads, writes: names of what it reads and writes.
        fires: events of your own that it fires with `learner.handle`.
        may_miss: events that it answers, and that need not be fired by anyone.
        home: a mark of the callbacks that it has joined last.
    """

    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    fires: tuple[type[Event], ...] = ()
    may_miss: tuple[type[Event], ...] = ()
    home: object = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("reads", "writes"):
            check_names(f"{cls.__name__}.{name}", getattr(cls, name))

    def attach(self, learner: Learner) -> None:
        """Called when the callback first joins a learner, before anything runs."""

    def around(self, callback: Callback, call: Call) -> Call:
        """What is called instead of `call`, a method of any of the learner's callbacks."""
        return call

    def state_dict(self) -> dict[str, Any]:
        """What has to be saved for training to go on from here; nothing unless overridden."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` has returned."""

    @property
    def unwrapped(self) -> Callback:
        """The callback itself, where another stands around it; see `throttle`."""
        return self

    def handlers(self) -> list[Handler]:
        """The marked methods with their events and phases, in the order of definition."""
        *classes, _ = type(self).__mro__  # `object` has none
        names = dict.fromkeys(name for cls in reversed(classes) for name in vars(cls))
        methods = [(name, getattr(getattr(type(self), name), "marks", ())) for name in names]
        return [(*mark, getattr(self, name)) for name, marks in methods for mark in marks]

    def called_at(self, event: type[Event], phase: type) -> list[Call]:
        """What is called at an event in a phase; a method with several marks that match, once."""
        calls: list[Call] = []
        for on_event, on_phase, call in self.handlers():
            matches = issubclass(event, on_event)
            if matches and (on_phase is Phase or issubclass(phase, on_phase)) and call not in calls:
                calls.append(call)
        return calls

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


_LONG = (FitBegin, EpochBegin)
Calls: TypeAlias = tuple[tuple[Callback, Call], ...]


class Table(dict[type[Event], tuple[Calls, type[Event] | None]]):
    """Who answers an event in one phase, with what, in order; and which end is due from then on.

    Worked out at its first use. An end that nobody answers is not due, except that of what runs
    long: a callback that answers it may join meanwhile.

    Args:
        callbacks: in their order.
        phase: the type of the phase.
        watchers: what stands around every call, besides the callbacks themselves.
    """

    def __init__(
        self, callbacks: Iterable[Callback], phase: type, watchers: tuple[Callback, ...] = ()
    ) -> None:
        super().__init__()
        self._callbacks, self._phase, self._watchers = callbacks, phase, watchers

    def __missing__(self, event: type[Event]) -> tuple[Calls, type[Event] | None]:
        if not issubclass(event, Event):
            raise TypeError(
                f"handle takes an event, as in handle(StepEnd()), and got one of {event}."
            )
        calls = tuple(
            (callback, self._around(callback, call))
            for callback in self._callbacks
            for call in callback.called_at(event, self._phase)
        )
        end = event.end
        is_due = end is not None and (calls or self[end][0] or event in _LONG)
        self[event] = calls, end if is_due else None
        return self[event]

    def _around(self, callback: Callback, call: Call) -> Call:
        for other in (*self._callbacks, *self._watchers):
            call = other.around(callback, call)
        return call


class Callbacks:
    """The callbacks of a learner, iterated in the order in which they are called.

    Args:
        learner: the learner.
        callbacks: its callbacks.
        watchers: what stands around every call (`Callback.around`), whatever the callbacks are.

    Raises:
        ValueError: their reads and writes allow no order; see `in_order`.
        TypeError: one of them is not a `Callback`.
    """

    def __init__(
        self,
        learner: Learner,
        callbacks: Iterable[Callback],
        watchers: tuple[Callback, ...] = (),
    ) -> None:
        self._learner, self._watchers = learner, watchers
        self._mark = object()  # a copy of a learner has one of its own, as its callbacks do
        self._listed: list[Callback] = []
        self._tables: dict[type, Table] = {}
        self.choose_table(type(None))
        self.set(callbacks)

    @property
    def listed(self) -> list[Callback]:
        """The callbacks in the order in which they were given."""
        return list(self._listed)

    def set(self, callbacks: Iterable[Callback]) -> None:
        """Replaces all callbacks by these."""
        if isinstance(callbacks, Callback):
            raise TypeError(f"Expected a list of callbacks, and got {callbacks!r}: write [...].")
        listed = list(callbacks)
        for index, callback in enumerate(listed):
            checked_callback(callback)
            if any(callback is other for other in listed[:index]):
                raise ValueError(f"{callback!r} is in the list of callbacks twice.")
        before = self._listed
        self._put(listed)
        try:
            for callback in listed:
                if callback.home is not self._mark:
                    callback.attach(self._learner)
                    callback.home = self._mark
        except BaseException:  # one that cannot join is not there
            self._put(before)
            raise

    def _put(self, listed: list[Callback]) -> None:
        self._ordered, self._listed = in_order(listed), listed
        for table in self._tables.values():
            table.clear()

    def check_joined(self) -> None:
        """Checks that no callback that keeps something for a learner has joined another since.

        Raises:
            ValueError: one has.
        """
        for callback in self._listed:
            keeps = type(callback.unwrapped).attach is not Callback.attach
            if keeps and callback.home is not None and callback.home is not self._mark:
                raise ValueError(
                    f"{callback!r} has joined another learner since, and what it keeps is that "
                    "one's: give each learner a callback of its own."
                )

    def add(self, callback: Callback) -> None:
        """Adds a callback at the end of the list."""
        self.set([*self._listed, callback])

    def get(self, kind: type[_Kind]) -> _Kind | None:
        """The first callback of this type, also if it is throttled, or `None`."""
        found = (callback.unwrapped for callback in self._listed)
        return next((callback for callback in found if isinstance(callback, kind)), None)

    def remove(self, kind: type[_Kind]) -> _Kind | None:
        """Takes out the first callback of this type and returns it, or `None`."""
        found = self.get(kind)
        self.set(callback for callback in self._listed if callback.unwrapped is not found)
        return found

    def replace(self, callback: Callback) -> Callback | None:
        """Puts `callback` where the first of its type was, which is returned; else adds it."""
        checked_callback(callback)
        old = self.get(type(callback.unwrapped))
        if old is None:
            self.add(callback)
        else:
            self.set(callback if each.unwrapped is old else each for each in self._listed)
        return old

    def choose_table(self, phase: type) -> None:
        """Makes `table` say who answers which event in phases of this type."""
        self.table = self._tables.setdefault(phase, Table(self, phase, self._watchers))

    def call(self, event: Event, calls: Calls) -> None:
        """Calls all that answer an event, then raises the strongest cancellation among theirs.

        Args:
            event: what happens.
            calls: the table's entry for it.

        Raises:
            RuntimeError: cancelled is a step or an epoch, and none is running.
        """
        learner, cancel = self._learner, None
        outer, learner.event = learner.event, event
        try:
            for callback, call in calls:
                try:
                    call(learner)
                except Cancel as error:
                    error.source = error.source or callback.unwrapped
                    event.cancel = cancel = graver(cancel, error)
            if cancel is not None:
                raise _in_place(cancel, learner)
        finally:
            learner.event = outer
            event.cancel = None  # its traceback holds this frame
            del cancel

    def __iter__(self) -> Iterator[Callback]:
        return iter(self._ordered)

    def __len__(self) -> int:
        return len(self._ordered)

    def __repr__(self) -> str:
        return f"Callbacks({self._ordered})"


def check_mark(event: Any, phase: Any) -> None:
    """Checks that a callback can be called at the event in the phase.

    Raises:
        TypeError: not an event class, not a phase class, or a phase for `FitBegin`, `FitEnd`.
    """
    _check_kind("event", event, Event)
    _check_kind("phase", phase, Phase)
    if issubclass(event, (FitBegin, FitEnd)) and phase is not Phase:
        raise TypeError(f"{event.__name__} happens in no phase: write @on({event.__name__}).")


def _check_kind(what: str, given: Any, base: type) -> None:
    if isinstance(given, type) and issubclass(given, base):
        return
    hint = f" Write {type(given).__name__}, without parentheses." if isinstance(given, base) else ""
    raise TypeError(f"@on takes a subclass of {base.__name__} as {what}, and got {given!r}.{hint}")


def checked_callback(callback: Any) -> Callback:
    """Returns `callback`.

    Raises:
        TypeError: it is none.
    """
    if isinstance(callback, Callback):
        return callback
    hint = first_make(callback)
    if not hint and callable(callback):
        hint = " Make one of a function with FunctionCallback, or `@learner.on(event)`."
    raise TypeError(f"Expected a Callback, and got {callback!r}.{hint}")


class WrittenBy:
    """Stands for what a callback writes into a learner, until it does.

    Examples:
        >>> class Fitted:
        ...     score = WrittenBy("Judge()")
        >>> fitted = Fitted()
        >>> fitted.score
        Traceback (most recent call last):
        AttributeError: There is no 'score': it comes with the callback Judge().
        >>> fitted.score = 10
        >>> fitted.score
        10
    """

    def __init__(self, callback: str) -> None:
        self._callback = callback

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, owner: Any, kind: type) -> Any:
        raise AttributeError(
            f"There is no {self._name!r}: it comes with the callback {self._callback}."
        )


def _in_place(cancel: Cancel, learner: Learner) -> Exception:
    """The cancellation, if what it cancels is running."""
    if isinstance(cancel, CancelStep) and not learner.in_step:
        what = "step"
    elif isinstance(cancel, CancelEpoch) and learner.running is None:
        what = "epoch"
    else:
        return cancel
    name, event = type(cancel).__name__, type(learner.event).__name__
    return RuntimeError(f"{cancel.source!r} raised {name} at {event}, when no {what} runs.")
