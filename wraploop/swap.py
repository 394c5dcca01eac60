"""Other models, optimizers, data or callbacks for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from wraploop import named
from wraploop.order import PROVIDED

if TYPE_CHECKING:
    from wraploop.learner import Learner


class Swap(Protocol):
    """Puts something else in place of a part of the learner."""

    def in_use(self, learner: Learner) -> AbstractContextManager[Any]:
        """While open, it is in place."""
        ...


_AS_GIVEN: dict[str, Callable[[Learner, Any], Any]] = {
    "model": lambda learner, given: named.models(given),
    "optimizer": lambda learner, given: named.optimizers(learner.model, given),
    "loss_fn": lambda learner, given: named.loss_fn(given),
    "data": lambda learner, given: named.data(given),
}


@contextmanager
def swap(learner: Learner, new: Mapping[str, Any]) -> Iterator[None]:
    """While open, the learner has what is in `new`.

    Raises:
        TypeError: a name that cannot be swapped.
    """
    names = [*_AS_GIVEN, "callbacks"]
    unknown = [name for name in new if name not in names]
    if unknown:
        raise TypeError(f"Cannot swap {unknown}; what can be is {', '.join(names)}.")
    before, listed = dict(vars(learner)), learner.callbacks.listed
    try:
        for name, taken in _AS_GIVEN.items():
            if name in new:
                setattr(learner, name, taken(learner, new[name]))
        if "callbacks" in new:
            given = list(new["callbacks"])
            _forget_what_ends(learner, listed, given)
            learner.callbacks.set(given)
        yield
    finally:
        if "callbacks" in new:
            learner.callbacks.set(listed)
            _put_back_what_was_written(learner, before)
        for name in _AS_GIVEN:
            setattr(learner, name, before[name])


def _forget_what_ends(learner: Learner, old: list[Any], given: list[Any]) -> None:
    """Takes away what only new callbacks will write, so that they begin their own."""
    stay = [each for each in given if any(each is one for one in old)]
    kept = {path.split(".")[0] for each in stay for path in each.writes}
    written = {path.split(".")[0] for each in given for path in each.writes}
    for name in (written - kept - PROVIDED) & set(vars(learner)):
        delattr(learner, name)


def _put_back_what_was_written(learner: Learner, before: dict[str, Any]) -> None:
    for name in {*vars(learner), *before} - PROVIDED:
        if name in before:
            setattr(learner, name, before[name])
        else:
            delattr(learner, name)
