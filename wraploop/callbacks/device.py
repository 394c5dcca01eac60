"""Where batches go, and models that are not wrapped."""

from __future__ import annotations

import copy
import importlib
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wraploop import processes
from wraploop.callback import Callback, on
from wraploop.events import EpochBegin, StepBegin

if TYPE_CHECKING:
    from wraploop.learner import Learner


class ToDevice(Callback):
    """Moves models to a device before an epoch, and each batch before its step.

    Models are moved in place, with what optimizers know about their parameters; a model that is
    there already is left alone. A wrapper that has devices of its own needs no `ToDevice`, except
    for batches.

    Args:
        device: where to; unless given, this process's own accelerator, or the CPU without one.
        models: whether models are moved, or only batches.

    Raises:
        RuntimeError: as an epoch begins, parameters cannot be moved in place, to `"meta"` say.
    """

    reads = ("model", "optimizer")
    writes = ("step.batch",)

    def __init__(self, device: torch.device | str | None = None, *, models: bool = True) -> None:
        self.device = torch.device(device) if device is not None else _own_device()
        self.models = models
        self._send = importlib.import_module("accelerate.utils.operations").send_to_device

    @on(EpochBegin)
    def move_models(self, learner: Learner) -> None:
        """Moves the models that are elsewhere."""
        if not self.models:
            return
        moved = False
        for name, model in learner.models.items():
            tensors = [*model.parameters(), *model.buffers()]
            if any(not _is_on(tensor, self.device) for tensor in tensors):
                self._move(name, model)
                moved = True
        for optimizer in learner.optimizers.values() if moved else ():
            _move_state(optimizer)

    def _move(self, name: str, model: nn.Module) -> None:
        before = list(model.parameters())
        model.to(self.device)
        if any(new is not old for new, old in zip(model.parameters(), before, strict=True)):
            raise RuntimeError(
                f"The parameters of {name} cannot be moved to {self.device} in place, and its "
                "optimizer holds those that there were. Move it before you make the learner."
            )

    @on(StepBegin)
    def move_batch(self, learner: Learner) -> None:
        """Moves every tensor in the batch."""
        learner.step.batch = self._sent(learner.step.batch)

    def _sent(self, nest: Any) -> Any:
        if hasattr(nest, "to"):
            return self._send(nest, self.device, non_blocking=True)
        if isinstance(nest, (tuple, list)):
            parts = map(self._sent, nest)
            return type(nest)(*parts) if hasattr(nest, "_fields") else type(nest)(parts)
        if isinstance(nest, dict):
            sent = copy.copy(nest)
            sent.update({key: self._sent(each) for key, each in nest.items()})
            return sent
        if is_dataclass(nest) and not isinstance(nest, type):
            sent = copy.copy(nest)
            for field in fields(nest):
                object.__setattr__(sent, field.name, self._sent(getattr(nest, field.name)))
            return sent
        return self._send(nest, self.device, non_blocking=True)

    def __repr__(self) -> str:
        return f"ToDevice({str(self.device)!r})"


def _own_device() -> torch.device:
    device = processes.device()
    if device is None and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
    return device or torch.device("cpu")


def _is_on(tensor: Tensor, device: torch.device) -> bool:
    same_kind = tensor.device.type == device.type
    return same_kind and device.index in (None, tensor.device.index)


def _move_state(optimizer: Optimizer) -> None:
    """Moves what an optimizer knows about its parameters to where they are."""
    if optimizer.state:
        optimizer.load_state_dict(optimizer.state_dict())  # which does that
