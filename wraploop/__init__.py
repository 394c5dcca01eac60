"""A training loop that does not know where it runs, and wrappers that do not know why.

Meaning     Learner          owns models, losses, optimizers, data; runs phases; calls callbacks
            Phase            what one step does: TrainingPhase, ValidationPhase, GANTraining, yours
            Callback         what else happens, and when; `callbacks` has those that are there
            fit_one_cycle, fine_tune, lr_find, freeze: training in one line
Execution   ModelWrapper     runs a model elsewhere: ThreadedCPUParallel, DataParallel,
                             DistributedModel
            shard            gives each process its rows of every batch, where that is wanted
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_NAMES = {  # of each module, those that are this package's too; `__init__.pyi` has the same
    "callback": "Callback on",
    "data": "shard",
    "events": (
        "BackwardBegin BackwardEnd CancelEpoch CancelFit CancelStep EpochBegin EpochEnd"
        " Event FitBegin FitEnd LossBegin StepBegin StepEnd"
    ),
    "freezing": "freeze frozen unfreeze",
    "gan": "GANTraining",
    "images": "image_grid",
    "learner": "Learner",
    "lr_finder": "lr_find",
    "phases": ("AbstractTrainingPhase AbstractValidationPhase Phase TrainingPhase ValidationPhase"),
    "plots": "plot_schedule",
    "recipes": "fine_tune fit_one_cycle",
    "schedules": "one_cycle",
    "wrappers.batch": "shared",
    "wrappers.batchnorm": "batch_mean",
    "wrappers.data_parallel": "DataParallel",
    "wrappers.distributed": "DistributedModel",
    "wrappers.spec": "wrap",
    "wrappers.threaded": "ThreadedCPUParallel",
    "wrappers.wrapper": "ModelWrapper",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = [*_HOMES, "callbacks", "gan", "processes"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Names and modules are imported when first asked for: who wraps a model needs no loop."""
    if name in _HOMES:
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value
        return value
    module = f"{__name__}.{name}"
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
