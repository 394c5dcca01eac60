"""The random state of this process: torch's, Python's, and NumPy's if it is loaded."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

State = tuple[Any, ...]


def get() -> State:
    """The state, that of the CPU alone of torch's; made of tensors, numbers and names."""
    return torch.get_rng_state(), *others()


def others() -> State:
    """The states of Python's and NumPy's generators."""
    return random.getstate(), _numpys()


def put(state: State) -> None:
    """Takes over a state that `get` has returned."""
    torch.set_rng_state(state[0])
    put_others(state[1:])


def put_others(state: State) -> None:
    """Takes over what `others` has returned."""
    random.setstate(state[0])
    numpy = sys.modules.get("numpy")
    if numpy and state[1]:
        numpy.random.set_state(state[1])


def seed(number: int) -> None:
    """Starts from a seed."""
    torch.manual_seed(number)
    seed_others(number)


def seed_others(number: int) -> None:
    """Starts Python's and NumPy's generators from a seed."""
    random.seed(number)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(number)


def move_others_on(*, pythons: bool, numpys: bool) -> None:
    """Draws a number from Python's generator, and from NumPy's."""
    if pythons:
        random.random()
    if numpys and (numpy := sys.modules.get("numpy")):
        numpy.random.random()


def seed_from(state: State, number: int) -> int:
    """A seed that follows from a state and a number, without drawing."""
    said = state[0].numpy().tobytes() + number.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(said, digest_size=4).digest(), "little")


def same(a: State, b: State) -> bool:
    """Whether two states are equal."""
    return torch.equal(a[0], b[0]) and a[1] == b[1] and a[2] == b[2]


def _numpys() -> tuple[Any, ...] | None:
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    name, keys, *rest = numpy.random.get_state()
    return name, keys.tolist(), *rest


@contextmanager
def kept() -> Iterator[None]:
    """Afterwards the state is what it was before, that of CUDA devices too.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> with kept():
        ...     drawn = torch.rand(3)
        >>> torch.equal(drawn, torch.rand(3))
        True
    """
    state = get()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        put(state)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
