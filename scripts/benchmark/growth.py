"""How cost grows: with processes and threads, with the batch, and with the model.

    workers      1, 2, 4 processes or threads, the same batch in all; more than there are cores
                 is overhead
    batch        1 to 64 times the rows, in 2 processes, or threads
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

    def over_plain(self, m: Measured) -> tuple[float, float, float]:
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
        yield "lstm", factor, case, [WAYS[name] for name in names]


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
    Sweep("batch", f"times {FEWEST_ROWS} rows", of_batch),
    Sweep("parameters", "parameters", of_parameters),
)


def grow(sweep: Sweep, rounds: int, say: Callable[[str], None]) -> list[Point]:
    """Measures the points of a sweep."""
    found = []
    for model, x, case, ways in sweep.points():
        say(f"growth, {sweep.name}: {model} at {x}")
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
    figure = Figure(figsize=(9, 3.2 * len(models)), layout="constrained")
    figure.suptitle(title, fontsize=8)
    for model, axes in zip(models, figure.subplots(len(models), 2, squeeze=False), strict=True):
        mine = [point for point in points if point.model == model]
        _lines(axes[0], mine, lambda point, m: 1e3 * m.step_s)
        _lines(axes[1], mine, lambda point, m: point.over_plain(m)[1])
        axes[0].set_ylabel(f"{model}: ms / step")
        if len(mine) > len(WORKERS):  # a wide range
            axes[0].set_yscale("log")
        else:
            axes[0].set_ylim(bottom=0)
        axes[1].set_ylabel("times as fast as plain")
        axes[1].axhline(1.0, color="black", linewidth=0.8)
        for ax in axes:
            ax.set(xlabel=sweep.x, xscale="log")
            if len({point.x for point in mine}) < 10 and sweep.name != "parameters":
                ax.set_xticks([p.x for p in mine], [str(p.x) for p in mine], minor=False)
                ax.minorticks_off()
    figure.savefig(path, dpi=150)


def _lines(ax: Axes, points: list[Point], y: Callable[[Point, Measured], float]) -> None:
    names = dict.fromkeys(m.way.name for point in points for m in point.measured)
    for i, name in enumerate(names):
        pairs = [(p.x, y(p, m)) for p in points for m in p.measured if m.way.name == name]
        ax.plot(*zip(*pairs, strict=True), marker="o", markersize=3, label=name, color=f"C{i}")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=7)
