"""Predicts a step on more ranks than there are here, and checks that with those that there are."""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import machine, prediction_chart, scaling, table
from .calibration import TRACED, Check, calibrated
from .collectives import Collective, Speed, sent_bytes
from .links import LINKS, Link
from .scaling import RANKS, Scaling
from .speeds import measured_speeds
from .zoo import ZOO, Case

MODELS = ("small-mlp", "lstm", "large-mlp")
ROUNDS = 12


def main() -> None:
    options = parsed()
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"{machine.described()}\n\n{scaling.__doc__}")
    say("messages between 2 processes")
    speeds = measured_speeds()
    say("")
    print(f"Measured over the loopback interface:\n\n{told_speeds(speeds)}\n", flush=True)
    found: dict[str, tuple[Scaling, list[Check]]] = {}
    for name in options.models:
        case = ZOO[name]
        found[name] = calibrated(case, speeds, options.rounds, say)
        say("")
        print(told(case, *found[name]), flush=True)
    write(found, options.out)
    prediction_chart.draw(found, machine.described(), options.out / "predicted.png")
    print(f"Tables and plot in {options.out}")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=scaling.__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    supervised = [name for name, case in ZOO.items() if not case.is_gan]
    there_are = f"of {', '.join(supervised)}"
    parser.add_argument("models", nargs="*", metavar="MODEL", help=there_are)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, default=Path("bench"), help="a folder: ./bench")
    options = parser.parse_args()
    options.models = options.models or list(MODELS)
    if unknown := [name for name in options.models if name not in supervised]:
        parser.error(f"no model {unknown[0]!r}; there are {', '.join(supervised)}.")
    return options


def told_speeds(speeds: dict[str, Speed]) -> str:
    """Latency and bandwidth of each kind of collective."""
    lines = [("collective", "us / message", "MB/s")]
    for kind, speed in speeds.items():
        latency, rate = 1e6 * speed.latency_s, speed.bytes_per_s / 1e6
        lines.append((kind, f"{latency:.0f}", f"{rate:.0f}"))
    return table.aligned(lines)


def told(case: Case, model: Scaling, checks: Sequence[Check]) -> str:
    """What was measured of a case, the check, and the prediction."""
    fixed_ms, row_ms = 1e3 * model.compute.fixed_s, 1e3 * model.compute.row_s
    rows = case.rows // TRACED
    overheads = ", ".join(f"{way} {1e3 * s:.2f} ms" for way, s in model.overhead_s.items())
    parts = [
        f"{case.name}: {case.about}; compute {fixed_ms:.2f} ms + {row_ms:.3f} ms x rows, "
        f"loss {1e6 * model.loss_row_s:.2f} us x rows\noverhead: {overheads}",
        "Each rank brings in a step:",
        "\n".join(_sent(model)),
        f"Checked with {case.rows} rows in all:",
        table.aligned(
            [("processes", "way", "ms/step", "predicted", "off by"), *map(_line, checks)]
        ),
        f"Predicted efficiency with {rows} rows on each rank, in per cent:",
        *(_efficiencies(model, rows, link) for link in LINKS),
    ]
    return "\n\n".join(parts) + "\n"


def _sent(model: Scaling) -> Iterator[str]:
    """A line for each way, and for each number of ranks from which it sends something else."""
    for way, by_ranks in model.sent.items():
        before: list[Collective] = []
        for ranks in RANKS[1:]:
            if by_ranks[ranks] != before:
                before = by_ranks[ranks]
                yield f"{way:<12}from {ranks:>4} ranks: {_listed(before)}"


def _listed(collectives: Sequence[Collective]) -> str:
    sizes: dict[str, list[int]] = {}
    for each in collectives:
        sizes.setdefault(each.kind, []).append(each.payload_bytes)
    return "; ".join(f"{len(of)} x {kind}, {sum(of)} bytes" for kind, of in sizes.items())


def _line(check: Check) -> tuple[str, ...]:
    ms = (f"{1e3 * check.measured_s:.2f}", f"{1e3 * check.predicted_s:.2f}")
    return str(check.ranks), check.way, *ms, f"{100 * check.error:+.0f} %"


def _efficiencies(model: Scaling, rows: int, link: Link) -> str:
    lines = [(f"{link.name} ({link.source})", *map(str, RANKS))]
    for way in model.ways:
        found = [model.efficiency(way, ranks, rows, link) for ranks in RANKS]
        lines.append((way, *(f"{100 * each:.0f}" for each in found)))
    return table.aligned(lines)


def write(found: dict[str, tuple[Scaling, list[Check]]], folder: Path) -> None:
    """Writes `predicted.csv`, a row for each model, link, way and ranks, and `check.csv`."""
    with (folder / "predicted.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        columns = ("model", "link", "way", "ranks", "rows_each", "step_ms", "efficiency")
        writer.writerow((*columns, "messages", "link_bytes"))
        for name, (model, _) in found.items():
            writer.writerows(_predictions(name, model))
    with (folder / "check.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("model", "ranks", "way", "measured_ms", "predicted_ms", "error"))
        for name, (_, checks) in found.items():
            for c in checks:
                measured_ms, predicted_ms = 1e3 * c.measured_s, 1e3 * c.predicted_s
                writer.writerow((name, c.ranks, c.way, measured_ms, predicted_ms, c.error))


def _predictions(name: str, model: Scaling) -> Iterator[tuple[object, ...]]:
    rows = ZOO[name].rows // TRACED
    for link in LINKS:
        for way in model.ways:
            for ranks in RANKS:
                step_ms = 1e3 * model.step_s(way, ranks, rows, link)
                efficiency = model.efficiency(way, ranks, rows, link)
                crossing = sum(sent_bytes(c, ranks) for c in model.collectives(way, ranks, rows))
                row = (name, link.name, way, ranks, rows, step_ms, efficiency)
                yield (*row, model.messages(way, ranks), math.ceil(crossing))


def say(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()
