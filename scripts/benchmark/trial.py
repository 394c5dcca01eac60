"""All ways of one model, side by side: a round is a turn of some steps for each way.

    round 1   plain │ ddp │ local │ threads
    round 2   local │ plain │ threads │ ddp        in another order every time
    ...

Ratios are taken within a round, so that what slows the machine down for a while slows both.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

from . import machine, turns
from .crew import Crew
from .measured import Measured
from .ways import Way
from .zoo import Case

TURN_S = 0.15  # short turns and many rounds: what else the machine does hits both of a ratio
MOST_STEPS = 400  # of a turn
FIRST_STEPS = 2  # from which it follows how many make a turn
LEAST_WARM_UP_STEPS = 3  # DDP makes its buckets anew after the first
WARM_UP_STEPS = 6
WARM_UP_S = 1.5  # after which the least are enough

Say = Callable[[str], None]


def measure(case: Case, ways: Sequence[Way], rounds: int, memory: bool, say: Say) -> list[Measured]:
    """Measures the ways of one model.

    Args:
        case: the model.
        ways: in the order in which they come back.
        rounds: how many.
        memory: whether to measure peak memory too, which takes new processes for each way.
        say: told what is going on.
    """
    found = [Measured(case, way) for way in ways]
    take_rounds(found, max(way.processes for way in ways), rounds, say)
    if memory:
        for measured in found:
            say(f"{case.name}: memory of {measured.way.name}")
            measured.peak_mib, measured.code_mib = peak_mib(case, measured.way)
    return found


def take_rounds(found: Sequence[Measured], processes: int, rounds: int, say: Say) -> None:
    """Adds so many rounds to what was measured, in that many processes."""
    with Crew(processes, any(measured.way.apart for measured in found)) as crew:
        for measured in found:
            say(f"{measured.case.name}: {measured.way.name} warms up")
            _warm_up(crew, measured)
        for number in range(rounds):
            say(f"{found[0].case.name}: round {number + 1} of {rounds}")
            for measured in random.Random(number).sample(found, len(found)):
                _take_turn(crew, measured, number)


def _warm_up(crew: Crew, measured: Measured) -> None:
    case, way, count = measured.case, measured.way, measured.way.processes
    begun_s = time.perf_counter()
    crew.ask(count, turns.make, case, way)
    decided = crew.ask(count, turns.warm_up, case, way, LEAST_WARM_UP_STEPS)[0]
    if time.perf_counter() - begun_s < WARM_UP_S:  # asked here, so that no process decides alone
        crew.ask(count, turns.warm_up, case, way, WARM_UP_STEPS - LEAST_WARM_UP_STEPS)
    measured.chosen = crew.ask(count, turns.chosen, case, way)[0]
    measured.deciding_steps = decided if measured.chosen else None
    seconds = max(crew.ask(count, turns.turn, case, way, FIRST_STEPS, 0))
    measured.steps = min(max(round(TURN_S / seconds), 1), MOST_STEPS)


def _take_turn(crew: Crew, measured: Measured, number: int) -> None:
    case, way, steps = measured.case, measured.way, measured.steps
    sent_before = machine.loopback_bytes()
    seconds = max(crew.ask(way.processes, turns.turn, case, way, steps, number))
    sent = machine.loopback_bytes() - sent_before
    measured.seconds.append(seconds)
    measured.sent_bytes.append(sent / (steps + turns.UNTIMED_STEPS))


def peak_mib(case: Case, way: Way) -> tuple[float, float]:
    """The most memory that rank 0 takes in training, over what it had before, in MiB.

    Returns:
        That, and how much of it is code of libraries.
    """
    with Crew(way.processes, way.apart) as crew:
        peaks = crew.ask(way.processes, turns.peak_bytes, case, way, WARM_UP_STEPS)
    peak, code = peaks[0]
    return peak / machine.MIB, code / machine.MIB
