# type: ignore  # torch's types are wider than what a step knows
"""Modules held, copied, called and derived in ways that torch's own containers do not show."""

from __future__ import annotations

import functools
import weakref
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from .registry import mlp, randn, step, update


def twice(m, o, k):
    """Gradients by `backward` and by `autograd.grad`."""
    x = randn(k, 7, 3).requires_grad_()
    out = m.net(x)
    ps = list(m.net.parameters())
    grads = torch.autograd.grad(out.square().sum(), [x, *ps], create_graph=True, allow_unused=True)
    update(o.net, out.mean() + sum(g.square().sum() for g in grads if g is not None))
    return out, grads


class Closures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(3, 3) for _ in range(3))
        self.run = lambda x: self.a(x)
        scale = self.b.weight

        def scaled(x, layer=self.c):
            return layer(x @ scale)

        self.scaled = scaled

    def forward(self, x):
        return self.scaled(self.run(x).tanh())


@step(net=Closures)
def closures_and_gradients_by_hand(m, o, k):
    return twice(m, o, k)


class Named(NamedTuple):
    first: nn.Module
    rest: list[Any]


@dataclass
class Parts:
    layer: nn.Module
    weight: torch.Tensor


class Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e, self.f = (nn.Linear(3, 3) for _ in range(6))
        self.named, self.parts = Named(self.a, [self.b]), Parts(self.c, self.d.weight)
        self.space, self.queue = SimpleNamespace(layer=self.e), deque([self.f], maxlen=2)
        self.table = defaultdict(list, {"x": [self.a, self.f]})
        self.ordered = OrderedDict(y=(self.b,))

    def forward(self, x):
        x = self.named.rest[0](self.named.first(x)).tanh()
        x = F.linear(self.parts.layer(x), self.parts.weight).tanh()
        x = self.queue[0](self.space.layer(x)).tanh()
        return self.ordered["y"][0](self.table["x"][1](x))


@step(net=Containers)
def modules_held_in_other_containers(m, o, k):
    return twice(m, o, k)


class Strategy:
    """An object of the user's, no module, that works on the model that it is given."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.calls = model, 0

    def __call__(self, x):
        return self.model.b(self.model.a(x).tanh())


class Delegating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.strategy = Strategy(self)

    def forward(self, x):
        return self.strategy(x)


@step(net=Delegating)
def model_that_delegates_to_an_object(m, o, k):
    return twice(m, o, k)


class Child(nn.Module):
    def __init__(self, parent: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.parents = [parent]
        self.weak = weakref.ref(parent)

    def forward(self, x):
        return self.layer(x) @ self.parents[0].weight


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))
        self.child = Child(self)

    def forward(self, x):
        return self.child(x)


@step(net=Parent)
def child_that_refers_to_its_parent(m, o, k):
    return twice(m, o, k)


class WeakChild(Child):
    def forward(self, x):
        parent = self.weak()
        assert parent is not None
        return self.layer(x) @ parent.weight


class WeakParent(Parent):
    def __init__(self) -> None:
        super().__init__()
        self.child = WeakChild(self)


@step(net=WeakParent)
def child_that_refers_to_its_parent_weakly(m, o, k):
    return twice(m, o, k)


class Properties(nn.Module):
    """Weights by property, and an attribute looked up by the model's own `__getattr__`."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.inner = nn.Linear(3, 3), mlp(3, 4, 2)

    @property
    def weight(self):
        return self.a.weight.triu() + torch.eye(3)

    @functools.cached_property
    def order(self):
        return torch.tensor([2, 0, 1])

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) * 2

    def forward(self, x):
        return self.inner[2](self.inner[0](x @ self.weight[self.order]).tanh()) + self.bias_sum

    @property
    def bias_sum(self):
        return sum(p.sum() for n, p in self.named_parameters() if n.endswith("bias"))


@step(net=Properties)
def properties_and_a_call_of_the_models_own(m, o, k):
    penalty = m.net.weight.square().sum()
    out = m.net(randn(k, 7, 3))
    update(o.net, out.square().mean() + 0.1 * penalty)
    return out


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).mT


class Parametrized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        parametrize.register_parametrization(self.a, "weight", Symmetric())

    def forward(self, x):
        with parametrize.cached():
            return self.a(self.a(x).tanh())


@step(net=Parametrized)
def parametrization_cached_in_forward(m, o, k):
    out = twice(m, o, k)
    with parametrize.cached():
        update(o.net, m.net(randn(k, 7, 3)).mean() + m.net.a.weight.square().sum())
    return out
