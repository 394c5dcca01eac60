"""All ways of one model, side by side: a round is a turn of some steps for each way.

    round 1   plain │ ddp │ local │ threads
    round 2   local │ plain │ threads │ ddp        in another order every time
    ...

A turn begins with a step that is not timed, after which caches and threads are this way's. Ratios
are taken within a round, so that what slows the machine down for a while slows both.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from . import machine
from .crew import Crew, Member
from .measured import Measured
from .training import Training, training
from .ways import Way
from .zoo import Case

LEAST_WARM_UP_STEPS = 3  # DDP makes its buckets anew after the first
WARM_UP_STEPS = 6
WARM_UP_S = 3.0  # after which the least are enough
MOST_WARM_UP_STEPS = 25  # while auto still tries
TURN_S = 0.35
MOST_STEPS = 400  # of a turn
LEAST_STEPS = 2


def measure(
    case: Case, ways: Sequence[Way], rounds: int, memory: bool, say: Callable[[str], None]
) -> list[Measured]:
    """Measures the ways of one model.

    Args:
        case: the model.
        ways: in the order in which they come back.
        rounds: how many.
        memory: whether to measure peak memory too, which takes new processes for each way.
        say: told what is going on.
    """
    found = {way.name: Measured(case, way) for way in ways}
    with Crew(max(way.processes for way in ways)) as crew:
        for way in ways:
            say(f"{case.name}: {way.name} warms up")
            _warm_up(crew, found[way.name])
        for number in range(rounds):
            say(f"{case.name}: round {number + 1} of {rounds}")
            for way in random.Random(number).sample(ways, len(ways)):
                _take_turn(crew, found[way.name], number)
    if memory:
        for way in ways:
            say(f"{case.name}: memory of {way.name}")
            found[way.name].peak_mib = peak_mib(case, way)
    return list(found.values())


def _warm_up(crew: Crew, measured: Measured) -> None:
    case, way = measured.case, measured.way
    crew.ask(way.processes, make, case, way)
    measured.deciding_steps = crew.ask(way.processes, warm_up, way)[0]
    measured.lanes = crew.ask(way.processes, lanes, way)[0]
    seconds = max(crew.ask(way.processes, turn, way, 3, 0))
    measured.steps = min(max(round(TURN_S / seconds), LEAST_STEPS), MOST_STEPS)


def _take_turn(crew: Crew, measured: Measured, number: int) -> None:
    way, steps = measured.way, measured.steps
    sent_before = machine.loopback_bytes()
    measured.seconds.append(max(crew.ask(way.processes, turn, way, steps, number)))
    sent = machine.loopback_bytes() - sent_before
    measured.sent_bytes.append(sent / (steps + 1))


def peak_mib(case: Case, way: Way) -> float:
    """The most memory that rank 0 takes in training, over what it had before, in MiB."""
    with Crew(way.processes) as crew:
        return crew.ask(way.processes, memory_of, case, way)[0] / machine.MIB


# In the processes


def make(member: Member, case: Case, way: Way) -> None:
    """Makes the training, so that it can be asked for."""
    member.kept[way.name] = training(case, way, member.rank)


def warm_up(member: Member, way: Way) -> int | None:
    """Makes the first steps; returns after how many a number of threads was chosen, if one was."""
    trained: Training = member.kept[way.name]
    _settle(member, way, 0)
    begun_s = time.perf_counter()
    made = decided = 0
    while made < _enough(time.perf_counter() - begun_s, trained):
        trained.run(1)
        made += 1
        decided = decided or (0 if trained.is_deciding else made)
    return decided if trained.lanes else None


def _enough(seconds: float, trained: Training) -> int:
    """How many steps are enough to warm up, after so many seconds."""
    if trained.is_deciding:
        return MOST_WARM_UP_STEPS
    return WARM_UP_STEPS if seconds < WARM_UP_S else LEAST_WARM_UP_STEPS


def lanes(member: Member, way: Way) -> int | None:
    """How many threads `threads="auto"` has chosen, if it has."""
    trained: Training = member.kept[way.name]
    return trained.lanes


def turn(member: Member, way: Way, steps: int, number: int) -> float:
    """Makes so many steps, and one before; returns the seconds that one of them took."""
    trained: Training = member.kept[way.name]
    _settle(member, way, number)
    trained.run(1)
    begun_s = time.perf_counter()
    trained.run(steps)
    return (time.perf_counter() - begun_s) / steps


def memory_of(member: Member, case: Case, way: Way) -> float:
    """The peak of resident memory in the first steps, over what was resident before."""
    _settle(member, way, 0)
    _step_once()
    gc.collect()
    machine.forget_peak()
    before = machine.resident_bytes()
    make(member, case, way)
    warm_up(member, way)
    return machine.peak_bytes() - before


def _settle(member: Member, way: Way, number: int) -> None:
    """Gives this process the threads of a way, and numbers to draw: its own if its rows are."""
    torch.set_num_threads(way.threads)
    torch.manual_seed(1000 * number + (member.rank if way.rows == "own" else 0))


def _step_once() -> None:
    """Has torch load what it loads at first use."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 2)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
