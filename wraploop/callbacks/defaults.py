"""The callbacks of a learner that asks for none."""

from collections.abc import Iterable

from wraploop.callback import Callback
from wraploop.callbacks.history import History
from wraploop.callbacks.metrics import Metrics
from wraploop.callbacks.progress import ProgressBar
from wraploop.callbacks.stop import StopOnNaNLoss
from wraploop.callbacks.table import EpochTable


def with_defaults(callbacks: Iterable[Callback]) -> list[Callback]:
    """What every learner has unless told otherwise, then `callbacks`, which replace their kind."""
    if isinstance(callbacks, Callback):
        raise TypeError(f"Expected a list of callbacks: write [{callbacks!r}].")
    given = list(callbacks)
    kinds = [getattr(callback, "unwrapped", callback) for callback in given]
    standard = [History(), Metrics(), ProgressBar(), EpochTable(), StopOnNaNLoss()]
    return [d for d in standard if not any(isinstance(k, type(d)) for k in kinds)] + given


def for_evaluation(callbacks: Iterable[Callback]) -> list[Callback]:
    """Those that take part in an evaluation: metrics and counts of its own, and what changes steps.

    Callbacks that write `step.` something change steps.
    """
    given = list(callbacks)
    metrics = next((each.unwrapped for each in given if isinstance(each.unwrapped, Metrics)), None)
    own = [History(), metrics.fresh() if isinstance(metrics, Metrics) else Metrics()]
    kept = [
        each for each in given if isinstance(each.unwrapped, ProgressBar) or changes_steps(each)
    ]
    return [*own, *kept]


def changes_steps(callback: Callback) -> bool:
    """Whether it puts something into a step: another batch, clipped gradients."""
    return any(written.startswith("step.") for written in callback.writes)
