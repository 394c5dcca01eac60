"""What decides on the batches: random states, the data's own generators, and going on in between.

Batches follow from the random state in which iterating begins, from generators that loaders,
samplers and datasets hold, and from what is drawn on the way. To go on after `n` batches:

1. put everything back to how it was when iterating began, and begin;
2. leave out `n` batches;
3. put everything to how it was when the `n`-th had been taken.

Step 2 replays what the data draws, and nothing of what the training steps drew between. So it is
exact unless data keeps numbers that it drew from the process's random state, on the way, between
those of a training step that draws too: a shuffle buffer filled from the global state, say. What
has `state_dict` and `load_state_dict`, as torchdata's `StatefulDataLoader`, is asked instead.
"""

from __future__ import annotations

import copy
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wraploop.data import ShardedBatches
from wraploop.processes import random_state

_MOST = 10_000  # objects that are looked at
_LONG = 100  # what is longer holds samples

State = dict[str, Any]


def draws_of(*data: Any) -> State:
    """The state of what is drawn from: the process's random state, and what each of `data` has."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    own = [{path: kind.get(each) for path, kind, each in _generators(batches)} for batches in data]
    return {"random": random_state.get(), "cuda": cuda, "own": own}


def put_draws(state: State, *data: Any) -> None:
    """Takes over what `draws_of` has returned."""
    random_state.put(state["random"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    for batches, own in zip(data, state["own"], strict=False):
        for path, kind, each in _generators(batches):
            if path in own:
                kind.put(each, own[path])


def knows_its_place(batches: Any) -> bool:
    """Whether the batches say themselves where they are, by `state_dict`."""
    return not isinstance(batches, ShardedBatches) and _has_state(batches)


def start_workers(batches: Any) -> None:
    """Starts workers that persist, as an epoch that is not the first finds them.

    Starting them draws a number, which is drawn only once.
    """
    if getattr(batches, "persistent_workers", False):
        with random_state.kept():
            next(iter(batches), None)


class _Kind:
    """How the state of one kind of thing is taken and put."""

    def __init__(self, get: Callable[[Any], Any], put: Callable[[Any, Any], None]) -> None:
        self.get, self.put = get, put


_TORCHS = _Kind(lambda each: each.get_state(), lambda each, state: each.set_state(state.cpu()))
_PYTHONS = _Kind(lambda each: each.getstate(), lambda each, state: each.setstate(state))
_NUMPYS = _Kind(
    lambda each: _as_lists(each.bit_generator.state),
    lambda each, state: setattr(each.bit_generator, "state", state),
)
_OLD_NUMPYS = _Kind(
    lambda each: _as_lists(each.get_state(legacy=False)),
    lambda each, state: each.set_state(state),
)
_STATEFUL = _Kind(
    lambda each: copy.deepcopy(each.state_dict()),
    lambda each, state: each.load_state_dict(copy.deepcopy(state)),
)
_EPOCHS = _Kind(lambda each: each.epoch, lambda each, state: each.set_epoch(state))


def _generators(data: Any) -> Iterator[tuple[str, _Kind, Any]]:
    """What has a random state of its own, in the data's attributes and theirs, by path."""
    seen: set[int] = set()
    waiting = deque([("", data.whole if isinstance(data, ShardedBatches) else data)])
    while waiting and len(seen) < _MOST:
        path, each = waiting.popleft()
        if type(each) is Tensor or id(each) in seen:  # of tensors there are many, in a list
            continue
        seen.add(id(each))
        kind = _kind(each)
        if kind:
            yield path, kind, each
        if kind in (None, _EPOCHS):
            waiting += [(f"{path}.{name}", part) for name, part in _parts(each)]


def _kind(each: Any) -> _Kind | None:
    numpy = sys.modules.get("numpy")
    if isinstance(each, torch.Generator):
        return _TORCHS
    if isinstance(each, random.Random):
        return _PYTHONS
    if numpy and isinstance(each, numpy.random.Generator):
        return _NUMPYS
    if numpy and isinstance(each, numpy.random.RandomState):
        return _OLD_NUMPYS
    if _has_state(each):
        return _STATEFUL
    return _EPOCHS if hasattr(each, "set_epoch") and hasattr(each, "epoch") else None


def _has_state(each: Any) -> bool:
    is_learners = isinstance(each, (nn.Module, Optimizer)) or hasattr(each, "callbacks")
    if is_learners or isinstance(each, (type, ShardedBatches)):
        return False
    return hasattr(each, "state_dict") and hasattr(each, "load_state_dict")


def _parts(each: Any) -> list[tuple[str, Any]]:
    """What may hold a generator, by name: not what is plain, large, or of a model."""
    if isinstance(each, Mapping):
        return [(str(name), part) for name, part in each.items()] if len(each) <= _LONG else []
    if isinstance(each, (list, tuple)):
        return [(str(i), part) for i, part in enumerate(each)] if len(each) <= _LONG else []
    if isinstance(each, partial):
        return [("func", each.func), ("args", each.args), ("keywords", each.keywords)]
    if isinstance(each, MethodType):
        return [("self", each.__self__)]
    if isinstance(each, (type, nn.Module, Optimizer, Tensor, FunctionType, ModuleType)):
        return []
    return sorted(vars(each).items()) if hasattr(each, "__dict__") else []


def _as_lists(state: Any) -> Any:
    """With arrays as lists of numbers."""
    if isinstance(state, dict):
        return {key: _as_lists(value) for key, value in state.items()}
    return state.tolist() if hasattr(state, "tolist") else state
