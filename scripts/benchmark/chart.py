"""Results as a picture."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .measured import BEST_DDP, Results

PANELS = {  # reference: ways
    "plain": ("threads", "threads=2"),
    BEST_DDP: ("threads", "local", "local-own-bn", "global", "gan-local", "gan-global"),
}
COLORS = {
    way: f"C{i}" for i, way in enumerate(dict.fromkeys(w for ways in PANELS.values() for w in ways))
} | {"plain": "black", "ddp-view": "0.6"}
_WIDTH = 0.8  # of the bars of a model together


def draw(results: Results, title: str, path: Path) -> None:
    """Bars of speed over the references, with quartiles, from 1; a panel for each reference."""
    panels = {reference: _measured(results, reference) for reference in PANELS}
    panels = {reference: ways for reference, ways in panels.items() if ways}
    if not panels:
        return
    width = max(6.0, 2.0 + 1.5 * len(results.cases))
    figure = Figure(figsize=(width, 3.4 * len(panels)), layout="constrained")
    figure.suptitle(title, fontsize=8)
    axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    for ax, (reference, ways) in zip(axes, panels.items(), strict=True):
        _panel(ax, results, reference, ways)
    figure.savefig(path, dpi=150)


def _measured(results: Results, reference: str) -> list[str]:
    cases = results.cases
    ways = PANELS[reference]
    return [way for way in ways if any(results.ratio(case, way, reference) for case in cases)]


def _panel(ax: Axes, results: Results, reference: str, ways: list[str]) -> None:
    width = _WIDTH / len(ways)
    for i, way in enumerate(ways):
        found = [results.ratio(case, way, reference) for case in results.cases]
        ratios = [(at, ratio) for at, ratio in enumerate(found) if ratio]
        at = [x + (i - (len(ways) - 1) / 2) * width for x, _ in ratios]
        middles = [ratio.middle for _, ratio in ratios]
        heights = [middle - 1 for middle in middles]
        below = [ratio.middle - ratio.low for _, ratio in ratios]
        above = [ratio.high - ratio.middle for _, ratio in ratios]
        style = {"linewidth": 0.8, "ecolor": "0.3"}
        look = {"label": way, "color": COLORS[way], "error_kw": style}
        bars = ax.bar(at, heights, width, bottom=1.0, yerr=(below, above), **look)
        labels = [f"{middle:.2f}" for middle in middles]
        ax.bar_label(bars, labels, fontsize=6, padding=1, rotation=90)
    ax.set_yscale("log", base=2)  # twice as fast is as far from 1 as half as fast
    ax.yaxis.set_major_formatter("{x:g}")
    ax.axhline(1.0, color="black", linewidth=0.8)
    ax.set_xticks(range(len(results.cases)), [case.name for case in results.cases])
    ax.set_ylabel(f"times as fast as\n{reference}")
    ax.margins(y=0.15)
    ax.legend(fontsize=7, ncols=len(ways), loc="upper center", bbox_to_anchor=(0.5, -0.1))
    ax.spines[["top", "right"]].set_visible(False)
