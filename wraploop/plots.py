"""Plots: what metrics, schedules and a search for a learning rate came to, as figures.

They belong to nobody but the caller: no pyplot, no display, no global state, so that they can be
drawn in any thread. A notebook shows them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wraploop.images import matplotlib, whole
from wraploop.phases import AbstractTrainingPhase, ValidationPhase
from wraploop.schedules import Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from wraploop.callbacks.metrics import PhaseMetrics
    from wraploop.learner import Learner

_FAINT: dict[str, Any] = {"alpha": 0.4, "linewidth": 0.8}
_FEW = 30  # points on a line up to which each is marked


def plot_metrics(learner: Learner) -> Figure:
    """Draws a panel for each metric, over epochs, with a line for each phase.

    Behind it, thin, are the steps of the phases that train. The last step of an epoch lies where
    the epoch does; the others lie evenly, as if all epochs had had as many steps.

    Raises:
        ValueError: the learner has no `Metrics`, or they have recorded nothing yet.
        ImportError: matplotlib is missing.
    """
    records = _recorded(learner)
    looks = {each.name for each in (*learner.phases, learner.phase) if _only_looks(each)}
    steps = {
        phase: record.steps if phase not in {*looks, ValidationPhase.name} else {}
        for phase, record in records.items()
    }
    names = dict.fromkeys(n for p in records for n in (*steps[p], *records[p].epochs))
    if not names:
        raise ValueError("Nothing to plot: no metrics are recorded yet. Run an epoch first.")
    figure, panels = _panels(len(names))
    for panel, name in zip(panels, names, strict=True):
        for index, (phase, record) in enumerate(records.items()):
            color = f"C{index}"
            if name in steps[phase]:
                series, length = steps[phase][name], _steps_per_epoch(learner, phase)
                at, label = [step / length for step in series.at], f"{phase}, each step"
                panel.plot(at, series.values, color=color, label=label, **_FAINT)
            if name in record.epochs:
                series = record.epochs[name]
                _line(panel, series.at, series.values, color=color, label=phase, zorder=3)
        _count_along_x(panel, "epoch")
        panel.set_ylabel(name)
    if panels[0].get_xlim()[0] < 1:
        panels[0].set_xlim(left=0)
    return _with_legend(figure, panels)


def plot_schedule(
    schedule: Schedule | Mapping[str, Schedule], steps: int, *, label: str = ""
) -> Figure:
    """Draws what a schedule, or each of several by name, gives over steps.

    Args:
        schedule: called with each step, counted from 0.
        steps: how many.
        label: what it gives, as `"learning rate"`.

    Raises:
        ValueError: no schedules, or `steps` below 1.
        ImportError: matplotlib is missing.
    """
    schedules = schedule if isinstance(schedule, Mapping) else {"": schedule}
    if not schedules or steps < 1:
        raise ValueError(f"Expected schedules and at least 1 step, and got {schedule}, {steps=}.")
    figure, (panel,) = _panels(1)
    for name, each in schedules.items():
        _line(panel, range(steps), [each(step) for step in range(steps)], label=name or "_")
    _count_along_x(panel, "step")
    panel.set_ylabel(label)
    return _with_legend(figure, [panel])


def plot_lr_find(
    rates: Sequence[float],
    losses: Sequence[float],
    smoothed: Sequence[float],
    suggestions: Mapping[str, float],
) -> Figure:
    """Draws losses over the learning rates at which they were taken, and the rates to choose.

    What the loss explodes to at the end is left out of sight.

    Args:
        rates: positive.
        losses: faint, as many.
        smoothed: the same, smoothed.
        suggestions: learning rates by name, each a vertical line.

    Raises:
        ValueError: no rates, other than positive ones, or not as many of each.
        ImportError: matplotlib is missing.
    """
    lengths = len(rates), len(losses), len(smoothed)
    if not len(rates) or len(set(lengths)) > 1 or not min(rates) > 0:
        raise ValueError(
            "Expected as many positive rates as losses and smoothed losses, at least one, and got "
            f"{lengths[0]}, {lengths[1]} and {lengths[2]}, of rates {list(rates[:3])}..."
        )
    figure, (panel,) = _panels(1)
    panel.plot(rates, losses, color="C0", label="loss", **_FAINT)
    _line(panel, rates, smoothed, color="C0", label="smoothed loss", zorder=3)
    for index, (name, rate) in enumerate(suggestions.items(), start=1):
        panel.axvline(rate, color=f"C{index}", linestyle="--", label=f"{name}: {rate:.2e}")
    panel.set(xlabel="learning rate", ylabel="loss", xscale="log", ylim=_limits(losses, smoothed))
    return _with_legend(figure, [panel])


def save_figure(path: str | Path, figure: Figure) -> None:
    """Writes a figure, in the format that the path ends in, or PNG; makes the folder.

    The file is replaced as a whole.
    """
    with whole(path) as (unfinished, kind):
        figure.savefig(unfinished, format=kind)


def _recorded(learner: Learner) -> dict[str, PhaseMetrics]:
    metrics = getattr(learner, "metrics", None)
    if metrics is None:
        raise ValueError(
            "Nothing to plot: the learner has no metrics. Add `Metrics()` to its callbacks."
        )
    return dict(metrics)


def _only_looks(phase: Any) -> bool:
    return phase is not None and not isinstance(phase, AbstractTrainingPhase)


def _steps_per_epoch(learner: Learner, phase: str) -> float:
    history = learner.history[phase]
    if history.epochs == 0:
        return max(history.steps, 1)
    before = (history.steps - history.steps_in_epoch) / history.epochs
    if history.steps_in_epoch <= before:  # the epoch they are in has come to no end
        return before
    return history.steps / history.epochs


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with panels over one x axis, which notebooks show."""
    columns = 2 if count in (2, 4) else min(count, 3)
    rows = math.ceil(count / columns)
    size = (7, 4.5) if count == 1 else (4.5 * columns, 3.2 * rows + 0.5)
    figure = matplotlib("figure").Figure(figsize=size, layout="constrained")
    vars(figure)["_repr_png_"] = partial(_png, figure)
    panels: list[Axes] = []
    for place in range(count):
        share = panels[0] if panels else None
        panels.append(figure.add_subplot(rows, columns, place + 1, sharex=share))
        panels[-1].grid(alpha=0.3)
    return figure, panels


def _line(panel: Axes, x: Sequence[float], y: Sequence[float], **options: Any) -> None:
    panel.plot(x, y, marker="o" if len(x) <= _FEW else "", markersize=4, **options)


def _count_along_x(panel: Axes, what: str) -> None:
    panel.set_xlabel(what)
    whole_numbers = {"integer": True, "min_n_ticks": 1, "steps": [1, 2, 2.5, 5, 10]}
    panel.xaxis.set_major_locator(matplotlib("ticker").MaxNLocator("auto", **whole_numbers))


def _with_legend(figure: Figure, panels: Sequence[Axes]) -> Figure:
    """One legend above all panels, where it covers none, if there is anything to tell apart."""
    handles: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles[label] = handle
    if handles:
        columns = int(figure.get_figwidth() // 2.5)
        figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=columns)
    return figure


def _limits(losses: Sequence[float], smoothed: Sequence[float]) -> tuple[float, float] | None:
    """From the lowest loss to the highest before it, or to half of all, with room about them."""
    finite = sorted(float(loss) for loss in smoothed if math.isfinite(loss))
    if not finite:
        return None
    until = list(smoothed).index(finite[0]) + 1
    bottom = min(loss for loss in (*losses[:until], finite[0]) if math.isfinite(loss))
    before = [loss for loss in smoothed[:until] if math.isfinite(loss)]
    top = max(*before, finite[len(finite) // 2])
    room = 0.1 * (top - bottom) or 0.1 * abs(bottom) or 1.0
    return bottom - room, top + 2 * room


def _png(figure: Figure) -> bytes:
    file = BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
