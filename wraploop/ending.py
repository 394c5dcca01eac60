"""Every begin has exactly one end, cancelled or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from wraploop.callback import Callbacks
from wraploop.events import Event, graver

Due = list[type[Event]]  # the ends of all that was begun, innermost first


@contextmanager
def ending(due: Due, callbacks: Callbacks, cut: Callable[[BaseException], None]) -> Iterator[None]:
    """Ends whatever is begun while it is open, also after an error, of which `cut` is told first.

    Raises:
        BaseException: the gravest of what the body and the ends raised.
    """
    outer = len(due)
    try:
        yield
    except BaseException as error:
        cut(error)
        end(due, outer, callbacks, error)
        raise
    end(due, outer, callbacks)


def end(due: Due, outer: int, callbacks: Callbacks, error: BaseException | None = None) -> None:
    """Fires the ends that are due, innermost first, each once, until `outer` are left.

    Raises:
        BaseException: what they raise that is graver than `error`.
    """
    cause = error
    while len(due) > outer:
        kind = due.pop(0)
        try:
            calls, _ = callbacks.table[kind]
            if calls:
                callbacks.call(kind(), calls)
        except BaseException as another:
            cause = graver(cause, another)
    try:
        if cause is not None and cause is not error:
            raise cause
    finally:
        del cause, error  # a traceback holds this frame
