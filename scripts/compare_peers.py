"""The training steps of tests/steps under torch DDP, accelerate and Lightning Fabric, beside ours.

Ours make every step as it is written. Peers make those that can be cut to the rows of a process,
see scripts/peers.py; and what can be asked of them are those in which averaging gradients is right
at all, which is found by averaging them by hand. The threads and processes of a case, one step
under one wrapper, are its own.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from peers import PEERS, PROCESSES, Rows, by_hand, distance, left_by, whole

from tests.promise import Wrap, differences, expected, snapshots
from tests.ranks import CONFIGURATIONS
from tests.steps import STEPS, Step
from tests.test_promises import IN_PROCESS

LIMIT_S = 10  # for a case, start and end of its processes included
AT_A_TIME = 2 * (os.cpu_count() or 1)
KINDS = ("right", "refused", "wrong", "hang", "error")  # of these, a case is the last reported
OURS = {**{name: (1, wrap) for name, wrap in IN_PROCESS.items()}, **CONFIGURATIONS}
BY_HAND = "gradients averaged by hand"

Outcome = tuple[str, str]  # one of KINDS, and what there is to say about it
Outcomes = dict[tuple[str, str], Outcome]  # of a wrapper and a step


def main() -> None:
    """Makes the steps under the wrappers and prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = [*PEERS, *OURS]
    parser.add_argument("--only", metavar="PATTERN", default="", help="steps, by expression")
    parser.add_argument("--wrappers", metavar="NAME", nargs="+", choices=every, default=every)
    parser.add_argument("--all", action="store_true", help="print a row for each step too")
    parser.add_argument("--csv", metavar="PATH", type=Path, help="write a row for each step there")
    options = parser.parse_args()

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    names = [name for name in STEPS if re.search(options.only, name)]
    for name in names:  # made once, here, and known to the processes that are forked from this
        expected(name)
    outcomes = make([(BY_HAND, name) for name in names if whole(name)[0] is not None])
    cut = [name for _, name in outcomes if outcomes[BY_HAND, name][0] in ("right", "wrong")]
    separable = [name for name in cut if outcomes[BY_HAND, name][0] == "right"]
    given = {wrapper: names if wrapper in OURS else cut for wrapper in options.wrappers}
    outcomes |= make([(wrapper, name) for wrapper in given for name in given[wrapper]])

    wrappers = [BY_HAND, *options.wrappers]
    rows = [
        [name, *(": ".join(filter(None, outcomes.get((w, name), ("-", "")))) for w in wrappers)]
        for name in names
    ]
    if options.csv:
        with options.csv.open("w", newline="") as file:
            csv.writer(file).writerows([["step", *wrappers], *rows])
    if options.all:
        print_table(["step", *wrappers], [[cell[:80] for cell in row] for row in rows])
    print(
        f"\n{len(separable)} of {len(names)} steps can be asked of a wrapper that averages "
        f"gradients. Not {len(names) - len(cut)},\nwhich fail when cut to a process's rows, "
        f"nor {len(cut) - len(separable)}, in which averaging gradients by hand is wrong too.\n"
        "Numbers of rows are made even for peers, and a step of ours is refused if it raises the "
        "error\nthat its entry in tests/steps announces."
    )
    print_counts(f"Those {len(separable)}", options.wrappers, separable, outcomes)
    print_counts(f"All {len(names)}, if they can be cut", options.wrappers, names, outcomes)


# What becomes of a step


def check_ours(step: Step, wrap: Wrap) -> Outcome:
    """Everything that tests/promise.py compares."""
    try:
        wrong = differences(step, snapshots(step, wrap))
    except Exception as error:
        refused = step.refused and re.search(step.refused, f"{type(error).__name__}: {error}")
        return "refused" if refused else "error", first_line(error)
    return ("wrong", wrong.splitlines()[0]) if wrong else ("right", "")


def check_peer(step: Step, wrap: Wrap, rank: int) -> Outcome:
    """Parameters and gradients, at the end."""
    plains, rows = whole(step.name)
    assert plains is not None
    try:
        off = distance(left_by(step, Rows(rows, rank, PROCESSES), wrap), plains)
    except Exception as error:
        return "error", first_line(error)
    return ("right", "") if off <= step.rtol else ("wrong", f"off by {off:.1e}")


def first_line(error: BaseException) -> str:
    """What an error says, in short."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


class Case:
    """The processes that make a step under a wrapper, and what they report."""

    def __init__(self, wrapper: str, name: str) -> None:
        self.wrapper, self.step = wrapper, STEPS[name]
        self.world_size, self.wrap = OURS.get(
            wrapper, (PROCESSES, PEERS[wrapper] if wrapper in PEERS else by_hand)
        )
        self.folder = tempfile.TemporaryDirectory()
        self.ends_s = time.monotonic() + LIMIT_S
        self.signals: list[str] = []
        self.running: set[int] = set()
        for rank in range(self.world_size):
            child = os.fork()
            if child == 0:
                self._become(rank)
            self.running.add(child)

    def _become(self, rank: int) -> NoReturn:
        try:
            folder = Path(self.folder.name)
            os.dup2(os.open(folder / f"said.{rank}", os.O_WRONLY | os.O_CREAT), 1)
            os.dup2(1, 2)
            if self.world_size > 1:
                self._join(rank)
            if self.wrapper in OURS:
                outcome = check_ours(self.step, self.wrap)
            else:
                outcome = check_peer(self.step, self.wrap, rank)
            (folder / f"part.{rank}").write_text(json.dumps([time.monotonic(), *outcome]))
            (folder / f"part.{rank}").rename(folder / f"report.{rank}")
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)

    def _join(self, rank: int) -> None:
        """As torchrun would have it, but that the processes meet in a file."""
        size = str(self.world_size)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), TORCHELASTIC_RUN_ID="peers")
        os.environ.update(WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29500")  # which nobody calls
        dist.init_process_group(
            "gloo",
            init_method=f"file://{self.folder.name}/group",
            rank=rank,
            world_size=self.world_size,
            timeout=timedelta(seconds=10 * LIMIT_S),
        )

    def has_ended(self) -> bool:
        """Whether all processes have; kills them if they take too long."""
        late = time.monotonic() > self.ends_s
        for pid in list(self.running):
            if late:
                os.kill(pid, signal.SIGKILL)
            done, status = os.waitpid(pid, 0 if late else os.WNOHANG)
            if done:
                self.running.remove(pid)
                if os.WIFSIGNALED(status) and not late:
                    self.signals.append(signal.Signals(os.WTERMSIG(status)).name)
        return not self.running

    def outcome(self) -> Outcome:
        """The worst that a process reports; of errors the first, from which others follow."""
        paths = Path(self.folder.name).glob("report.*")
        reports = sorted(json.loads(path.read_text()) for path in paths)
        said = {kind: text for _, kind, text in reversed(reports)}
        if self.signals:
            said.setdefault("error", f"ended by {self.signals[0]}")
        if len(reports) < self.world_size:
            said.setdefault("hang", f"took more than {LIMIT_S} s")
        worst = next(
            kind for kind in ("error", "hang", "wrong", "refused", "right") if kind in said
        )
        return worst, said[worst]


def make(cases: list[tuple[str, str]]) -> Outcomes:
    """Makes the cases, some at a time."""
    found: Outcomes = dict.fromkeys(cases, ("", ""))
    left, running = cases[::-1], []
    try:
        while left or running:
            while left and len(running) < AT_A_TIME:
                running.append(Case(*left.pop()))
            time.sleep(0.002)
            for case in [case for case in running if case.has_ended()]:
                running.remove(case)
                found[case.wrapper, case.step.name] = case.outcome()
                case.folder.cleanup()
                done = len(cases) - len(left) - len(running)
                if done % 100 == 0 or done == len(cases):
                    print(f"{done} of {len(cases)} cases", file=sys.stderr, flush=True)
    finally:
        for case in running:
            case.ends_s = 0.0
            case.has_ended()
    return found


# Tables


def print_counts(title: str, wrappers: list[str], names: list[str], outcomes: Outcomes) -> None:
    """How many of the steps `names` end how, under each wrapper."""
    rows = []
    for wrapper in wrappers:
        kinds = Counter(outcomes.get((wrapper, name), ("", ""))[0] for name in names)
        rows.append([wrapper, len(names) - kinds[""], *(kinds[kind] for kind in KINDS)])
    print(f"\n{title}:\n")
    print_table(["wrapper", "steps", *KINDS], rows)


def print_table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> None:
    """In markdown."""
    for row in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |")


if __name__ == "__main__":
    main()
