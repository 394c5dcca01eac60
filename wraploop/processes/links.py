"""Messages on one socket, of which each says what collective it is for.

What belongs to one that this rank has given up is dropped when it comes. A link never waits: what
is sent goes as far as the system takes it, what comes is put together until it is whole.
"""

from __future__ import annotations

import select
import socket
import struct
from collections import deque
from collections.abc import Sequence
from itertools import islice

GATHER, GIVEN_UP, SUM = range(3)  # kinds of messages
SUMS = 128  # kinds of them, from `SUM` on: each for a model's
_HEAD = struct.Struct("<BQQ")  # the kind and the number of the collective, the message's length
_MOST_VIEWS = 8  # given to the system at once
_SMALL = 1 << 14  # bytes that are quicker copied than sent from where they are

Bytes = bytes | bytearray | memoryview


class GivenUpError(ConnectionError):
    """Another rank has given up what this one waits for, and says why."""


class Link:
    """A socket to one rank.

    Args:
        connection: the socket.
        rank: the rank at the other end.
        event: when it is ready, see `select.poll`.

    Attributes:
        ready: waits for that.
    """

    def __init__(self, connection: socket.socket, rank: int, event: int) -> None:
        connection.setblocking(False)
        self.connection = connection
        self.rank = rank
        self.ready = select.poll()
        self.ready.register(connection, event)


class Outgoing(Link):
    """A link that this rank sends on.

    To a rank that has ended nothing is sent: those notice it that wait for it.
    """

    def __init__(self, connection: socket.socket, rank: int) -> None:
        super().__init__(connection, rank, select.POLLOUT)
        self._left: deque[memoryview] = deque()

    def put(self, kind: int, number: int, parts: Sequence[Bytes]) -> None:
        """Begins to send a message."""
        length = sum(map(len, parts))
        head = _HEAD.pack(kind, number, length)
        if length <= _SMALL:
            self._left.append(memoryview(head + b"".join(parts)))
            return
        self._left.extend(memoryview(part) for part in (head, *parts) if len(part))

    def push(self) -> bool:
        """Sends what can be sent at once; whether nothing is left."""
        try:
            while self._left:
                self._drop(self.connection.sendmsg([*islice(self._left, _MOST_VIEWS)]))
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno is None:  # from the handler of a signal
                raise
            self.connection.close()
            self._left.clear()
        return True

    def keep(self) -> None:
        """Has what is left no longer belong to the caller."""
        self._left = deque(memoryview(bytes(view)) for view in self._left)

    def _drop(self, sent: int) -> None:
        while sent and sent >= len(self._left[0]):
            sent -= len(self._left.popleft())
        if sent:
            self._left[0] = self._left[0][sent:]


class Incoming(Link):
    """A link that this rank receives on."""

    def __init__(self, connection: socket.socket, rank: int) -> None:
        super().__init__(connection, rank, select.POLLIN)
        self._head = memoryview(bytearray(_HEAD.size))
        self._begin()

    def _begin(self) -> None:
        self._kind = self._number = -1  # of the message that is coming
        self._into = self._head
        self._own: bytearray | None = None  # what it comes into, unless that is the caller's
        self._had = 0

    @property
    def has_begun(self) -> bool:
        """Whether the head of a message has come; its rest may have none, and nothing follows."""
        return self._number >= 0

    def pull(self, kind: int, number: int, target: memoryview | None) -> Bytes | None:
        """The next message for the collective `number`, in `target` if there is one.

        Returns:
            The message; None if it has not all come yet.

        Raises:
            ConnectionError: there will be none.
        """
        try:
            while True:
                if self._number < 0 and self._fill():
                    self._make_room(kind, number, target)
                if self._number > number:
                    raise GivenUpError(f"rank {self.rank} has given this up")
                if self._number >= 0 and self._fill():
                    came, message, is_of = self._kind, self._own, self._number
                    self._begin()
                    if is_of == number:
                        return self._taken(came, message, kind, target)
        except BlockingIOError:
            return None

    def keep(self) -> None:
        """Has what is still to come no longer go to the caller."""
        if self._number >= 0 and self._own is None:
            self._own = bytearray(len(self._into))
            self._into = memoryview(self._own)

    def _make_room(self, kind: int, number: int, target: memoryview | None) -> None:
        """Looks at the head, and makes room for the rest."""
        *said, length = _HEAD.unpack(self._head)
        if said == [kind, number] and target is not None and len(target) == length:
            self._into = target
        else:
            self._own = bytearray(length)
            self._into = memoryview(self._own)
        self._kind, self._number = said
        self._had = 0

    def _taken(
        self, came: int, message: bytearray | None, kind: int, target: memoryview | None
    ) -> Bytes:
        """A message for the awaited collective, in `target` if there is one."""
        if came == GIVEN_UP:
            why = (message or b"").decode(errors="replace")
            raise GivenUpError(f"rank {self.rank} has given this up: {why}")
        if came != kind:
            raise ConnectionError(f"rank {self.rank} does something else")
        if message is None or target is None:
            return target if message is None else message  # pyright: ignore[reportReturnType]
        if len(message) != len(target):
            raise ConnectionError(f"rank {self.rank} sends another number of bytes")
        target[:] = message
        return target

    def _fill(self) -> bool:
        """Receives once; whether all there is to come has come."""
        if self._had < len(self._into):
            try:
                received = self.connection.recv_into(self._into[self._had :])
            except BlockingIOError:
                raise
            except OSError as error:
                if error.errno is None:  # from the handler of a signal
                    raise
                raise ConnectionError(f"rank {self.rank} has ended: {error}") from error
            if not received:
                raise ConnectionError(f"rank {self.rank} has ended")
            self._had += received
        return self._had == len(self._into)
