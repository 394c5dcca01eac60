"""What was measured of one model under one way, and ratios of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from wraploop.wrappers.tuning import Split

from .ways import Way
from .zoo import Case


class Spread(NamedTuple):
    """A median, and the quartiles around it."""

    low: float
    middle: float
    high: float
    size: int = 1  # how many values

    @property
    def noise(self) -> float:
        """How far off the median may be, with 95 % confidence; NaN of one value.

        Source: McGill, Tukey and Larsen, Variations of Box Plots, 1978.
        """
        if self.size < 2:
            return math.nan
        return 1.57 * (self.high - self.low) / math.sqrt(self.size)


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles.

    Examples:
        >>> spread([1, 2, 3, 4, 5])
        Spread(low=2.0, middle=3.0, high=4.0, size=5)
    """
    if len(values) < 2:
        (value,) = values or (math.nan,)
        return Spread(value, value, value)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(low, middle, high, len(values))


@dataclass
class Measured:
    """One model under one way.

    Attributes:
        steps: of a turn.
        seconds: a step's, in each round.
        sent_bytes: by all processes together in a step, in each round, TCP's headers included.
        peak_mib: the most memory that rank 0 took, over what it had before the model was made.
        code_mib: how much of it is code of libraries, which processes share.
        chosen: how `threads="auto"` divides the cores, if the way has it.
        deciding_steps: after how many.
    """

    case: Case
    way: Way
    steps: int = 0
    seconds: list[float] = field(default_factory=list)
    sent_bytes: list[float] = field(default_factory=list)
    peak_mib: float = math.nan
    code_mib: float = math.nan
    chosen: list[Split] = field(default_factory=list)
    deciding_steps: int | None = None

    @property
    def step_s(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.seconds)

    @property
    def sent(self) -> float:
        """The median over the rounds, in bytes: what else talks now and then is left out."""
        return statistics.median(self.sent_bytes)

    def speed_over(self, other: Measured) -> Spread:
        """How many times as fast as `other`, in the same round; above 1 is faster."""
        pairs = zip(other.seconds, self.seconds, strict=True)
        return spread([theirs / mine for theirs, mine in pairs])


class Results:
    """Everything that a run has measured, in order."""

    def __init__(self, measured: Iterable[Measured]) -> None:
        self.all = list(measured)
        self._by_name = {(m.case.name, m.way.name): m for m in self.all}

    @property
    def cases(self) -> list[Case]:
        """The models, each once."""
        return list({m.case.name: m.case for m in self.all}.values())

    def of(self, case: Case) -> list[Measured]:
        """The ways of one model."""
        return [m for m in self.all if m.case.name == case.name]

    def get(self, case: Case, way: str) -> Measured | None:
        """One way of a model; None if it was not measured."""
        if way == BEST_DDP:
            return self.best_ddp(case)
        return self._by_name.get((case.name, way))

    def best_ddp(self, case: Case) -> Measured | None:
        """The faster, by its median, of DDP's two bucket modes."""
        both = [m for m in self.of(case) if m.way.name in ("ddp", "ddp-view")]
        return min(both, key=lambda m: m.step_s, default=None)

    def ratio(self, case: Case, way: str, reference: str) -> Spread | None:
        """How many times as fast one way is as another; None if one was not measured."""
        mine, theirs = self.get(case, way), self.get(case, reference)
        return mine.speed_over(theirs) if mine and theirs else None


BEST_DDP = "best ddp"


@dataclass(frozen=True)
class Mean:
    """A geometric mean of ratios.

    Attributes:
        noise: how far off it may be, that of the ratios being independent.
    """

    value: float
    noise: float
    count: int


def geometric_mean(ratios: Iterable[Spread]) -> Mean:
    """The geometric mean of the medians."""
    ratios = list(ratios)
    mean = statistics.geometric_mean([ratio.middle for ratio in ratios])
    relative = math.hypot(*(ratio.noise / ratio.middle for ratio in ratios)) / len(ratios)
    return Mean(mean, mean * relative, len(ratios))
