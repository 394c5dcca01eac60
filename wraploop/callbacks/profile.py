"""Some training steps under torch's profiler."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.profiler import profile, record_function

from wraploop import processes
from wraploop.callback import Callback, on
from wraploop.events import EpochEnd, FitBegin, FitEnd, StepBegin, StepEnd
from wraploop.given import whole
from wraploop.phases import AbstractTrainingPhase

if TYPE_CHECKING:
    from wraploop.learner import Learner


class TorchProfiler(Callback):
    """Profiles some training steps with `torch.profiler`, and what lies between them.

    Steps are counted over all training phases from when it joined the learner. A fit, or an epoch
    outside of a fit, that ends before the last of them ends the profile too. One learner, one
    profile.

    Args:
        folder: of the Chrome traces, `trace_rank0.json` for rank 0.
        first_step: the first step that is profiled, counted from 1.
        steps: how many are.
        options: for `torch.profiler.profile`, such as `record_shapes=True`.

    Attributes:
        averages: what `torch.profiler.profile.key_averages()` returns, `None` until it is through;
            steps are in it as `training step 2`.

    Raises:
        ValueError: a number below 1, an option that there is not or that is not for you to set, or
            a folder that is a file.
    """

    def __init__(
        self, folder: str | Path, first_step: int = 2, steps: int = 3, **options: Any
    ) -> None:
        first_step, steps = whole("first_step", first_step), whole("steps", steps)
        known = set(inspect.signature(profile).parameters) - {"schedule", "on_trace_ready"}
        unknown = sorted(set(options) - known)
        if unknown:
            raise ValueError(f"Cannot set {unknown}; options are {', '.join(sorted(known))}.")
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"Traces go to a folder, and {str(folder)!r} is a file.")
        self.first_step, self.steps, self.options = first_step, steps, options
        self.averages: Any = None
        self._profile: Any = None
        self._mark: Any = None
        self._count = self._depth = 0
        self._in_fit = False

    @on(FitBegin)
    def begin(self, learner: Learner) -> None:
        """A profile may go on in the next epoch."""
        self._in_fit = True

    @on(StepBegin, AbstractTrainingPhase)
    def start(self, learner: Learner) -> None:
        """Starts with the first step that is profiled."""
        self._depth += 1
        if self._depth > 1 or self.averages is not None:
            return
        self._count += 1
        if self._count == self.first_step:
            self._profile = profile(**self.options)
            self._profile.start()
        if self._profile is not None:
            self._mark = record_function(f"training step {self._count}")
            self._mark.__enter__()

    @on(StepEnd, AbstractTrainingPhase)
    def stop(self, learner: Learner) -> None:
        """Stops with the last."""
        self._depth = max(0, self._depth - 1)  # it may have joined in the middle of a step
        if self._depth:
            return
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
            self._mark = None
        is_alone = learner.running is None and learner.step.cancelled
        if is_alone or self._count >= self.first_step + self.steps - 1:
            self._finish()

    @on(EpochEnd, AbstractTrainingPhase)
    def end_epoch(self, learner: Learner) -> None:
        """Stops if no epoch follows."""
        if learner.running.broken or not self._in_fit:
            self._finish()

    @on(FitEnd)
    def end(self, learner: Learner) -> None:
        """Stops if it has not."""
        self._in_fit = False
        self._finish()

    def _finish(self) -> None:
        if self._profile is None:
            return
        ended, self._profile = self._profile, None
        ended.stop()
        self.averages = ended.key_averages()
        self.folder.mkdir(parents=True, exist_ok=True)
        ended.export_chrome_trace(str(self.folder / f"trace_rank{processes.rank()}.json"))

    def __repr__(self) -> str:
        return f"TorchProfiler({str(self.folder)!r}, {self.first_step}, {self.steps})"
