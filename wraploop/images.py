"""Images: many in one grid, written so that a reader never sees half of one."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

_BETWEEN = 128  # the grey between images, and where the last row has none
_NAN = (255, 0, 255)  # magenta


def image_grid(
    images: Tensor, columns: int | None = None, *, padding: int = 1, scale: int = 1
) -> Tensor:
    """Puts images into one, row by row, with grey lines around each.

    A NaN shows as magenta, so that a model which has gone wrong can be seen to.

    Args:
        images: shape `(N, H, W)` or `(N, 1, H, W)`, grey, or `(N, 3, H, W)`, red, green and blue;
            floats from 0 to 1, beyond which they are clamped, or bytes, `torch.uint8`.
        columns: images in a row; without, as makes the grid nearly square.
        padding: pixels between images and around them.
        scale: how many pixels wide and high each pixel of an image is shown.

    Returns:
        Bytes of shape `(height, width)` if the images are grey and have no NaN, else
        `(height, width, 3)`; on the CPU.

    Raises:
        ValueError: images of another shape or type, or none; `columns` or `scale` below 1,
            `padding` below 0.

    Examples:
        >>> image_grid(torch.tensor([[[0.0, 1.0]], [[0.2, 0.4]]]))
        tensor([[128, 128, 128, 128, 128, 128, 128],
                [128,   0, 255, 128,  51, 102, 128],
                [128, 128, 128, 128, 128, 128, 128]], dtype=torch.uint8)
    """
    _check(images, columns, padding, scale)
    pixels = _as_bytes(images.detach().cpu())
    pixels = pixels.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    count, height, width, channels = pixels.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    down, right = height + padding, width + padding
    size = (rows * down + padding, columns * right + padding, channels)
    grid = torch.full(size, _BETWEEN, dtype=torch.uint8)
    for index, image in enumerate(pixels):
        row, column = divmod(index, columns)
        y, x = row * down + padding, column * right + padding
        grid[y : y + height, x : x + width] = image
    return grid.squeeze(2) if channels == 1 else grid


def save_image(path: str | Path, grid: Tensor) -> None:
    """Writes an image, in the format that the path ends in, or PNG; makes the folder.

    Args:
        path: of the file, which is replaced as a whole.
        grid: bytes of shape `(height, width)`, grey, or `(height, width, 3)`.

    Raises:
        ValueError: something else; `image_grid` makes such grids.
        ImportError: matplotlib is missing.
    """
    if grid.dtype != torch.uint8 or not (grid.ndim == 2 or grid.shape[2:] == (3,)):
        raise ValueError(
            "Expected bytes of shape (height, width) or (height, width, 3), and got "
            f"{_describe(grid)}. Make one of images with `image_grid(images)`."
        )
    imsave = matplotlib("image").imsave
    colours = torch.stack([grid] * 3, dim=2) if grid.ndim == 2 else grid  # a colour map rounds down
    with whole(path) as (unfinished, kind):
        imsave(unfinished, colours.cpu().numpy(), format=kind)


@contextmanager
def whole(path: str | Path) -> Iterator[tuple[Path, str]]:
    """Gives a path beside `path` to write to, then puts what was written in its place at once.

    With it comes the format in which to write. If the body fails, what is at `path` stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        yield unfinished, path.suffix[1:] or "png"
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def matplotlib(module: str) -> Any:
    """Imports a module of matplotlib, which nobody needs who draws nothing.

    Raises:
        ImportError: there is no matplotlib.
    """
    try:
        return importlib.import_module(f"matplotlib.{module}")
    except ImportError as error:
        message = 'Pictures are drawn by matplotlib: pip install "wraploop[plot]".'
        raise ImportError(message) from error


def _check(images: Tensor, columns: int | None, padding: int, scale: int) -> None:
    shapes = images.ndim == 3 or (images.ndim == 4 and images.shape[1] in (1, 3))
    kinds = images.dtype == torch.uint8 or images.is_floating_point()
    if not (shapes and kinds and images.numel()):
        raise ValueError(
            "Expected images of shape (N, H, W), (N, 1, H, W) or (N, 3, H, W), floats from 0 to 1 "
            f"or torch.uint8, and got {_describe(images)}."
        )
    if (columns is not None and columns < 1) or padding < 0 or scale < 1:
        raise ValueError(
            "`columns` and `scale` are at least 1, `padding` at least 0, "
            f"and got {columns=}, {scale=}, {padding=}."
        )


def _as_bytes(images: Tensor) -> Tensor:
    """Shape `(N, H, W, 1)` or `(N, H, W, 3)`."""
    images = images.unsqueeze(3) if images.ndim == 3 else images.permute(0, 2, 3, 1)
    if images.dtype == torch.uint8:
        return images
    images = images.double()
    pixels = (images.nan_to_num(0).clamp(0, 1) * 255).round().to(torch.uint8)
    nan = images.isnan().any(3, keepdim=True)
    return torch.where(nan, torch.tensor(_NAN, dtype=torch.uint8), pixels) if nan.any() else pixels


def _describe(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)} of {tensor.dtype}"
