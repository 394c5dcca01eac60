"""What processes say to each other in a step, and how long each kind of it takes here."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from . import turns
from .crew import Crew, Member
from .links import Link
from .trial import WARM_UP_STEPS
from .ways import Way
from .zoo import Case

KINDS = ("all_reduce", "all_gather", "broadcast")
SIZES = tuple(4**i for i in range(3, 13))  # bytes
REPEATS = 30
_BYTES = {"float": 4, "double": 8, "long int": 8, "int": 4, "unsigned char": 1, "bool": 1}
_PREFIX = "gloo:"


@dataclass(frozen=True)
class Collective:
    """One collective.

    Args:
        kind: of `KINDS`, or another, which counts as a message without content.
        payload_bytes: that each rank brings.
    """

    kind: str
    payload_bytes: int


@dataclass(frozen=True)
class Speed:
    """Of one kind of collective: what a message costs, and what a byte of it adds."""

    latency_s: float
    bytes_per_s: float

    def over(self, link: Link) -> Speed:
        """The same, limited by a link; where it goes by the processor, by that too."""
        slowest = min(self.bytes_per_s, link.bytes_per_s)
        return Speed(self.latency_s, slowest if link.by_processor else link.bytes_per_s)


def messages(kind: str, ranks: int) -> int:
    """How many messages, one after the other, a rank sends in a collective."""
    if ranks == 1:
        return 0
    if kind == "all_reduce":
        return 2 * (ranks - 1)
    return ranks - 1 if kind == "all_gather" else math.ceil(math.log2(ranks))


def sent_bytes(collective: Collective, ranks: int) -> float:
    """How many bytes cross each link, one after the other."""
    count = messages(collective.kind, ranks)
    share = ranks if collective.kind == "all_reduce" else 1
    return count * collective.payload_bytes / share


def seconds(collective: Collective, ranks: int, speeds: dict[str, Speed], link: Link) -> float:
    """How long it takes."""
    speed = speeds.get(collective.kind, speeds["broadcast"]).over(link)
    latency_s = messages(collective.kind, ranks) * speed.latency_s
    return latency_s + sent_bytes(collective, ranks) / speed.bytes_per_s


# Measured


def measured_speeds() -> dict[str, Speed]:
    """Latency and bandwidth of each kind, between 2 processes over gloo."""
    with Crew(2) as crew:
        return {kind: _fitted(kind, crew.ask(2, time_sizes, kind)[0]) for kind in KINDS}


def _fitted(kind: str, times_s: list[float]) -> Speed:
    alone = [Collective(kind, size) for size in SIZES]
    xs = [sent_bytes(each, 2) for each in alone]
    intercept, slope = line(xs, times_s)
    return Speed(intercept / messages(kind, 2), 1 / slope)


def line(xs: list[float], ys: list[float]) -> tuple[float, float]:
    """Intercept and slope of the line with the least relative squared errors."""
    design = torch.tensor([[1 / y, x / y] for x, y in zip(xs, ys, strict=True)]).double()
    found = torch.linalg.lstsq(design, torch.ones(len(ys), 1).double()).solution
    intercept, slope = found.flatten().tolist()
    return intercept, slope


def traced(case: Case, way: Way) -> list[Collective]:
    """The collectives of one step in a way's processes, as torch's profiler sees them."""
    with Crew(way.processes) as crew:
        crew.ask(way.processes, turns.make, case, way)
        crew.ask(way.processes, turns.warm_up, case, way, WARM_UP_STEPS)
        return crew.ask(way.processes, trace, case, way)[0]


# In the processes


def time_sizes(member: Member, kind: str) -> list[float]:
    """The median seconds that a collective takes, for each size."""
    return [_time(*_collective(kind, size)) for size in SIZES]


def _collective(kind: str, size: int) -> tuple[Callable[[], object], int]:
    """What runs it, and how often at a time: a broadcast to and fro: its source does not wait."""
    tensor = torch.zeros(size // 4)
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    made: dict[str, tuple[Callable[[], object], int]] = {
        "all_reduce": (lambda: dist.all_reduce(tensor), 1),
        "all_gather": (lambda: dist.all_gather(parts, tensor), 1),
        "broadcast": (lambda: (dist.broadcast(tensor, 0), dist.broadcast(tensor, 1)), 2),
    }
    return made[kind]


def _time(run: Callable[[], object], times: int) -> float:
    run()
    taken: list[float] = []
    for _ in range(REPEATS):
        begun_s = time.perf_counter()
        run()
        taken.append((time.perf_counter() - begun_s) / times)
    return statistics.median(taken)


def trace(member: Member, case: Case, way: Way) -> list[Collective]:
    """The collectives of the next step."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with _silent(), torch.profiler.profile(activities=cpu, record_shapes=True) as profile:
        turns.kept(member, case, way).run(1)
    assert profile.profiler is not None
    results = profile.profiler.kineto_results
    assert results is not None
    events = [event for event in results.events() if event.name().startswith(_PREFIX)]
    return [Collective(event.name().removeprefix(_PREFIX), _payload(event)) for event in events]


@contextmanager
def _silent() -> Iterator[None]:
    """A block in which nothing gets to stderr, to which the profiler's library talks."""
    before = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def _payload(event: object) -> int:
    shapes, dtypes = event.shapes(), event.dtypes()  # pyright: ignore[reportAttributeAccessIssue]
    pairs = zip(shapes, dtypes, strict=True)
    return sum(math.prod(shape) * _BYTES.get(dtype, 4) for shape, dtype in pairs)
