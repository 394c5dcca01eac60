"""Every begin has exactly one end, cancelled or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from wraploop.callback import Callbacks
from wraploop.events import Event, graver


class Ending:
    """Ends whatever is begun while it is open: each once, innermost first, also after an error.

    Args:
        due: the ends of all that was begun, innermost first.
        callbacks: are called for the ends.
        cut: is told of the error that leaves the body, if one does, before the ends are fired.

    Raises:
        BaseException: the gravest of what the body and the ends raised.
    """

    __slots__ = ("_callbacks", "_cut", "_due", "_outer")

    def __init__(
        self,
        due: list[type[Event]],
        callbacks: Callbacks,
        cut: Callable[[BaseException], None],
    ) -> None:
        self._due, self._callbacks, self._cut = due, callbacks, cut

    def __enter__(self) -> None:
        self._outer = len(self._due)

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is not None:
            self._cut(error)
        cause = error
        while len(self._due) > self._outer:
            end = self._due.pop(0)
            try:
                if self._callbacks.table[end]:
                    self._callbacks.call(end())
            except BaseException as another:
                cause = graver(cause, another)
        try:
            if cause is not None and cause is not error:
                raise cause
        finally:
            del cause, error  # a traceback holds this frame
