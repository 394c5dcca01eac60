"""Ways to train that have proved good: one cycle, and fine-tuning."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any

from torch import nn

from wraploop import named
from wraploop.callbacks.scheduler import Scheduler, TorchScheduler
from wraploop.freezing import Part, frozen
from wraploop.given import check_numbers, whole
from wraploop.parameter_groups import by_layer, grouped
from wraploop.phases import AbstractTrainingPhase, Phase
from wraploop.running import Batches
from wraploop.schedules import one_cycle

if TYPE_CHECKING:
    from wraploop.learner import Learner

Phases = Iterable[Phase | tuple[Phase, Batches]]


def fit_one_cycle(
    learner: Learner,
    epochs: int,
    max_lr: float | Mapping[str, float],
    *,
    phases: Phases = (),
    weight_decay: float | None = None,
    warmup: float = 0.25,
    div: float = 25.0,
    final_div: float = 1e5,
    resume: str | PathLike[str] | None = None,
) -> None:
    """Fits with the learning rate going through one cycle; see `schedules.one_cycle`.

    Schedulers of the learner's own rest meanwhile. Afterwards learning rates and weight decay are
    what they were; how the rate went is in `learner.hyperparameters`.

    Args:
        learner: the learner.
        epochs: how many.
        max_lr: the highest rate, of all optimizers or by name.
        phases: as for `learner.fit`. The cycle is over the steps of those that train.
        weight_decay: of all optimizers meanwhile; as it is unless given.
        warmup: the share of the steps in which the rate rises.
        div: the highest rate over the first.
        final_div: the highest rate over the last.
        resume: as for `learner.fit`.

    Raises:
        ValueError: an unknown optimizer, an optimizer without weight decay, or training batches
            without a length.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from wraploop.learner import Learner
        >>> data = [(torch.ones(4, 2), torch.ones(4, 1))] * 10
        >>> learner = Learner(
        ...     nn.Linear(2, 1), nn.functional.mse_loss, data=data, optimizer=torch.optim.SGD,
        ...     default_callbacks=False,
        ... )
        >>> fit_one_cycle(learner, 2, max_lr=0.1, div=10, final_div=100)
        >>> rates = learner.hyperparameters["lr"].values
        >>> rates[0], max(rates), rates[-1]
        (0.01, 0.1, 0.001)
    """
    planned = named.planned(phases, learner.data)
    steps = whole("epochs", epochs, least=0) * sum(
        _length(*pair) for pair in planned if _trains(pair[0])
    )
    rates = _by_optimizer(learner, max_lr)
    for rate in rates.values():
        check_numbers(max_lr=rate)
    options = {"warmup": warmup, "div": div, "final_div": final_div}
    schedulers = [
        Scheduler(name, lr=one_cycle(max(steps, 1), rate, **options))
        for name, rate in rates.items()
    ]
    with _callbacks_for_now(learner, schedulers), _options_kept(learner):
        if weight_decay is not None:
            _set_weight_decay(learner, weight_decay)
        learner.fit(epochs, planned, resume=resume)


def fine_tune(
    learner: Learner,
    epochs: int,
    base_lr: float = 2e-3,
    *,
    model: str = "",
    groups: Sequence[Part] = (),
    freeze_epochs: int = 1,
    backbone_factor: float = 0.1,
    phases: Phases = (),
    warmup: float = 0.3,
    div: float = 5.0,
    resume: str | PathLike[str] | None = None,
) -> None:
    """Trains the last group of a model's parameters, then all of them, each for one cycle.

    First everything but the last group is frozen, with rates up to `base_lr`. Then nothing is, with
    half of that for the last group, and less the nearer a group is to the backbone.

    Args:
        learner: the learner.
        epochs: how many, after those with a frozen backbone.
        base_lr: the highest rate.
        model: the name of the model, where there are several.
        groups: modules or lists of parameters, from the backbone to the head; unless given, all
            layers but the last, and the last.
        freeze_epochs: how many with a frozen backbone.
        backbone_factor: the first group's rate over the last's; between, it rises evenly.
        phases: as for `learner.fit`.
        warmup: the share of steps in which the rate rises, once nothing is frozen.
        div: the highest rate over the first.
        resume: `"auto"`, as for `learner.fit`.

    Raises:
        ValueError: groups that overlap, or that the model's optimizer does not hold.

    Source: Howard and Ruder, ULMFiT, 2018, section 3.2.
    """
    name = _only(learner, model)
    if not learner.optimizers:
        raise ValueError(named.NO_OPTIMIZER)
    tuned = name if name in learner.optimizers else next(iter(learner.optimizers))
    parts = [part if isinstance(part, nn.Module) else list(part) for part in groups]
    parts = parts or by_layer(learner.models[name])
    last = max(len(parts) - 1, 1)
    scales = [backbone_factor ** ((len(parts) - 1 - i) / last) for i in range(len(parts))]
    phases = list(phases)
    with grouped(learner.optimizers[tuned], parts, scales):
        with frozen(*parts[:-1]):
            rates = {tuned: base_lr}
            fit_one_cycle(
                learner, freeze_epochs, rates, phases=phases, warmup=0.99, div=div, resume=resume
            )
        if learner.stopped is None:
            rates = {tuned: base_lr / 2}
            fit_one_cycle(
                learner, epochs, rates, phases=phases, warmup=warmup, div=div, resume=resume
            )


def _trains(phase: Phase) -> bool:
    return isinstance(phase, AbstractTrainingPhase)


def _length(phase: Phase, batches: Any) -> int:
    try:
        return len(batches)
    except TypeError:
        raise ValueError(
            f"A cycle goes over a known number of steps, and the batches of {phase.name}, a "
            f"{type(batches).__name__}, have no length. Fit with a Scheduler of your own: "
            "Scheduler(lr=one_cycle(steps, maximum))."
        ) from None


def _by_optimizer(learner: Learner, rates: float | Mapping[str, float]) -> dict[str, float]:
    there = learner.optimizers
    if not isinstance(rates, Mapping):
        return dict.fromkeys(there, rates)
    unknown = [name for name in rates if name not in there]
    if unknown:
        raise ValueError(f"Rates for {unknown}, but the optimizers are {list(there)}.")
    return dict(rates)


def _only(learner: Learner, model: str) -> str:
    if model in learner.models:
        return model
    if model or len(learner.models) > 1:
        raise ValueError(f"Name the model to tune, {' or '.join(learner.models)}; got {model!r}.")
    return next(iter(learner.models))


@contextmanager
def _callbacks_for_now(learner: Learner, schedulers: list[Scheduler]) -> Iterator[None]:
    """While open, these schedulers instead of those of the learner."""
    listed = learner.callbacks.listed
    others = [c for c in listed if not isinstance(c.unwrapped, (Scheduler, TorchScheduler))]
    learner.callbacks.set([*others, *schedulers])
    try:
        yield
    finally:
        learner.callbacks.set(listed)


@contextmanager
def _options_kept(learner: Learner) -> Iterator[None]:
    """Afterwards learning rates and weight decays are what they were."""
    names = ("lr", "weight_decay")
    groups = _groups(learner)
    before = [{name: group[name] for name in names if name in group} for group in groups]
    try:
        yield
    finally:
        for group, options in zip(_groups(learner), before, strict=True):  # loading makes new ones
            group.update(options)


def _groups(learner: Learner) -> list[dict[str, Any]]:
    return [group for each in learner.optimizers.values() for group in each.param_groups]


def _set_weight_decay(learner: Learner, weight_decay: float) -> None:
    for name, optimizer in learner.optimizers.items():
        for group in optimizer.param_groups:
            if "weight_decay" not in group:
                kind = type(optimizer).__name__
                raise ValueError(f"{kind}, the optimizer of {name}, has no weight decay.")
            group["weight_decay"] = weight_decay
