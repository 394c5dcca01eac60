"""Schedules: the value of a hyperparameter as a function of the step, counted from 0."""

from __future__ import annotations

import math
from collections.abc import Callable

from wraploop.given import check_numbers, whole

Schedule = Callable[[int], float]


def one_cycle(
    steps: int,
    maximum: float,
    *,
    warmup: float = 0.25,
    div: float = 25.0,
    final_div: float = 1e5,
) -> Schedule:
    """Half a cosine up to `maximum`, and half a cosine down, over a number of steps.

    It starts at exactly `maximum / div` in step 0, has its maximum in the step that is nearest to
    `warmup * (steps - 1)`, between first and last, and ends at exactly `maximum / final_div` in
    step `steps - 1`, where it stays.

    Args:
        steps: how many there are.
        maximum: the highest value.
        warmup: the share of the steps in which it rises, from 0 to 1.
        div: the maximum over the first value.
        final_div: the maximum over the last value.

    Raises:
        ValueError: there are no steps, `warmup` is no share, or something else is not positive.

    Source: Smith and Topin, Super-Convergence, 2018; with cosines, as in fastai.

    Examples:
        >>> rate = one_cycle(101, 0.1, final_div=1000.0)
        >>> [round(rate(step), 6) for step in (0, 25, 50, 100, 200)]
        [0.004, 0.1, 0.075025, 0.0001, 0.0001]
    """
    whole("steps", steps)
    check_numbers(maximum=maximum, warmup=warmup, div=div, final_div=final_div)
    if not 0 <= warmup <= 1 or not min(maximum, div, final_div) > 0:
        raise ValueError(
            "Expected a warmup from 0 to 1, and the rest above 0, and got "
            f"{maximum=}, {warmup=}, {div=}, {final_div=}."
        )
    last = steps - 1
    peak = round(warmup * last)
    if last > 1 and 0 < warmup < 1:  # however few steps: first up, then down
        peak = min(max(peak, 1), last - 1)
    first, end = maximum / div, maximum / final_div

    def value(step: int) -> float:
        if step < peak:
            return _cosine(first, maximum, step / peak)
        if step >= last and last > peak:
            return end
        return _cosine(maximum, end, (step - peak) / max(1, last - peak))

    return value


def _cosine(start: float, end: float, share: float) -> float:
    """From `start` to `end`, of which a share is done, along half a cosine."""
    left = (1 + math.cos(math.pi * min(max(share, 0.0), 1.0))) / 2
    return start * left + end * (1 - left)
