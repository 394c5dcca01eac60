"""Random numbers drawn inside a wrapped module.

Lanes share torch's one CPU generator, and which of them draws first is chance. So each lane has a
generator of its own while it draws, seeded from the process's, one after the other: the same seed
gives the same numbers on every run, and different ones in every lane. A module that draws nothing
leaves the process's random state alone, so that what the step draws is what it would be without
wrapper.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_one_at_a_time = threading.Lock()


class Noise:
    """The random states of the lanes of one call.

    Attributes:
        drawn: whether a lane has drawn a random number.
    """

    def __init__(self, lanes: int) -> None:
        self.drawn = False
        self._lanes = lanes
        self._states: list[Tensor] = []

    def lane(self, index: int) -> TorchDispatchMode:
        """A context in which random operators draw from the generator of lane `index`."""
        return _LaneNoise(self, index)

    def draw(self, index: int, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """`func(*args, **kwargs)`, drawing from the generator of lane `index`."""
        generator = torch.default_generator
        with _one_at_a_time:
            if not self._states:
                self._seed(generator)
            outside = generator.get_state()
            generator.set_state(self._states[index])
            try:
                return func(*args, **kwargs)
            finally:
                self._states[index] = generator.get_state()
                generator.set_state(outside)

    def _seed(self, generator: torch.Generator) -> None:
        self.drawn = True
        seeds = torch.randint(2**62, (self._lanes,), generator=generator)
        for seed in seeds.tolist():
            self._states.append(torch.Generator().manual_seed(seed).get_state())


class _LaneNoise(TorchDispatchMode):
    def __init__(self, noise: Noise, index: int) -> None:
        super().__init__()
        self._noise = noise
        self._index = index

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would import the compiler at the first operator

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and not _has_generator(args, kwargs):
            return self._noise.draw(self._index, func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _has_generator(args: Sequence[Any], kwargs: dict[str, Any] | None) -> bool:
    values = [*args, *(kwargs or {}).values()]
    return any(isinstance(value, torch.Generator) for value in values)


class OwnNoise:
    """Whether numbers were drawn in an `own_noise` block.

    Attributes:
        drew: that, once the block has ended.
    """

    drew = False


@contextmanager
def own_noise(number: int) -> Iterator[OwnNoise]:
    """Lets what draws random numbers in the block draw those of shard `number`.

    They follow from the random state before the block, which is as before after it.
    """
    noise = OwnNoise()
    generators = _generators()
    before = [generator.get_state() for generator in generators]
    seed = int.from_bytes(
        hashlib.blake2b(before[0].numpy().tobytes(), digest_size=7).digest(), "big"
    )
    seeded = []
    for generator in generators:
        generator.manual_seed(seed + number)
        seeded.append(generator.get_state())
    try:
        yield noise
    finally:
        now = [generator.get_state() for generator in generators]
        noise.drew = not all(map(torch.equal, seeded, now))
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)


def _generators() -> list[torch.Generator]:
    """The generators that operators draw from by default, on the CPU and the current device."""
    found = [torch.default_generator]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found.append(torch.cuda.default_generators[torch.cuda.current_device()])
    return found
