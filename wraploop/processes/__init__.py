"""This process among the others: rank, world size, and agreeing across processes.

Everything here works without a process group too: one process is rank 0 of 1. What processes say
to each other goes through a `channel`, on which none can take what was meant for something else.
"""

from __future__ import annotations

import atexit
import builtins
import os
import pickle
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import failure, random_state
from .channel import Channel, PeerError
from .failure import failed_elsewhere
from .joining import join, launched

__all__ = ["Channel", "PeerError", "failed_elsewhere", "launched", "random_state"]

_AVAILABLE = dist.is_available()
_LONG_S = 1800.0

_timeout_s: float | None = None  # of the group that `start` has joined


def is_started() -> bool:
    """Whether this process belongs to a process group."""
    return _AVAILABLE and dist.is_initialized()


def rank() -> int:
    """This process's number, from 0; as torchrun says while no process group is started."""
    return dist.get_rank() if is_started() else int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """This process's number on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    """How many processes have joined the process group; 1 without one."""
    return dist.get_world_size() if is_started() else 1


def is_main_process() -> bool:
    """Whether this is the process that prints and saves."""
    return rank() == 0


def start(timeout_s: float = 300.0) -> None:
    """Joins the process group that torchrun's environment describes, unless that has been done.

    Run with plain `python` there is no such environment, and one process stays alone.
    The backend is nccl where there are CUDA devices, else gloo. From then on an exception that ends
    one process ends all of them, see `failure`; the group is left when Python ends.

    Args:
        timeout_s: how long a collective waits for the other processes, in seconds. What is here
            waits as long too, `on_main` half an hour at least; in a group that was started
            otherwise, half an hour.
    """
    global _timeout_s
    if not is_started() and join(local_rank(), timeout_s):
        _timeout_s = timeout_s
        atexit.register(stop)
    if is_started():
        failure.install()


def device() -> torch.device | None:
    """The device that is this process's own; None if it has only the CPU."""
    if not torch.cuda.is_available():
        return None
    return torch.device("cuda", local_rank() % torch.cuda.device_count())


def stop() -> None:
    """Leaves the process group, if there is one."""
    global _timeout_s
    _timeout_s = None
    if is_started():
        dist.destroy_process_group()


def any(flag: bool | Tensor, what: str = "") -> bool:
    """Whether `flag` is true on at least one process; the same answer on all of them.

    Args:
        flag: this process's.
        what: what it is about, the same on all: another's is an error on every process.
    """
    if not is_started():
        return bool(flag)
    return sum(float(bool(flag)), what) > 0


def sum(value: float | Tensor, what: str = "") -> float:
    """The sum of `value` over all processes; the same answer on all of them. `what`: see `any`."""
    number = float(value)
    if world_size() == 1:
        return number
    said = Channel(None, _timeout_s).exchange(_doing("add numbers up", what), _packed(number))
    return builtins.sum(_unpacked(packed) for packed in said)


def mean(value: float | Tensor, weight: float = 1.0, what: str = "") -> float:
    """The mean of `value` over all processes, each weighted by `weight`. `what`: see `any`."""
    return sum(float(value) * weight, what) / sum(weight, what)


def gather(value: Any, what: str = "") -> list[Any]:
    """Every process's `value` (anything that pickles), in the order of ranks, on all of them.

    `what`: see `any`.
    """
    if world_size() == 1:
        return [value]
    said = Channel(None, _timeout_s).exchange(_doing("gather values", what), _packed(value))
    return [*map(_unpacked, said)]


def on_main(function: Callable[[], Any]) -> Any:
    """What the function returns on rank 0, which alone calls it, on every process.

    Raises:
        PeerError: it has raised an error, which on rank 0 is that error itself.
    """
    result = error = None
    if rank() == 0 or world_size() == 1:
        try:
            result = function()
        except Exception as raised:
            error = raised
    said = result, error and f"{type(error).__name__}: {error}"
    result, message = _broadcast(said, max(_timeout_s or 0.0, _LONG_S))
    if error:
        raise error
    if message:
        raise PeerError(f"Rank 0 failed, so rank {rank()} cannot go on: {message}")
    return result


def broadcast(value: Any) -> Any:
    """Rank 0's `value` (anything that pickles), on every process."""
    return _broadcast(value, _timeout_s)


def _broadcast(value: Any, timeout_s: float | None) -> Any:
    if world_size() == 1:
        return value
    return _first_ones(value, Channel(None, timeout_s))


def _first_ones(value: Any, channel: Channel) -> Any:
    own = _packed(value if channel.rank == 0 else None)
    return _unpacked(channel.exchange("take over what rank 0 has", own)[0])


def _packed(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _unpacked(packed: Tensor) -> Any:
    return pickle.loads(packed.numpy().tobytes())


def _doing(doing: str, what: str) -> str:
    return f"{doing} ({what})" if what else doing


def have_same(value: Any) -> bool:
    """Whether `value` (anything that pickles) is equal on all processes; the same answer on all."""
    return not any(broadcast(value) != value)


def draw_alike() -> bool:
    """Whether all processes would draw the same random numbers; the same answer on all."""
    own = random_state.get()
    return not any(not random_state.same(broadcast(own), own))


def align_random_state(channel: Channel | None = None) -> None:
    """Gives every process rank 0's random state: torch's, Python's, and NumPy's if it is loaded.

    Args:
        channel: the way to the processes that are meant; None is all of them.
    """
    if world_size() == 1:
        return
    torchs, *others = random_state.get()  # as an array: a tensor's pickle loads much of torch
    said = _first_ones((torchs.numpy(), *others), channel or Channel(None, _timeout_s))
    random_state.put((torch.from_numpy(said[0]), *said[1:]))


def part_random_states(channel: Channel | None = None) -> None:
    """Gives every process a random state of its own, which follows from rank 0's; that stays.

    Args:
        channel: as in `align_random_state`.
    """
    align_random_state(channel)
    if world_size() > 1 and rank() > 0:
        random_state.seed(random_state.seed_from(random_state.get(), rank()))
