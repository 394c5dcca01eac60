"""What `__init__.py` has when it is asked, as type checkers see it."""

from . import callbacks, gan, processes
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
from .gan import GANTraining
from .images import image_grid
from .learner import Learner
from .lr_finder import lr_find
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

__version__: str

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
