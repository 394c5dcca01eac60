"""Callbacks that act around updates: whenever an optimizer steps in a training step."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from wraploop.callback import Callback, on
from wraploop.events import Event, StepBegin, StepEnd
from wraploop.phases import AbstractTrainingPhase

if TYPE_CHECKING:
    from wraploop.learner import Learner


class LateUpdateEnd(Event):
    """The update outside of a step has been made."""


class LateUpdateBegin(Event):
    """An update is about to be made outside of a step."""

    end = LateUpdateEnd


class AroundUpdates(Callback):
    """Has `before` and `after` called around each update that a training step makes.

    An update is a call of `step` of one of the learner's optimizers, wherever the phase has it;
    the phase needs no events for it. Gradients are complete then, of all processes too.

    Attributes:
        needs_gradients: it acts on gradients, which an optimizer with a closure has yet to make.
    """

    needs_gradients = False
    may_miss = (LateUpdateBegin, LateUpdateEnd)

    def __init__(self) -> None:
        self._hooks: list[Any] = []
        self._depth = 0

    def before(self, learner: Learner, name: str, optimizer: Optimizer) -> None:
        """Called before the optimizer called `name` makes its update."""

    def after(self, learner: Learner, name: str, optimizer: Optimizer) -> None:
        """Called after it."""

    @on(StepBegin, AbstractTrainingPhase)
    @on(LateUpdateBegin, AbstractTrainingPhase)
    def watch(self, learner: Learner) -> None:
        """Looks at the optimizers while a step runs."""
        self._depth += 1
        if self._depth > 1:  # a step within a step
            return
        for name, optimizer in learner.optimizers.items():
            before = partial(self._before, learner, name)
            after = partial(self._after, learner, name)
            self._hooks.append(optimizer.register_step_pre_hook(before))
            self._hooks.append(optimizer.register_step_post_hook(after))

    @on(StepEnd, AbstractTrainingPhase)
    @on(LateUpdateEnd, AbstractTrainingPhase)
    def unwatch(self, learner: Learner) -> None:
        """Looks away."""
        self._depth = max(0, self._depth - 1)  # it may have joined in the middle of a step
        while self._hooks and not self._depth:
            self._hooks.pop().remove()

    def _before(self, learner: Learner, name: str, optimizer: Any, args: Any, kwargs: Any) -> None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if self.needs_gradients and closure is not None:
            raise TypeError(
                f"{self!r} acts on gradients before the update, and {type(optimizer).__name__} "
                "computes its gradients within it, by a closure. Leave one of the two out."
            )
        if self._is_there(learner):
            self.before(learner, name, optimizer)

    def _after(self, learner: Learner, name: str, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._is_there(learner):
            self.after(learner, name, optimizer)

    def _is_there(self, learner: Learner) -> bool:
        """Whether it still is the learner's; taken out within a step, it sees no end of it."""
        if learner.calls(self):
            return True
        self._depth = 0
        while self._hooks:
            self._hooks.pop().remove()
        return False


def parameters_of(optimizer: Optimizer) -> list[Any]:
    """All parameters that an optimizer holds."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def has_update(optimizer: Optimizer) -> bool:
    """Whether an update changes anything: some parameter has a gradient."""
    return any(p.grad is not None for p in parameters_of(optimizer))
