"""What else happens in a loop, one family of callbacks a file.

default      History, Metrics (Metric, accuracy), ProgressBar, EpochTable, StopOnNaNLoss
deciding     EarlyStopping (and `criteria`), Scheduler, TorchScheduler, Checkpoints
a step       AccumulateGradients, ClipGradients, EMA, ToDevice, GarbageCollect
watching     Traces, SanityCheck (Check), Timings, TorchProfiler
telling      LogMetrics, LogHyperparameters, LogHistograms, LogImages, LogTraces, to
             CSVLogger, JSONLinesLogger, MemoryLogger, TrackerLogger; PlotMetrics, SaveImages
of others    FunctionCallback, throttle
"""

from wraploop.lazy import attach

__getattr__, __dir__, __all__ = attach(  # pyright: ignore[reportUnsupportedDunderAll]
    __name__,
    {
        "average": "EMA",
        "checkpoints": "Checkpoints",
        "checks": "Check",
        "device": "ToDevice",
        "early_stopping": "EarlyStopping",
        "function": "FunctionCallback",
        "garbage": "GarbageCollect",
        "gradients": "AccumulateGradients ClipGradients",
        "history": "History",
        "log_files": "CSVLogger JSONLinesLogger",
        "log_tensors": "LogHistograms LogImages",
        "loggers": "Logger MemoryLogger",
        "logs": "LogHyperparameters LogMetrics LogTraces",
        "metrics": "Metric Metrics accuracy",
        "pictures": "PlotMetrics SaveImages",
        "profile": "TorchProfiler",
        "progress": "ProgressBar",
        "sanity": "SanityCheck SanityCheckError",
        "scheduler": "Scheduler TorchScheduler",
        "stop": "StopOnNaNLoss",
        "strict": "UndeclaredAccess",
        "table": "EpochTable",
        "throttling": "throttle",
        "timings": "Timings",
        "traces": "Traces",
        "trackers": "TrackerLogger",
    },
    modules=("criteria",),
)
