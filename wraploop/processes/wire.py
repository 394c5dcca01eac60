"""The wire between processes: bytes that the calling thread itself sends and receives.

torch's collectives on the CPU hand what is sent from thread to thread, and each waits to be woken.
A training step says little and waits for the answer, several times. So here are two collectives on
sockets of their own, in which no thread but the caller's takes part. Rank r of n sends to the ranks
r - 1, r - 2, r - 4, ... and receives from r + 1, r + 2, r + 4, ...

    gather   everyone's message, of any length: in round k each rank passes on all that it has to
             the rank 2^k before it, so there are log2(n) rounds (Bruck et al., 1997)
    sum      a ring: each rank's run of the numbers collects everyone's in n - 1 steps, and in as
             many goes around, so that all ranks have the very same bits (Patarasu, Yuan, 2009)

Every message has the number of the collective that it is for. What belongs to one that this rank
has given up is dropped when it comes, so an error leaves nothing behind that another could take.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
import weakref
from collections import deque
from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

_HEAD = struct.Struct("<QQ")  # the number of the collective, the length of the message
_LENGTH = struct.Struct("<I")
_PIECE = 1 << 22  # bytes of a sum that go around at once: a cache's worth
_MOST_VIEWS = 8  # given to the system at once

Bytes = bytes | bytearray | memoryview


class Outgoing:
    """A socket that this rank sends on.

    Args:
        connection: to the rank that receives.
        rank: that rank.
    """

    def __init__(self, connection: socket.socket, rank: int) -> None:
        connection.setblocking(False)
        self.connection = connection
        self.rank = rank
        self._left: deque[memoryview] = deque()

    def put(self, number: int, parts: Sequence[Bytes]) -> None:
        """Begins to send a message."""
        views = [view for part in parts if (view := memoryview(part).cast("B")).nbytes]
        self._left.append(memoryview(_HEAD.pack(number, sum(view.nbytes for view in views))))
        self._left.extend(views)

    def push(self) -> bool:
        """Sends what can be sent at once; whether nothing is left."""
        try:
            while self._left:
                self._drop(self.connection.sendmsg([*islice(self._left, _MOST_VIEWS)]))
        except BlockingIOError:
            return False
        return True

    def keep(self) -> None:
        """Has what is left no longer belong to the caller."""
        self._left = deque(memoryview(bytes(view)) for view in self._left)

    def _drop(self, sent: int) -> None:
        while sent and sent >= self._left[0].nbytes:
            sent -= self._left.popleft().nbytes
        if sent:
            self._left[0] = self._left[0][sent:]


class Incoming:
    """A socket that this rank receives on.

    Args:
        connection: to the rank that sends.
        rank: that rank.
    """

    def __init__(self, connection: socket.socket, rank: int) -> None:
        connection.setblocking(False)
        self.connection = connection
        self.rank = rank
        self._head = bytearray(_HEAD.size)
        self._begin()

    def _begin(self) -> None:
        self._number: int | None = None  # of the message that is coming
        self._into = memoryview(self._head)
        self._message: bytearray | None = None
        self._had = 0

    def pull(self, number: int, target: memoryview | None) -> Bytes | None:
        """The next message for the collective `number`, into `target` if there is one.

        Returns:
            The message; None if it has not all come yet.
        """
        try:
            while True:
                if self._number is None:
                    if not self._fill():
                        continue
                    self._number, length = _HEAD.unpack(self._head)
                    is_awaited = self._number == number and target is not None
                    self._message = None if is_awaited else bytearray(length)
                    self._into = memoryview(target if is_awaited else self._message)
                    self._had = 0
                    if self._into.nbytes != length:
                        raise ConnectionError(f"rank {self.rank} sends another number of bytes")
                if self._number > number:
                    raise ConnectionError(f"rank {self.rank} has given this up")
                if self._fill():
                    done, found = self._number == number, self._message
                    self._begin()
                    if done:
                        return target if found is None else found
        except BlockingIOError:
            return None

    def keep(self) -> None:
        """Has what is still to come no longer go to the caller."""
        if self._number is not None and self._message is None:
            self._message = bytearray(self._into.nbytes)
            self._into = memoryview(self._message)

    def _fill(self) -> bool:
        """Receives once; whether all there is to come has come."""
        if self._had < self._into.nbytes:
            received = self.connection.recv_into(self._into[self._had :])
            if not received:
                raise ConnectionError(f"rank {self.rank} has ended")
            self._had += received
        return self._had == self._into.nbytes


class Wire:
    """This rank's sockets to others of its group.

    Args:
        rank: this rank.
        outgoing: to the ranks 1, 2, 4, ... before this one.
        incoming: from those after it.
    """

    def __init__(
        self, rank: int, world_size: int, outgoing: list[Outgoing], incoming: list[Incoming]
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self._outgoing = outgoing
        self._incoming = incoming
        self._number = 0
        _open.add(self)

    def close(self) -> None:
        """Closes the sockets."""
        for link in (*self._outgoing, *self._incoming):
            link.connection.close()

    def gather(self, parts: Sequence[Bytes], timeout_s: float) -> list[memoryview]:
        """Everyone's message, in the order of ranks.

        Args:
            parts: what this rank's message consists of.
            timeout_s: how long to wait for the others, in seconds.

        Raises:
            TimeoutError: they have not come.
            ConnectionError: one of them has ended.
        """
        self._number += 1
        until_s = time.monotonic() + timeout_s
        own = bytearray().join(parts)
        have: list[Bytes] = [own]
        for outgoing, incoming in zip(self._outgoing, self._incoming, strict=True):
            passed = have[: self.world_size - len(have)]
            lengths = b"".join(_LENGTH.pack(len(message)) for message in passed)
            outgoing.put(self._number, [lengths, *passed])
            received = self._pass(outgoing, incoming, None, until_s)
            have += _cut(received, len(passed))
        start = self.world_size - self.rank
        return [memoryview(message) for message in have[start:] + have[:start]]

    def sum(self, flat: Tensor, timeout_s: float) -> None:
        """Makes `flat` the sum of all ranks' `flat`, in place.

        Args:
            flat: one axis, contiguous, on the CPU; as long on every rank.
            timeout_s: how long to wait for the others, in seconds.
        """
        self._number += 1
        until_s = time.monotonic() + timeout_s
        size = max(1, _PIECE // flat.element_size())
        other = torch.empty(min(size, len(flat)) // self.world_size + 1, dtype=flat.dtype)
        for piece in flat.split(size):
            self._sum_piece(piece, other, until_s)

    def _sum_piece(self, piece: Tensor, other: Tensor, until_s: float) -> None:
        n, r = self.world_size, self.rank
        runs = piece.tensor_split(n)
        for step in range(1, n):
            into = runs[(r + 1 + step) % n]
            received = other[: len(into)]
            self._ring(runs[(r + step) % n], received, until_s)
            into += received
        for step in range(n - 1):
            self._ring(runs[(r + step) % n], runs[(r + 1 + step) % n], until_s)

    def _ring(self, own: Tensor, into: Tensor, until_s: float) -> None:
        self._outgoing[0].put(self._number, [_bytes_of(own)])
        self._pass(self._outgoing[0], self._incoming[0], _bytes_of(into), until_s)

    def _pass(
        self, outgoing: Outgoing, incoming: Incoming, target: memoryview | None, until_s: float
    ) -> Bytes:
        """Sends what is there to be sent, and receives a message at the same time."""
        sent, received = False, None
        try:
            while True:
                sent = sent or outgoing.push()
                received = incoming.pull(self._number, target) if received is None else received
                if sent and received is not None:
                    return received
                _wait(outgoing, incoming, not sent, received is None, until_s)
        finally:
            if not sent or received is None:
                outgoing.keep()
                incoming.keep()


def _wait(
    outgoing: Outgoing, incoming: Incoming, to_send: bool, to_receive: bool, until_s: float
) -> None:
    """Waits until there is something to be done."""
    poll = select.poll()
    if to_send:
        poll.register(outgoing.connection, select.POLLOUT)
    if to_receive:
        poll.register(incoming.connection, select.POLLIN)
    left_s = until_s - time.monotonic()
    if left_s <= 0 or not poll.poll(left_s * 1000):
        raise TimeoutError(f"rank {(incoming if to_receive else outgoing).rank} does not come")


def _cut(received: Bytes, count: int) -> list[Bytes]:
    """The messages in `received`, which begins with their lengths."""
    view = memoryview(received)
    at = count * _LENGTH.size
    found = []
    for (length,) in _LENGTH.iter_unpack(view[:at]):
        found.append(view[at : at + length])
        at += length
    return found


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.view(torch.uint8).numpy())


_open: weakref.WeakSet[Wire] = weakref.WeakSet()


def _close_in_child() -> None:
    """A forked process's copies would keep connections open when this process has ended."""
    for wire in list(_open):
        wire.close()


os.register_at_fork(after_in_child=_close_in_child)
