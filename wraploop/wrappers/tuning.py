"""Finding the fastest number of lanes, by running with each for a while."""

from __future__ import annotations

from collections import defaultdict

_SAMPLES = 3  # of each number of lanes, after one to warm up
_MOST_CALLS = 16
_GAIN = 0.95  # more than one lane must take at most this part of the time of one


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
        parts = {part for part, _ in self._seconds}
        needed = [self._seconds[part, lanes] for part in parts for lanes in self._candidates]
        enough = all(len(samples) > _SAMPLES for samples in needed)
        if not enough or (parts == {"forward"} and self._calls < _MOST_CALLS):
            return
        cost = {
            lanes: sum(_median(self._seconds[part, lanes][1:]) for part in parts)
            for lanes in self._candidates
        }
        fastest = min(cost, key=cost.__getitem__)
        self.chosen = fastest if cost[fastest] < _GAIN * cost[1] else 1


def _median(values: list[float]) -> float:
    """As `statistics.median`, which would be slow to import; of an even number, the upper one."""
    return sorted(values)[len(values) // 2]
