"""Experiment trackers as loggers: TensorBoard, Weights & Biases, and what else accelerate knows."""

from __future__ import annotations

import inspect
import os
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor
from typing_extensions import override

from wraploop import processes
from wraploop.callbacks.loggers import Kind, Logger, Setting

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

# What accelerate's own trackers take; those that are not here take numbers.
_TAKES: dict[str, frozenset[Kind]] = {
    "tensorboard": frozenset({"numbers", "histograms", "images", "text"}),
    "wandb": frozenset({"numbers", "images", "text"}),
    "comet_ml": frozenset({"numbers", "text"}),
    "swanlab": frozenset({"numbers", "images"}),
}
_NUMBERS: frozenset[Kind] = frozenset({"numbers"})


class TrackerLogger(Logger):
    """Logs through one of accelerate's trackers, on rank 0.

    The tracker is started when something is first logged, unless it has been, and only on rank 0:
    on no other rank is it touched. An `Accelerator` is not needed; if you use one, make it first.

    Args:
        tracker: a tracker; or a `functools.partial` of its class, which is then called on rank 0
            only, for those that open something when they are made.

    Attributes:
        takes: TensorBoard takes everything, W&B all but histograms, SwanLab numbers and images,
            Comet numbers and text, the others numbers.

    Raises:
        TypeError: it is no tracker.
        RuntimeError: at first use, torchrun started this process and no process group is there.

    Examples:
        >>> TrackerLogger.named("tensorboard", "first run", logging_dir="logs")
        TrackerLogger(TensorBoardTracker)
    """

    def __init__(self, tracker: GeneralTracker | partial[GeneralTracker]) -> None:
        from accelerate.tracking import GeneralTracker

        kind: Any = tracker.func if isinstance(tracker, partial) else type(tracker)
        if not (isinstance(kind, type) and issubclass(kind, GeneralTracker)):
            raise TypeError(
                f"Expected a tracker of accelerate, or a partial of its class, and got {tracker!r}."
                " By name: TrackerLogger.named('tensorboard', 'run', logging_dir='logs')."
            )
        self._name, self._class_name = str(getattr(kind, "name", "")), kind.__name__
        self.takes = _TAKES.get(self._name, _NUMBERS)
        self._tracker, self._open = tracker, False

    @classmethod
    def named(cls, name: str, run_name: str, **options: Any) -> TrackerLogger:
        """A tracker by accelerate's name for it, `"tensorboard"` or `"wandb"`.

        Args:
            name: of the tracker.
            run_name: of the run, or, for trackers that sort runs so, of the project.
            options: what the tracker's class takes besides.

        Raises:
            ValueError: there is no such tracker.
            ModuleNotFoundError: its package is not installed.
            TypeError: an option is missing.
        """
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"No tracker is called {name!r}; there are {[*LOGGER_TYPE_TO_CLASS]}.")
        tracker_class = LOGGER_TYPE_TO_CLASS[name]
        is_own = tracker_class.__module__ == "accelerate.tracking"
        if is_own and name not in [str(each) for each in get_available_trackers()]:
            raise ModuleNotFoundError(f"The package of the tracker {name!r} is not installed.")
        inspect.signature(tracker_class).bind(run_name, **options)  # which raises if they do not
        return cls(partial(tracker_class, run_name, **options))

    @property
    def tracker(self) -> GeneralTracker:
        """The tracker itself, started; on rank 0 only."""
        if isinstance(self._tracker, partial):
            _prepare()
            self._tracker = self._tracker()
        if not self._open:
            _prepare()
            if getattr(self._tracker, "tracker", None) is None:
                self._tracker.start()
            self._open = True
        return self._tracker

    @override
    def write_numbers(self, values: dict[str, float], step: int) -> None:
        self.tracker.log(values, step=step)

    @override
    def write_settings(self, values: dict[str, Setting]) -> None:
        self.tracker.store_init_configuration(values)

    @override
    def write_histogram(self, name: str, values: Tensor, step: int) -> None:
        writer: Any = self.tracker.tracker  # pyright: ignore  every tracker has it
        writer.add_histogram(name, values.numpy(), global_step=step)
        writer.flush()

    @override
    def write_image(self, name: str, image: Tensor, step: int) -> None:
        tracker: Any = self.tracker
        is_tensorboard = self._name == "tensorboard"
        options = {"dataformats": "NHWC"} if is_tensorboard else {}
        tracker.log_images({name: image[None].numpy()}, step=step, **options)
        if is_tensorboard:
            tracker.tracker.flush()

    @override
    def write_text(self, name: str, text: str, step: int) -> None:
        self.tracker.log({name: text}, step=step)

    @override
    def close(self) -> None:
        if self._open:
            self.tracker.finish()
            self._open = False

    def __repr__(self) -> str:
        return f"TrackerLogger({self._class_name})"


def _prepare() -> None:
    """Makes the state that accelerate's trackers look at; its own process group it must not make.

    It would wait for ranks that never come, as trackers are on rank 0 only.
    """
    from accelerate.state import PartialState

    if "LOCAL_RANK" in os.environ and not processes.is_started():
        raise RuntimeError(
            "torchrun started this process, and it has joined no process group yet. Wrap a model "
            "in DistributedModel before a tracker is used, or call wraploop.processes.start()."
        )
    PartialState()
