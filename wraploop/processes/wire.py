"""The wire between processes: bytes that the calling thread itself sends and receives.

torch's collectives on the CPU hand what is sent from thread to thread, and each waits to be woken.
A training step says little and waits for the answer, several times. So here are two collectives on
sockets of their own, in which no thread but the caller's takes part. Rank r of n sends to the ranks
r - 1, r - 2, r - 4, ... and receives from r + 1, r + 2, r + 4, ...

    gather   everyone's message, of any length: in round k each rank passes on all that it has to
             the rank 2^k before it, so there are log2(n) rounds (Bruck et al., 1997)
    sum      a ring: each rank's run of the numbers collects everyone's in n - 1 steps, and in as
             many goes around, so that all ranks have the very same bits (Patarasu, Yuan, 2009)

On one machine numbers that lie in arenas, see `arena.py`, are read where they are: each rank adds
up its run of them, then copies the others' runs; it says when it is through with either.

Every message says which collective it is for, by number and kind. What belongs to one that this
rank has given up is dropped when it comes, so an error leaves nothing behind that another could
take. A rank that gives up, for whatever reason, tells those that wait for it; so none waits long
because another has ended that it does not hear from itself.
"""

from __future__ import annotations

import os
import select
import struct
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from .arena import Arena, Neighbour
from .links import GATHER, GIVEN_UP, SUM, SUMS, Bytes, Incoming, Outgoing
from .packing import view_of

_LENGTH = struct.Struct("<Q")
_PIECE = 1 << 22  # bytes of a sum that go around at once: a cache's worth
_PIECE_IN_PLACE = 1 << 20
_PLACE = struct.Struct("<qQ")  # where a tensor lies in an arena, and how many bytes
_MOST_TEXT = 1024
_LOOK_AGAIN_S = 3600.0  # a wait that the system takes


class Wire:
    """This rank's sockets to others of its group. Its threads take turns.

    Args:
        rank: this rank.
        outgoing: to the ranks 1, 2, 4, ... before this one.
        incoming: from those after it.

    Attributes:
        arena: this process's, if every rank can read every other's; else None.
        neighbours: then the others', by rank.
    """

    arena: Arena | None = None

    def __init__(
        self, rank: int, world_size: int, outgoing: list[Outgoing], incoming: list[Incoming]
    ) -> None:
        self.neighbours: dict[int, Neighbour] = {}
        self.rank = rank
        self.world_size = world_size
        self._outgoing = outgoing
        self._incoming = incoming
        self._number = 0
        self._turn = threading.Lock()
        self._is_closed = False
        self._is_moving = False  # bytes, not all of which have been counted
        self._given_up: list[Tensor] = []  # which others may still read
        _open.add(self)

    def close(self) -> None:
        """Closes the sockets."""
        self._is_closed = True
        for link in (*self._outgoing, *self._incoming):
            link.connection.close()

    __del__ = close

    def gather(self, parts: Sequence[Bytes], timeout_s: float) -> list[memoryview]:
        """Everyone's message, in the order of ranks.

        Args:
            parts: what this rank's message consists of.
            timeout_s: how long to wait for the others, in seconds.

        Raises:
            TimeoutError: they have not come.
            ConnectionError: one of them has ended, has given this up or does something else.
        """
        with self._collective(timeout_s) as until_s:
            return self._gather(GATHER, parts, until_s)

    def _gather(self, kind: int, parts: Sequence[Bytes], until_s: float) -> list[memoryview]:
        have: list[Bytes] = [bytearray().join(parts)]
        for outgoing, incoming in zip(self._outgoing, self._incoming, strict=True):
            passed = have[: self.world_size - len(have)]
            lengths = b"".join(_LENGTH.pack(len(message)) for message in passed)
            outgoing.put(kind, self._number, [lengths, *passed])
            received = self._pass(outgoing, incoming, kind, None, until_s)
            have += _cut(received, len(passed))
        self._given_up.clear()  # all have come to this one, so none reads for another
        start = self.world_size - self.rank
        return [memoryview(message) for message in have[start:] + have[:start]]

    def sum(self, flat: Tensor, timeout_s: float, model: int = 0) -> None:
        """Makes `flat` the sum of all ranks' `flat`, in place.

        Args:
            flat: one axis, contiguous, on the CPU; as long on every rank.
            timeout_s: how long to wait for the others, in seconds.
            model: whose numbers they are; the same on every rank.

        Raises:
            TimeoutError: they have not come; then `flat` is neither.
            ConnectionError: as `gather`.
        """
        kind = SUM + model % SUMS
        with self._collective(timeout_s) as until_s:
            try:
                if places := self._places(kind, flat, until_s):
                    self._sum_in_place(kind, flat, places, until_s)
                    return
            except BaseException:
                self._given_up.append(flat)
                raise
            size = max(1, _PIECE // flat.element_size())
            other = flat.new_empty(min(size, len(flat)) // self.world_size + 1)
            for piece in flat.split(size):
                self._sum_piece(kind, piece, other, until_s)

    def _places(self, kind: int, flat: Tensor, until_s: float) -> list[int] | None:
        """Where in its arena each rank's `flat` begins; None if one does not lie in its."""
        if self.arena is None:
            return None
        place = self.arena.place_of(flat)
        own = _PLACE.pack(-1 if place is None else place, flat.nbytes)
        said = [_PLACE.unpack(each) for each in self._gather(kind, [own], until_s)]
        for rank, (_, size) in enumerate(said):
            if size != flat.nbytes:
                raise ConnectionError(f"rank {rank} sums another number of bytes")
        places = [place for place, _ in said]
        return None if min(places) < 0 else places

    def _sum_in_place(self, kind: int, flat: Tensor, places: list[int], until_s: float) -> None:
        runs = flat.tensor_split(self.world_size)

        def theirs(piece: Tensor, rank: int) -> Tensor:
            at = places[rank] + piece.data_ptr() - flat.data_ptr()
            return self.neighbours[rank].part(at, piece)

        for piece in _pieces(runs[self.rank]):
            for rank in self.neighbours:
                piece += theirs(piece, rank)
        self._gather(kind, [], until_s)
        for rank in self.neighbours:
            for piece in _pieces(runs[rank]):
                piece.copy_(theirs(piece, rank))
        self._gather(kind, [], until_s)  # from here on each may write to its own

    def _sum_piece(self, kind: int, piece: Tensor, other: Tensor, until_s: float) -> None:
        n, r = self.world_size, self.rank
        runs = piece.tensor_split(n)
        for step in range(1, n):
            into = runs[(r + 1 + step) % n]
            received = other[: len(into)]
            self._ring(kind, runs[(r + step) % n], received, until_s)
            into += received
        for step in range(n - 1):
            self._ring(kind, runs[(r + step) % n], runs[(r + 1 + step) % n], until_s)

    def _ring(self, kind: int, own: Tensor, into: Tensor, until_s: float) -> None:
        target = view_of(into.view(torch.uint8))
        self._outgoing[0].put(kind, self._number, [view_of(own.view(torch.uint8))])
        self._pass(self._outgoing[0], self._incoming[0], kind, target, until_s)

    def _pass(
        self,
        outgoing: Outgoing,
        incoming: Incoming,
        kind: int,
        target: memoryview | None,
        until_s: float,
    ) -> Bytes:
        """Sends what is there to be sent, and receives a message at the same time."""
        self._is_moving = True
        sent = outgoing.push()
        received = incoming.pull(kind, self._number, target) if incoming.has_begun else None
        self._is_moving = False
        while not sent or received is None:
            _wait(None if sent else outgoing, incoming if received is None else None, until_s)
            self._is_moving = True
            sent = sent or outgoing.push()
            if received is None:
                received = incoming.pull(kind, self._number, target)
            self._is_moving = False
        return received

    @contextmanager
    def _collective(self, timeout_s: float) -> Iterator[float]:
        """One collective, which ends or is given up; with the time by which it must end."""
        until_s = time.monotonic() + timeout_s
        if not self._turn.acquire(timeout=min(timeout_s, threading.TIMEOUT_MAX)):
            raise TimeoutError("another thread of this process still waits for the others")
        try:
            if self._is_closed:
                raise ConnectionError("this process's connections have been closed")
            self._number += 1
            yield until_s
        except BaseException as error:
            self._give_up(error)
            raise
        finally:
            self._turn.release()

    def _give_up(self, error: BaseException) -> None:
        """Leaves nothing of this collective to the next, and tells those that wait."""
        if self._is_moving and not isinstance(error, ConnectionError):
            self.close()  # interrupted, so how much of a message has crossed is not known
        if self._is_closed:
            return
        self._is_moving = False
        name = "" if isinstance(error, OSError) else f"{type(error).__name__} "
        text = f"{name}{error}".encode(errors="replace")[:_MOST_TEXT]
        for incoming in self._incoming:
            incoming.keep()
        for outgoing in self._outgoing:
            outgoing.keep()
            outgoing.put(GIVEN_UP, self._number, [text])
            outgoing.push()


def _pieces(run: Tensor) -> Sequence[Tensor]:
    return run.split(max(1, _PIECE_IN_PLACE // run.element_size())) if len(run) else ()


def _wait(to_send: Outgoing | None, to_receive: Incoming | None, until_s: float) -> None:
    """Waits until there is something to be done, or to be looked at again."""
    link = to_receive or to_send
    assert link is not None
    ready = link.ready
    if to_send and to_receive:
        ready = select.poll()
        ready.register(to_send.connection, select.POLLOUT)
        ready.register(to_receive.connection, select.POLLIN)
    left_s = until_s - time.monotonic()
    if not ready.poll(min(max(0.0, left_s), _LOOK_AGAIN_S) * 1000) and left_s <= 0:
        raise TimeoutError(f"rank {link.rank} does not come")


def _cut(received: Bytes, count: int) -> list[Bytes]:
    """The messages in `received`, which begins with their lengths."""
    view = memoryview(received)
    at = count * _LENGTH.size
    found = []
    for (length,) in _LENGTH.iter_unpack(view[:at]):
        found.append(view[at : at + length])
        at += length
    return found


_open: weakref.WeakSet[Wire] = weakref.WeakSet()


def _close_in_child() -> None:
    """A forked process's copies would keep connections open when this process has ended."""
    for wire in list(_open):
        wire._turn = threading.Lock()  # another thread's turn does not end here
        wire.close()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_close_in_child)
