"""A channel between processes on which no rank can take what was meant for something else.

Every exchange begins with a frame of one fixed size, in which each rank says what it is doing. Only
when all say the same does anything else cross. So ranks that do different things get an error that
says what each was doing, instead of each other's numbers or a hang; and a rank that fails says so
in its next frame, whatever the others are waiting for.
"""

from __future__ import annotations

import math
import struct
import time
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .watch import watch

_SIZE = 4096  # bytes of a frame
_HEAD = struct.Struct("<BIIQ")  # failed? length of the text, number of facts, length of the payload
_MOST_TEXT = 1024
_MOST_FACTS = 128
_FAREWELL_S = 5.0


_unfinished: list[Any] = []  # what was no longer waited for


class PeerError(RuntimeError):
    """Another process failed, ended, or does something else.

    Attributes:
        follows: whether this only follows from another process's failure or end, and says less.
    """

    def __init__(self, message: str, follows: bool = False) -> None:
        super().__init__(message)
        self.follows = follows


class Channel:
    """What one rank says to the others, in order.

    Args:
        group: the process group; None is the default one.
        timeout_s: how long to wait for the others, in seconds.
    """

    def __init__(self, group: Any = None, timeout_s: float | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self._facts: list[tuple[str, float]] = []
        self._watch = watch()
        self._advice: dict[str, str] = {}
        self._timeout = None if timeout_s is None else timedelta(seconds=timeout_s)

    def agree(self, what: str, facts: list[float], advice: str) -> None:
        """Has the next exchange check that `facts`, see `fingerprint`, are alike on all ranks.

        Args:
            what: what the facts are about.
            facts: numbers.
            advice: what to do if they are not, for the error.
        """
        self._facts += [(what, fact) for fact in facts]
        self._advice[what] = advice

    def exchange(self, doing: str, payload: Tensor) -> list[Tensor]:
        """Every rank's `payload`, in the order of ranks.

        Args:
            doing: what this is for; the same on every rank.
            payload: one axis, uint8, on the CPU; of any length.

        Raises:
            PeerError: on every rank, when a rank has failed or does something else, or what was to
                be agreed on differs.
        """
        facts, self._facts = self._facts, []
        about = ", ".join(dict.fromkeys(what for what, _ in facts))
        text = f"{doing}, with the {about}" if about else doing
        own = Frame(text, [fact for _, fact in facts], len(payload))
        if self._watch:
            self._watch.doing = text
        everyone = self._all_gather(own.packed(payload))
        frames = [Frame.unpacked(frame) for frame in everyone]
        self._check(frames, [what for what, _ in facts])
        lengths = [frame.length for frame in frames]
        if max(lengths) <= own.room:
            start = _SIZE - own.room
            return [f[start : start + n] for f, n in zip(everyone, lengths, strict=True)]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(payload)] = payload
        received = self._all_gather(padded)
        return [part[:length] for part, length in zip(received, lengths, strict=True)]

    def sum(self, flat: Tensor) -> Tensor:
        """The sum of every rank's `flat`, in place. After an `exchange` that has agreed on it."""
        self._wait(dist.all_reduce(flat, group=self.group, async_op=True))
        return flat

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrites `tensor` with rank 0's."""
        source = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        self._wait(dist.broadcast(tensor, source, group=self.group, async_op=True))

    def fail(self, error: BaseException) -> bool:
        """Tells the others that this rank has failed, if they exchange anything soon.

        Returns:
            Whether they have heard it.
        """
        self._facts = []
        text = f"{type(error).__name__}: {error}"
        frame = Frame(text, [], 0, failed=True).packed(torch.empty(0, dtype=torch.uint8))
        before, self._timeout = self._timeout, timedelta(seconds=_FAREWELL_S)
        watching, self._watch = self._watch, None  # nobody is asked what they are doing
        try:
            self._all_gather(frame)
        except PeerError:
            return False  # they have gone, or are far away
        finally:
            self._timeout, self._watch = before, watching
        return True

    def _check(self, frames: list[Frame], whats: list[str]) -> None:
        for rank, frame in enumerate(frames):
            if frame.failed:
                raise PeerError(
                    f"Rank {rank} failed, so rank {self.rank} cannot go on: {frame.text}", True
                )
        first = frames[0]
        if any((f.text, len(f.facts)) != (first.text, len(first.facts)) for f in frames):
            lines = "\n".join(f"  rank {rank}: {frame.text}" for rank, frame in enumerate(frames))
            raise PeerError(
                "The processes do different things, where each must do the same:\n"
                f"{lines}\nEvery process must run the same step on the same batch."
            )
        for rank, frame in enumerate(frames):
            for what, mine, theirs in zip(whats, first.facts, frame.facts, strict=True):
                if not _is_close(mine, theirs):
                    raise PeerError(
                        f"Rank {rank} has another {what} than rank 0. {self._advice[what]}"
                    )

    def _all_gather(self, own: Tensor) -> list[Tensor]:
        everyone = [torch.empty_like(own) for _ in range(self.world_size)]
        self._wait(dist.all_gather(everyone, own, group=self.group, async_op=True))
        return everyone

    def _wait(self, work: Any) -> None:
        watching, begun_s = self._watch, time.monotonic()
        if watching:
            watching.is_waiting = True
        try:
            work.wait() if self._timeout is None else work.wait(self._timeout)
        except RuntimeError as error:
            _unfinished.append(work)
            waited_s = time.monotonic() - begun_s
            doing = f" to {watching.doing}" if watching else ""
            others = f":\n{watching.ask()}\n" if watching else ". "
            raise PeerError(
                f"Rank {self.rank} has waited {waited_s:.1f} s for the others{doing}{others}"
                "Every process must run the same step, and none end before the others; timeout_s "
                f"says how long to wait. ({error})",
                follows=True,
            ) from error
        finally:
            if watching:
                watching.is_waiting = False


class Frame(NamedTuple):
    """What every exchange begins with.

    Attributes:
        text: what the rank is doing, or why it failed.
        facts: numbers to be agreed on.
        length: of the payload, in bytes, which stands in the frame itself if there is room.
        failed: whether the rank has failed.
    """

    text: str
    facts: list[float]
    length: int
    failed: bool = False

    @property
    def room(self) -> int:
        """How many bytes of payload fit beside the rest."""
        return _SIZE - len(self._head())

    def packed(self, payload: Tensor) -> Tensor:
        """The frame as bytes, with `payload` if there is room."""
        head = self._head()
        frame = torch.zeros(_SIZE, dtype=torch.uint8)
        frame[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        if len(payload) <= self.room:
            frame[len(head) : len(head) + len(payload)] = payload
        return frame

    @classmethod
    def unpacked(cls, frame: Tensor) -> Frame:
        """The frame that was `packed`."""
        raw = frame.numpy().tobytes()
        failed, text, facts, length = _HEAD.unpack_from(raw)
        end = _HEAD.size + text
        values = struct.unpack_from(f"<{facts}d", raw, end)
        return cls(
            raw[_HEAD.size : end].decode(errors="replace"), list(values), length, bool(failed)
        )

    def _head(self) -> bytes:
        text, facts = self.text.encode()[:_MOST_TEXT], self.facts[:_MOST_FACTS]
        head = _HEAD.pack(self.failed, len(text), len(facts), self.length)
        return head + text + struct.pack(f"<{len(facts)}d", *facts)


def is_waited_for() -> bool:
    """Whether the group still waits for an exchange that this process has given up."""
    return not all(work.is_completed() for work in _unfinished)


def fingerprint(tensor: Tensor) -> float:
    """A number that different batches do not share: a weighted mean of a sample of `tensor`."""
    flat = tensor.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    sample = flat[:: 1 + len(flat) // 1024].double().cpu().nan_to_num(0.5, 3.0, -2.0)
    if not len(sample):
        return 0.0
    weights = torch.linspace(1.0, 2.0, len(sample), dtype=torch.float64)
    return float((weights * (sample + 2 * sample.abs())).mean())  # no terms that cancel


def _is_close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-12) or (math.isnan(a) and math.isnan(b))
