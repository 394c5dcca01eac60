"""A channel between processes on which no rank can take what was meant for something else.

Every exchange begins with a frame, in which each rank says what it is doing. Only when all say the
same is what follows it taken. So ranks that do different things get an error that says what each
was doing, instead of each other's numbers or a hang; and a rank that fails says so in its next
frame, whatever the others are waiting for.
"""

from __future__ import annotations

import functools
import math
import os
import struct
import time
import weakref
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import Collectives
from .connecting import connect
from .links import GivenUpError
from .packing import view_of
from .watch import watch
from .wire import Wire

_HEAD = struct.Struct("<BII")  # failed? length of the text, number of facts
_MOST_TEXT = 1 << 14  # bytes; of what is longer all is compared, and the beginning told
_MOST_SHOWN = 1024
_FAREWELL_S = 5.0
_TIMEOUT_S = 1800.0  # torch's own, for gloo

T = TypeVar("T")

_wires: weakref.WeakKeyDictionary[Any, Wire | None] = weakref.WeakKeyDictionary()
_models: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


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
        timeout_s: how long to wait for the others, in seconds; None is half an hour.
        model: the number of the model that speaks, see `numbered`: another's messages, of another
            thread say, are never taken for its own.
    """

    def __init__(self, group: Any = None, timeout_s: float | None = None, model: int = 0) -> None:
        self._pid = os.getpid()
        self._collectives = Collectives(group)
        self.rank = self._collectives.rank
        self.world_size = self._collectives.world_size
        self._of = group or dist.group.WORLD
        self._facts: list[Fact] = []
        self._speaks_by: Wire | Collectives | None = None
        self._watch = watch()
        self._timeout_s = _TIMEOUT_S if timeout_s is None else timeout_s
        self._model = model
        self._whose = f", model {model}" if model > 1 else ""

    def is_open(self) -> bool:
        """Whether its process group still is the one that there is."""
        return dist.is_initialized() and self._of is (self._collectives.group or dist.group.WORLD)

    def agree(
        self,
        what: str,
        facts: list[float],
        advice: str,
        rel_tol: float = 1e-4,
        abs_tol: float = 1e-12,
    ) -> None:
        """Has the next exchange check that `facts`, see `fingerprint`, are alike on all ranks.

        Args:
            what: what the facts are about.
            facts: numbers.
            advice: what to do if they are not, for the error.
            rel_tol: how far apart they may be, as in `math.isclose`.
            abs_tol: the same.
        """
        self._facts.append(Fact(what, facts, advice, rel_tol, abs_tol))

    def exchange(self, doing: str, *payload: Tensor | bytes) -> list[Tensor]:
        """Every rank's `payload`, in the order of ranks.

        Args:
            doing: what this is for; the same on every rank.
            payload: bytes, or tensors of one axis, uint8, on the CPU; of any length. They arrive
                as one.

        Raises:
            PeerError: on every rank, when a rank has failed or does something else, or what was to
                be agreed on differs.
        """
        return [*map(_as_tensor, self.gather(doing, *payload))]

    def gather(self, doing: str, *payload: Tensor | bytes) -> list[memoryview]:
        """As `exchange`; it arrives as bytes."""
        doing += self._whose
        text, facts, self._facts = doing, self._facts, []
        if whats := dict.fromkeys(fact.what for fact in facts if fact.numbers):
            text = f"{doing}, with the {', '.join(whats)}"
        if self._watch:
            self._watch.doing = text
        own = Frame(text, [number for fact in facts for number in fact.told()]).packed()
        parts = [own, *(p if isinstance(p, bytes) else view_of(p) for p in payload)]
        everyone = self._waited(lambda: self._wire().gather(parts, self._timeout_s))
        for message in everyone:
            if message[: len(own)] != own:
                self._check([Frame.unpacked(message) for message in everyone], facts)
        return [message[len(own) :] for message in everyone]

    def sum(self, flat: Tensor) -> Tensor:
        """The sum of every rank's `flat`, in place. After an `exchange` that has agreed on it."""
        wire = self._wire() if flat.device.type == "cpu" else self._collectives
        self._waited(lambda: wire.sum(flat, self._timeout_s, self._model))
        return flat

    def memory(self, size: int) -> Any:
        """A buffer of at least `size` bytes; what lies in it is summed in the least time."""
        wire = _wires.get(self._of)
        if wire and wire.arena:
            with suppress(OSError):
                return wire.arena.block(size)
        return bytearray(size)

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrites `tensor` with rank 0's."""
        self._waited(lambda: self._collectives.broadcast(tensor, self._timeout_s))

    def fail(self, error: BaseException) -> bool:
        """Tells the others that this rank has failed, if they exchange anything soon.

        Returns:
            Whether they have heard it.
        """
        self._facts = []
        if self._of not in _wires or os.getpid() != self._pid:
            return False  # they have not exchanged anything yet, or this is not one of them
        text = f"{type(error).__name__}: {error}"[:_MOST_SHOWN]
        frame = Frame(text, [], failed=True).packed()
        try:
            self._wire().gather([frame], _FAREWELL_S)
        except (TimeoutError, ConnectionError):
            return False  # they have gone, or are far away
        return True

    def _wire(self) -> Wire | Collectives:
        """What this group's processes speak by."""
        if self._speaks_by is None:
            if self._of not in _wires:
                _wires[self._of] = connect(self._collectives, self._timeout_s)
            self._speaks_by = _wires[self._of] or self._collectives
        return self._speaks_by

    def _check(self, frames: list[Frame], facts: list[Fact]) -> None:
        for rank, frame in enumerate(frames):
            if frame.failed:
                raise PeerError(
                    f"Rank {rank} failed, so rank {self.rank} cannot go on: {frame.text}", True
                )
        first = frames[0]
        if any((f.text, len(f.facts)) != (first.text, len(first.facts)) for f in frames):
            texts = _told_apart([frame.text for frame in frames])
            lines = "\n".join(f"  rank {rank}: {text}" for rank, text in enumerate(texts))
            raise PeerError(
                "The processes do different things, where each must do the same:\n"
                f"{lines}\nEvery process must run the same step on the same batch, or on its rows "
                "of it; models that threads run at once each need a process group of their own."
            )
        for rank, frame in enumerate(frames):
            at = 0
            for fact in facts:
                begin, at = at, at + len(fact.told())
                if not _are_alike(first.facts[begin:at], frame.facts[begin:at]):
                    raise PeerError(
                        f"Rank {rank} has another {fact.what} than rank 0. {fact.advice}"
                    )

    def _waited(self, speak: Callable[[], T]) -> T:
        """What `speak` returns, which waits for the others.

        Raises:
            PeerError: they have not come, or have ended.
            RuntimeError: this is none of them.
        """
        if os.getpid() != self._pid:
            raise RuntimeError(_FORKED)
        watching, begun_s = self._watch, time.monotonic()
        if watching:
            watching.is_waiting = True
        try:
            return speak()
        except GivenUpError as error:
            raise PeerError(f"Rank {self.rank} cannot go on: {error}", follows=True) from error
        except (TimeoutError, ConnectionError) as error:
            waited_s = time.monotonic() - begun_s
            doing = f" at: {watching.doing}" if watching else ""
            others = f"\n{watching.ask()}\n" if watching else ". "
            raise PeerError(
                f"Rank {self.rank} has waited {waited_s:.1f} s for the others{doing}{others}"
                "Every process must run the same step, and none end before the others; timeout_s "
                f"says how long to wait. ({error})",
                follows=True,
            ) from error
        finally:
            if watching:
                watching.is_waiting = False


def numbered(group: Any = None) -> int:
    """The next number of a model of that group: the same on every rank, which make them alike."""
    of = group or dist.group.WORLD
    _models[of] = _models.get(of, 0) + 1
    return _models[of]


class Fact(NamedTuple):
    """Numbers to be agreed on, see `Channel.agree`."""

    what: str
    numbers: list[float]
    advice: str
    rel_tol: float
    abs_tol: float

    def told(self) -> list[float]:
        """What the others are told of it: how far apart its numbers may be, and those."""
        return [self.rel_tol, self.abs_tol, *self.numbers]


def _are_alike(first: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two ranks' numbers may be called the same: as the first has it, so alike on all."""
    rel_tol, abs_tol = first[:2]
    return all(
        math.isclose(one, another, rel_tol=rel_tol, abs_tol=abs_tol)
        or (math.isnan(one) and math.isnan(another))
        for one, another in zip(first[2:], other[2:], strict=True)
    )


class Frame(NamedTuple):
    """What every exchange begins with.

    Attributes:
        text: what the rank is doing, or why it failed.
        facts: numbers to be agreed on.
        failed: whether the rank has failed.
    """

    text: str
    facts: Sequence[float]
    failed: bool = False

    def packed(self) -> bytes:
        """The frame as bytes."""
        is_short = len(self.text) <= _MOST_SHOWN  # which is worth keeping
        beginning = _beginning if is_short else _beginning.__wrapped__
        begins = beginning(self.text, len(self.facts), self.failed)
        return begins + struct.pack(f"<{len(self.facts)}d", *self.facts) if self.facts else begins

    @classmethod
    def unpacked(cls, message: memoryview) -> Frame:
        """The frame that was `packed`, at the beginning of a message."""
        failed, length, facts = _HEAD.unpack_from(message)
        end = _HEAD.size + length
        text = bytes(message[_HEAD.size : end]).decode(errors="replace")
        values = struct.unpack_from(f"<{facts}d", message, end)
        return cls(text, list(values), bool(failed))


_FORKED = (
    "This process, a DataLoader's worker say, was forked from one of those that run the model "
    "together, and is none of them: the others would take what it says for its parent's. Call "
    "the model, and what asks other processes, where it was made."
)


@functools.lru_cache(maxsize=1024)
def _beginning(text: str, facts: int, failed: bool) -> bytes:
    packed = text.encode()
    if len(packed) > _MOST_TEXT:
        packed = packed[:_MOST_TEXT] + f"... (#{zlib.crc32(packed):08x})".encode()
    return _HEAD.pack(failed, len(packed), facts) + packed


def _told_apart(texts: list[str]) -> list[str]:
    """The texts; if they are long, what is around the place where they begin to differ."""
    if max(map(len, texts)) <= _MOST_SHOWN:
        return texts
    columns = enumerate(zip(*texts, strict=False))
    differ = next((i for i, each in columns if len(set(each)) > 1), min(map(len, texts)))
    begin = max(0, differ - _MOST_SHOWN // 2)
    ends = [text[begin:] for text in texts]
    cut = [end[:_MOST_SHOWN] + "..." * (len(end) > _MOST_SHOWN) for end in ends]
    return ["..." * (begin > 0) + end for end in cut]


def _as_tensor(message: memoryview) -> Tensor:
    if not message.nbytes:
        return torch.empty(0, dtype=torch.uint8, device="cpu")
    return torch.frombuffer(message, dtype=torch.uint8)


def fingerprint(tensor: Tensor) -> float:
    """A number that different batches do not share: a weighted mean of a sample of `tensor`."""
    return weighted_mean(sample(tensor))


def sample(tensor: Tensor, turn: int = 0) -> np.ndarray:
    """Up to 1024 of its numbers, evenly spaced; in other turns others."""
    flat = tensor.detach().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat.resolve_conj()).reshape(-1)
    step = 1 + len(flat) // 1024
    return flat[turn % step :: step].double().numpy(force=True)


def weighted_mean(numbers: np.ndarray) -> float:
    """Of which no terms cancel; what is not finite counts as some number."""
    if not len(numbers):
        return 0.0
    with np.errstate(all="ignore"):
        number = _weighted(numbers)
        if not math.isfinite(number):
            number = _weighted(np.nan_to_num(numbers, nan=0.5, posinf=3.0, neginf=-2.0))
    return number


def _weighted(numbers: np.ndarray) -> float:
    weights = _weights(len(numbers))
    return float(weights @ numbers + 2 * (weights @ abs(numbers)))  # no terms that cancel


@functools.lru_cache(maxsize=64)
def _weights(count: int) -> Any:
    with torch.inference_mode(False):
        return torch.linspace(
            1.0 / count, 2.0 / count, count, dtype=torch.float64, device="cpu"
        ).numpy()
