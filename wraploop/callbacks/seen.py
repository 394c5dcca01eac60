"""What the first step of a phase shows, run in a rehearsal."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from typing_extensions import override

from wraploop import processes
from wraploop.callback import on
from wraploop.callbacks.updates import AroundUpdates, parameters_of
from wraploop.events import StepBegin
from wraploop.phases import AbstractValidationPhase, Phase
from wraploop.rehearsal import NotCopyable, rehearsed

if TYPE_CHECKING:
    from wraploop.learner import Learner

_ATTEMPTS = 4  # to meet the other processes: each may have told of a failure twice before


@dataclass
class Seen:
    """What the first step of a phase has shown.

    Attributes:
        phase: the phase.
        validates: whether there is validation data.
        note: why no step was tried, if none was; then the rest is empty.
        batch: a copy of the first batch, as the step got it.
        has_batch: whether there was one.
        tried: whether a step was begun with it.
        error: what reading the batch or the step raised.
        ran: whether the step came to its end.
        stored: what the step stored in its state.
        gradient_norms: of each update, the optimizer's name and the norm of its gradients.
        rates: the learning rates.
        trainable: names of the parameters that can be trained.
        without_gradient: names of those that had no gradient at any update.
        unchanged: names of those that are what they were.
    """

    phase: Phase
    validates: bool = False
    note: str = ""
    batch: Any = None
    has_batch: bool = False
    tried: bool = False
    error: Exception | None = None
    ran: bool = False
    stored: dict[str, Any] = field(default_factory=dict)
    gradient_norms: list[tuple[str, float]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    trainable: list[str] = field(default_factory=list)
    without_gradient: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)

    @property
    def losses(self) -> dict[str, Any]:
        """The phase's losses that the step stored."""
        return {name: self.stored[name] for name in self.phase.losses if name in self.stored}


def first_step(learner: Learner) -> Seen:
    """Runs a step of the running phase on the first of its batches, on copies; nothing is changed.

    Callbacks that write `step.batch` take part, as copies, so that the step gets its batch as it
    needs it. All processes run the step, or none does.
    """
    phases, batches = learner.phases, learner.running.batches
    validates = any(isinstance(each, AbstractValidationPhase) for each in phases)
    seen = Seen(learner.phase, validates or "validation" in learner.data)
    seen.note = _why_not(batches)
    if processes.any(seen.note != "", "what SanityCheck can try"):
        seen.note = seen.note or "another process could read none without losing it"
        return seen
    witness = _Witness()
    with ExitStack() as stack:

        def read() -> None:
            helpers = [copy.deepcopy(c) for c in learner.callbacks if "step.batch" in c.writes]
            with_callbacks = {"callbacks": [*helpers, witness]}
            opened.append(stack.enter_context(rehearsed(learner, seen.phase, **with_callbacks)))
            for batch in batches:
                seen.batch, seen.has_batch = copy.deepcopy(batch), True
                return

        opened: list[Phase] = []
        seen.error = _together(read)
        if isinstance(seen.error, NotCopyable):
            seen.note, seen.error = str(seen.error), None
        if processes.any(not seen.has_batch or seen.error is not None):
            return seen
        seen.tried = True
        seen.error = _together(lambda: _run(learner, opened[0], seen, witness))
        seen.ran = seen.ran and seen.error is None
    return seen


def _why_not(batches: Any) -> str:
    if batches is None:
        return "this epoch's loop was given no batches to take one from"
    if isinstance(batches, Iterator):
        return "the batches are an iterator, which would lose the one that is tried"
    return ""


def _run(learner: Learner, phase: Phase, seen: Seen, witness: _Witness) -> None:
    """Runs the step, and compares before and after."""
    with learner.run_epoch(phase, learner.running.batches):
        before = {
            name: None if is_lazy(p) else p.detach().clone() for name, p in _trainable(learner)
        }
        parameters = dict(_trainable(learner))
        seen.trainable = list(before)
        seen.rates = [
            float(group.get("lr", math.nan))
            for optimizer in learner.optimizers.values()
            for group in optimizer.param_groups
        ]
        witness.parameters = parameters
        try:
            seen.ran = not learner.run_step(phase, seen.batch).cancelled
        finally:
            witness.look()
            seen.stored, seen.gradient_norms = witness.stored, witness.norms
            seen.batch = seen.stored.get("batch", seen.batch)
            seen.without_gradient = [n for n in before if n not in witness.with_gradient]
            seen.unchanged = [
                n
                for n, old in before.items()
                if old is not None and torch.equal(old, parameters[n])
            ]
            witness.parameters, witness.stored = {}, {}  # the learner goes on holding the witness


def _trainable(learner: Learner) -> Iterator[tuple[str, Tensor]]:
    """The parameters that can be trained, with names that tell the models apart."""
    for model, module in learner.models.items():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                yield f"{model}.{name}" if len(learner.models) > 1 else name, parameter


class _Witness(AroundUpdates):
    """Looks at the gradients of every update."""

    reads = ("optimizer", "step")

    def __init__(self) -> None:
        super().__init__()
        self.stored: dict[str, Any] = {}
        self.parameters: dict[str, Tensor] = {}
        self.with_gradient: set[str] = set()
        self.norms: list[tuple[str, float]] = []
        self._is_seen = False

    @on(StepBegin)
    def begin(self, learner: Learner) -> None:
        """What the step will store is found here."""
        self.stored = self.stored or vars(learner.step)

    def look(self) -> None:
        """Sees which parameters have a gradient now."""
        self.with_gradient |= {n for n, p in self.parameters.items() if p.grad is not None}

    @override
    def before(self, learner: Learner, name: str, optimizer: Optimizer) -> None:
        self.look()
        gradients = [p.grad for p in parameters_of(optimizer) if p.grad is not None]
        self._is_seen = bool(gradients)
        if gradients:
            self.norms.append((name, math.hypot(*map(_norm, gradients))))

    @override
    def after(self, learner: Learner, name: str, optimizer: Optimizer) -> None:
        if not self._is_seen:  # they came by a closure
            self.before(learner, name, optimizer)


def _norm(gradient: Tensor) -> float:
    values = gradient.detach().coalesce().values() if gradient.is_sparse else gradient.detach()
    dtype = torch.promote_types(values.abs().dtype, torch.float32)
    return float(values.abs().to(dtype).norm())


def _together(act: Callable[[], None]) -> Exception | None:
    """What `act` raised here or, if nothing, in another process; all go on from here together."""
    error: Exception | None = None
    try:
        act()
    except Exception as raised:
        error = raised
    if processes.world_size() == 1:
        return error
    if error is not None and not isinstance(error, processes.PeerError):
        processes.Channel().fail(error)
    for _ in range(_ATTEMPTS):  # where one process told of a failure, the others hear it here
        try:
            processes.any(False)
            return error
        except processes.PeerError as raised:
            error = error or raised
    return error
