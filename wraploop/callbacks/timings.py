"""How long callbacks take, and what lies between events."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from wraploop.callback import Call, Callback, on
from wraploop.callbacks.records import ByPhase
from wraploop.events import Event, FitEnd
from wraploop.phases import Phase

if TYPE_CHECKING:
    from wraploop.learner import Learner


@dataclass
class Duration:
    """How long something took.

    Examples:
        >>> step = Duration()
        >>> step.add(0.5)
        >>> step.add(1.0)
        >>> step.count, step.total_s, step.mean_s
        (2, 1.5, 0.75)
    """

    count: int = 0
    total_s: float = 0.0

    @property
    def mean_s(self) -> float:
        """The mean, in seconds; 0 if it never happened."""
        return self.total_s / self.count if self.count else 0.0

    def add(self, seconds: float) -> None:
        """It happened once more."""
        self.count += 1
        self.total_s += seconds


class NoPhase(Phase):
    """Stands for what happens between phases, as FitBegin does."""

    name = "between phases"


class TimingTable:
    """How long things took, by phase; printed, a table.

    Attributes:
        gaps: between consecutive events: `gaps[TrainingPhase]["StepBegin -> LossBegin"]`.
        calls: of callbacks' methods: `calls[TrainingPhase]["History().begin at EpochBegin"]`.
    """

    def __init__(self) -> None:
        self.gaps: ByPhase[dict[str, Duration]] = ByPhase(dict)
        self.calls: ByPhase[dict[str, Duration]] = ByPhase(dict)

    def __str__(self) -> str:
        rows = [("phase", "what", "count", "total s", "mean ms")]
        for phase in dict.fromkeys([*self.gaps, *self.calls]):
            for durations in (self.gaps, self.calls):
                took_most = durations[phase].items() if phase in durations else ()
                for what, took in sorted(took_most, key=lambda item: -item[1].total_s):
                    total, mean = f"{took.total_s:.4f}", f"{took.mean_s * 1000:.4f}"
                    rows.append((phase, what, str(took.count), total, mean))
        first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
        return "\n".join(
            f"{phase:<{first}}  {what:<{second}}  {count:>7}  {total:>9}  {mean:>9}"
            for phase, what, count, total, mean in rows
        )


class _Level:
    """The events that happen one after the other, none within a callback's answer to another."""

    def __init__(self) -> None:
        self.event: Event | None = None
        self.answered_s = 0.0  # when the last answer to it came to its end


class Timings(Callback):
    """Measures callbacks and what lies between events, in `learner.timings`, to be printed.

    From one event's last answer to the next one's first is a gap: `StepBegin -> LossBegin` is the
    forward, `BackwardEnd -> StepEnd` the update, `StepEnd -> StepBegin` getting the next batch.
    What is fired within a callback's method has gaps of its own, and its time is the method's too.
    On an accelerator, gaps show where the host waits; `TorchProfiler` shows what the device does.

    Examples:
        >>> import torch
        >>> from wraploop.learner import Learner
        >>> from wraploop.phases import TrainingPhase
        >>> data = [(torch.ones(4, 2), torch.ones(4, 1))] * 8
        >>> learner = Learner(
        ...     torch.nn.Linear(2, 1), torch.nn.L1Loss(), callbacks=[Timings()],
        ...     optimizer=torch.optim.SGD, data=data, default_callbacks=False,
        ... )
        >>> learner.fit(1)
        >>> learner.timings.gaps[TrainingPhase]["BackwardBegin -> BackwardEnd"].count
        8
    """

    writes = ("timings",)

    def __init__(self) -> None:
        self._levels = [_Level()]

    @override
    def attach(self, learner: Learner) -> None:
        self._table = learner.timings = TimingTable()
        self._levels = [_Level()]

    @override
    def around(self, callback: Callback, call: Call) -> Call:
        name = f"{callback.unwrapped!r}.{_name(call)}" if callback.unwrapped is not self else ""

        def timed(learner: Learner) -> None:
            event, phase = learner.event, learner.phase or NoPhase
            level, begun_s = self._levels[-1], time.perf_counter()
            if event is not level.event:
                self._begin(level, event, phase, begun_s)
            self._levels.append(_Level())
            try:
                call(learner)
            finally:
                self._levels.pop()
                level.answered_s = time.perf_counter()
                if name:
                    durations, what = self._table.calls[phase], f"{name} at {type(event).__name__}"
                    durations.setdefault(what, Duration()).add(level.answered_s - begun_s)

        return timed

    @on(Event)
    def see(self, learner: Learner) -> None:
        """Has every event answered, so that `around` sees it."""

    def _begin(self, level: _Level, event: Any, phase: Any, now_s: float) -> None:
        if level.event is not None and not isinstance(level.event, FitEnd):
            what = f"{type(level.event).__name__} -> {type(event).__name__}"
            self._table.gaps[phase].setdefault(what, Duration()).add(now_s - level.answered_s)
        level.event = event


def _name(call: Any) -> str:
    inner = call.args[0] if isinstance(call, partial) and call.args else call  # a throttled one
    return getattr(inner, "__name__", "call")
