"""Random numbers drawn inside a wrapped module.

Lanes share torch's one CPU generator, and which of them draws first is chance. So each lane has a
generator of its own while it draws, seeded from the process's, one after the other: the same seed
gives the same numbers on every run, and different ones in every lane. A module that draws nothing
leaves the process's random state alone, so that what the step draws is what it would be without
wrapper.
"""

from __future__ import annotations

import functools
import hashlib
import operator
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from wraploop.processes import random_state

from .internals import is_checkpointing

_one_at_a_time = threading.Lock()


class Noise:
    """The random states of the lanes of one call.

    Args:
        lanes: how many.
        watch: whether to look for random numbers that no lane can have of its own.

    Attributes:
        drawn: whether a lane has drawn a random number.
    """

    def __init__(self, lanes: int, watch: bool) -> None:
        self.drawn = False
        self._outside = torch.default_generator.get_state()
        self._others = random_state.others() if watch else None
        seed = _seed_of(self._outside)
        seeded = [torch.Generator().manual_seed(seed + lane) for lane in range(lanes)]
        self._states = [generator.get_state() for generator in seeded]

    def lane(self, index: int) -> TorchFunctionMode:
        """A context in which random operators draw from the generator of lane `index`."""
        return _LaneNoise(self, index)

    def draw(self, index: int, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """`func(*args, **kwargs)`, drawing from the generator of lane `index`."""
        generator, before = torch.default_generator, self._states[index]
        with _one_at_a_time:
            generator.set_state(before)
            try:
                return func(*args, **kwargs)
            finally:
                self._states[index] = generator.get_state()
                generator.set_state(self._outside)
                self.drawn |= not torch.equal(before, self._states[index])
                if self.drawn and is_checkpointing():
                    raise NotImplementedError(_CHECKPOINTED)

    def end(self) -> None:
        """Moves the process's generator on if a lane has drawn, so that the next call's differ.

        Raises:
            NotImplementedError: the module has drawn where it could not be seen.
        """
        if not torch.equal(torch.default_generator.get_state(), self._outside):
            raise NotImplementedError(_UNSEEN.format("in an operator of no known name"))
        if self._others is not None and random_state.others() != self._others:
            raise NotImplementedError(_UNSEEN.format("of Python or NumPy"))
        if self.drawn:
            torch.rand(1)


_CHECKPOINTED = (
    "A checkpointed part of a module draws random numbers (dropout) in a lane. Its recomputation "
    "would draw others, and the gradient would be wrong. Leave the part out of checkpointing, or "
    "use DistributedModel."
)
_UNSEEN = (
    "The module draws random numbers {}. Lanes run at the same time, and which of them would draw "
    "first is chance. Draw with torch's own functions, or use DistributedModel."
)
_DRAWING = {  # Python functions of torch that draw; operators say so themselves
    *("dropout1d", "dropout2d", "dropout3d", "gumbel_softmax", "multi_head_attention_forward"),
    *("fractional_max_pool2d", "fractional_max_pool2d_with_indices"),
    *("fractional_max_pool3d", "fractional_max_pool3d_with_indices"),
}
_DRAWING_IF_DROPPING = {
    *("gru", "lstm", "rnn_relu", "rnn_tanh"),
    *("scaled_dot_product_attention", "multi_head_attention_forward"),
}


class _LaneNoise(TorchFunctionMode):
    def __init__(self, noise: Noise, index: int) -> None:
        super().__init__()
        self._noise = noise
        self._index = index

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _may_draw(func, args, kwargs):
            return self._noise.draw(self._index, func, args, kwargs)
        return func(*args, **kwargs)


def _may_draw(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    if not _is_random(name, getattr(func, "__module__", None)):
        return False
    if name in _DRAWING_IF_DROPPING:
        named = {key: value for key, value in kwargs.items() if key != "scale"}
        return any(isinstance(v, float) and v > 0 for v in (*args, *named.values()))
    return not any(isinstance(v, torch.Generator) for v in (*args, *kwargs.values()))


@functools.cache
def _is_random(name: str, module: str | None) -> bool:
    """Whether the function of that name may draw random numbers, as the operators say."""
    if name in _DRAWING or module == "torch.nn.init":
        return True
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return False
    overloads = (getattr(packet, overload) for overload in packet.overloads())
    return any(torch.Tag.nondeterministic_seeded in overload.tags for overload in overloads)


def _seed_of(state: Tensor) -> int:
    """A seed that follows from a generator's state, without drawing from it."""
    return int.from_bytes(hashlib.blake2b(state.numpy().tobytes(), digest_size=7).digest(), "big")


class RandomFingerprint:
    """A number that processes share if they are about to draw the same random numbers.

    Attributes:
        now: that, as of the last look.
    """

    def __init__(self) -> None:
        self._state = torch.default_generator.get_state()
        self.now = float(_seed_of(self._state))

    def has_changed(self) -> bool:
        """Looks, and says whether numbers have been drawn since the last look."""
        state = torch.default_generator.get_state()
        if torch.equal(state, self._state):
            return False
        self._state, self.now = state, float(_seed_of(state))
        return True


class OwnNoise:
    """Whether numbers were drawn in an `own_noise` block.

    Attributes:
        drew: that, once the block has ended.
        drew_elsewhere: whether Python's or NumPy's were, if that was asked for.
        drawn_from: what was drawn from, for `move_on`.
    """

    drew = drew_elsewhere = False
    drawn_from = 0


@contextmanager
def own_noise(number: int, *, elsewhere: bool) -> Iterator[OwnNoise]:
    """Lets what draws random numbers in the block draw those of shard `number`.

    They follow from the random states before the block, which are as before after it.

    Args:
        number: which shard.
        elsewhere: whether to see to Python's and NumPy's numbers too, which takes a while.
    """
    noise = OwnNoise()
    others = random_state.others() if elsewhere else None
    generators = _generators()
    before = [generator.get_state() for generator in generators]
    seed = _seed_of(before[0])
    seeded = []
    for generator in generators:
        generator.manual_seed(seed + number)
        seeded.append(generator.get_state())
    if elsewhere:
        random_state.seed_others((zlib.crc32(repr(others).encode()) + number) % 2**32)
    others_seeded = random_state.others() if elsewhere else None
    try:
        yield noise
    finally:
        now = [generator.get_state() for generator in generators]
        drew = [not all(map(torch.equal, seeded, now))]
        if others and others_seeded:
            drew += map(operator.ne, random_state.others(), others_seeded)
            random_state.put_others(others)
        noise.drew, noise.drew_elsewhere = any(drew), any(drew[1:])
        noise.drawn_from = sum(bit << i for i, bit in enumerate(drew))
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)


def move_on(drawn_from: int) -> None:
    """Moves the generators on that were drawn from, so that the next call draws other numbers."""
    if drawn_from & 1:
        torch.rand(1)
    random_state.move_others_on(pythons=bool(drawn_from & 2), numpys=bool(drawn_from & 4))


@contextmanager
def kept_random_state() -> Iterator[OwnNoise]:
    """A block after which all random states are what they were before."""
    noise = OwnNoise()
    generators = _generators()
    before = [generator.get_state() for generator in generators]
    others = random_state.others()
    try:
        yield noise
    finally:
        now = [generator.get_state() for generator in generators]
        noise.drew = not all(map(torch.equal, before, now)) or random_state.others() != others
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)
        random_state.put_others(others)


def _generators() -> list[torch.Generator]:
    """The generators that operators draw from by default, on the CPU and the current device."""
    found = [torch.default_generator]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found.append(torch.cuda.default_generators[torch.cuda.current_device()])
    return found
