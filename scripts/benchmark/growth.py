"""How cost grows: with processes and threads, with the batch, and with the model.

    workers      1, 2, 4 processes or threads, the same batch in all; more than there are cores
                 is overhead
    batch        4 rows, and up to 64 times as many, in 2 processes, or threads
    parameters   10^3 to 10^8 of them, in 2 processes, or threads

Each point is measured beside plain torch on all cores, in the same rounds.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .chart import COLORS
from .measured import Measured, Results, spread
from .trial import measure
from .ways import WAYS, Way, ddp, distributed, in_threads
from .zoo import CLASSES, ZOO, Case, labelled, mlp, sgd

WORKERS = (1, 2, 4)
WORKED = ("lstm", "large-mlp")  # much to compute, and much to send
FACTORS = (1, 2, 4, 8, 16, 32, 64)
FEWEST_ROWS = 4
INPUTS = 16
WIDTHS = (20, 86, 302, 985, 3146, 9983)  # of a network with about 10^3 to 10^8 parameters
COLUMNS = (
    *("model", "x", "way", "step_ms_q1", "step_ms", "step_ms_q3"),
    *("over_plain_q1", "over_plain", "over_plain_q3", "sent_bytes"),
)

Quartiles = tuple[float, float, float]


@dataclass
class Point:
    """The ways of one model, where `x` is what grows."""

    model: str
    x: int
    results: Results

    @property
    def measured(self) -> list[Measured]:
        """Its ways."""
        return self.results.all

    def over_plain(self, m: Measured) -> Quartiles:
        """Quartiles of the speed of one of its ways over plain torch's."""
        ratio = self.results.ratio(m.case, m.way.name, "plain")
        assert ratio is not None
        return ratio[:3]


@dataclass(frozen=True)
class Sweep:
    """One thing that grows.

    Args:
        name: of its files.
        x: what grows, for an axis.
        points: what to measure: for each model and each x a case and its ways.
    """

    name: str
    x: str
    points: Callable[[], Iterator[tuple[str, int, Case, list[Way]]]]


def of_workers() -> Iterator[tuple[str, int, Case, list[Way]]]:
    """As many processes as threads, the batch as it is."""
    for name in WORKED:
        for workers in WORKERS:
            ways = [WAYS["plain"], in_threads("threads", workers)]
            if workers > 1:
                ways += [ddp("ddp-view", workers, view=True)]
                ways += [distributed(batch, workers, batch) for batch in ("local", "global")]
            yield name, workers, ZOO[name], ways


def of_batch() -> Iterator[tuple[str, int, Case, list[Way]]]:
    """More and more rows through the LSTM."""
    names = ("plain", "threads=2", "ddp-view", "local", "global")
    for factor in FACTORS:
        case = replace(ZOO["lstm"], rows=factor * FEWEST_ROWS)
        yield "lstm", case.rows, case, [WAYS[name] for name in names]


def of_parameters() -> Iterator[tuple[str, int, Case, list[Way]]]:
    """Wider and wider linear layers."""
    names = ("plain", "threads=2", "ddp-view", "local", "global")
    for width in WIDTHS:
        make = partial(mlp, INPUTS, width, width, CLASSES)
        parameters = sum(p.numel() for p in make()["model"].parameters())
        about = f"3 linear layers, {parameters} parameters"
        case = Case("mlp", about, make, partial(labelled, shape=(INPUTS,)), 64, sgd)
        yield "mlp", parameters, case, [WAYS[name] for name in names]


SWEEPS = (
    Sweep("workers", "processes, or threads", of_workers),
    Sweep("batch", "rows in the whole batch", of_batch),
    Sweep("parameters", "parameters", of_parameters),
)


def grow(sweep: Sweep, rounds: int, apart: bool, say: Callable[[str], None]) -> list[Point]:
    """Measures the points of a sweep."""
    found = []
    for model, x, case, ways in sweep.points():
        say(f"growth, {sweep.name}: {model} at {x}")
        ways = [replace(way, apart=apart) for way in ways]
        found.append(Point(model, x, Results(measure(case, ways, rounds, False, say))))
    return found


def rows(points: list[Point]) -> list[list[float | str]]:
    """A row for each way at each point, by `COLUMNS`."""
    return [_row(point, m) for point in points for m in point.measured]


def _row(point: Point, m: Measured) -> list[float | str]:
    step_ms = spread([1e3 * s for s in m.seconds])[:3]
    sent = m.sent if math.isnan(m.sent) else round(m.sent)
    return [point.model, point.x, m.way.name, *step_ms, *point.over_plain(m), sent]


def write(points: list[Point], path: Path) -> None:
    """Writes them as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(rows(points))


def draw(sweep: Sweep, points: list[Point], title: str, path: Path) -> None:
    """Milliseconds of a step, and speed over plain torch's, over what grows, for each model."""
    models = list(dict.fromkeys(point.model for point in points))
    figure = Figure(figsize=(9, 0.8 + 2.8 * len(models)), layout="constrained")
    figure.suptitle(title, fontsize=7)
    rows = figure.subplots(len(models), 2, squeeze=False)
    for model, axes in zip(models, rows, strict=True):
        mine = [point for point in points if point.model == model]
        _lines(axes[0], mine, lambda point, m: spread([1e3 * s for s in m.seconds])[:3])
        _lines(axes[1], mine, lambda point, m: point.over_plain(m))
        axes[0].set_title(f"{model}: milliseconds of a step", fontsize=9)
        axes[1].set_title(f"{model}: times as fast as plain torch", fontsize=9)
        axes[1].axhline(1.0, color="black", linewidth=0.8)
        axes[1].set_ylim(bottom=0)
        if sweep.name == "workers":
            axes[0].set_ylim(bottom=0)
        else:
            axes[0].set_yscale("log", base=2 if sweep.name == "batch" else 10)
            axes[0].yaxis.set_major_formatter("{x:g}")
        for ax in axes:
            _over(ax, sorted({point.x for point in mine}), sweep.x)
    named = {line.get_label(): line for ax in rows[:, 0] for line in ax.containers}
    figure.legend(named.values(), named, loc="outside lower center", ncols=len(named), fontsize=8)
    figure.savefig(path, dpi=110)


def _over(ax: Axes, xs: list[int], label: str) -> None:
    """A logarithmic axis for what grows, with each x if there is room for it."""
    ax.set_xlabel(label)
    ax.set_xscale("log")
    if xs[-1] < 1000:
        ax.set_xticks(xs, [str(x) for x in xs])
        ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)


def _lines(ax: Axes, points: list[Point], y: Callable[[Point, Measured], Quartiles]) -> None:
    for name in dict.fromkeys(m.way.name for point in points for m in point.measured):
        mine = [(p.x, y(p, m)) for p in points for m in p.measured if m.way.name == name]
        xs, ys = [x for x, _ in mine], [middle for _, (_, middle, _) in mine]
        below = [middle - low for _, (low, middle, _) in mine]
        above = [high - middle for _, (_, middle, high) in mine]
        look = {"marker": "o", "markersize": 3, "linewidth": 1.2, "color": COLORS[name]}
        ax.errorbar(xs, ys, (below, above), label=name, elinewidth=0.8, **look)
