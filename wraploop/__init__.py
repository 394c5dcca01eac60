"""A training loop that does not know where it runs, and wrappers that do not know why.

Meaning     Learner          owns models, losses, optimizers, data; runs phases; calls callbacks
            Phase            what one step does: TrainingPhase, ValidationPhase, GANTraining, yours
            Callback         what else happens, and when; `callbacks` has those that are there
            fit_one_cycle, fine_tune, lr_find, freeze: training in one line
Execution   ModelWrapper     runs a model elsewhere: ThreadedCPUParallel, DataParallel,
                             DistributedModel
            shard            gives each process its rows of every batch, where that is wanted
"""

from .lazy import attach

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = attach(  # pyright: ignore[reportUnsupportedDunderAll]
    __name__,
    {
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
        "phases": (
            "AbstractTrainingPhase AbstractValidationPhase Phase TrainingPhase ValidationPhase"
        ),
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
    },
    modules=("callbacks", "gan", "processes"),
)
