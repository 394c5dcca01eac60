"""What connects ranks: the loopback interface, for the check, and published line rates."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """What connects each rank to the next.

    Args:
        name: what it is called.
        bytes_per_s: its line rate in one direction; infinite for the loopback interface, whose
            rate is the processor's.
        by_processor: whether the processor copies what is sent, as with TCP, and may be slower.
        source: who says so.
    """

    name: str
    bytes_per_s: float
    by_processor: bool
    source: str


LOOPBACK = Link("loopback", float("inf"), True, "measured here")
LINKS = (
    Link("1 Gb/s Ethernet", 1e9 / 8, True, "IEEE 802.3ab-1999"),
    Link("10 Gb/s Ethernet", 10e9 / 8, True, "IEEE 802.3ae-2002"),
    Link("100 Gb/s Ethernet, RDMA", 100e9 / 8, False, "IEEE 802.3ba-2010"),
    Link("400 Gb/s InfiniBand NDR", 400e9 / 8, False, "NVIDIA ConnectX-7 user manual"),
)
