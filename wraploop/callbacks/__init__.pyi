"""What `__init__.py` has when it is asked, as type checkers see it."""

from . import criteria
from .average import EMA
from .checkpoints import Checkpoints
from .checks import Check
from .device import ToDevice
from .early_stopping import EarlyStopping
from .function import FunctionCallback
from .garbage import GarbageCollect
from .gradients import AccumulateGradients, ClipGradients
from .history import History
from .log_files import CSVLogger, JSONLinesLogger
from .log_tensors import LogHistograms, LogImages
from .loggers import Logger, MemoryLogger
from .logs import LogHyperparameters, LogMetrics, LogTraces
from .metrics import Metric, Metrics, accuracy
from .pictures import PlotMetrics, SaveImages
from .profile import TorchProfiler
from .progress import ProgressBar
from .sanity import SanityCheck, SanityCheckError
from .scheduler import Scheduler, TorchScheduler
from .stop import StopOnNaNLoss
from .strict import UndeclaredAccess
from .table import EpochTable
from .throttling import throttle
from .timings import Timings
from .traces import Traces
from .trackers import TrackerLogger

__all__ = [
    "EMA",
    "AccumulateGradients",
    "CSVLogger",
    "Check",
    "Checkpoints",
    "ClipGradients",
    "EarlyStopping",
    "EpochTable",
    "FunctionCallback",
    "GarbageCollect",
    "History",
    "JSONLinesLogger",
    "LogHistograms",
    "LogHyperparameters",
    "LogImages",
    "LogMetrics",
    "LogTraces",
    "Logger",
    "MemoryLogger",
    "Metric",
    "Metrics",
    "PlotMetrics",
    "ProgressBar",
    "SanityCheck",
    "SanityCheckError",
    "SaveImages",
    "Scheduler",
    "StopOnNaNLoss",
    "Timings",
    "ToDevice",
    "TorchProfiler",
    "TorchScheduler",
    "Traces",
    "TrackerLogger",
    "UndeclaredAccess",
    "accuracy",
    "criteria",
    "throttle",
]
