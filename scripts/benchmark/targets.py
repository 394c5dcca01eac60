"""What a run should show on a machine of 2 cores, and whether it does.

Ratios of speed are above 1 where ours is faster. A target whose ways were not all measured is left
out, and one over several models says how many they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .measured import BEST_DDP, Results, geometric_mean
from .zoo import Case


@dataclass(frozen=True)
class Target:
    """A figure, and what it should be at least, or at most."""

    text: str
    figure: float
    bound: float
    at_most: bool = False

    @property
    def is_met(self) -> bool:
        """Whether it is, by the digits that are printed."""
        figure = round(self.figure, 2)
        return figure <= self.bound if self.at_most else figure >= self.bound


def targets(results: Results) -> list[Target]:
    """Those that the run can tell."""
    makers = (_threads, _threads_over_ddp, _local, _gan)
    return [target for maker in makers for target in maker(results)]


def _ratios(results: Results, way: str, reference: str) -> dict[str, float]:
    """The medians, by model."""
    found = {case.name: results.ratio(case, way, reference) for case in results.cases}
    return {name: ratio.middle for name, ratio in found.items() if ratio}


def _over(count: int) -> str:
    return f"geometric mean of {count} model{'s' if count > 1 else ''}"


def _threads(results: Results) -> Iterator[Target]:
    ratios = _ratios(results, "threads", "plain")
    for name, ratio in ratios.items():
        yield Target(f"threads / plain, {name}", ratio, _LEAST_OVER_PLAIN.get(name, 0.98))
    chosen = [ratios[case.name] for case in results.cases if _lanes(results, case) > 1]
    if chosen:
        text = f"threads / plain, {_over(len(chosen))} for which auto chose threads"
        yield Target(text, geometric_mean(chosen), 1.15)
    deciding = [m.deciding_steps for m in results.all if m.deciding_steps]
    if deciding:
        yield Target("steps until auto has chosen, the most", max(deciding), 19, at_most=True)


_LEAST_OVER_PLAIN = {"lstm": 1.4, "transformer": 1.1}


def _lanes(results: Results, case: Case) -> int:
    both = results.ratio(case, "threads", "plain")
    threads = results.get(case, "threads")
    return (threads.lanes or 1) if both and threads else 1


def _threads_over_ddp(results: Results) -> Iterator[Target]:
    ratios = _ratios(results, "threads", BEST_DDP)
    if ratios:
        yield Target(
            f"threads / {BEST_DDP}, {_over(len(ratios))}", geometric_mean(ratios.values()), 1.3
        )


def _local(results: Results) -> Iterator[Target]:
    ratios = _ratios(results, "local", BEST_DDP)
    for name, ratio in ratios.items():
        yield Target(f"local / {BEST_DDP}, {name}", ratio, 0.97)
    if ratios:
        yield Target(
            f"local / {BEST_DDP}, {_over(len(ratios))}", geometric_mean(ratios.values()), 1.0
        )
    for case in results.cases:
        local, ddp = results.get(case, "local"), results.get(case, BEST_DDP)
        if local and ddp and ddp.peak_mib == ddp.peak_mib:
            ratio = local.peak_mib / ddp.peak_mib
            yield Target(f"memory of local / {BEST_DDP}, {case.name}", ratio, 1.0, at_most=True)


def _gan(results: Results) -> Iterator[Target]:
    for name, ratio in _ratios(results, "gan-local", BEST_DDP).items():
        yield Target(f"GANTraining, local / tutorial's GAN, {BEST_DDP}, {name}", ratio, 1.2)
