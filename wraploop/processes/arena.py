"""Memory of one process that the others on the same machine can read.

To copy many megabytes costs as much as to add them. So what is summed over the processes of one
machine is not sent: it lies in a file without a name, which exists in memory alone, each process
has one, and the others map the parts of it that they read. It goes with the last process that has
it open, however that ends.
"""

from __future__ import annotations

import mmap
import os
import secrets
import threading
import weakref
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

_TOKEN = 16  # bytes at the beginning of the file, by which it is known


class Arena:
    """This process's file.

    Raises:
        OSError: the system does not give it one.
    """

    def __init__(self) -> None:
        self._token = secrets.token_bytes(_TOKEN)
        self._process = os.getpid()
        self._file = os.memfd_create("wraploop")
        os.pwrite(self._file, self._token, 0)
        self._end = mmap.ALLOCATIONGRANULARITY
        self._blocks: dict[int, tuple[int, int]] = {}  # by address: place in the file, and size
        self._growing = threading.Lock()

    @property
    def name(self) -> dict[str, Any]:
        """What others need in order to find it, see `Neighbour`."""
        return {"process": self._process, "file": self._file, "token": self._token.hex()}

    def block(self, size: int) -> mmap.mmap:
        """New memory of at least `size` bytes, which ends with the last reference to it.

        Raises:
            OSError: there is none.
        """
        whole = -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        with self._growing:
            place, self._end = self._end, self._end + whole
            os.ftruncate(self._file, self._end)
        block = mmap.mmap(self._file, whole, offset=place)
        address = torch.frombuffer(block, dtype=torch.uint8).data_ptr()
        self._blocks[address] = place, whole
        weakref.finalize(block, self._free, address).atexit = False
        return block

    def place_of(self, tensor: Tensor) -> int | None:
        """Where in the file a contiguous tensor begins; None if it is somewhere else."""
        begin = tensor.data_ptr()
        for address, (place, size) in list(self._blocks.items()):
            if address <= begin and begin + tensor.nbytes <= address + size:
                return place + begin - address
        return None

    def _free(self, address: int) -> None:
        """Gives a block's memory back to the system, unless it is a forked process's parent's."""
        place, size = self._blocks.pop(address)
        if os.getpid() == self._process:
            with suppress(OSError), mmap.mmap(self._file, size, offset=place) as block:
                block.madvise(mmap.MADV_REMOVE)


class Neighbour:
    """Another process's `Arena`.

    Args:
        name: what that process says of it.

    Raises:
        OSError: it cannot be reached from here.
    """

    def __init__(self, name: dict[str, Any]) -> None:
        self._file = os.open(f"/proc/{name['process']}/fd/{name['file']}", os.O_RDWR)
        weakref.finalize(self, os.close, self._file)
        if os.pread(self._file, _TOKEN, 0).hex() != name["token"]:
            raise OSError("another process has that number here")

    def part(self, place: int, like: Tensor) -> Tensor:
        """What lies there, of the length and dtype of `like`. It is to be read, and let go."""
        before = place % mmap.ALLOCATIONGRANULARITY
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        view = mmap.mmap(self._file, before + like.nbytes, flags, offset=place - before)
        return torch.frombuffer(view, dtype=like.dtype, count=like.numel(), offset=before)


_own: Arena | None = None


def own_arena() -> Arena | None:
    """This process's; None where there can be none."""
    global _own
    if _own is None and hasattr(os, "memfd_create"):
        with suppress(OSError):
            _own = Arena()
    return _own


def _forget() -> None:
    """A forked process begins one of its own."""
    global _own
    _own = None


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget)
