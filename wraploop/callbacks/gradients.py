"""What happens to gradients between backward and update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer
from typing_extensions import override

from wraploop import processes
from wraploop.callback import on
from wraploop.callbacks.meters import rows_of
from wraploop.callbacks.updates import AroundUpdates, LateUpdateBegin, LateUpdateEnd, parameters_of
from wraploop.events import EpochEnd
from wraploop.given import check_numbers, whole
from wraploop.phases import AbstractTrainingPhase

if TYPE_CHECKING:
    from wraploop.learner import Learner


class ClipGradients(AroundUpdates):
    """Bounds the gradients of each update, those of one optimizer together.

    With `AccumulateGradients` it bounds what has been accumulated. The norms before clipping are
    in `learner.step.gradient_norm`, by the optimizer's name.

    Args:
        max_norm: longer gradients are scaled to this norm, by `torch.nn.utils.clip_grad_norm_`.
        max_value: each element is clamped to plus or minus this, before the norm is taken.
        norm_type: 2, or another p, or infinity.

    Raises:
        ValueError: there is no bound, or a bound is not positive.
    """

    reads = ("optimizer", "step.accumulated")
    writes = ("step.gradient_norm",)
    needs_gradients = True

    def __init__(
        self,
        max_norm: float = float("inf"),
        *,
        max_value: float = float("inf"),
        norm_type: float = 2.0,
    ) -> None:
        super().__init__()
        check_numbers(max_norm=max_norm, max_value=max_value, norm_type=norm_type)
        if not (max_norm > 0 and max_value > 0) or max_norm == max_value == float("inf"):
            raise ValueError(
                "Give a positive bound, max_norm or max_value or both, "
                f"and got {max_norm=}, {max_value=}."
            )
        self.max_norm, self.max_value, self.norm_type = max_norm, max_value, norm_type

    @override
    def before(self, learner: Learner, name: str, optimizer: Optimizer) -> None:
        parameters = [p for p in parameters_of(optimizer) if p.grad is not None]
        if not parameters:
            return
        if self.max_value < float("inf"):
            clip_grad_value_(parameters, self.max_value)
        norm = clip_grad_norm_(parameters, self.max_norm, self.norm_type)
        norms = getattr(learner.step, "gradient_norm", {})
        learner.step.gradient_norm = {**norms, name: norm}


class AccumulateGradients(AroundUpdates):
    """Makes one update from the gradients of several steps, as if their batches were one.

    The phase stays as it is: between, its `optimizer.step()` finds no gradients, and so changes
    nothing, moments and weight decay included; each optimizer counts its own updates. What is left
    at the end of an epoch makes an update of its own. Schedulers count steps, not updates.

    Args:
        steps: how many make one update.
        reduction: that of the loss. For `"mean"`, a mean over rows, each step weighs as many rows
            as it has, over all processes; with `"sum"` gradients are added.

    Raises:
        ValueError: fewer than 1 step, or another reduction.
    """

    reads = ("optimizer", "step.batch", "step.rows")
    writes = ("step.accumulated",)
    fires = (LateUpdateBegin, LateUpdateEnd)
    needs_gradients = True

    def __init__(self, steps: int, *, reduction: str = "mean") -> None:
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise ValueError(f"Expected the reduction 'mean' or 'sum', and got {reduction!r}.")
        self.steps, self.reduction = whole("steps", steps), reduction
        self._sums: dict[str, _Sum] = {}
        self._is_flushing = False
        self._taken: dict[Tensor, Tensor] = {}

    @override
    def before(self, learner: Learner, name: str, optimizer: Optimizer) -> None:
        if self._is_flushing:
            return
        so_far = self._sums.setdefault(name, _Sum())
        weight = 1.0
        if self.reduction == "mean":
            weight = processes.sum(rows_of(vars(learner.step)), "the rows of a step")
        self._taken = so_far.add(optimizer, weight)
        is_due = so_far.steps == self.steps
        if is_due:
            self._give_back(name, optimizer)
        learner.step.accumulated = 0 if is_due else so_far.steps

    @override
    def after(self, learner: Learner, name: str, optimizer: Optimizer) -> None:
        for parameter, gradient in self._taken.items():  # which another optimizer may hold too
            parameter.grad = gradient
        self._taken = {}

    @on(EpochEnd, AbstractTrainingPhase)
    def flush(self, learner: Learner) -> None:
        """Makes an update from what is left, unless the epoch is broken."""
        if not learner.running.broken and self._sums:
            self._is_flushing, learner.step.accumulated = True, 0
            learner.handle(LateUpdateBegin())  # so that clipping and averages see it
            try:
                for name, optimizer in learner.optimizers.items():
                    if name in self._sums:
                        self._give_back(name, optimizer)
                        optimizer.step()
                        optimizer.zero_grad()
            finally:
                learner.handle(LateUpdateEnd())
                self._is_flushing = False
        self._sums = {}

    def _give_back(self, name: str, optimizer: Optimizer) -> None:
        so_far = self._sums.pop(name)
        factor = 1 / so_far.weight if self.reduction == "mean" and so_far.weight else 1.0
        parameters = parameters_of(optimizer)
        for index, gradient in so_far.gradients.items():
            parameters[index].grad = gradient.to(parameters[index].device) * factor

    @override
    def state_dict(self) -> dict[str, Any]:
        return {name: dict(vars(so_far)) for name, so_far in self._sums.items()}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sums = {name: _Sum(**saved) for name, saved in state.items()}


class _Sum:
    """The sum of gradients over some steps, by the parameter's number in its optimizer."""

    def __init__(
        self, steps: int = 0, weight: float = 0.0, gradients: Mapping[int, Tensor] | None = None
    ) -> None:
        self.steps, self.weight, self.gradients = steps, weight, dict(gradients or {})

    @torch.no_grad()
    def add(self, optimizer: Optimizer, weight: float) -> dict[Tensor, Tensor]:
        """Takes the parameters' gradients away, and returns them."""
        taken: dict[Tensor, Tensor] = {}
        self.steps += 1
        self.weight += weight
        for index, parameter in enumerate(parameters_of(optimizer)):
            if parameter.grad is None:
                continue
            taken[parameter] = parameter.grad
            weighted = parameter.grad * weight
            so_far = self.gradients.get(index)
            is_first = so_far is None
            self.gradients[index] = weighted if is_first else so_far.to(weighted.device) + weighted
            parameter.grad = None
        return taken
