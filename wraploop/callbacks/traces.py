"""Whatever one wants to follow, step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from typing_extensions import override

from wraploop.callback import Callback, Handler
from wraploop.callbacks.records import ByPhase
from wraploop.events import StepEnd
from wraploop.given import check_names
from wraploop.phases import Phase

if TYPE_CHECKING:
    from wraploop.learner import Learner


@dataclass
class Trace:
    """What a function returned: `values[i]` after the phase's step `at[i]`, counted from 1."""

    at: list[int] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)


class Traces(Callback):
    """Keeps what functions of the learner return after each step.

    They are in `learner.traces`: `learner.traces[TrainingPhase]["norm"].values`. Cancelled steps
    have none. Tensors are kept without their graphs.

    Args:
        functions: by name, functions of the learner.
        phase: the phases in which they are called.
        reads: names of what the functions read.

    Raises:
        ValueError: there are no functions.
        TypeError: they are not functions by name.

    Examples:
        >>> Traces({"margin": lambda learner: learner.step.outputs.std().item()})
        Traces(margin)
    """

    def __init__(
        self,
        functions: Mapping[str, Callable[[Learner], Any]],
        *,
        phase: type[Phase] = Phase,
        reads: tuple[str, ...] = ("model", "optimizer", "step"),
    ) -> None:
        check_names("Traces.reads", reads)
        if not isinstance(functions, Mapping) or not all(map(callable, functions.values())):
            example = "Traces({'name': function})"
            raise TypeError(f"Expected functions by name, as in {example}, and got {functions!r}.")
        if not functions:
            raise ValueError("Give functions of the learner by name: Traces({'name': function}).")
        self.functions, self.phase = dict(functions), phase
        self.reads = ("history", *reads)
        self.writes = tuple(f"traces.{name}" for name in self.functions)

    @override
    def attach(self, learner: Learner) -> None:
        if "traces" not in vars(learner):
            learner.traces = ByPhase[dict[str, Trace]](dict)

    @override
    def handlers(self) -> list[Handler]:
        return [(StepEnd, self.phase, self.take)]

    def take(self, learner: Learner) -> None:
        """Calls the functions, and keeps what they return."""
        if learner.step.cancelled:
            return
        at, traces = learner.history[learner.phase].steps, learner.traces[learner.phase]
        for name, function in self.functions.items():
            value = function(learner)
            if name not in traces:
                traces[name] = Trace()
            traces[name].at.append(at)
            traces[name].values.append(value.detach() if isinstance(value, Tensor) else value)

    def __repr__(self) -> str:
        return f"Traces({', '.join(self.functions)})"
