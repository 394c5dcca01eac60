"""Callbacks that answer an event only now and then."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from wraploop import processes
from wraploop.callback import Call, Callback, Handler, checked_callback
from wraploop.events import Event
from wraploop.given import check_numbers, whole

if TYPE_CHECKING:
    from wraploop.learner import Learner


def throttle(
    callback: Callback,
    event: type[Event],
    *,
    every: int | None = None,
    every_s: float | None = None,
) -> Callback:
    """Has `callback` answer an event only now and then, and all others as ever.

    What comes out has its place in the order, and `learner.callbacks.get` finds the callback in it.

    Args:
        callback: the callback.
        event: the event, or a class of events, that it is kept from.
        every: it answers the first, then every so many-th; each phase is counted by itself.
        every_s: it answers the first, then the next when so many seconds have passed; of several
            processes, as rank 0 has it.

    Raises:
        ValueError: neither or both of `every` and `every_s` are given, or they are not positive,
            or the callback does not answer the event.

    Examples:
        >>> from wraploop.callbacks.function import FunctionCallback
        >>> from wraploop.events import StepEnd
        >>> throttle(FunctionCallback(print, StepEnd), StepEnd, every=100)
        throttle(FunctionCallback(print), StepEnd, every=100)
    """
    return Throttled(callback, event, every, every_s)


class Throttled(Callback):
    """What `throttle` returns."""

    def __init__(
        self, callback: Callback, event: type[Event], every: int | None, every_s: float | None
    ) -> None:
        _check(callback, event, every, every_s)
        self.callback, self.event, self.every, self.every_s = callback, event, every, every_s
        self.reads, self.writes, self.fires = callback.reads, callback.writes, callback.fires
        self._counts: Counter[str] = Counter()
        self._passed_s: dict[str, float] = {}
        self._latest: Event | None = None
        self._passes = False
        self._handlers: list[Handler] = []
        for handler in callback.handlers():
            self._handlers.append(self._throttled(*handler))

    @property
    @override
    def unwrapped(self) -> Callback:
        return self.callback.unwrapped

    @override
    def attach(self, learner: Learner) -> None:
        self._counts, self._passed_s = Counter(), {}
        self.callback.attach(learner)

    @override
    def around(self, callback: Callback, call: Call) -> Call:
        return self.callback.around(callback, call)

    @override
    def handlers(self) -> list[Handler]:
        return self._handlers

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"callback": self.callback.state_dict(), "counts": dict(self._counts)}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.callback.load_state_dict(state["callback"])
        self._counts = Counter(state["counts"])

    def _throttled(self, event: type[Event], phase: Any, call: Call) -> Handler:
        meet = issubclass(event, self.event) or issubclass(self.event, event)
        if not meet:
            return event, phase, call
        for _, _, old in self._handlers:  # one for a method with several marks
            if isinstance(old, partial) and old.args == (call,):
                return event, phase, old
        return event, phase, partial(self._call, call)

    def _call(self, call: Call, learner: Learner) -> None:
        if learner.event is not self._latest:  # which several of its methods may answer
            self._latest = learner.event
            self._passes = self._decide(type(learner.phase).__name__)
        if self._passes:
            call(learner)

    def _decide(self, phase: str) -> bool:
        if not isinstance(self._latest, self.event):
            return True
        if self.every is not None:
            self._counts[phase] += 1
            return (self._counts[phase] - 1) % self.every == 0
        now_s = time.monotonic()
        is_time = now_s - self._passed_s.get(phase, -float("inf")) >= (self.every_s or 0.0)
        if processes.broadcast(is_time):
            self._passed_s[phase] = now_s
            return True
        return False

    def __repr__(self) -> str:
        every = f"every={self.every}" if self.every is not None else f"every_s={self.every_s}"
        return f"throttle({self.callback!r}, {self.event.__name__}, {every})"


def _check(
    callback: Callback, event: type[Event], every: int | None, every_s: float | None
) -> None:
    if (every is None) == (every_s is None):
        raise ValueError("Throttle by count or by time: give one of `every` and `every_s`.")
    checked_callback(callback)
    if every is not None:
        whole("every", every)
    if every_s is not None:
        check_numbers(every_s=every_s)
        if every_s < 0:
            raise ValueError(f"every_s is at least 0, and got {every_s}.")
    answered = {on_event for on_event, _, _ in callback.handlers()}
    if not any(issubclass(event, each) or issubclass(each, event) for each in answered):
        names = ", ".join(sorted(each.__name__ for each in answered)) or "nothing"
        raise ValueError(f"{callback!r} does not answer {event.__name__}, but {names}.")
