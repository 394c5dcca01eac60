"""To which loggers something is logged, and at which steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wraploop.callback import Callback
from wraploop.callbacks.loggers import Kind, Logger
from wraploop.given import first_make

if TYPE_CHECKING:
    from wraploop.learner import Learner


def checked_loggers(
    callback: Callback, loggers: tuple[Logger, ...], kind: Kind
) -> tuple[Logger, ...]:
    """The loggers of a callback that logs things of this kind.

    Raises:
        ValueError: there are none, or one does not take that kind.
        TypeError: one is none.
    """
    name = type(callback).__name__
    if not loggers:
        raise ValueError(f"{name} has no logger: give one that takes {kind}.")
    for logger in loggers:
        if not isinstance(logger, Logger):
            raise TypeError(f"{name} expected a Logger, and got {logger!r}.{first_make(logger)}")
        if kind not in logger.takes:
            raise ValueError(
                f"{name} logs {kind}, and {logger!r} takes {', '.join(sorted(logger.takes))}. "
                f"Give a logger that takes {kind}."
            )
    return loggers


def is_due(learner: Learner, loggers: tuple[Logger, ...], every_steps: int) -> bool:
    """Whether the step counts, is one of every so many, and is logged in this process at all."""
    if learner.step.cancelled or not any(logger.acts for logger in loggers):
        return False
    return learner.history[learner.phase].steps % every_steps == 0
