"""When a fit has gone on for long enough.

Each criterion is told the watched loss after every epoch, and says why to stop, or nothing.

Source: Prechelt, Early Stopping - but when?, 1998; names as in EarlyStopping.jl.
"""

from __future__ import annotations

import inspect
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from typing_extensions import override

from wraploop.given import whole


class Criterion(ABC):
    """Says after an epoch whether to stop; losses are to become small."""

    @abstractmethod
    def update(self, loss: float) -> str:
        """Takes the epoch's watched loss; returns the reason to stop, or an empty string."""

    def update_training(self, loss: float) -> str:
        """Takes the loss of a training epoch, as `update` does the watched one."""
        return ""

    def state_dict(self) -> dict[str, Any]:
        """Everything it has seen; its settings are not in it."""
        settings = inspect.signature(type(self)).parameters
        return {name: value for name, value in vars(self).items() if name not in settings}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` has returned."""
        vars(self).update(state)

    def __repr__(self) -> str:
        names = inspect.signature(type(self)).parameters
        options = [f"{name}={vars(self)[name]!r}" for name in names if name in vars(self)]
        return f"{type(self).__name__}({', '.join(options)})"


class Never(Criterion):
    """It is never enough."""

    @override
    def update(self, loss: float) -> str:
        return ""


class NoImprovement(Criterion):
    """The loss has not improved for a number of epochs.

    Args:
        epochs: how many in a row may bring nothing.
        min_delta: how much lower than the best so far counts as better.
    """

    def __init__(self, epochs: int = 6, *, min_delta: float = 0.0) -> None:
        _check_count(epochs)
        self.epochs, self.min_delta = epochs, min_delta
        self.best, self.since_best = math.inf, 0

    @override
    def update(self, loss: float) -> str:
        if loss < self.best - self.min_delta:
            self.best, self.since_best = loss, 0
        else:
            self.since_best += 1
        if self.since_best < self.epochs:
            return ""
        return f"no improvement on {self.best:.6g} for {self.epochs} epochs"


class Patience(Criterion):
    """The loss has risen a number of times in a row, each time above the epoch's before."""

    def __init__(self, epochs: int = 5) -> None:
        _check_count(epochs)
        self.epochs, self.rises, self.latest = epochs, 0, math.inf

    @override
    def update(self, loss: float) -> str:
        self.rises = self.rises + 1 if loss > self.latest else 0
        self.latest = loss
        return f"it has risen {self.rises} times in a row" if self.rises >= self.epochs else ""


class InvalidValue(Criterion):
    """A loss, the watched one or that of training, is NaN or infinite."""

    @override
    def update(self, loss: float) -> str:
        return "" if math.isfinite(loss) else f"it is {loss}"

    @override
    def update_training(self, loss: float) -> str:
        return "" if math.isfinite(loss) else f"the training loss is {loss}"


class Threshold(Criterion):
    """The loss is below a value."""

    def __init__(self, value: float = 0.0) -> None:
        self.value = value

    @override
    def update(self, loss: float) -> str:
        return f"it is below {self.value:g}" if loss < self.value else ""


class TimeLimit(Criterion):
    """So many seconds have passed since the first epoch ended."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s, self.passed_s = limit_s, 0.0
        self._latest_s: float | None = None

    @override
    def update(self, loss: float) -> str:
        now_s = time.monotonic()
        self.passed_s += now_s - self._latest_s if self._latest_s is not None else 0.0
        self._latest_s = now_s
        return f"{self.limit_s:g} seconds have passed" if self.passed_s >= self.limit_s else ""

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"passed_s": self.passed_s}


class NumberLimit(Criterion):
    """So many epochs have been watched."""

    def __init__(self, epochs: int = 100) -> None:
        _check_count(epochs)
        self.epochs, self.seen = epochs, 0

    @override
    def update(self, loss: float) -> str:
        self.seen += 1
        return f"it has been watched for {self.epochs} epochs" if self.seen >= self.epochs else ""


class GL(Criterion):
    """Generalisation loss: so many per cent above the lowest so far.

    Source: Prechelt 1998, section 2.2.
    """

    def __init__(self, alpha: float = 2.0) -> None:
        self.alpha, self.best, self.percent = alpha, math.inf, 0.0

    @override
    def update(self, loss: float) -> str:
        self.best = min(self.best, loss)
        self.percent = 100 * _above(loss, self.best) if self.best else 0.0
        return f"it is {self.percent:.3g} % above its lowest" if self.percent > self.alpha else ""


class PQ(Criterion):
    """Generalisation loss over the progress of training in the last epochs.

    It needs two training epochs to say anything.

    Args:
        alpha: the highest quotient.
        epochs: over how many training epochs the progress is taken: per mille by which their mean
            lies above their lowest.

    Source: Prechelt 1998, section 2.2.
    """

    def __init__(self, alpha: float = 0.75, epochs: int = 5) -> None:
        _check_count(epochs)
        self.alpha, self.epochs = alpha, epochs
        self.best, self.training = math.inf, list[float]()

    @override
    def update_training(self, loss: float) -> str:
        self.training = [*self.training, loss][-self.epochs :]
        return ""

    @override
    def update(self, loss: float) -> str:
        self.best = min(self.best, loss)
        if len(self.training) < 2 or not self.best or not min(self.training):
            return ""
        percent = 100 * _above(loss, self.best)
        mean = sum(self.training) / len(self.training)
        progress = 1000 * _above(mean, min(self.training))
        if percent <= self.alpha * progress:
            return ""
        return f"it rises faster than training makes progress ({percent:.3g} %, {progress:.3g} ‰)"


class Either(Criterion):
    """Stops when one of several criteria does."""

    def __init__(self, *criteria: Criterion) -> None:
        self.criteria = criteria

    @override
    def update(self, loss: float) -> str:
        return " and ".join(filter(None, [each.update(loss) for each in self.criteria]))

    @override
    def update_training(self, loss: float) -> str:
        return " and ".join(filter(None, [each.update_training(loss) for each in self.criteria]))

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"criteria": [each.state_dict() for each in self.criteria]}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for criterion, saved in zip(self.criteria, state["criteria"], strict=True):
            criterion.load_state_dict(saved)

    def __repr__(self) -> str:
        return f"Either({', '.join(map(repr, self.criteria))})"


def _above(loss: float, lowest: float) -> float:
    """How far above the lowest, as a share of its size; losses may be negative."""
    return (loss - lowest) / abs(lowest)


def _check_count(epochs: int) -> None:
    whole("epochs", epochs)
