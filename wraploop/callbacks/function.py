"""Functions as callbacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from wraploop.callback import Callback, Handler, on
from wraploop.events import Event
from wraploop.given import check_names
from wraploop.phases import Phase

if TYPE_CHECKING:
    from wraploop.learner import Learner


class FunctionCallback(Callback):
    """Calls a function with the learner, at an event in a phase.

    `@learner.on(event, phase)` makes one and adds it.

    Args:
        function: takes the learner.
        event: when it is called; subclasses match.
        phase: in which phases; subclasses match.
        reads: names of what it reads, as of any callback.
        writes: names of what it writes.

    Examples:
        >>> from wraploop.events import EpochEnd
        >>> FunctionCallback(lambda learner: print(learner.phase.name), EpochEnd)
        FunctionCallback(<lambda>)
    """

    def __init__(
        self,
        function: Callable[[Learner], Any],
        event: type[Event],
        phase: type[Phase] = Phase,
        *,
        reads: tuple[str, ...] = (),
        writes: tuple[str, ...] = (),
    ) -> None:
        on(event, phase)  # which raises if there are none such
        check_names("FunctionCallback.reads", reads)
        check_names("FunctionCallback.writes", writes)
        if not callable(function):
            raise TypeError(f"Expected a function of the learner, and got {function!r}.")
        self.function, self.reads, self.writes = function, reads, writes
        self._moment = event, phase

    @override
    def handlers(self) -> list[Handler]:
        return [(*self._moment, self.function)]

    def __repr__(self) -> str:
        return f"FunctionCallback({getattr(self.function, '__name__', self.function)})"
