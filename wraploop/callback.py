"""Callbacks: what else happens in a loop, when, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from wraploop.events import Event, FitBegin, FitEnd
from wraploop.phases import Phase

if TYPE_CHECKING:
    from wraploop.learner import Learner

Call = Callable[["Learner"], Any]  # a callback's method, ready to be called with the learner
Handler = tuple[type[Event], type[Phase], Call]
_Method = TypeVar("_Method", bound=Callable[..., Any])
_Kind = TypeVar("_Kind", bound="Callback")

# What the learner itself has, and its phases store in `step`: to read it takes no writer.
PROVIDED = frozenset(
    "callbacks data event loss_fn model models optimizer optimizers params phase running step "
    "stopped".split()
)


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
    _check_mark("event", event, Event)
    _check_mark("phase", phase, Phase)
    if issubclass(event, (FitBegin, FitEnd)) and phase is not Phase:
        raise TypeError(f"{event.__name__} happens in no phase: write @on({event.__name__}).")

    def mark(method: _Method) -> _Method:
        vars(method).setdefault("marks", []).append((event, phase))
        return method

    return mark


class Callback:
    """What else happens in a loop: methods marked with `@on`.

    A callback declares what it reads and writes, as attributes of the learner, `"metrics"` or
    `"step.loss"`. Who writes comes before who reads; the rest keeps the order of the list.
    """

    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("reads", "writes"):
            paths = getattr(cls, name)
            if isinstance(paths, str):
                raise TypeError(f"{cls.__name__}.{name} is a tuple of names; write ({paths!r},).")

    def attach(self, learner: Learner) -> None:
        """Called when the callback joins a learner, before anything runs."""

    def handlers(self) -> list[Handler]:
        """The marked methods with their events and phases, in the order of definition."""
        names = dict.fromkeys(name for cls in reversed(type(self).__mro__) for name in vars(cls))
        methods = [(name, getattr(getattr(type(self), name), "marks", ())) for name in names]
        return [(*mark, getattr(self, name)) for name, marks in methods for mark in marks]

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Dispatch(dict[type[Event], tuple[Call, ...]]):
    """Which methods answer an event in one phase, in order; worked out at its first use."""

    def __init__(self, callbacks: Callbacks, phase: type[Phase] | None) -> None:
        super().__init__()
        self._callbacks, self._phase = callbacks, phase

    def __missing__(self, event: type[Event]) -> tuple[Call, ...]:
        handlers = [handler for callback in self._callbacks for handler in callback.handlers()]
        calls = [
            call
            for on_event, on_phase, call in handlers
            if issubclass(event, on_event) and self._is_in(on_phase)
        ]
        self[event] = tuple(dict.fromkeys(calls))
        return self[event]

    def _is_in(self, phase: type[Phase]) -> bool:
        return phase is Phase or (self._phase is not None and issubclass(self._phase, phase))


class Callbacks:
    """The callbacks of a learner, iterated in the order in which they are called.

    Raises:
        ValueError: their reads and writes allow no order; see `in_order`.
        TypeError: one of them is not a `Callback`.
    """

    def __init__(self, learner: Learner, callbacks: Iterable[Callback]) -> None:
        self._learner = learner
        self._tables: dict[type[Phase] | None, Dispatch] = {}
        self._listed: list[Callback] = []
        self.set(callbacks)

    def set(self, callbacks: Iterable[Callback]) -> None:
        """Replaces all callbacks by these."""
        listed = list(callbacks)
        for callback in listed:
            _check_callback(callback)
        self._ordered = in_order(listed)
        before, self._listed = self._listed, listed
        for table in self._tables.values():
            table.clear()
        for callback in listed:
            if not any(callback is old for old in before):
                callback.attach(self._learner)

    def add(self, callback: Callback) -> None:
        """Adds a callback at the end of the list."""
        self.set([*self._listed, callback])

    def get(self, kind: type[_Kind]) -> _Kind | None:
        """The first callback of this type, or `None`."""
        return next((callback for callback in self._listed if isinstance(callback, kind)), None)

    def remove(self, kind: type[_Kind]) -> _Kind | None:
        """Takes out the first callback of this type and returns it, or `None`."""
        found = self.get(kind)
        self.set(callback for callback in self._listed if callback is not found)
        return found

    def replace(self, callback: Callback) -> Callback | None:
        """Puts `callback` where the first of its type was, which is returned; else adds it."""
        old = self.get(type(callback))
        if old is None:
            self.add(callback)
        else:
            self.set(callback if each is old else each for each in self._listed)
        return old

    def table(self, phase: type[Phase] | None) -> Dispatch:
        """Which methods answer which event in phases of this type; one object for good."""
        if phase not in self._tables:
            self._tables[phase] = Dispatch(self, phase)
        return self._tables[phase]

    def __iter__(self) -> Iterator[Callback]:
        return iter(self._ordered)

    def __len__(self) -> int:
        return len(self._ordered)

    def __repr__(self) -> str:
        return f"Callbacks({self._ordered})"


def in_order(callbacks: Iterable[Callback]) -> list[Callback]:
    """Sorts callbacks so that who writes comes before who reads; ties keep their order.

    A name covers what lies below it: a writer of `"metrics"` comes before a reader of
    `"metrics.loss"`. The learner's own attributes and the step's need no writer.

    Raises:
        ValueError: two write the same, one reads what nobody writes, or they wait for each other.
    """
    waiting = list(callbacks)
    _check_writers(waiting)
    _check_readers(waiting)
    ordered: list[Callback] = []
    while waiting:
        ready = next((each for each in waiting if not _awaited(each, waiting)), None)
        if ready is None:
            raise ValueError(_cycle_message(waiting))
        ordered.append(ready)
        waiting = [each for each in waiting if each is not ready]
    return ordered


def _awaited(reader: Callback, writers: Iterable[Callback]) -> list[tuple[str, Callback]]:
    """What `reader` reads of the others' writing, with its writer."""
    return [
        (read, writer)
        for writer in writers
        if writer is not reader
        for read in reader.reads
        if any(_overlap(read, written) for written in writer.writes)
    ]


def _check_writers(callbacks: list[Callback]) -> None:
    for index, first in enumerate(callbacks):
        for second in callbacks[index + 1 :]:
            for path in second.writes:
                if any(_overlap(path, written) for written in first.writes):
                    raise ValueError(
                        f"{first!r} and {second!r} both write {path!r}. "
                        "Leave one of them out, or declare in `writes` what each really writes."
                    )


def _check_readers(callbacks: list[Callback]) -> None:
    written = [path for callback in callbacks for path in callback.writes]
    for callback in callbacks:
        for read in callback.reads:
            known = read.split(".")[0] in PROVIDED
            if not known and not any(_overlap(read, path) for path in written):
                raise ValueError(
                    f"{callback!r} reads {read!r}, which no callback writes; "
                    f"written are {sorted(written)}. Add the callback that writes it."
                )


def _cycle_message(waiting: list[Callback]) -> str:
    waits = [
        f"{reader!r} reads {read!r}, which {writer!r} writes"
        for reader in waiting
        for read, writer in _awaited(reader, waiting)
    ]
    return f"These callbacks wait for each other: {'; '.join(waits)}. Take one of the reads out."


def _overlap(one: str, other: str) -> bool:
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _check_mark(what: str, given: Any, base: type) -> None:
    if isinstance(given, type) and issubclass(given, base):
        return
    hint = f" Write {type(given).__name__}, without parentheses." if isinstance(given, base) else ""
    raise TypeError(f"@on takes a subclass of {base.__name__} as {what}, and got {given!r}.{hint}")


def _check_callback(callback: Any) -> None:
    if isinstance(callback, Callback):
        return
    hint = " Make one of it first: add parentheses." if isinstance(callback, type) else ""
    raise TypeError(f"Expected a Callback, and got {callback!r}.{hint}")
