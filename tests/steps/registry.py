"""The list of training steps that every wrapper must leave what they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

Models = Any  # a namespace of modules, wrapped or not, on which a step may keep more of its own
Optimizers = Any  # a namespace of optimizers, one for each model


@dataclass(frozen=True)
class Step:
    """A training step, in plain torch.

    Attributes:
        name: what it does.
        run: `run(models, optimizers, k)` makes the k-th step; what it returns is compared too.
        build: makes the models, in float64 unless they say otherwise.
        optimizers: makes the optimizers of the (wrapped) models.
        methods: names of methods that take a batch, for wrapping.
        plain: names of models that are not wrapped.
        steps: how many steps are made.
        rtol: relative to the largest element of each tensor.
        draws: whether models draw random numbers (which must then not matter).
        refused: what the error says, where the design cannot keep the promise.
        local: how the losses of the rows that a process has, `mine`, make up that of all: "mean" or
            "sum"; None where they do not, or the step takes whole batches.
    """

    name: str
    run: Callable[[Models, Optimizers, int], Any]
    build: Callable[[], Mapping[str, nn.Module]]
    optimizers: Callable[[Models], Mapping[str, Any]]
    methods: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()
    steps: int = 3
    rtol: float = 1e-10
    draws: bool = False
    refused: str | None = None
    local: str | None = None


STEPS: dict[str, Step] = {}

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01)


def sgd(models: Models) -> dict[str, Any]:
    """SGD with momentum and weight decay for every model that has parameters."""
    parameters = {name: list(model.parameters()) for name, model in vars(models).items()}
    return {name: SGD(mine) for name, mine in parameters.items() if mine}


def each(optimizer: Callable[..., Any]) -> Callable[[Models], dict[str, Any]]:
    """An `optimizer` for every model."""
    return lambda models: {n: optimizer(model.parameters()) for n, model in vars(models).items()}


def step(
    models: Callable[[], Mapping[str, nn.Module]] | None = None,
    *,
    optimizers: Callable[[Models], Mapping[str, Any]] = sgd,
    methods: tuple[str, ...] = (),
    plain: tuple[str, ...] = (),
    steps: int = 3,
    rtol: float = 1e-10,
    draws: bool = False,
    refused: str | None = None,
    local: str | None = None,
    **factories: Callable[[], nn.Module],
) -> Callable[[Callable[[Models, Optimizers, int], Any]], Callable[[Models, Optimizers, int], Any]]:
    """Puts the decorated function on the list.

    Args:
        models: makes all models; or, by name, `factories` makes each.
        optimizers: see `Step`, like the rest.
        methods: names of methods.
        plain: names of models.
        steps: how many.
        rtol: tolerance.
        draws: whether models draw.
        refused: an expression that the error matches.
        local: how losses of a process's own rows make up that of all.
        factories: one for each model.
    """
    build = models or (lambda: {name: make() for name, make in factories.items()})

    def register(run: Callable[[Models, Optimizers, int], Any]) -> Any:
        name = run.__name__.strip("_")
        assert name not in STEPS or STEPS[name].run.__module__ == run.__module__, name
        STEPS[name] = Step(
            name, run, build, optimizers, methods, plain, steps, rtol, draws, refused, local
        )
        return run

    return register


# What steps are made of


def randn(k: int, *shape: int) -> Tensor:
    """Standard normal numbers that follow from `k` and the shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 * k + sum(shape)))


OWN = [0, 1]  # which of how many runs of rows are this process's own


def mine(*batch: Tensor) -> Any:
    """The rows of `batch` that are this process's own, where it is to pass no others."""
    part, parts = OWN
    own = [tensor.tensor_split(parts)[part] for tensor in batch]
    return own[0] if len(own) == 1 else own


def randint(k: int, high: int, *shape: int) -> Tensor:
    """Integers below `high` that follow from `k` and the shape."""
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(77 + k))


def mlp(*sizes: int, act: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    """Linear layers with activations between."""
    layers: list[nn.Module] = []
    for i, o in pairwise(sizes):
        layers += [nn.Linear(i, o), act()]
    return nn.Sequential(*layers[:-1])


def update(optimizer: Any, loss: Any) -> None:
    """The three lines of every step; gradients stay to be looked at."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def space(**values: Any) -> SimpleNamespace:
    """A namespace."""
    return SimpleNamespace(**values)
