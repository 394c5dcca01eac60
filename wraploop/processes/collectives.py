"""torch's own collectives, for what is not said on the wire: see `wire.py`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .packing import view_of

_unfinished: list[Any] = []  # what was no longer waited for


class Collectives:
    """Those of a process group, with a time limit.

    Args:
        group: the process group; None is the default one.

    Raises:
        ConnectionError: every method, when the others have ended or do not come.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)

    def gather(self, parts: Sequence[bytes | memoryview], timeout_s: float) -> list[memoryview]:
        """Everyone's message, in the order of ranks; as `Wire.gather`."""
        own = torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)
        lengths = self._gather(torch.tensor([len(own)], device="cpu"), timeout_s)
        longest = max(int(length) for length in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8, device="cpu")
        padded[: len(own)] = own
        messages = self._gather(padded, timeout_s)
        return [
            view_of(message[: int(length)])
            for message, length in zip(messages, lengths, strict=True)
        ]

    def sum(self, flat: Tensor, timeout_s: float, _: int = 0) -> None:
        """Makes `flat` the sum of all ranks' `flat`, in place."""
        self._wait(dist.all_reduce(flat, group=self.group, async_op=True), timeout_s)

    def broadcast(self, tensor: Tensor, timeout_s: float) -> None:
        """Overwrites `tensor` with rank 0's."""
        if tensor.is_complex():  # which gloo does not broadcast before torch 2.7
            tensor = torch.view_as_real(tensor.conj() if tensor.is_conj() else tensor)
        source = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        work = dist.broadcast(tensor, source, group=self.group, async_op=True)
        self._wait(work, timeout_s)

    def _gather(self, own: Tensor, timeout_s: float) -> list[Tensor]:
        everyone = [torch.empty_like(own) for _ in range(self.world_size)]
        self._wait(dist.all_gather(everyone, own, group=self.group, async_op=True), timeout_s)
        return everyone

    def _wait(self, work: Any, timeout_s: float) -> None:
        try:
            work.wait(timedelta(seconds=timeout_s))
        except RuntimeError as error:
            _unfinished.append(work)
            raise ConnectionError(str(error)) from error


def is_waited_for() -> bool:
    """Whether the group still waits for a collective that this process has given up."""
    return not all(work.is_completed() for work in _unfinished)
