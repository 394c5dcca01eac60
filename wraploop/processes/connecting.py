"""Making the wire: every process listens, says where by a collective, and calls its peers.

A process may have several addresses, of which not all can be reached from everywhere; the callers
try them in turn. Who calls must know a number that only the group has been told.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import struct
import threading
from contextlib import suppress
from typing import Any

from .collectives import Collectives
from .wire import Incoming, Outgoing, Wire

_TOKEN = 16  # bytes
_HELLO = struct.Struct("<16sII")  # the token, the caller's rank, the distance between the ranks
_WELCOME = b"!"
_CALL_WITHIN_S = 5.0  # at one address
_ALL_WITHIN_S = 30.0
_FROM_ANYWHERE = "192.0.2.1"  # an address for documentation: nothing is sent there


def connect(collectives: Collectives, timeout_s: float) -> Wire | None:
    """The wire between the processes of a group; None where they cannot reach each other."""

    def say(own: dict[str, Any]) -> list[dict[str, Any]]:
        everyone = collectives.gather([json.dumps(own).encode()], timeout_s)
        return [json.loads(bytes(said)) for said in everyone]

    rank, world_size = collectives.rank, collectives.world_size
    distances = [1 << k for k in range((world_size - 1).bit_length())]
    incoming: dict[int, Incoming] = {}
    outgoing: list[Outgoing] = []
    with socket.create_server(("", 0), backlog=len(distances)) as listening:
        listening.settimeout(_ALL_WITHIN_S)
        port, token = listening.getsockname()[1], secrets.token_hex(_TOKEN)
        said = say({"port": port, "at": _addresses(), "token": token})
        expected = bytes.fromhex(said[0]["token"])
        accepting = threading.Thread(
            target=_accept, args=(listening, expected, len(distances), incoming), daemon=True
        )
        accepting.start()
        with suppress(OSError):
            for distance in distances:
                peer = (rank - distance) % world_size
                hello = _HELLO.pack(expected, rank, distance)
                outgoing.append(Outgoing(_call(said[peer], hello), peer))
        accepting.join()
    is_whole = len(outgoing) == len(incoming) == len(distances)
    wire = Wire(rank, world_size, outgoing, [incoming[d] for d in sorted(incoming)])
    if all(answer["whole"] for answer in say({"whole": is_whole})):
        return wire
    wire.close()
    return None


def _addresses() -> list[str]:
    """This machine's addresses, the likeliest to be reached first."""
    found = []
    for there in (os.environ.get("MASTER_ADDR"), _FROM_ANYWHERE):
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outward:
            outward.connect((there or _FROM_ANYWHERE, 9))  # says which address would be used
            found.append(outward.getsockname()[0])
    with suppress(OSError):
        found.append(socket.gethostbyname(socket.gethostname()))
    return list(dict.fromkeys([*found, "127.0.0.1"]))


def _call(peer: dict[str, Any], hello: bytes) -> socket.socket:
    """A connection to `peer`, which has welcomed it."""
    for address in peer["at"]:
        with suppress(OSError):
            connection = socket.create_connection((address, peer["port"]), _CALL_WITHIN_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(hello)
            if connection.recv(1) == _WELCOME:
                return connection
            connection.close()  # somebody else's port
    raise ConnectionError


def _accept(
    listening: socket.socket, token: bytes, expected: int, incoming: dict[int, Incoming]
) -> None:
    """Takes calls until all that are expected have come."""
    with suppress(OSError):
        while len(incoming) < expected:
            connection, _ = listening.accept()
            connection.settimeout(_CALL_WITHIN_S)
            with suppress(OSError):
                said = connection.recv(_HELLO.size, socket.MSG_WAITALL)
                if len(said) == _HELLO.size and said.startswith(token):
                    _, rank, distance = _HELLO.unpack(said)
                    connection.sendall(_WELCOME)
                    incoming[distance] = Incoming(connection, rank)
                    continue
            connection.close()
