"""What one step does: the two standard phases, and what a phase of your own is made from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from wraploop.events import BackwardBegin, BackwardEnd, Event, LossBegin
from wraploop.given import check_names, first_make

if TYPE_CHECKING:
    from wraploop.learner import Learner

_FIRST = "_first_attributes"
Batch = Any  # whatever the data yields, as the phase expects it


class Phase(ABC):
    """What a step does with a batch; subclasses write `step`.

    `learner.step` holds the step's state: any attribute may be stored there for callbacks, and
    its losses should be, under the names in `losses`. If the state's rows are not those of the
    first tensor in the batch, store `learner.step.rows` as well: metrics are weighted by it.

    Attributes:
        name: under which history and metrics are kept; the class's name unless given.
        data: the name in `learner.data` of the batches to run over.
        losses: the attributes of `learner.step` that are losses, 0-dim tensors.
        fires: the events that `step` fires; `None` if that is not known.
    """

    name: str = "Phase"
    data: str = ""
    losses: tuple[str, ...] = ("loss",)
    fires: tuple[type[Event], ...] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "step" in vars(cls) and "fires" not in vars(cls):
            cls.fires = None
        if "name" not in vars(cls):
            cls.name = cls.__name__
        check_names(f"{cls.__name__}.losses", cls.losses)
        if isinstance(cls.fires, type):
            name = cls.fires.__name__
            raise TypeError(f"{cls.__name__}.fires is a tuple of events; write ({name},).")

    @abstractmethod
    def step(self, learner: Learner, batch: Batch) -> None:
        """Runs one step on `batch`, storing in `learner.step` what callbacks should see."""

    def abandon(self, learner: Learner) -> None:  # noqa: B027  most steps leave nothing behind
        """Drops what a step left behind that did not come to its end."""

    def state_dict(self) -> dict[str, Any]:
        """What has to be saved for the phase to go on from here.

        Unless overridden, the attributes that have changed since a fit first began with it, as a
        counter of its own does: those that are numbers, text or tensors.
        """
        first, now = vars(self).get(_FIRST, {}), _attributes(self)
        return {name: now[name] for name in now if not _is_same(now[name], first.get(name))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` has returned."""
        for name, value in state.items():
            now = vars(self).get(name)
            if isinstance(value, torch.Tensor) and isinstance(now, torch.Tensor):
                value = value.to(now.device)
            vars(self)[name] = value

    def note(self) -> None:
        """Remembers what its attributes are before it runs; the learner calls it, and only once."""
        if _FIRST not in vars(self):
            first = _attributes(self)
            vars(self)[_FIRST] = {
                name: value.clone() if isinstance(value, torch.Tensor) else value
                for name, value in first.items()
            }

    def mode(self, models: Iterable[nn.Module]) -> AbstractContextManager[Any]:
        """While open, the modules and the grad mode are as this phase wants them."""
        return nullcontext()


def _attributes(phase: Phase) -> dict[str, Any]:
    """Its attributes that are plain, and so can be saved."""
    plain = (int, float, str, torch.Tensor, type(None))
    return {name: value for name, value in vars(phase).items() if isinstance(value, plain)}


def _is_same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return a is b or (type(a) is type(b) and not isinstance(a, torch.Tensor) and a == b)


class AbstractTrainingPhase(Phase):
    """A phase that trains: train mode, gradients on.

    A model that already is in train mode keeps the flags of its parts, so a BatchNorm that was
    put in eval mode on purpose stays so. Afterwards every flag is what it was.
    """

    data = "training"

    def mode(self, models: Iterable[nn.Module]) -> AbstractContextManager[Any]:
        """Train mode and gradients."""
        return _mode(list(models), train=True)


class AbstractValidationPhase(Phase):
    """A phase that looks: eval mode, no gradients. Afterwards every flag is what it was."""

    data = "validation"

    def mode(self, models: Iterable[nn.Module]) -> AbstractContextManager[Any]:
        """Eval mode and no gradients."""
        return _mode(list(models), train=False)


class TrainingPhase(AbstractTrainingPhase):
    """Supervised training on batches of `(inputs, targets)`.

    A step that is cancelled before its update leaves weights as they were, and no gradients.
    """

    fires = (LossBegin, BackwardBegin, BackwardEnd)

    def step(self, learner: Learner, batch: Batch) -> None:
        """Forward, loss, backward, update."""
        state = learner.step
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            raise _no_pair(self, batch)
        state.inputs, state.targets = batch
        state.outputs = learner.model(state.inputs)
        learner.handle(LossBegin())
        state.loss = learner.loss_fn(state.outputs, state.targets)
        learner.handle(BackwardBegin())
        state.loss.backward()
        learner.handle(BackwardEnd())
        learner.optimizer.step()
        learner.optimizer.zero_grad()

    def abandon(self, learner: Learner) -> None:
        """Drops the gradients, which the next step would add to."""
        for optimizer in learner.optimizers.values():
            optimizer.zero_grad()


class ValidationPhase(AbstractValidationPhase):
    """Outputs and loss on batches of `(inputs, targets)`; nothing is changed."""

    fires = (LossBegin,)

    def step(self, learner: Learner, batch: Batch) -> None:
        """Forward and loss."""
        state = learner.step
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            raise _no_pair(self, batch)
        state.inputs, state.targets = batch
        state.outputs = learner.model(state.inputs)
        learner.handle(LossBegin())
        state.loss = learner.loss_fn(state.outputs, state.targets)


def standard_phases(data: Mapping[str, Any]) -> list[Phase]:
    """Training and, where there is data for it, validation."""
    return [TrainingPhase(), *[ValidationPhase()] * ("validation" in data)]


def checked_phase(phase: Any) -> Phase:
    """Returns `phase`.

    Raises:
        TypeError: it is none.
    """
    if isinstance(phase, Phase):
        return phase
    if isinstance(phase, Iterable) and not isinstance(phase, (str, type)):
        raise TypeError(
            f"Expected a Phase, and got a {type(phase).__name__}. Batches come behind the phase, "
            "or as `batches=...`."
        )
    raise TypeError(f"Expected a Phase, and got {phase!r}.{first_make(phase)}")


def no_loss_fn(*_: Any) -> Any:
    """Stands in for the loss function of a learner that has none."""
    raise TypeError(
        "This phase needs a loss function, and the learner has none: Learner(model, loss_fn, ...)."
    )


def _no_pair(phase: Phase, batch: Batch) -> TypeError:
    return TypeError(
        f"{phase.name} takes batches of (inputs, targets), and got {_describe(batch)}. "
        "Let the data yield pairs, or write a phase whose `step` takes such batches."
    )


def _describe(batch: Batch) -> str:
    if isinstance(batch, torch.Tensor):
        return f"a tensor of shape {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} with the keys {list(batch)}"
    size = f" of length {len(batch)}" if hasattr(batch, "__len__") else ""
    return f"a {type(batch).__name__}{size}"


@contextmanager
def _mode(models: list[nn.Module], train: bool) -> Iterator[None]:
    """While open, models and gradients are in train or eval mode; then all flags as they were."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            if not (train and model.training):
                model.train(train)
        with torch.set_grad_enabled(train):
            yield
    finally:
        for module, flag in flags:
            module.training = flag
