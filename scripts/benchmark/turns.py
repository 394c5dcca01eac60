"""What a process of the benchmark is asked to do."""

from __future__ import annotations

import gc
import time

import torch
from torch import nn

from wraploop.wrappers.tuning import Split

from . import machine
from .crew import Member
from .muting import mute
from .training import Training, training
from .ways import Way
from .zoo import Case

MOST_DECIDING_STEPS = 25  # of `threads="auto"`
UNTIMED_STEPS = 1  # at the begin of a turn, after which caches and threads are this way's


def make(member: Member, case: Case, way: Way) -> None:
    """Makes the training, for the others to ask for."""
    mute(False)
    member.kept[_key(case, way)] = training(case, way, member.rank)


def warm_up(member: Member, case: Case, way: Way, steps: int) -> int:
    """Makes so many steps, and more while auto tries; returns after how many it did not."""
    trained = kept(member, case, way)
    _settle(member, way, 0)
    made = decided = 0
    while made < steps or (not decided and made < MOST_DECIDING_STEPS):
        trained.run(1)
        made += 1
        decided = decided or (0 if trained.is_deciding else made)
    return decided


def chosen(member: Member, case: Case, way: Way) -> list[Split]:
    """What `threads="auto"` has chosen, if it has."""
    return kept(member, case, way).chosen


def turn(member: Member, case: Case, way: Way, steps: int, number: int) -> float:
    """Makes so many steps, after those that are not timed; returns the seconds that one took."""
    trained = kept(member, case, way)
    _settle(member, way, number)
    trained.run(UNTIMED_STEPS)
    begun_s = time.perf_counter()
    trained.run(steps)
    return (time.perf_counter() - begun_s) / steps


def peak_bytes(member: Member, case: Case, way: Way, steps: int) -> tuple[float, float]:
    """The peak of resident memory in the first steps, over what was resident before.

    Returns:
        That, and how much of it is files' contents: code of libraries, which processes share.
    """
    _settle(member, way, 0)
    _step_once()
    gc.collect()
    machine.forget_peak()
    before, files_before = machine.resident_bytes(), machine.file_bytes()
    make(member, case, way)
    warm_up(member, case, way, steps)
    return machine.peak_bytes() - before, machine.file_bytes() - files_before


def kept(member: Member, case: Case, way: Way) -> Training:
    """What `make` has made."""
    return member.kept[_key(case, way)]


def _key(case: Case, way: Way) -> str:
    return f"{case.name}, {case.rows} rows, {way.name}"


def _settle(member: Member, way: Way, number: int) -> None:
    """Gives this process the threads of a way, and numbers to draw: its own if its rows are."""
    mute(way.mute)
    torch.set_num_threads(way.threads)
    torch.manual_seed(1000 * number + (member.rank if way.rows == "own" else 0))


def _step_once() -> None:
    """Has torch load what it loads at first use."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 2)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
