"""What happens in a loop, and the exceptions by which a callback cancels it.

fit    FitBegin ... FitEnd
epoch    EpochBegin ... EpochEnd
step       StepBegin [forward] LossBegin BackwardBegin BackwardEnd [update] StepEnd
"""

from __future__ import annotations

from typing import ClassVar, TypeVar

_Error = TypeVar("_Error", bound=BaseException)


class Event:
    """Something that happens in a loop; callbacks answer it, `learner.handle(event)` fires it.

    Write a subclass for an event of your own. If it begins something, name the event that ends
    it: the learner then fires the end too where a cancellation or an error cuts the thing short.

    Examples:
        >>> class DecodeEnd(Event):
        ...     '''The samples are decoded.'''
        >>> class DecodeBegin(Event):
        ...     '''The samples are about to be decoded.'''
        ...
        ...     end = DecodeEnd
    """

    end: ClassVar[type[Event] | None] = None
    cancel: Cancel | None = None  # a callback's, which acts when all have been called

    @property
    def is_cancelling(self) -> bool:
        """Whether a callback has cancelled at it."""
        return self.cancel is not None


class FitEnd(Event):
    """`fit` is about to return or raise; `learner.stopped` tells whether it was cancelled."""


class FitBegin(Event):
    """`fit` is about to run its first epoch."""

    end = FitEnd


class EpochEnd(Event):
    """A phase is through its batches, or was cancelled.

    `learner.running.broken` tells that an error or `CancelFit` cut it off: such an epoch does
    not count, and its metrics do not exist.
    """


class EpochBegin(Event):
    """A phase is about to run over its batches; `learner.running` is the epoch."""

    end = EpochEnd


class StepEnd(Event):
    """A step is done, its update included, or `learner.step.cancelled`."""


class StepBegin(Event):
    """A step is about to run; `learner.step.batch` may be replaced."""

    end = StepEnd


class LossBegin(Event):
    """The outputs are there, the loss is about to be computed."""


class BackwardEnd(Event):
    """The gradients are there, the update is yet to come."""


class BackwardBegin(Event):
    """The loss is there, the gradients are about to be computed."""

    end = BackwardEnd


class Cancel(Exception):
    """Ends a part of the loop early; what is ended still fires its end events.

    Every callback sees the event at which one cancels; then the strongest cancellation acts.
    `source` is the callback that raised it, `None` if the phase's own step did.
    """

    strength: ClassVar[int] = 0

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.source: object | None = None


class CancelStep(Cancel):
    """Skips the rest of this step; the next batch is next."""

    strength = 1


class CancelEpoch(Cancel):
    """Skips the rest of this epoch; the next epoch, of this phase or another, is next."""

    strength = 2


class CancelFit(Cancel):
    """Ends the fit, which then returns; `learner.stopped` is this exception, with its reason."""

    strength = 3

    def __init__(self, reason: str) -> None:
        super().__init__(reason)


def graver(first: _Error | None, second: _Error) -> _Error:
    """The one that ends more: an error, then `CancelFit`, `CancelEpoch`, `CancelStep`.

    Equals leave it at the first.
    """
    return second if first is None or _gravity(second) > _gravity(first) else first


def _gravity(error: BaseException) -> int:
    return error.strength if isinstance(error, Cancel) else 4
