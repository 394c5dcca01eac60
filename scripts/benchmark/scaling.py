"""How long a step takes on any number of ranks: a model, and what it assumes.

    step = compute + overhead + loss + messages x latency + bytes / bandwidth

1.  Rows of a rank are fixed, so the whole batch grows with the ranks (weak scaling), and a rank is
    a core as there is here. Efficiency is compute / step.
2.  Compute is a + b x rows: forward, backward and optimizer of plain torch with 1 thread, measured
    while 2 processes do it, which share caches and memory, and send nothing.
3.  What a step sends is noted in 2 processes: for DistributedModel the calls of its Wire, as for
    each number of ranks, since small gradients go to everyone at once among few, and are summed
    among many; for DDP the collectives of gloo that torch's profiler sees. Nobody reads another's
    memory, as ranks of one machine can. Messages are as long on any number of ranks.
4.  Overhead is what a way takes over compute when it sends nothing: measured in 2 processes with
    the same rows, each of which takes what it would say for what all say. It is as long for any
    number of rows and ranks; adding up what a gather brings, which grows, is left out.
5.  Over p ranks, one message after the other: a Wire's gather of n bytes each is log2 p messages,
    rounded up, in which (p - 1) n bytes come in; a Wire's sum of n bytes is a ring, 2 (p - 1)
    messages of m / p bytes for each piece of m, 4 MiB at most. Gloo's all-reduce, taken as a ring,
    is 2 (p - 1) messages of n / p, a broadcast a tree of log2 p messages of n. Other algorithms
    (trees, several links for each rank, reduction in the switch) are faster at many ranks.
6.  Latency of a message and bandwidth are fitted, for each kind, to times of 64 bytes to 16 MiB
    between 2 processes on the loopback interface; a ring's include adding up. A link takes the same
    latency: too little for TCP between machines, too much for RDMA. TCP is as fast as its link or
    as the processor copies, whichever is slower. RDMA is as fast as its link, and supposes a
    transport that uses it, which neither a Wire nor gloo over TCP is. Links are free of other
    traffic, whichever ranks they connect, and their headers cost nothing.
7.  Nothing overlaps. With cores to spare DDP hides messages behind backward, so that it does better
    than this, until messages take longer than backward.
8.  "global": every rank has the whole batch and makes the loss on it, the time of which is measured
    and grows with the ranks. Loading the whole batch on every rank is not counted. "+ inputs"
    gathers the inputs from where they were loaded, in one gather.
9.  No rank is slower than another: no stragglers, no failures.
10. For the check the whole batch is fixed. With more processes than cores, compute is measured in
    as many processes, and all else takes longer in proportion.
"""

from __future__ import annotations

from dataclasses import dataclass

from .collectives import Collective, Speed, messages, seconds
from .links import Link

INPUTS = "global + inputs"
RANKS = tuple(2**i for i in range(11))


@dataclass(frozen=True)
class Compute:
    """Seconds of a step without anything sent: `fixed_s + row_s x rows`."""

    fixed_s: float
    row_s: float

    def step_s(self, rows: float) -> float:
        """A step's, of so many rows."""
        return self.fixed_s + self.row_s * rows


@dataclass(frozen=True)
class Scaling:
    """What one model's steps come to.

    Args:
        compute: of one rank.
        overhead_s: what else each way costs, if there are several ranks, but for what it sends.
        loss_row_s: forward and backward of the loss alone, for each row.
        input_row_bytes: of the batch, for each row.
        sent: what each way sends in a step, by ranks.
        speeds: by kind of collective.
    """

    compute: Compute
    overhead_s: dict[str, float]
    loss_row_s: float
    input_row_bytes: float
    sent: dict[str, dict[int, list[Collective]]]
    speeds: dict[str, Speed]

    @property
    def ways(self) -> list[str]:
        """Those that it knows, and "global" with inputs gathered."""
        return [*self.sent, *([INPUTS] if "global" in self.sent else [])]

    def collectives(self, way: str, ranks: int, rows: float) -> list[Collective]:
        """What a way sends in a step on so many ranks, each having so many rows."""
        if way != INPUTS:
            return self.sent[way][ranks]
        inputs = Collective("gather", round(self.input_row_bytes * rows))
        return [*self.sent["global"][ranks], inputs]

    def added_s(self, way: str, ranks: int, rows: float, link: Link) -> float:
        """The seconds that a step takes on several ranks, over those of its compute."""
        is_global = way in ("global", INPUTS)
        loss_s = self.loss_row_s * rows * (ranks - 1) if is_global else 0.0
        collectives = self.collectives(way, ranks, rows)
        sending_s = sum(seconds(each, ranks, self.speeds, link) for each in collectives)
        return self.overhead_s["global" if is_global else way] + loss_s + sending_s

    def step_s(self, way: str, ranks: int, rows: float, link: Link) -> float:
        """The seconds of a step on so many ranks, each with so many rows and a core."""
        added_s = self.added_s(way, ranks, rows, link) if ranks > 1 else 0.0
        return self.compute.step_s(rows) + added_s

    def efficiency(self, way: str, ranks: int, rows: float, link: Link) -> float:
        """The part of a step that is compute."""
        return self.compute.step_s(rows) / self.step_s(way, ranks, rows, link)

    def messages(self, way: str, ranks: int) -> int:
        """How many messages a rank sends in a step, one after the other."""
        return sum(messages(each, ranks) for each in self.collectives(way, ranks, 0))
