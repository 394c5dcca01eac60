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
    given = list(callbacks)
    kinds = [getattr(callback, "unwrapped", callback) for callback in given]
    standard = [History(), Metrics(), ProgressBar(), EpochTable(), StopOnNaNLoss()]
    return [d for d in standard if not any(isinstance(k, type(d)) for k in kinds)] + given
