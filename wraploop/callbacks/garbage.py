"""Collecting garbage."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import torch

from wraploop.callback import Callback, on
from wraploop.events import StepEnd
from wraploop.given import whole

if TYPE_CHECKING:
    from wraploop.learner import Learner


class GarbageCollect(Callback):
    """Collects garbage now and then, so that what has cycles does not fill the memory.

    Args:
        every_steps: how often, steps of all phases counted.
        empty_cache: gives memory that is cached for an accelerator back as well, which is slow.

    Raises:
        ValueError: `every_steps` is below 1.
    """

    def __init__(self, every_steps: int = 100, *, empty_cache: bool = False) -> None:
        self.every_steps = whole("every_steps", every_steps)
        self.empty_cache = empty_cache
        self._steps = 0

    @on(StepEnd)
    def collect(self, learner: Learner) -> None:
        """Collects, if it is time."""
        self._steps += 1
        if self._steps % self.every_steps:
            return
        gc.collect()
        if self.empty_cache and torch.cuda.is_available():
            torch.cuda.empty_cache()
