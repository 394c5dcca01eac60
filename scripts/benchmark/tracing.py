"""What a step says to the other processes.

`DistributedModel` speaks on a `Wire`, whose calls are noted; DDP by gloo, which torch's profiler
sees. How `DistributedModel` sends small gradients depends on the number of ranks, so a step is
traced as if there were as many.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from wraploop.processes.links import Bytes
from wraploop.processes.wire import Wire
from wraploop.wrappers import rank

from . import turns
from .collectives import Collective
from .crew import Crew, Member
from .trial import WARM_UP_STEPS
from .ways import Way
from .zoo import Case

_BYTES = {"float": 4, "double": 8, "long int": 8, "int": 4, "unsigned char": 1, "bool": 1}
_PREFIX = "gloo:"

Trace = Callable[[int], list[Collective]]


def traced(case: Case, way: Way, ranks: Sequence[int]) -> dict[int, list[Collective]]:
    """The collectives of one step in a way's processes, as if they were so many ranks."""
    with Crew(way.processes, way.apart) as crew:

        @functools.cache
        def at(count: int) -> list[Collective]:
            return crew.ask(way.processes, trace, case, way, count)[0]

        return _between(ranks, at)


def _between(ranks: Sequence[int], at: Trace) -> dict[int, list[Collective]]:
    """What `at` finds, asked only until both ends are alike: what has grown large stays so."""
    if at(ranks[0]) == at(ranks[-1]):
        return dict.fromkeys(ranks, at(ranks[0]))
    middle = len(ranks) // 2
    return {**_between(ranks[:middle], at), **_between(ranks[middle:], at)}


# In the processes


def trace(member: Member, case: Case, way: Way, ranks: int) -> list[Collective]:
    """The collectives of a step after those in which a way still finds its form."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with as_if(ranks, way.processes):
        turns.make(member, case, way)
        turns.warm_up(member, case, way, WARM_UP_STEPS)
        with noted() as said, _silent():
            with torch.profiler.profile(activities=cpu, record_shapes=True) as profile:
                turns.kept(member, case, way).run(1)
    return [*said, *_seen(profile)]


@contextmanager
def as_if(ranks: int, processes: int) -> Iterator[None]:
    """A block in which gradients are as small, or large, as they are among so many ranks."""
    before = rank._SMALL
    rank._SMALL = before * (processes - 1) // (ranks - 1)
    try:
        yield
    finally:
        rank._SMALL = before


@contextmanager
def noted() -> Iterator[list[Collective]]:
    """A block in which what is said on a `Wire` is noted; messages by the longest rank's."""
    found: list[Collective] = []
    gather, total = Wire.gather, Wire.sum

    def noted_gather(self: Wire, parts: Sequence[Bytes], timeout_s: float) -> list[memoryview]:
        everyone = gather(self, parts, timeout_s)
        found.append(Collective("gather", max(map(len, everyone))))
        return everyone

    def noted_sum(self: Wire, flat: Tensor, timeout_s: float, model: int = 0) -> None:
        total(self, flat, timeout_s, model)
        found.append(Collective("sum", flat.nbytes))

    Wire.gather, Wire.sum = noted_gather, noted_sum
    try:
        yield found
    finally:
        Wire.gather, Wire.sum = gather, total


def _seen(profile: torch.profiler.profile) -> list[Collective]:
    """Gloo's collectives."""
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
