"""What else happens in a loop, one family of callbacks a file."""

from wraploop.callback import Callback
from wraploop.callbacks.history import History
from wraploop.callbacks.metrics import Metrics
from wraploop.callbacks.progress import ProgressBar
from wraploop.callbacks.stop import StopOnNaNLoss
from wraploop.callbacks.table import EpochTable


def defaults() -> list[Callback]:
    """What every learner has unless told otherwise."""
    return [History(), Metrics(), ProgressBar(), EpochTable(), StopOnNaNLoss()]
