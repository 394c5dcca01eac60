"""Memory of one process that the others on the same machine can read.

To copy many megabytes costs as much as to add them. So what is summed over the processes of one
machine is not sent: it lies in a file without a name, which exists in memory alone, each process
has one, and the others map the parts of it that they read. It goes with the last process that has
it open, however that ends.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import threading
import weakref
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

_NAME = "wraploop"
_TOKEN = 16  # bytes at the beginning of the file, by which it is known
_MAP_FIXED = 0x10  # of Linux
_FAILED = ctypes.c_void_p(-1).value


class Arena:
    """This process's file.

    Its blocks are mapped by the system's own call: what `mmap.mmap` makes keeps a file's number for
    each, of which there are few, and gives up an address before anybody hears of it. A forked
    process may read in them what its parent writes; what it writes itself, it keeps to itself.

    Raises:
        OSError: the system does not give it one.
    """

    def __init__(self) -> None:
        self._token = os.urandom(_TOKEN)
        self._process = os.getpid()
        self._file = os.memfd_create(_NAME)
        os.pwrite(self._file, self._token, 0)
        self._end = mmap.ALLOCATIONGRANULARITY
        self._blocks: dict[int, tuple[int, int]] = {}  # by address: place in the file, and size
        self._growing = threading.Lock()

    @property
    def name(self) -> dict[str, Any]:
        """What others need in order to find it, see `Neighbour`."""
        return {"process": self._process, "file": self._file, "token": self._token.hex()}

    def block(self, size: int) -> ctypes.Array[ctypes.c_char]:
        """New memory of at least `size` bytes, which ends with the last reference to it.

        Raises:
            OSError: there is none.
        """
        whole = -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        with self._growing:
            place, self._end = self._end, self._end + whole
            os.ftruncate(self._file, self._end)
        address = self._map(None, place, whole, mmap.MAP_SHARED)
        self._blocks[address] = place, whole
        block = (ctypes.c_char * whole).from_address(address)
        weakref.finalize(block, self._free, address).atexit = False
        return block

    def place_of(self, tensor: Tensor) -> int | None:
        """Where in the file a contiguous tensor begins; None if it is somewhere else."""
        begin = tensor.data_ptr()
        for address, (place, size) in list(self._blocks.items()):
            if address <= begin and begin + tensor.nbytes <= address + size:
                return place + begin - address
        return None

    def keep_apart(self) -> None:
        """In a forked process: has what it writes to the blocks not reach its parent."""
        for address, (place, size) in self._blocks.items():
            with suppress(OSError):
                self._map(address, place, size, mmap.MAP_PRIVATE | _MAP_FIXED)

    def _map(self, at: int | None, place: int, size: int, flags: int) -> int:
        """The address where that part of the file now is."""
        access = mmap.PROT_READ | mmap.PROT_WRITE
        address = _system().mmap(at, size, access, flags, self._file, place)
        if address == _FAILED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return address

    def _free(self, address: int) -> None:
        """Gives a block's memory back to the system, unless it is a forked process's parent's."""
        _, size = self._blocks.pop(address)
        if os.getpid() == self._process:
            _system().madvise(address, size, mmap.MADV_REMOVE)
        _system().munmap(address, size)


@functools.cache
def _system() -> ctypes.CDLL:
    """The system's calls."""
    found = ctypes.CDLL(None, use_errno=True)
    address, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    found.mmap.argtypes = address, size, number, number, number, ctypes.c_long
    found.mmap.restype = address
    found.madvise.argtypes = address, size, number
    found.munmap.argtypes = address, size
    return found


class Neighbour:
    """Another process's `Arena`.

    Args:
        name: what that process says of it.

    Raises:
        OSError: it cannot be reached from here.
    """

    def __init__(self, name: dict[str, Any]) -> None:
        path = f"/proc/{name['process']}/fd/{name['file']}"
        if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
            raise OSError("another process has that number here, and it is no arena")
        self._file = os.open(path, os.O_RDWR)
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
    if _own:
        _own.keep_apart()
    _own = None


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget)
