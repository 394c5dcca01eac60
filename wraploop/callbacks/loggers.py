"""Where logged things go: what all loggers share, and a logger that keeps them in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from typing_extensions import override

from wraploop import processes
from wraploop.running import number

Kind: TypeAlias = Literal["numbers", "histograms", "images", "text"]
Setting: TypeAlias = float | str | bool  # one entry of a configuration


class Logger(ABC):
    """Where logged things go. It acts on rank 0 only, whatever the rank it is called on.

    Names are tags with slashes, `"TrainingPhase/loss"`; steps are those of training. A logger of
    your own writes `write_numbers`, `write_settings`, and a method more for each kind it takes
    besides; these are called on rank 0, and have written when they return.

    Attributes:
        takes: the kinds of things that it takes.

    Raises:
        ValueError: it is given a thing of another kind.
    """

    takes: frozenset[Kind] = frozenset({"numbers"})

    @property
    def acts(self) -> bool:
        """Whether it does anything in this process."""
        return processes.is_main_process()

    def numbers(self, values: Mapping[str, float | Tensor], step: int) -> None:
        """Logs numbers by name."""
        if self.acts and values:
            self.write_numbers({name: number(value) for name, value in values.items()}, step)

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """Logs how values of any shape are distributed.

        Values that are not finite are left out, and where none is, nothing is logged; of complex
        numbers both parts count.
        """
        if self._takes("histograms"):
            finite = _finite(values)
            if len(finite):
                self.write_histogram(name, finite, step)

    def image(self, name: str, image: Tensor, step: int) -> None:
        """Logs an image, shape `(C, H, W)` of 1 or 3 channels, or `(H, W)`; see `pixels`."""
        if self._takes("images"):
            self.write_image(name, pixels(image), step)

    def text(self, name: str, text: str, step: int) -> None:
        """Logs a text."""
        if self._takes("text"):
            self.write_text(name, text, step)

    def hyperparameters(self, values: Mapping[str, Setting]) -> None:
        """Logs the configuration: numbers, strings and bools by name; once."""
        if self.acts:
            self.write_settings(checked_configuration(values))

    def close(self) -> None:  # noqa: B027  most have nothing to close
        """Ends the log. At Python's exit that happens by itself."""

    @abstractmethod
    def write_numbers(self, values: dict[str, float], step: int) -> None:
        """Writes numbers."""

    @abstractmethod
    def write_settings(self, values: dict[str, Setting]) -> None:
        """Writes the configuration."""

    def write_histogram(self, name: str, values: Tensor, step: int) -> None:
        """Writes a histogram of finite values, float64 in memory, shape `(N,)`, N at least 1."""
        raise NotImplementedError

    def write_image(self, name: str, image: Tensor, step: int) -> None:
        """Writes an image, uint8 in memory, shape `(H, W, C)`, C being 1 or 3."""
        raise NotImplementedError

    def write_text(self, name: str, text: str, step: int) -> None:
        """Writes a text."""
        raise NotImplementedError

    def _takes(self, kind: Kind) -> bool:
        if kind not in self.takes:
            raise ValueError(f"{self!r} takes {', '.join(sorted(self.takes))}, and no {kind}.")
        return self.acts

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Entry(NamedTuple):
    """One thing that a `MemoryLogger` was given; the configuration has no step."""

    kind: str
    name: str
    step: int | None
    value: Any


class MemoryLogger(Logger):
    """Keeps everything in a list, for notebooks and tests.

    Examples:
        >>> logger = MemoryLogger()
        >>> logger.numbers({"loss": 0.5}, step=1)
        >>> logger.numbers({"loss": 0.25}, step=2)
        >>> logger.series("loss")
        [(1, 0.5), (2, 0.25)]
    """

    takes = frozenset({"numbers", "histograms", "images", "text"})

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def series(self, name: str) -> list[tuple[int | None, Any]]:
        """Steps and values of all that has this name."""
        return [(entry.step, entry.value) for entry in self.entries if entry.name == name]

    @override
    def write_numbers(self, values: dict[str, float], step: int) -> None:
        self.entries += [Entry("number", name, step, value) for name, value in values.items()]

    @override
    def write_settings(self, values: dict[str, Setting]) -> None:
        self.entries += [Entry("setting", name, None, value) for name, value in values.items()]

    @override
    def write_histogram(self, name: str, values: Tensor, step: int) -> None:
        self.entries.append(Entry("histogram", name, step, values))

    @override
    def write_image(self, name: str, image: Tensor, step: int) -> None:
        self.entries.append(Entry("image", name, step, image))

    @override
    def write_text(self, name: str, text: str, step: int) -> None:
        self.entries.append(Entry("text", name, step, text))


def pixels(image: Tensor) -> Tensor:
    """An image as bytes in memory, shape `(H, W, C)`.

    Args:
        image: shape `(C, H, W)` of 1 or 3 channels, or `(H, W)`; floats in [0, 1], what is
            outside clamped and NaN black, or uint8.

    Raises:
        ValueError: it has another shape.
        TypeError: it is of another type.

    Examples:
        >>> pixels(torch.tensor([[0.0, 0.5], [1.0, 7.0]])).flatten().tolist()
        [0, 128, 255, 255]
    """
    channels = image if image.ndim == 3 else image[None]
    if channels.ndim != 3 or channels.shape[0] not in (1, 3):
        raise ValueError(
            "An image has the shape (C, H, W) with 1 or 3 channels, or (H, W), and got "
            f"{tuple(image.shape)}. Permute its axes, or log several under names of their own."
        )
    if not (image.is_floating_point() or image.dtype == torch.uint8):
        raise TypeError(
            f"An image is of floats in [0, 1] or of uint8, and got {image.dtype}. Convert it."
        )
    channels = channels.detach().cpu().permute(1, 2, 0)
    if image.is_floating_point():
        channels = (channels.float().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
    return channels.contiguous()


def checked_configuration(values: Mapping[str, Setting]) -> dict[str, Setting]:
    """The configuration, if it is one.

    Raises:
        TypeError: an entry is no number, string or bool.
    """
    for name, value in values.items():
        if not isinstance(value, (int, float, str, bool)):
            raise TypeError(
                f"The configuration holds numbers, strings and bools, and {name!r} is {value!r}. "
                "Write it as a string, or give its parts names of their own."
            )
    return dict(values)


def _finite(values: Tensor) -> Tensor:
    parts = torch.view_as_real(values.detach()) if values.is_complex() else values.detach()
    flat = parts.flatten().double().cpu()
    return flat[flat.isfinite()]
