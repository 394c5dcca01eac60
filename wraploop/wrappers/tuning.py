"""Finding the fastest number of lanes, by running with each for a while."""

from __future__ import annotations

from collections import defaultdict

_CALLS = 18  # that are tried, if each has its backward
_MOST_CALLS = 3 * _CALLS
_WARM_UP = 1  # of them, with each number of lanes
_GAIN = 0.9  # more than one lane must take at most this part of the time of one


class Tuner:
    """Says how many lanes the next call should have, until it has seen which is fastest.

    It only looks at calls that are made anyway, each of which computes the same with any number
    of lanes. A call is its forward, and its backward if it has one.

    Args:
        most: the largest number of lanes to try.
    """

    def __init__(self, most: int) -> None:
        self._candidates = sorted({1, most, max(1, most // 2)})
        self._seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
        self._calls = 0
        self.chosen: int | None = 1 if most == 1 else None

    def next(self) -> int:
        """How many lanes the next call should have."""
        if self.chosen is not None:
            return self.chosen
        self._calls += 1
        return self._candidates[self._calls % len(self._candidates)]

    def note(self, part: str, lanes: int, seconds: float) -> None:
        """Takes note that a `"forward"` or `"backward"` with so many lanes took so long."""
        if self.chosen is None:
            self._seconds[part, lanes].append(seconds)
            self._choose()

    def _choose(self) -> None:
        samples = {
            part: [self._seconds[part, lanes][_WARM_UP:] for lanes in self._candidates]
            for part in {part for part, _ in self._seconds}
        }
        fewest = min(len(one) for each in samples.values() for one in each)
        enough = _CALLS // len(self._candidates) - _WARM_UP
        if self._calls < (_CALLS if fewest >= enough else _MOST_CALLS):
            return
        known = [each for each in samples.values() if all(each)]
        costs = [sum(map(_median, column)) for column in zip(*known, strict=True)]
        cost = dict(zip(self._candidates, costs, strict=True)) if known else {1: 0.0}
        fastest = min(cost, key=cost.__getitem__)
        self.chosen = fastest if cost[fastest] < _GAIN * cost[1] else 1


def _median(values: list[float]) -> float:
    """As `statistics.median`, which would be slow to import; of an even number, the upper one."""
    return sorted(values)[len(values) // 2]
