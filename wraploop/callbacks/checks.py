"""Checks of what the first step of a phase has shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from wraploop.callbacks.seen import Seen
from wraploop.phases import AbstractTrainingPhase, Phase
from wraploop.running import number

_MOST = 6  # items of a long list that are described


class NotSeen(Exception):
    """Raised by a check that cannot tell: what it is about was not seen."""


class Check(NamedTuple):
    """Something that the first step of a phase has to show.

    Attributes:
        name: what is so if all is well.
        function: called with what was seen, a `Seen`; returns what is wrong, or `""`.
        is_error: whether training may not begin where it fails.
        phase: the phases in which it is made.

    Examples:
        >>> Check("there are labels", lambda seen: "" if len(seen.batch) == 2 else "no labels")
        Check('there are labels')
    """

    name: str
    function: Callable[[Seen], str]
    is_error: bool = True
    phase: type[Phase] = Phase

    def __repr__(self) -> str:
        return f"Check({self.name!r})"


def described(nest: Any) -> str:
    """What is in a nest of tensors: dtypes and shapes, and the kinds of what else there is.

    Examples:
        >>> import torch
        >>> described((torch.zeros(64, 1, 8, 8), {"label": torch.zeros(64).long(), "name": "a"}))
        "(float32 (64, 1, 8, 8), {'label': int64 (64,), 'name': str})"
        >>> described([1] * 100)
        '[int, int, int, int, int, int, 94 more]'
    """
    if hasattr(nest, "dtype") and hasattr(nest, "shape"):
        return f"{str(nest.dtype).removeprefix('torch.')} {tuple(nest.shape)}"
    if isinstance(nest, Mapping):
        return f"{{{listed(f'{key!r}: {described(nest[key])}' for key in nest)}}}"
    if isinstance(nest, (tuple, list)):
        inside = listed(map(described, nest))
        return f"[{inside}]" if isinstance(nest, list) else f"({inside})"
    return type(nest).__name__


def listed(items: Iterable[str]) -> str:
    """The first of the items, and how many more there are."""
    items = list(items)
    more = [f"{len(items) - _MOST} more"] * (len(items) > _MOST)
    return ", ".join([*items[:_MOST], *more])


def said(error: Exception | None) -> str:
    """An error's kind and message."""
    return f"{type(error).__name__}: {error}"


def is_number(loss: Any) -> bool:
    """Whether it is a number, or a 0-dimensional tensor."""
    return not loss.ndim if isinstance(loss, Tensor) else isinstance(loss, (int, float))


def _need_step(seen: Seen) -> None:
    if not seen.ran:
        raise NotSeen


def _batches(seen: Seen) -> str:
    if seen.note:
        raise NotSeen
    if seen.error and not seen.tried:
        return f"reading one raised {said(seen.error)}"
    return "" if seen.has_batch else "there are none"


def _runs(seen: Seen) -> str:
    if not seen.tried:
        raise NotSeen
    if seen.error:
        return f"it raised {said(seen.error)}"
    return "" if seen.ran else "it was cancelled"


def _losses(seen: Seen) -> str:
    if not seen.losses:
        _need_step(seen)
    wrong = [_wrong_with(name, loss) for name, loss in seen.losses.items()]
    if seen.phase.losses and not seen.losses:
        return f"the step stored none of {', '.join(seen.phase.losses)} in `learner.step`"
    return "; ".join(each for each in wrong if each)


def _wrong_with(name: str, loss: Any) -> str:
    if not is_number(loss):
        hint = ": reduce it, as by `.mean()`" * isinstance(loss, Tensor)
        return f"{name} is {described(loss)}, which is no single number{hint}"
    return "" if math.isfinite(number(loss)) else f"{name} is {number(loss)}"


def _changes(seen: Seen) -> str:
    _need_step(seen)
    if not seen.trainable:
        return "all parameters are frozen"
    if len(seen.unchanged) < len(seen.trainable) or not any(seen.rates):
        return ""
    updates = "no optimizer made an update" if not seen.gradient_norms else "for all the updates"
    return f"all {len(seen.trainable)} that are trained are what they were, and {updates}"


def _all_have_gradients(seen: Seen) -> str:
    _need_step(seen)
    return f"{listed(seen.without_gradient)} got none" if seen.without_gradient else ""


def _finite_gradients(seen: Seen) -> str:
    _need_step(seen)
    bad = [f"norm {norm} ({name})" for name, norm in seen.gradient_norms if not math.isfinite(norm)]
    return ", ".join(bad)


def _validates(seen: Seen) -> str:
    return "" if seen.validates else "there is none: Learner(data=(training, validation))"


_IN_TRAINING: dict[str, Any] = {"phase": AbstractTrainingPhase}
STANDARD_CHECKS = (
    Check("there are batches", _batches),
    Check("the step runs", _runs),
    Check("losses are finite numbers", _losses),
    Check("some parameter changes", _changes, **_IN_TRAINING),
    Check("gradients are finite", _finite_gradients, **_IN_TRAINING),
    Check("every parameter gets a gradient", _all_have_gradients, False, **_IN_TRAINING),
    Check("there is validation data", _validates, False, **_IN_TRAINING),
)
