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
from typing import TYPE_CHECKING, Any

from . import callbacks, processes
from .callback import Callback, on
from .data import shard
from .events import (
    BackwardBegin,
    BackwardEnd,
    CancelEpoch,
    CancelFit,
    CancelStep,
    EpochBegin,
    EpochEnd,
    Event,
    FitBegin,
    FitEnd,
    LossBegin,
    StepBegin,
    StepEnd,
)
from .freezing import freeze, frozen, unfreeze
from .images import image_grid
from .learner import Learner
from .lr_find import lr_find
from .phases import (
    AbstractTrainingPhase,
    AbstractValidationPhase,
    Phase,
    TrainingPhase,
    ValidationPhase,
)
from .plots import plot_schedule
from .recipes import fine_tune, fit_one_cycle
from .schedules import one_cycle
from .wrappers.batch import shared
from .wrappers.batchnorm import batch_mean
from .wrappers.data_parallel import DataParallel
from .wrappers.distributed import DistributedModel
from .wrappers.spec import wrap
from .wrappers.threaded import ThreadedCPUParallel
from .wrappers.wrapper import ModelWrapper

if TYPE_CHECKING:
    from . import gan
    from .gan import GANTraining

__version__ = "0.1.0"

__all__ = [
    "AbstractTrainingPhase",
    "AbstractValidationPhase",
    "BackwardBegin",
    "BackwardEnd",
    "Callback",
    "CancelEpoch",
    "CancelFit",
    "CancelStep",
    "DataParallel",
    "DistributedModel",
    "EpochBegin",
    "EpochEnd",
    "Event",
    "FitBegin",
    "FitEnd",
    "GANTraining",
    "Learner",
    "LossBegin",
    "ModelWrapper",
    "Phase",
    "StepBegin",
    "StepEnd",
    "ThreadedCPUParallel",
    "TrainingPhase",
    "ValidationPhase",
    "batch_mean",
    "callbacks",
    "fine_tune",
    "fit_one_cycle",
    "freeze",
    "frozen",
    "gan",
    "image_grid",
    "lr_find",
    "on",
    "one_cycle",
    "plot_schedule",
    "processes",
    "shard",
    "shared",
    "unfreeze",
    "wrap",
]


def __getattr__(name: str) -> Any:
    """`gan` is imported when it is first asked for: a tenth of the import, and few need it."""
    if name not in ("gan", "GANTraining"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    gan = import_module(f"{__name__}.gan")
    return gan if name == "gan" else gan.GANTraining


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
