"""Making the wire: every process listens, says where by a collective, and calls its peers.

A process may have several addresses, of which not all can be reached from everywhere, and some are
another machine's too; the callers try them in turn. Caller and called must each know a number that
only the group has been told.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from .arena import Neighbour, own_arena
from .collectives import Collectives
from .links import Incoming, Outgoing
from .wire import Wire

_SECRET = 16  # bytes
_HELLO = struct.Struct("<16sII")  # a secret, the caller's rank, the distance between the ranks
_CALL_WITHIN_S = 5.0  # at one address
_CALLS_WITHIN_S = 20.0
_HELLO_WITHIN_S = 1.0  # a stranger who says nothing holds up the others as long
_LOOK_EVERY_S = 1.0  # where closing does not wake who listens
_FROM_ANYWHERE = ("192.0.2.1", "2001:db8::1")  # for documentation: nothing is sent there


def connect(collectives: Collectives, timeout_s: float) -> Wire | None:
    """The wire between the processes of a group; None where they cannot reach each other."""
    if sys.platform == "win32":  # has not all that the wire needs
        return None

    def say(own: dict[str, Any], within_s: float) -> list[dict[str, Any]]:
        everyone = collectives.gather([json.dumps(own).encode()], within_s)
        return [json.loads(bytes(said)) for said in everyone]

    rank, world_size = collectives.rank, collectives.world_size
    distances = [1 << k for k in range((world_size - 1).bit_length())]
    outgoing: list[Outgoing] = []
    arena = own_arena()
    with _listen() as listening:
        own = {"port": listening.getsockname()[1], "at": _addresses()}
        own["arena"] = arena.name if arena else None
        said = say({**own, "secret": os.urandom(2 * _SECRET).hex()}, timeout_s)
        secret = bytes.fromhex(said[0]["secret"])
        callers = {distance: (rank + distance) % world_size for distance in distances}
        with Reception(listening, secret, callers) as reception:
            until_s = time.monotonic() + _CALLS_WITHIN_S
            with suppress(OSError):
                for distance in distances:
                    peer = (rank - distance) % world_size
                    hello = _HELLO.pack(secret[:_SECRET], rank, distance)
                    connection = _call(said[peer], hello, secret[_SECRET:], until_s)
                    outgoing.append(Outgoing(connection, peer))
            neighbours = _neighbours(said, rank)
            reached = {"all": len(outgoing) == len(distances), "near": neighbours is not None}
            reached = say(reached, timeout_s + 2 * _CALLS_WITHIN_S)
    incoming = [reception.incoming[d] for d in sorted(reception.incoming)]
    wire = Wire(rank, world_size, outgoing, incoming)
    if neighbours and all(each["near"] for each in reached):
        wire.arena, wire.neighbours = arena, neighbours
    if all(each["all"] for each in reached):
        return wire
    wire.close()
    return None


def _neighbours(said: list[dict[str, Any]], rank: int) -> dict[int, Neighbour] | None:
    """The other ranks' arenas; None where one cannot be read from here."""
    with suppress(OSError, TypeError):
        return {r: Neighbour(each["arena"]) for r, each in enumerate(said) if r != rank}
    return None


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        with suppress(OSError):  # it has been switched off
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _addresses() -> list[str]:
    """This machine's addresses, the likeliest to be reached first."""
    found = []
    for there in (os.environ.get("MASTER_ADDR"), *_FROM_ANYWHERE):
        for family, where in _resolved(there) if there else []:
            with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as outward:
                outward.connect(where)  # says which address would be used
                found.append(outward.getsockname()[0])
    found += [where[0] for _, where in _resolved(socket.gethostname())]
    return list(dict.fromkeys([*found, "127.0.0.1"]))


def _resolved(name: str) -> list[tuple[int, Any]]:
    """The families and addresses that `name` has."""
    with suppress(OSError, UnicodeError):
        found = socket.getaddrinfo(name, 9, type=socket.SOCK_DGRAM)
        return [(family, where) for family, _, _, _, where in found]
    return []


def _call(peer: dict[str, Any], hello: bytes, welcome: bytes, until_s: float) -> socket.socket:
    """A connection to `peer`, which has welcomed it."""
    for address in peer["at"]:
        within_s = min(_CALL_WITHIN_S, until_s - time.monotonic())
        if within_s <= 0:
            break
        with suppress(OSError):
            connection = socket.create_connection((address, peer["port"]), within_s)
            with suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.sendall(hello)
                if _received(connection, len(welcome), within_s) == welcome:
                    return connection
            connection.close()  # somebody else's port
    raise ConnectionError


def _received(connection: socket.socket, size: int, within_s: float) -> bytes:
    """The next bytes, fewer if no more come."""
    until_s = time.monotonic() + within_s
    received = b""
    while len(received) < size and (left_s := until_s - time.monotonic()) > 0:
        connection.settimeout(left_s)
        more = connection.recv(size - len(received))
        if not more:
            break
        received += more
    return received


class Reception:
    """Takes the peers' calls, in a thread, within a `with` block.

    Args:
        listening: where they call.
        secret: its first half is what a caller must say, its second what it is answered.
        callers: by their distance, the ranks that call.

    Attributes:
        incoming: by their distance, those that have been welcomed. Who calls again, having given
            up its first call, is taken instead of that.
    """

    def __init__(self, listening: socket.socket, secret: bytes, callers: dict[int, int]) -> None:
        self.incoming: dict[int, Incoming] = {}
        self._listening = listening
        self._secret = secret
        self._callers = callers
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._take_calls, daemon=True)

    def __enter__(self) -> Reception:
        self._listening.settimeout(_LOOK_EVERY_S)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # wakes it
        self._thread.join()

    def _take_calls(self) -> None:
        while not self._ended.is_set():
            try:
                connection, _ = self._listening.accept()
            except (TimeoutError, ConnectionAbortedError):
                continue
            except OSError:
                return
            if not self._welcome(connection):
                connection.close()

    def _welcome(self, connection: socket.socket) -> bool:
        """Whether a call is a peer's."""
        with suppress(OSError):
            said = _received(connection, _HELLO.size, _HELLO_WITHIN_S)
            if len(said) < _HELLO.size:
                return False
            secret, rank, distance = _HELLO.unpack(said)
            if secret != self._secret[:_SECRET] or self._callers.get(distance) != rank:
                return False
            before = self.incoming.pop(distance, None)
            if before:
                before.connection.close()
            connection.sendall(self._secret[_SECRET:])
            self.incoming[distance] = Incoming(connection, rank)
            return True
        return False
