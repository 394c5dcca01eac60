"""Trying steps out: on copies, and afterwards everything is as before."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

from wraploop.phases import Phase, checked_phase
from wraploop.processes import random_state

if TYPE_CHECKING:
    from wraploop.learner import Learner

_LOOP = ("step", "in_step", "stopped", "phases")  # which steps, epochs and fits leave behind


class NotCopyable(TypeError):
    """Something that a rehearsal needs a copy of cannot be copied."""


@contextmanager
def rehearsed(learner: Learner, phase: Phase, **swapped: Any) -> Iterator[Phase]:
    """While open, whatever the learner runs happens to copies; then everything is as before.

    The models, optimizers, loss function and phase are copied together: the copied optimizers hold
    the copied models' parameters, which begin without gradients. There are no callbacks, unless
    some are given. Put back are random states, those of what draws the data too, and what the
    loop keeps. It may be opened anywhere, in a callback of a running fit too. What functions close
    over and files hold is not copied.

    Args:
        learner: the learner, whose data stay what they are.
        phase: the phase to copy; the copy is what is yielded.
        swapped: as `learner.using` takes them; mostly `callbacks`.

    Raises:
        NotCopyable: when it is opened, something cannot be copied.

    Examples:
        >>> from torch import nn
        >>> from wraploop.learner import Learner
        >>> from wraploop.phases import TrainingPhase
        >>> learner = Learner(nn.Linear(1, 1), nn.L1Loss(), optimizer=torch.optim.SGD)
        >>> before = learner.model.weight.item()
        >>> with rehearsed(learner, TrainingPhase()) as phase:
        ...     state = learner.run_step(phase, (torch.ones(4, 1), torch.zeros(4, 1)))
        ...     learner.model.weight.item() == before
        False
        >>> learner.model.weight.item() == before
        True
    """
    rehearsal = _Rehearsal(checked_phase(phase), swapped)
    with learner.using(rehearsal):
        yield rehearsal.phase


class _Rehearsal:
    """What `learner.using` puts in place, for which it gives the learner itself."""

    def __init__(self, phase: Phase, swapped: dict[str, Any]) -> None:
        self.phase, self._swapped = phase, swapped

    @contextmanager
    def in_use(self, learner: Learner) -> Iterator[None]:
        """While open, the learner has copies."""
        running = [] if learner.running is None else [learner.running.batches]
        with ExitStack() as stack:
            stack.enter_context(random_state.kept())
            stack.enter_context(_kept_loop(learner))
            for batches in [*learner.data.values(), *running]:
                stack.enter_context(kept_draws(batches))
            copies, self.phase = _copied(learner, self.phase)
            stack.enter_context(learner.using(**{**copies, "callbacks": [], **self._swapped}))
            yield


@contextmanager
def kept_draws(batches: Any) -> Iterator[None]:
    """Afterwards, what draws `batches` draws the same as it would have before.

    Loaders, samplers and datasets have the attributes that they had, generators the state. While
    it is open, loaders start workers of their own.
    """
    sources, generators = _sources(batches)
    before = [(source, dict(vars(source))) for source in sources]
    put_back = [_as_it_is(generator) for generator in generators]
    for source in sources:
        if isinstance(source, DataLoader):
            source._iterator = None  # with persistent workers, which may be at work
    try:
        yield
    finally:
        for source, attributes in before:
            vars(source).clear()
            vars(source).update(attributes)
        for put in put_back:
            put()


def _sources(batches: Any) -> tuple[list[Any], list[Any]]:
    """What draws `batches`, and the generators that it draws from."""
    sources, generators, waiting = [], [], [batches]
    for each in waiting:  # which grows
        if _is_generator(each):
            generators.append(each)
        elif hasattr(each, "__dict__") and not any(each is source for source in sources):
            sources.append(each)
            waiting += _parts(each)
    return sources, generators


def _parts(source: Any) -> list[Any]:
    """What an object has that may draw, in lists too; and a loader's dataset, whatever its kind."""
    parts = list(vars(source).values())
    parts += [each for part in parts if isinstance(part, (list, tuple)) for each in part[:_MOST]]
    found = [part for part in parts if isinstance(part, _DRAWS) or _is_generator(part)]
    if isinstance(source, DataLoader):
        found += [source.dataset, source.collate_fn]
    return found


_MOST = 1000  # parts of a list that are looked at
_DRAWS = (DataLoader, Sampler, Dataset)


def _is_generator(thing: Any) -> bool:
    is_numpys = hasattr(type(thing), "bit_generator")
    return isinstance(thing, (torch.Generator, random.Random)) or is_numpys


def _as_it_is(generator: Any) -> Callable[[], Any]:
    """What puts a generator of torch, Python or NumPy back to its state of now."""
    if isinstance(generator, torch.Generator):
        return partial(generator.set_state, generator.get_state())
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    bits = generator.bit_generator
    return partial(setattr, bits, "state", bits.state)


@contextmanager
def _kept_loop(learner: Learner) -> Iterator[None]:
    before = {name: getattr(learner, name) for name in _LOOP}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(learner, name, value)


def _copied(learner: Learner, phase: Phase) -> tuple[dict[str, Any], Phase]:
    """The learner's parts by name, and the phase, copied together."""
    parts = (learner.model, learner.optimizer, learner.loss_fn, phase)
    memo: dict[int, Any] = {id(it): it for it in (learner, *learner.data.values())}
    for model in learner.models.values():
        memo.update(_derived(model))
    try:
        model, optimizer, loss_fn, phase = copy.deepcopy(parts, memo)
        for old in learner.optimizers.values():
            _complete(old, memo)
    except Exception as error:
        raise NotCopyable(
            "Steps are rehearsed on copies of models, optimizers, loss function and phase, and one "
            f"of them cannot be copied ({type(error).__name__}: {error}). Give it a __deepcopy__ "
            "method, or keep what cannot be copied, such as an open iterator, outside of it."
        ) from error
    return {"model": model, "optimizer": optimizer, "loss_fn": loss_fn}, phase


def _derived(model: torch.nn.Module) -> dict[int, Tensor]:
    """Copies, by id, of tensors computed from others and kept, as by `weight_norm`."""
    kept = [value for module in model.modules() for value in vars(module).values()]
    tensors = [value for value in kept if isinstance(value, Tensor) and not value.is_leaf]
    return {id(tensor): tensor.detach().clone() for tensor in tensors}


def _complete(old: Optimizer, memo: dict[int, Any]) -> None:
    """Gives the copy of an optimizer the attributes that torch leaves out, as LBFGS has some."""
    new = memo[id(old)]
    for name, value in vars(old).items():
        if name not in vars(new) and not callable(value):  # a scheduler's `step` would step `old`
            setattr(new, name, copy.deepcopy(value, memo))
