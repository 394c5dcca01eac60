"""Logging tensors: histograms of parameters, and images. When, and at which step, as in `logs`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from wraploop.callback import Callback, Handler, on
from wraploop.callbacks.due import checked_loggers, is_due
from wraploop.callbacks.loggers import Logger
from wraploop.events import EpochEnd, StepEnd
from wraploop.given import whole
from wraploop.phases import AbstractTrainingPhase, Phase, ValidationPhase
from wraploop.processes import random_state

if TYPE_CHECKING:
    from wraploop.learner import Learner


class LogHistograms(Callback):
    """Logs how the parameters of every model are distributed: `generator/0.weight`.

    A model alone is called `model`. Parameters are copied to memory one after the other.

    Args:
        loggers: where to; each takes histograms.
        every_steps: how often.
    """

    reads = ("history", "model")

    def __init__(self, *loggers: Logger, every_steps: int = 100) -> None:
        self.loggers = checked_loggers(self, loggers, "histograms")
        self.every_steps = whole("every_steps", every_steps)

    @on(StepEnd, AbstractTrainingPhase)
    def log(self, learner: Learner) -> None:
        """Logs all parameters."""
        if not is_due(learner, self.loggers, self.every_steps):
            return
        for model_name, model in learner.models.items():
            for name, parameter in model.named_parameters():
                for logger in self.loggers:
                    tag = f"{model_name}/{name}"
                    logger.histogram(tag, parameter, learner.history.training_steps)


class LogImages(Callback):
    """Logs the images that a function of the learner returns, at the end of epochs.

    It changes nothing of the training: the function is called with the models in eval mode,
    without gradients, and the random state is put back. It is called on every rank, as models
    may communicate.

    Args:
        function: takes the learner and returns images, shape `(N, C, H, W)`, `(N, H, W)`,
            `(C, H, W)` or `(H, W)`, logged as `images/0` and so on where there is an `N`, else as
            `images`. Three axes are one image if the first is 1 or 3. Values as `pixels` takes.
        loggers: where to; each takes images.
        every_epochs: how often.
        name: before each image's number.
        phase: the phases at whose epochs' end.
        reads: names of what the function reads.

    Raises:
        ValueError: the function returns another shape.
    """

    def __init__(
        self,
        function: Callable[[Learner], Tensor],
        *loggers: Logger,
        every_epochs: int = 1,
        name: str = "images",
        phase: type[Phase] = AbstractTrainingPhase,
        reads: tuple[str, ...] = ("model",),
    ) -> None:
        self.loggers = checked_loggers(self, loggers, "images")
        self.every_epochs = whole("every_epochs", every_epochs)
        self.function, self.name, self.phase = function, name, phase
        self.reads = ("history", *dict.fromkeys(("model", *reads)))

    @override
    def handlers(self) -> list[Handler]:
        return [(EpochEnd, self.phase, self.log)]

    def log(self, learner: Learner) -> None:
        """Makes images and logs them, unless the epoch is broken."""
        if learner.running.broken or learner.history[learner.phase].epochs % self.every_epochs:
            return
        with random_state.kept(), ValidationPhase().mode(learner.models.values()):
            images = self.function(learner)
        for name, image in _named_images(self.name, images):
            for logger in self.loggers:
                logger.image(name, image, learner.history.training_steps)


def _named_images(name: str, images: Any) -> Iterator[tuple[str, Tensor]]:
    is_one = isinstance(images, Tensor) and images.ndim == 3 and images.shape[0] in (1, 3)
    if not isinstance(images, Tensor) or images.ndim not in (2, 3, 4):
        came = f"the shape {tuple(images.shape)}" if isinstance(images, Tensor) else repr(images)
        raise ValueError(
            f"The function of LogImages returns a tensor of shape (N, C, H, W), (N, H, W), "
            f"(C, H, W) or (H, W), and returned {came}."
        )
    if images.ndim == 2 or is_one:
        return iter([(name, images)])
    return ((f"{name}/{index}", image) for index, image in enumerate(torch.unbind(images)))
