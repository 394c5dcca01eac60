"""What processes say to each other: how many messages and bytes, and how long they take."""

from __future__ import annotations

import math
from dataclasses import dataclass

from wraploop.processes import wire

from .links import Link

PIECE = wire._PIECE  # bytes of a `Wire.sum` that go around at once


@dataclass(frozen=True)
class Collective:
    """One collective.

    Args:
        kind: "gather" or "sum" of a `Wire`; or gloo's "all_reduce", "broadcast", or another, which
            counts as a broadcast.
        payload_bytes: that each rank brings.
    """

    kind: str
    payload_bytes: int


@dataclass(frozen=True)
class Speed:
    """Of one kind of collective: what a message costs, and what a byte of it adds."""

    latency_s: float
    bytes_per_s: float

    def over(self, link: Link) -> Speed:
        """The same, limited by a link; where it goes by the processor, by that too."""
        slowest = min(self.bytes_per_s, link.bytes_per_s)
        return Speed(self.latency_s, slowest if link.by_processor else link.bytes_per_s)


def messages(collective: Collective, ranks: int) -> int:
    """How many messages, one after the other, a rank sends in a collective.

    Examples:
        >>> messages(Collective("gather", 100), 5)
        3
        >>> messages(Collective("sum", 2 * PIECE), 5)
        16
    """
    around = 2 * (ranks - 1)
    if collective.kind == "all_reduce":
        return around
    if collective.kind == "sum":
        return around * math.ceil(collective.payload_bytes / PIECE)
    return (ranks - 1).bit_length()


def sent_bytes(collective: Collective, ranks: int) -> float:
    """How many bytes a rank receives, one after the other.

    Examples:
        >>> sent_bytes(Collective("gather", 100), 5)
        400
        >>> sent_bytes(Collective("sum", 100), 5)
        160.0
    """
    size = collective.payload_bytes
    if collective.kind in ("all_reduce", "sum"):
        return 2 * (ranks - 1) * size / ranks
    return size * (ranks - 1 if collective.kind == "gather" else messages(collective, ranks))


def seconds(collective: Collective, ranks: int, speeds: dict[str, Speed], link: Link) -> float:
    """How long it takes."""
    speed = speeds.get(collective.kind, speeds["broadcast"]).over(link)
    latency_s = messages(collective, ranks) * speed.latency_s
    return latency_s + sent_bytes(collective, ranks) / speed.bytes_per_s
