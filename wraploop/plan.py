"""What a learner has, and who answers which event, to read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from wraploop.callback import Callback
from wraploop.events import (
    BackwardBegin,
    BackwardEnd,
    EpochBegin,
    EpochEnd,
    Event,
    FitBegin,
    FitEnd,
    LossBegin,
    StepBegin,
    StepEnd,
)
from wraploop.phases import Phase

if TYPE_CHECKING:
    from wraploop.learner import Learner

_IN_ORDER = [
    FitBegin,
    EpochBegin,
    StepBegin,
    LossBegin,
    BackwardBegin,
    BackwardEnd,
    StepEnd,
    EpochEnd,
    FitEnd,
]


def plan(learner: Learner, phases: list[Phase]) -> str:
    """Models, optimizers, data and phases, and callbacks by event, in order, one a line."""
    return "\n".join(
        [
            "models",
            *_indented(_model(name, model) for name, model in learner.models.items()),
            "optimizers",
            *_indented(_optimizer(name, each) for name, each in learner.optimizers.items()),
            "data",
            *_indented(f"{name}: {_batches(each)}" for name, each in learner.data.items()),
            "phases of an epoch",
            *_indented(f"{phase.name} over {phase.data} data" for phase in phases),
            "callbacks in their order, by event",
            *_indented(_events(learner, phases)),
        ]
    )


def _indented(lines: Iterator[str] | Any) -> list[str]:
    return [f"  {line}" for line in lines] or ["  none"]


def _model(name: str, model: nn.Module) -> str:
    count = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = "" if trained == count else f", {count - trained:,} of them frozen"
    return f"{name}: {_kinds(model)}, {count:,} parameters{frozen}"


def _kinds(model: nn.Module) -> str:
    """The model's class in those of its wrappers."""
    inner = vars(model).get("_modules", {}).get("module")
    name = type(model).__name__
    return f"{name}({_kinds(inner)})" if isinstance(inner, nn.Module) else name


def _optimizer(name: str, optimizer: Any) -> str:
    rates = dict.fromkeys(str(group["lr"]) for group in optimizer.param_groups if "lr" in group)
    held = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    return f"{name}: {type(optimizer).__name__}, lr {' and '.join(rates)}, {held:,} parameters"


def _batches(batches: Any) -> str:
    try:
        return f"{len(batches)} batches ({type(batches).__name__})"
    except TypeError:
        return f"batches without a length ({type(batches).__name__})"


def _events(learner: Learner, phases: list[Phase]) -> Iterator[str]:
    callbacks = list(learner.callbacks)
    for event in _IN_ORDER:
        answers = [_answers(callback, event, phases) for callback in callbacks]
        answers = [answer for answer in answers if answer]
        if answers:
            yield f"{event.__name__}: {', '.join(answers)}"
    for event in _own_events(callbacks):
        answers = [_answers(callback, event, phases) for callback in callbacks]
        yield f"{event.__name__}: {', '.join(answer for answer in answers if answer)}"
    silent = [c for c in callbacks if not any(_answers(c, e, phases) for e in _all(c))]
    if silent:
        yield f"never called in these phases: {', '.join(map(repr, silent))}"


def _own_events(callbacks: list[Callback]) -> list[type[Event]]:
    """Events of the user's own that are answered by name."""
    answered = dict.fromkeys(event for callback in callbacks for event in _all(callback))
    return [event for event in answered if event not in _IN_ORDER and event is not Event]


def _all(callback: Callback) -> list[type[Event]]:
    return [event for event, _, _ in callback.handlers()]


def _answers(callback: Callback, event: type[Event], phases: list[Phase]) -> str:
    """The callback, and in which of the phases it answers, if not in all."""
    kinds = [kind for on_event, kind, _ in callback.handlers() if issubclass(event, on_event)]
    where = [phase.name for phase in phases if any(isinstance(phase, kind) for kind in kinds)]
    if Phase in kinds or (where and len(where) == len(phases)):
        return repr(callback)
    return f"{callback!r} (in {' and '.join(where)})" if where else ""
