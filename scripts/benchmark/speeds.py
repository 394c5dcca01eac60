"""How fast each kind of collective is here: latency and bandwidth, between 2 processes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from wraploop.processes.collectives import Collectives
from wraploop.processes.connecting import connect

from .collectives import Collective, Speed, messages, sent_bytes
from .crew import TIMEOUT_S, Crew, Member

KINDS = ("gather", "sum", "all_reduce", "broadcast")
SIZES = tuple(4**i for i in range(3, 13))  # bytes
REPEATS = 30
TURNS = 3

Run = Callable[[], object]


def measured_speeds() -> dict[str, Speed]:
    """Latency and bandwidth of each kind, between 2 processes."""
    with Crew(2, apart=True) as crew:
        turns = [{kind: crew.ask(2, time_sizes, kind)[0] for kind in KINDS} for _ in range(TURNS)]
    return {kind: _fitted(kind, [turn[kind] for turn in turns]) for kind in KINDS}


def _fitted(kind: str, turns: Sequence[Sequence[float]]) -> Speed:
    times_s = [statistics.median(times) for times in zip(*turns, strict=True)]
    each = [Collective(kind, size) for size in SIZES]
    counts, sent = [messages(c, 2) for c in each], [sent_bytes(c, 2) for c in each]
    latency_s, byte_s = plane(counts, sent, times_s)
    return Speed(latency_s, 1 / byte_s)


def line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Intercept and slope of the line with the least relative squared errors."""
    return plane([1.0] * len(xs), xs, ys)


def plane(us: Sequence[float], vs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """The a and b for which `a u + b v` has the least squared errors relative to `y`."""
    design = torch.tensor([[u / y, v / y] for u, v, y in zip(us, vs, ys, strict=True)]).double()
    found = torch.linalg.lstsq(design, torch.ones(len(ys), 1).double()).solution
    a, b = found.flatten().tolist()
    return a, b


# In the processes


def time_sizes(member: Member, kind: str) -> list[float]:
    """The median seconds that a collective takes, for each size."""
    return [_time(*each) for each in (_wired if kind in ("gather", "sum") else _gloo)(kind)]


def _wired(kind: str) -> list[tuple[Run, int]]:
    """What runs a wire's collective, for each size, and how often at a time."""
    wire = connect(Collectives(None), TIMEOUT_S)
    if wire is None:
        raise ConnectionError("The processes cannot reach each other by sockets of their own.")
    tensors = [torch.zeros(size // 4) for size in SIZES]
    if kind == "sum":
        return [(partial(wire.sum, t, TIMEOUT_S), 1) for t in tensors]
    return [(partial(wire.gather, [bytes(size)], TIMEOUT_S), 1) for size in SIZES]


def _gloo(kind: str) -> list[tuple[Run, int]]:
    """The same of gloo's: a broadcast to and fro, as its source does not wait."""
    tensors = [torch.zeros(size // 4) for size in SIZES]
    if kind == "all_reduce":
        return [(partial(dist.all_reduce, t), 1) for t in tensors]
    return [(partial(_to_and_fro, t), 2) for t in tensors]


def _to_and_fro(tensor: Tensor) -> None:
    dist.broadcast(tensor, 0)
    dist.broadcast(tensor, 1)


def _time(run: Run, times: int) -> float:
    run()
    taken: list[float] = []
    for _ in range(REPEATS):
        begun_s = time.perf_counter()
        run()
        taken.append((time.perf_counter() - begun_s) / times)
    return statistics.median(taken)
