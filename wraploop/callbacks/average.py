"""Averages of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn
from typing_extensions import override

from wraploop.callbacks.updates import AroundUpdates, has_update, parameters_of
from wraploop.given import check_names, check_numbers
from wraploop.named import plain_key

if TYPE_CHECKING:
    from wraploop.learner import Learner


class EMA(AroundUpdates):
    """Keeps an exponential moving average of the weights, brought up to date at each update.

    `with learner.using(ema): ...` puts the averages in place of the weights, to evaluate, sample or
    save; afterwards the weights are what they were. Buffers are the model's own.

    Args:
        decay: how much of the average stays at an update, between 0 and 1.
        models: names of the models that are averaged; all of them unless given.

    Attributes:
        averages: by the model's name, tensors by the parameter's name; the keys are the plain
            model's under any wrapper.

    Raises:
        ValueError: a decay outside of [0, 1); when it joins a learner, a model that there is not;
            in use, it has joined none.

    Examples:
        >>> from functools import partial
        >>> from torch import nn
        >>> from wraploop.learner import Learner
        >>> data = [(torch.ones(4, 2), torch.ones(4, 1))] * 8
        >>> learner = Learner(
        ...     nn.Linear(2, 1), nn.functional.mse_loss, data=(data, data), callbacks=[EMA(0.9)],
        ...     optimizer=partial(torch.optim.SGD, lr=0.1), default_callbacks=False,
        ... )
        >>> learner.fit(1)
        >>> with learner.using(learner.callbacks.get(EMA)):
        ...     metrics = learner.evaluate()
    """

    reads = ("model", "optimizer", "step.accumulated")

    def __init__(self, decay: float = 0.999, *, models: tuple[str, ...] = ()) -> None:
        super().__init__()
        check_numbers(decay=decay)
        check_names("EMA.models", models)
        if not 0 <= decay < 1:
            raise ValueError(f"The decay is at least 0 and below 1, and got {decay}.")
        self.decay, self.models = decay, models
        self.averages: dict[str, dict[str, Tensor]] = {}
        self._update = get_ema_multi_avg_fn(decay)
        self._has_begun = False

    @override
    def attach(self, learner: Learner) -> None:
        unknown = [name for name in self.models if name not in learner.models]
        if unknown:
            raise ValueError(f"No models {unknown} to average; there are {list(learner.models)}.")
        self._has_begun = False
        self._start(learner)

    @override
    def before(self, learner: Learner, name: str, optimizer: Optimizer) -> None:
        if not self._has_begun:  # weights may have been loaded since it joined
            self._start(learner)
        self._has_begun = True

    def _start(self, learner: Learner) -> None:
        self.averages = {name: _copies(learner, name) for name in self.models or learner.models}

    @override
    @torch.no_grad()
    def after(self, learner: Learner, name: str, optimizer: Optimizer) -> None:
        is_gathering = getattr(learner.step, "accumulated", 0) > 0
        if is_gathering or not has_update(optimizer):
            return
        held = set(parameters_of(optimizer))
        averages, weights = [], []
        for model, kept in self.averages.items():
            for key, weight in _weights(learner, model):
                if weight in held:
                    average = kept.get(key)
                    if average is None or average.device != weight.device:
                        kept[key] = average = _copy(weight if average is None else average, weight)
                    averages.append(average)
                    weights.append(weight.detach().to(average.dtype))
        if weights:
            self._update(averages, weights, 0)

    @contextmanager
    def in_use(self, learner: Learner) -> Iterator[None]:
        """While open, the models have the averages as their weights."""
        if not self.averages:
            raise ValueError(
                f"{self!r} has no averages: it has joined no learner. Give it to the learner's "
                "callbacks before training: Learner(..., callbacks=[ema])."
            )
        if not self._has_begun:
            self._start(learner)
        weights = {name: _copies(learner, name) for name in self.averages}
        try:
            _put(learner, self.averages)
            yield
        finally:
            _put(learner, weights)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"averages": self.averages}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._has_begun = bool(state["averages"])
        for model, averages in state["averages"].items():
            for key, average in averages.items():
                self.averages.setdefault(model, {})[key] = average.clone()

    def __repr__(self) -> str:
        return f"EMA({self.decay})"


def _copies(learner: Learner, name: str) -> dict[str, Tensor]:
    return {key: _copy(weight, weight) for key, weight in _weights(learner, name)}


def _weights(learner: Learner, name: str) -> Iterator[tuple[str, Tensor]]:
    """A model's parameters, by the names that they have without `torch.compile` around it."""
    for key, parameter in learner.models[name].named_parameters():
        yield plain_key(key), parameter


def _copy(values: Tensor, like: Tensor) -> Tensor:
    """A copy where `like` is, in at least float32: half precision would lose small changes."""
    dtype = torch.promote_types(like.dtype, torch.float32) if like.is_floating_point() else None
    return values.detach().to(like.device, dtype, copy=True)


@torch.no_grad()
def _put(learner: Learner, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
    for name, tensors in weights.items():
        for key, weight in _weights(learner, name):
            if key in tensors:
                weight.copy_(tensors[key])
