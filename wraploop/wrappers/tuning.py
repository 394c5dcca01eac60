"""Finding the fastest way to use the cores, by running in each for a while."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

_CALLS = 18  # that are tried, if each has its backward
_MOST_CALLS = 3 * _CALLS
_WARM_UP = 1  # of them, with each split
_GAIN = 0.9  # another split must take at most this part of plain torch's time


class Split(NamedTuple):
    """How cores are divided: so many lanes, each with so many threads inside its operators."""

    lanes: int
    operator_threads: int

    @classmethod
    def even(cls, lanes: int, cores: int) -> Split:
        """So many lanes, among which the cores are divided."""
        return cls(lanes, max(1, cores // lanes))


class Tuner:
    """Says how the next call should use the cores, until it has seen which split is fastest.

    It only looks at calls that are made anyway, each of which computes the same in any split. A
    call is its forward, and its backward if it has one.

    Args:
        cores: how many threads there may be in all.

    Attributes:
        plain: one lane with all cores inside operators, which is torch alone.
        chosen: the fastest split, once it is known.
    """

    def __init__(self, cores: int) -> None:
        self.plain = Split.even(1, cores)
        even = {Split.even(lanes, cores) for lanes in (1, max(1, cores // 2), cores)}
        self._candidates = sorted({Split(1, 1), *even})
        self._seconds: dict[tuple[str, Split], list[float]] = defaultdict(list)
        self._calls = 0
        self.chosen: Split | None = self.plain if cores == 1 else None

    def next(self) -> Split:
        """How the next call should use them."""
        if self.chosen is not None:
            return self.chosen
        self._calls += 1
        return self._candidates[self._calls % len(self._candidates)]

    def note(self, part: str, split: Split, seconds: float) -> None:
        """Takes note that a `"forward"` or `"backward"` took so long, or would if chosen."""
        if self.chosen is None:
            self._seconds[part, split].append(seconds)
            self._choose()

    def _choose(self) -> None:
        samples = {
            part: [self._seconds[part, split][_WARM_UP:] for split in self._candidates]
            for part in {part for part, _ in self._seconds}
        }
        fewest = min(len(one) for each in samples.values() for one in each)
        enough = _CALLS // len(self._candidates) - _WARM_UP
        if self._calls < (_CALLS if fewest >= enough else _MOST_CALLS):
            return
        known = [each for each in samples.values() if all(each)]
        costs = [sum(map(_median, column)) for column in zip(*known, strict=True)]
        cost = dict(zip(self._candidates, costs, strict=True)) if known else {self.plain: 0.0}
        fastest = min(cost, key=cost.__getitem__)
        self.chosen = fastest if cost[fastest] < _GAIN * cost[self.plain] else self.plain


def _median(values: list[float]) -> float:
    """As `statistics.median`, which would be slow to import; of an even number, the upper one."""
    return sorted(values)[len(values) // 2]
