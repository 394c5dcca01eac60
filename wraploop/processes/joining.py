"""Joining the process group that a launcher describes, also after it has restarted the processes.

torchrun keeps one store over all restarts, in which addresses of processes lie that were killed;
who reads those waits for the dead. Its count of restarts does not tell attempts apart either, as it
differs from machine to machine. So the processes that are alive agree on a name for their attempt:

    rank r   says hello, with a number drawn just now
    rank 0   answers each number that it finds with one of its own, again when a hello changes
    rank r   confirms the answer to its own number: only a rank 0 that lives can have given it
    rank 0   says that all have come, for which the others wait

Then they use the part of the store that has that name.
"""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_JOIN_WITHIN_S = 300.0  # some machines start later than others
_LOOK_EVERY_S = 0.02


def launched() -> int:
    """How many processes there are, as the environment has it; 0 if it describes no group."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in _LAUNCHED) else 0


def join(local_rank: int, timeout_s: float) -> bool:
    """Joins the group that the environment describes; returns whether it describes one."""
    world_size = launched()
    if not world_size:
        return False
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(seconds=max(timeout_s, _JOIN_WITHIN_S))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        return True
    rank = int(os.environ["RANK"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, is_master=False, timeout=timeout)
    name = agreed_name(PrefixStore("wraploop/joining", store), rank, world_size, timeout)
    dist.init_process_group(
        backend,
        store=PrefixStore(f"wraploop/{name}", store),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    return True


def agreed_name(store: Any, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name that only those processes have that are in `store` now.

    Raises:
        TimeoutError: some of them have not come in time.
    """
    own = uuid.uuid4().hex
    if rank == 0:
        _answer(store, own, set(range(1, world_size)), timeout)
        store.set(f"complete/{own}", "")
        return own
    store.set(f"hello/{rank}", own)
    _wait(store, f"answer/{own}", timeout, "rank 0")
    name = store.get(f"answer/{own}").decode()
    store.set(f"confirmed/{name}/{rank}", "")
    _wait(store, f"complete/{name}", timeout, "all the others")
    return name


def _wait(store: Any, key: str, timeout: timedelta, whom: str) -> None:
    try:
        store.wait([key], timeout)
    except dist.DistStoreError as error:
        raise _not_come(timeout, whom) from error


def _not_come(timeout: timedelta, whom: str) -> TimeoutError:
    return TimeoutError(
        f"This process has waited {timeout.total_seconds():.0f} s for {whom} to join. Every "
        "process must make the same wrapped models, and none end before it makes the first."
    )


def _answer(store: Any, name: str, missing: set[int], timeout: timedelta) -> None:
    until_s = time.monotonic() + timeout.total_seconds()
    answered: dict[int, bytes] = {}
    while missing:
        if time.monotonic() > until_s:
            raise _not_come(timeout, f"rank {', '.join(map(str, sorted(missing)))}")
        for rank in sorted(missing):
            hello = store.get(f"hello/{rank}") if store.check([f"hello/{rank}"]) else b""
            if hello and answered.get(rank) != hello:
                answered[rank] = hello
                store.set(f"answer/{hello.decode()}", name)
            elif hello and store.check([f"confirmed/{name}/{rank}"]):
                missing = missing - {rank}
        time.sleep(_LOOK_EVERY_S if missing else 0)
