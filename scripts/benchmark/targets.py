"""What a run should show on a machine of 2 cores, and whether it does.

Ratios of speed are above 1 where ours is faster. A target whose ways were not all measured is left
out, and one over several models says how many they were.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from .measured import BEST_DDP, Mean, Results, Spread, geometric_mean
from .zoo import Case


@dataclass(frozen=True)
class Target:
    """A figure, and what it should be at least, or at most.

    Attributes:
        noise: how far off the figure may be; NaN where that is not known.
    """

    text: str
    figure: float
    bound: float
    noise: float = math.nan
    at_most: bool = False

    @property
    def is_met(self) -> bool:
        """Whether it is, by the digits that are printed."""
        figure = round(self.figure, 2)
        return figure <= self.bound if self.at_most else figure >= self.bound

    @property
    def is_certain(self) -> bool:
        """Whether noise leaves it at that."""
        return not abs(self.figure - self.bound) < self.noise


def targets(results: Results) -> list[Target]:
    """Those that the run can tell."""
    makers = (_threads, _threads_over_ddp, _local, _gan)
    return [target for maker in makers for target in maker(results)]


def _ratios(results: Results, way: str, reference: str) -> dict[str, Spread]:
    """By model."""
    found = {case.name: results.ratio(case, way, reference) for case in results.cases}
    return {name: ratio for name, ratio in found.items() if ratio}


def _each(text: str, ratio: Spread, bound: float) -> Target:
    return Target(text, ratio.middle, bound, ratio.noise)


def _mean(text: str, mean: Mean, bound: float) -> Target:
    over = f"geometric mean of {mean.count} model{'s' if mean.count > 1 else ''}"
    return Target(f"{text}, {over}", mean.value, bound, mean.noise)


def _threads(results: Results) -> Iterator[Target]:
    ratios = _ratios(results, "threads", "plain")
    for name, ratio in ratios.items():
        yield _each(f"threads / plain, {name}", ratio, _LEAST_OVER_PLAIN.get(name, 0.98))
    chosen = [ratios[case.name] for case in results.cases if _has_lanes(results, case)]
    if chosen:
        yield _mean("threads / plain, where auto chose threads", geometric_mean(chosen), 1.15)
    deciding = [m.deciding_steps for m in results.all if m.deciding_steps]
    if deciding:
        yield Target("steps until auto has chosen, the most", max(deciding), 19, at_most=True)


_LEAST_OVER_PLAIN = {"lstm": 1.4, "transformer": 1.1}


def _has_lanes(results: Results, case: Case) -> bool:
    """Whether auto has chosen more than one lane, and plain is there to compare."""
    threads = results.get(case, "threads")
    if not threads or not results.get(case, "plain"):
        return False
    return any(split.lanes > 1 for split in threads.chosen)


def _threads_over_ddp(results: Results) -> Iterator[Target]:
    if ratios := _ratios(results, "threads", BEST_DDP):
        yield _mean(f"threads / {BEST_DDP}", geometric_mean(ratios.values()), 1.3)


def _local(results: Results) -> Iterator[Target]:
    ratios = _ratios(results, "local", BEST_DDP)
    for name, ratio in ratios.items():
        yield _each(f"local / {BEST_DDP}, {name}", ratio, 0.97)
    if ratios:
        yield _mean(f"local / {BEST_DDP}", geometric_mean(ratios.values()), 1.0)
    for case in results.cases:
        local, ddp = results.get(case, "local"), results.get(case, BEST_DDP)
        if local and ddp and not math.isnan(ddp.peak_mib):
            ratio = local.peak_mib / ddp.peak_mib
            yield Target(f"memory of local / {BEST_DDP}, {case.name}", ratio, 1.0, at_most=True)


def _gan(results: Results) -> Iterator[Target]:
    for name, ratio in _ratios(results, "gan-local", BEST_DDP).items():
        yield _each(f"GANTraining, local / tutorial's GAN, {BEST_DDP}, {name}", ratio, 1.2)
