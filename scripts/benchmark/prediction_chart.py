"""The check and the prediction as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .calibration import TRACED, Check
from .chart import COLORS
from .links import LINKS, Link
from .scaling import INPUTS, RANKS, Scaling
from .zoo import ZOO

_COLORS = {**COLORS, INPUTS: COLORS["global"]}
_DRAWN = LINKS[:3]  # where latency is all, a faster one changes nothing
_APART = 0.16  # of ways with as many processes


def draw(found: dict[str, tuple[Scaling, list[Check]]], title: str, path: Path) -> None:
    """For each model the check, then efficiency over ranks for each link."""
    figure = Figure(figsize=(11, 0.8 + 2.8 * len(found)), layout="constrained")
    figure.suptitle(title, fontsize=7)
    rows = figure.subplots(len(found), 1 + len(_DRAWN), squeeze=False)
    for axes, (name, (model, checks)) in zip(rows, found.items(), strict=True):
        _check(axes[0], checks)
        axes[0].set_title(f"{name} here: ms / step", fontsize=9)
        rows_each = ZOO[name].rows // TRACED
        for ax, link in zip(axes[1:], _DRAWN, strict=True):
            _efficiency(ax, model, rows_each, link)
            ax.set_title(f"{name}, {link.name}", fontsize=9)
        axes[1].set_ylabel(f"predicted efficiency, %\n({rows_each} rows on each rank)", fontsize=8)
        for ax in axes:
            ax.spines[["top", "right"]].set_visible(False)
    handles, labels = rows[0, 1].get_legend_handles_labels()
    points, said = rows[0, 0].get_legend_handles_labels()
    ncols = len(labels + said)
    figure.legend(
        handles + points, labels + said, loc="outside lower center", ncols=ncols, fontsize=8
    )
    figure.savefig(path, dpi=110)


def _efficiency(ax: Axes, model: Scaling, rows: int, link: Link) -> None:
    for way in model.ways:
        percents = [100 * model.efficiency(way, ranks, rows, link) for ranks in RANKS]
        style = "--" if way == INPUTS else "-"
        ax.plot(RANKS, percents, label=way, color=_COLORS[way], linestyle=style)
    ax.set_xscale("log", base=2)
    ax.set_xticks(RANKS[::2], [f"{ranks:,}" for ranks in RANKS[::2]], fontsize=8)
    ax.set(ylim=(0, 105), xlabel="ranks")
    ax.grid(alpha=0.3)


def _check(ax: Axes, checks: Sequence[Check]) -> None:
    counts = sorted({check.ranks for check in checks})
    for at, count in enumerate(counts):
        mine = [check for check in checks if check.ranks == count]
        xs = [at + (i - (len(mine) - 1) / 2) * _APART for i in range(len(mine))]
        colors = [_COLORS.get(check.way, "black") for check in mine]
        label = "measured" if at == 0 else None
        ax.scatter(xs, [1e3 * c.measured_s for c in mine], color=colors, s=18, label=label)
        label = "predicted" if at == 0 else None
        predicted = [1e3 * c.predicted_s for c in mine]
        ax.scatter(xs, predicted, color="black", marker="_", s=60, label=label)
    ax.set_xticks(range(len(counts)), [str(count) for count in counts])
    ax.set(ylim=(0, None), xlabel="processes", xlim=(-0.5, len(counts) - 0.5))
