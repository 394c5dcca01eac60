"""Whether events that callbacks answer are ever fired."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from wraploop.callback import Callback
from wraploop.events import (
    EpochBegin,
    EpochEnd,
    Event,
    FitBegin,
    FitEnd,
    StepBegin,
    StepEnd,
)
from wraploop.phases import Phase

_OTHER_USES = ("handlers", "called_at", "attach", "around", "state_dict")
_MOMENTS = ("on_", "before_", "after_")  # as Lightning, Keras and fastai name methods
_ALWAYS = (FitBegin, FitEnd, EpochBegin, EpochEnd, StepBegin, StepEnd)


def check_fired(callbacks: Iterable[Callback], phases: Iterable[Phase]) -> None:
    """Checks that each event that a callback answers in one of the phases can happen there.

    A phase that does not say what it fires may fire anything.

    Raises:
        ValueError: a callback answers an event that nothing fires, or none of its methods is marked
            and it is of no other use.
    """
    callbacks, phases = list(callbacks), list(phases)
    for callback in callbacks:
        _check_marked(callback.unwrapped)
    by_callbacks = [event for callback in callbacks for event in callback.fires]
    for callback in callbacks:
        for event, kind, call in callback.handlers():
            if event in callback.unwrapped.may_miss or _meets(event, _ALWAYS):
                continue
            there = [phase for phase in phases if isinstance(phase, kind)]
            if not there or any(phase.fires is None for phase in there):
                continue
            fired = {*_ALWAYS, *by_callbacks, *(each for p in there for each in p.fires or ())}
            fired |= {each.end for each in fired if each.end is not None}
            if not _meets(event, fired):
                raise ValueError(_message(callback, event, call, there, fired))


def _check_marked(callback: Callback) -> None:
    kind = type(callback)
    is_other = any(getattr(kind, name) is not getattr(Callback, name) for name in _OTHER_USES)
    methods = [name for name in dir(kind) if name[0] != "_" and not hasattr(Callback, name)]
    own = [name for name in methods if _is_meant(name, inspect.getattr_static(kind, name))]
    if own and not is_other and not callback.handlers():
        raise ValueError(
            f"{callback!r} is never called: none of its methods ({', '.join(own)}) says at which "
            "event. Mark it in its class: `@on(StepEnd)`."
        )


def _is_meant(name: str, member: Any) -> bool:
    """Whether it is a method that is called as other libraries call theirs, or as marked ones are.

    Those have names of moments, those here take the learner alone.
    """
    if not inspect.isfunction(member):
        return False
    if name.startswith(_MOMENTS):
        return True
    try:
        inspect.signature(member).bind(None, None)
    except TypeError:
        return False
    return True


def _meets(event: type[Event], fired: Iterable[type[Event]]) -> bool:
    return any(issubclass(each, event) for each in fired)


def _message(
    callback: Callback,
    event: type[Event],
    call: object,
    there: list[Phase],
    fired: set[type[Event]],
) -> str:
    method = getattr(call, "__name__", "a method")
    return (
        f"{callback.unwrapped!r}.{method} answers {event.__name__}, which never happens: "
        f"{', '.join(phase.name for phase in there)} fires "
        f"{', '.join(sorted(each.__name__ for each in fired))}. If a phase or a callback does fire "
        f"it, say so in its class: `fires = ({event.__name__},)`."
    )
