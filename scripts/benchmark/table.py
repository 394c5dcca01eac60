"""Results as text and as CSV."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from .machine import MIB
from .measured import BEST_DDP, Measured, Results, Spread, geometric_mean, spread
from .targets import Target

REFERENCES = {"plain": "plain", "ddp": BEST_DDP}  # by the name of their columns
SUMMARY = (
    *(("threads", "plain"), ("threads", BEST_DDP), ("threads=2", "plain"), ("local", BEST_DDP)),
    *(("local-own-bn", BEST_DDP), ("global", BEST_DDP), ("gan-local", BEST_DDP)),
    *(("gan-local-own-bn", BEST_DDP), ("gan-global", BEST_DDP), ("gan-threads", BEST_DDP)),
)
HEADER = (
    *("way", "processes x threads", "ms/step", "quartiles", "/ plain", "quartiles"),
    *(f"/ {BEST_DDP}", "quartiles", "peak MiB", "of it code", "sent MiB/step", "auto chose"),
)
SHORT = {  # by the heading of a column: a ratio
    "`threads` over plain": ("threads", "plain"),
    "over DDP": ("threads", BEST_DDP),
    "`local` over DDP": ("local", BEST_DDP),
    "batch norms apart": ("local-own-bn", BEST_DDP),
    "`global` over DDP": ("global", BEST_DDP),
}
COLUMNS = (
    *("model", "way", "processes", "threads", "rounds", "steps_per_round"),
    *("step_ms_q1", "step_ms", "step_ms_q3"),
    *(f"over_{name}{part}" for name in REFERENCES for part in ("_q1", "", "_q3")),
    *("peak_mib", "code_mib", "sent_bytes", "auto_threads", "auto_steps"),
)


def rows(results: Results) -> list[dict[str, float | str | None]]:
    """A row for each way of each model, by `COLUMNS`."""
    return [_row(results, m) for m in results.all]


def _row(results: Results, m: Measured) -> dict[str, float | str | None]:
    low, middle, high = spread([1e3 * s for s in m.seconds])[:3]
    row: list[float | str | None] = [m.case.name, m.way.name, m.way.processes, m.way.threads]
    row += [len(m.seconds), m.steps, low, middle, high]
    for reference in REFERENCES.values():
        ratio = results.ratio(m.case, m.way.name, reference)
        row += ratio[:3] if ratio else (None, None, None)
    row += [_known(m.peak_mib), _known(m.code_mib), _known(m.sent)]
    row += [_splits(m), m.deciding_steps]
    return dict(zip(COLUMNS, row, strict=True))


def cell(value: float | str) -> str:
    """A value as it is printed; floats with two digits after the point."""
    return _number(value) if isinstance(value, float) else str(value)


def _known(number: float) -> float | None:
    return None if math.isnan(number) else number


def write(results: Results, folder: Path) -> None:
    """Writes `steps.csv`, a row for each way of a model; `rounds.csv`, one for each turn; and
    `steps.md`, the `short` table.
    """
    (folder / "steps.md").write_text(short(results) + "\n")
    with (folder / "steps.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows(results))
    with (folder / "rounds.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("model", "way", "round", "step_ms", "sent_bytes"))
        for m in results.all:
            for number, (s, sent) in enumerate(zip(m.seconds, m.sent_bytes, strict=True)):
                writer.writerow((m.case.name, m.way.name, number, 1e3 * s, sent))


def text(results: Results) -> str:
    """The tables of all models, then the geometric means."""
    parts = []
    for case in results.cases:
        cells = [_cells(results, m) for m in results.of(case)]
        parts.append(f"{case.name}: {case.about}, {case.rows} rows\n{aligned([HEADER, *cells])}")
    return "\n\n".join([*parts, _means(results)])


def short(results: Results) -> str:
    """A table in Markdown: what matters most, a row for each model."""
    lines = [["model", "plain, ms", "DDP, ms", *SHORT, "DDP, MiB", "`local`, MiB"]]
    lines += [["---"] * len(lines[0])]
    for case in results.cases:
        plain, ddp, local = (results.get(case, way) for way in ("plain", BEST_DDP, "local"))
        threads = results.get(case, "threads")
        ratios = [results.ratio(case, *ways) for ways in SHORT.values()]
        cells = [_number(ratio.middle) if ratio else "" for ratio in ratios]
        if threads and threads.chosen:
            cells[0] += f" ({_splits(threads)})"
        times = [_number(1e3 * m.step_s) if m else "" for m in (plain, ddp)]
        lines.append([case.name, *times, *cells, *_peaks(ddp, local)])
    means = []
    for ways in SHORT.values():
        ratios = [ratio for case in results.cases if (ratio := results.ratio(case, *ways))]
        means.append(_number(geometric_mean(ratios).value) if ratios else "")
    lines.append(["geometric mean", "", "", *means, "", ""])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _peaks(*ways: Measured | None) -> list[str]:
    return [_number(m.peak_mib) if m else "" for m in ways]


def _cells(results: Results, m: Measured) -> list[str]:
    step = spread([1e3 * s for s in m.seconds])
    cells = [m.way.name, f"{m.way.processes} x {m.way.threads}", *_spread(step)]
    for reference in REFERENCES.values():
        cells += _spread(results.ratio(m.case, m.way.name, reference))
    chose = f"{_splits(m)} after {m.deciding_steps}" if m.chosen else ""
    memory = _number(m.peak_mib), _number(m.code_mib)
    return [*cells, *memory, _number(m.sent / MIB), chose]


def _splits(m: Measured) -> str | None:
    """What auto has chosen, as lanes x operator threads."""
    return ", ".join(f"{lanes} x {threads}" for lanes, threads in m.chosen) or None


def _spread(values: Spread | None) -> list[str]:
    if values is None:
        return ["", ""]
    return [_number(values.middle), f"{_number(values.low)} - {_number(values.high)}"]


def _number(number: float) -> str:
    return "" if math.isnan(number) else f"{number:.2f}" if number < 100 else f"{number:.0f}"


def _means(results: Results) -> str:
    lines = [("geometric means", "speed", "+-", "models", "least", "most")]
    for way, reference in SUMMARY:
        found = [results.ratio(case, way, reference) for case in results.cases]
        if ratios := [ratio for ratio in found if ratio]:
            mean, middles = geometric_mean(ratios), [ratio.middle for ratio in ratios]
            figures = (_number(mean.value), _number(mean.noise), str(mean.count))
            ends = (_number(min(middles)), _number(max(middles)))
            lines.append((f"{way} / {reference}", *figures, *ends))
    return aligned(lines) if len(lines) > 1 else ""


def verdicts(targets: Sequence[Target]) -> str:
    """The targets, and which are met; those that more rounds might change have a question mark."""
    lines = [("target", "is", "+-", "should be", "")]
    for target in targets:
        bound = f"{'at most' if target.at_most else 'at least'} {target.bound:g}"
        verdict = ("met" if target.is_met else "NOT") + ("" if target.is_certain else "?")
        lines.append((target.text, _number(target.figure), _number(target.noise), bound, verdict))
    met = sum(target.is_met for target in targets)
    return f"{aligned(lines)}\n{met} of {len(targets)} met" if targets else ""


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells in columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
