"""Seconds, memory and bytes of a training step under every way to run it, side by side.

Every model of the zoo (--list) is trained in every way that makes sense for it: plain torch, in
threads, under torch's DistributedDataParallel (DDP, by gloo) and under DistributedModel with 2
processes on the loopback interface. All get the same whole batch; 2 processes have a half each, and
use half the cores each. A ratio is how many times as fast a way is as the reference, the median
over rounds of the ratio within a round; "best ddp" is the faster of DDP's two bucket modes. DDP
does not bring batch norm's statistics together, which "local" does and "local-own-bn" does not.
What ends in "-mute", if asked for, sends nothing: no way to send it could be faster.

Peak MiB is what rank 0 takes over what it had before, in a process of its own; how much of it is
code of libraries, which processes share, stands beside it. Sent is what all
processes of the machine send over the loopback interface, headers of TCP included: let nothing
else talk or compute meanwhile. What DistributedModel's processes read in each other's memory is not
sent; with --apart they do not, and send all, as between machines.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

from . import chart, growth, loop, machine, table
from .measured import Measured, Results
from .targets import Target, targets
from .trial import measure
from .ways import USUAL, WAYS, ways_of
from .zoo import ZOO

LOOP, GROWTH = "loop", "growth"
ROUNDS, GROWTH_ROUNDS = 24, 6
IMPORT_MS = 60.0  # at most, wraploop over torch


def main() -> None:
    options = parsed()
    if options.list:
        print(listed())
        return
    names = options.rows or list(ZOO)
    print(f"{machine.described()}\nload before: {machine.load():.2f}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    if LOOP in names:
        measure_loop(options.rounds or ROUNDS)
    if models := [name for name in names if name in ZOO]:
        measure_models(models, options.rounds or ROUNDS, options)
    if GROWTH in names:
        measure_growth(options.rounds or GROWTH_ROUNDS, options.apart, options.out)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    rows = [*ZOO, LOOP, GROWTH]
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(rows)}")
    parser.add_argument("--ways", metavar="WAY,...", type=known_ways, default=USUAL)
    parser.add_argument("--rounds", type=int, help=f"{ROUNDS} ({GROWTH}: {GROWTH_ROUNDS})")
    parser.add_argument("--apart", action="store_true", help="as on machines of their own")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    parser.add_argument("--out", type=Path, default=Path("bench"), help="a folder: ./bench")
    parser.add_argument("--list", action="store_true", help="say which rows and ways there are")
    options = parser.parse_args()
    if unknown := [row for row in options.rows if row not in rows]:
        parser.error(f"no row {unknown[0]!r}; there are {', '.join(rows)}.")
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds is at least 1; got {options.rounds}.")
    return options


def known_ways(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in WAYS]:
        there_are = ", ".join(WAYS)
        raise argparse.ArgumentTypeError(f"no way {unknown[0]!r}; there are {there_are}.")
    return [name for name in WAYS if name in names]


def listed() -> str:
    rows = [("row", "what"), *((case.name, case.about) for case in ZOO.values())]
    rows += [(LOOP, "a learner's step over a loop by hand; importing wraploop")]
    rows += [(GROWTH, "with processes and threads, the batch, and the model")]
    ways = [("way", "what"), *((way.name, way.about) for way in WAYS.values())]
    return "\n".join(f"{name:<20}{what}" for name, what in [*rows, ("", ""), *ways])


def measure_loop(rounds: int) -> None:
    print(loop.overhead(rounds))
    found: list[Target] = []
    for what, statement in loop.IMPORTED.items():
        text = f"import of {what} over torch, in ms"
        found.append(Target(text, 1e3 * loop.import_s(statement), IMPORT_MS, at_most=True))
    print(table.verdicts(found))


def measure_models(names: list[str], rounds: int, options: argparse.Namespace) -> None:
    begun_s = time.monotonic()
    found: list[Measured] = []
    for name in names:
        case = ZOO[name]
        ways = ways_of(case.is_gan, case.norms, options.ways)
        ways = [replace(way, apart=options.apart) for way in ways]
        if ways:
            found += measure(case, ways, rounds, not options.no_memory, say)
    say("")
    results = Results(found)
    table.write(results, options.out)
    chart.draw(results, machine.described(), options.out / "steps.png")
    text = "\n\n".join([table.text(results), table.verdicts(targets(results))])
    (options.out / "steps.txt").write_text(f"{machine.described()}\n\n{text}\n")
    took_s = time.monotonic() - begun_s
    print(f"\n{text}\n\n{rounds} rounds, {took_s:.0f} s; tables in {options.out}")


def measure_growth(rounds: int, apart: bool, out: Path) -> None:
    for sweep in growth.SWEEPS:
        points = growth.grow(sweep, rounds, apart, say)
        say("")
        growth.write(points, out / f"growth-{sweep.name}.csv")
        growth.draw(sweep, points, machine.described(), out / f"growth-{sweep.name}.png")
        cells = [[table.cell(cell) for cell in row] for row in growth.rows(points)]
        print(f"\n{sweep.x}\n{table.aligned([growth.COLUMNS, *cells])}", flush=True)
    print(f"\n{rounds} rounds; tables and plots in {out}")


def say(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()
