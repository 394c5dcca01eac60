"""The check and the prediction as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .calibration import TRACED, Check
from .links import LINKS, Link
from .scaling import INPUTS, RANKS, Scaling
from .zoo import ZOO

_COLORS = {"one": "black", "ddp-view": "C0", "local": "C1", "global": "C2", INPUTS: "C3"}
_STYLES = {way: "--" if way == INPUTS else "-" for way in _COLORS}


def draw(found: dict[str, tuple[Scaling, list[Check]]], title: str, path: Path) -> None:
    """For each model the check, then efficiency over ranks for each link."""
    figure = Figure(figsize=(10, 5.6 * len(found)), layout="constrained")
    figure.suptitle(title, fontsize=8)
    parts = figure.subfigures(len(found), 1, squeeze=False)[:, 0]
    for part, (name, (model, checks)) in zip(parts, found.items(), strict=True):
        axes = part.subplots(2, -(-(1 + len(LINKS)) // 2)).flatten()
        _check(axes[0], checks)
        axes[0].set_ylabel(f"{name}: ms / step")
        for ax, link in zip(axes[1:], LINKS, strict=True):
            _efficiency(ax, model, ZOO[name].rows // TRACED, link)
        axes[1].legend(fontsize=6)
        for ax in axes:
            ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _efficiency(ax: Axes, model: Scaling, rows: int, link: Link) -> None:
    for way in model.ways:
        percents = [100 * model.efficiency(way, ranks, rows, link) for ranks in RANKS]
        ax.plot(RANKS, percents, label=way, color=_COLORS[way], linestyle=_STYLES[way])
    ax.set_xscale("log", base=2)
    ax.set(ylim=(0, 105), xlabel="ranks", ylabel="predicted efficiency, %")
    ax.set_title(link.name, fontsize=8)


def _check(ax: Axes, checks: Sequence[Check]) -> None:
    for way in dict.fromkeys(check.way for check in checks):
        mine = [check for check in checks if check.way == way]
        ranks, color = [check.ranks for check in mine], _COLORS[way]
        ax.plot(ranks, [1e3 * c.measured_s for c in mine], "o", label=way, color=color)
        ax.plot(ranks, [1e3 * c.predicted_s for c in mine], "_--", color=color, linewidth=0.8)
    ax.set(ylim=(0, None), xticks=sorted({check.ranks for check in checks}), xlabel="processes")
    ax.set_title("here: measured o, predicted -", fontsize=8)
    ax.legend(fontsize=6)
