"""Pictures of how training goes, written while it does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from wraploop import processes
from wraploop.callback import Callback, on
from wraploop.events import EpochEnd, FitBegin, FitEnd
from wraploop.given import check_names, whole
from wraploop.images import image_grid, save_image
from wraploop.phases import AbstractTrainingPhase, Phase, ValidationPhase
from wraploop.plots import plot_metrics, save_figure
from wraploop.processes import random_state

if TYPE_CHECKING:
    from wraploop.learner import Learner


class PlotMetrics(Callback):
    """Writes `plot_metrics(learner)` to a file, over and over, whole each time; on rank 0.

    In a fit it does so after the last of the phases, and at the end if there is something new; an
    epoch that is run by itself is written after it. Broken epochs change nothing.

    Args:
        path: of the file; its ending says in which format.
        every_epochs: written after every so many-th epoch of the phase.

    Raises:
        ValueError: `every_epochs` is below 1.
    """

    reads = ("history", "metrics", "phases")

    def __init__(self, path: str | Path, every_epochs: int = 1) -> None:
        self.path, self.every_epochs = Path(path), whole("every_epochs", every_epochs)
        self._in_fit = self._has_news = False

    @on(FitBegin)
    def begin(self, learner: Learner) -> None:
        """From now on epochs belong to a fit."""
        self._in_fit, self._has_news = True, False

    @on(EpochEnd)
    def follow(self, learner: Learner) -> None:
        """Writes the file, if it is time to."""
        if learner.running.broken:
            return
        self._has_news = True
        is_last = not self._in_fit or learner.phase is learner.phases[-1]
        if is_last and learner.history[learner.phase].epochs % self.every_epochs == 0:
            self._write(learner)

    @on(FitEnd)
    def end(self, learner: Learner) -> None:
        """Writes the file, unless it tells everything already."""
        self._in_fit = False
        if self._has_news:
            self._write(learner)

    def _write(self, learner: Learner) -> None:
        self._has_news = False
        if processes.is_main_process():
            save_figure(self.path, plot_metrics(learner))

    def __repr__(self) -> str:
        return f"PlotMetrics({str(self.path)!r})"


class SaveImages(Callback):
    """Writes what a model makes of images, epoch by epoch: `folder/images_0003.png`; on rank 0.

    The function is called on every rank, so that models which communicate can be. It finds them in
    eval mode, without gradients; afterwards modes and random states are what they were, so that
    training goes on as it would without pictures.

    Args:
        folder: made if it is not there.
        function: takes the learner and returns images from 0 to 1, as `image_grid` does.
        every_epochs: called after every so many-th epoch of a phase that is not broken; files are
            numbered by the phase's epochs.
        phase: after which phases; subclasses match.
        name: of the files, before the number.
        columns: images in a row.
        scale: how many pixels wide and high each pixel is shown.
        reads: names of what the function reads, besides history and model.

    Raises:
        ValueError: `every_epochs`, `columns` or `scale` is below 1.

    Examples:
        >>> import torch
        >>> latents = torch.randn(64, 16)
        >>> SaveImages("samples", lambda learner: learner.model.generator(latents) / 2 + 0.5)
        SaveImages('samples')
    """

    def __init__(
        self,
        folder: str | Path,
        function: Callable[[Learner], Tensor],
        *,
        every_epochs: int = 1,
        phase: type[Phase] = AbstractTrainingPhase,
        name: str = "images",
        columns: int | None = None,
        scale: int = 1,
        reads: tuple[str, ...] = ("step", "data"),
    ) -> None:
        if (columns is not None and columns < 1) or scale < 1:
            raise ValueError(f"`columns` and `scale` are at least 1, got {columns=}, {scale=}.")
        if not callable(function):
            raise TypeError(f"Expected a function of the learner, and got {function!r}.")
        check_names("SaveImages.reads", reads)
        self.folder, self.function = Path(folder), function
        self.every_epochs = whole("every_epochs", every_epochs)
        self.phase, self.name, self.columns, self.scale = phase, name, columns, scale
        self.reads = ("history", "model", *reads)

    @on(EpochEnd)
    def save(self, learner: Learner) -> None:
        """Calls the function and, on rank 0, writes the file, if it is time to."""
        epoch = learner.history[learner.phase].epochs
        is_time = not learner.running.broken and epoch % self.every_epochs == 0
        if not is_time or not isinstance(learner.phase, self.phase):
            return
        with ValidationPhase().mode(learner.models.values()), random_state.kept():
            grid = image_grid(self.function(learner), self.columns, scale=self.scale)
        if processes.is_main_process():
            save_image(self.folder / f"{self.name}_{epoch:04d}.png", grid)

    def __repr__(self) -> str:
        return f"SaveImages({str(self.folder)!r})"
