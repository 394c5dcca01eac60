"""Objects of the user's in a model's attributes, and hooks that keep things in all places."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from .registry import mlp, randn, step, update


class Config:
    """An object that holds a module, and a number that the user changes."""

    def __init__(self, head: nn.Module) -> None:
        self.head, self.scale = head, 1.0


class Configured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.gate = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 4)
        self.config = Config(self.head)
        self.stages = [[self.gate, 1.0]]

    def forward(self, x):
        h = self.body(x).tanh()
        for gate, weight in self.stages:
            h = h + weight * gate(h)
        return self.config.head(h) * self.config.scale


@step(net=Configured, steps=4)
def object_that_the_user_changes_between_steps(m, o, k):
    m.net.config.scale = 1.0 + k
    m.net.stages[0][1] = 0.5 * k
    out = m.net(randn(k, 7, 3))
    update(o.net, out.square().mean())
    return out


class Remembering(nn.Module):
    """Keeps a loss, a state, a count and a history in objects, none of which holds a module."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.context = SimpleNamespace(aux=None, last=None, calls=0, names=[])
        self.history: deque[torch.Tensor] = deque(maxlen=2)

    def forward(self, x):
        h = self.a(x).tanh()
        self.context.aux, self.context.last = h.square().mean(), h
        self.context.calls += 1
        self.context.names.append(f"call {self.context.calls}")
        self.history.append(h.detach().mean())
        return self.b(h)


@step(net=Remembering, steps=4)
def losses_and_counts_kept_in_objects(m, o, k):
    out = m.net(randn(k, 7, 3))
    context = m.net.context
    update(o.net, out.mean() + context.aux + context.last.abs().mean())
    return context.calls, list(context.names), list(m.net.history), context.last


class Averages:
    """A running mean, updated by the forward."""

    def __init__(self) -> None:
        self.n, self.mean = 0, torch.zeros(4)

    def update(self, x: torch.Tensor) -> None:
        self.n += 1
        self.mean = torch.lerp(self.mean, x, 1 / self.n)


class Averaging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.averages = nn.Linear(3, 4), Averages()

    def forward(self, x):
        h = self.a(x)
        if self.training:
            self.averages.update(h.detach().mean(0))
        return h - self.averages.mean if not self.training else h


@step(net=Averaging, steps=4)
def running_mean_kept_by_an_object(m, o, k):
    m.net.train()
    update(o.net, m.net(randn(k, 7, 3)).square().mean())
    m.net.eval()
    return m.net(randn(k + 9, 5, 3)), m.net.averages.n, m.net.averages.mean


TOTAL = torch.zeros(())


@step(net=lambda: mlp(3, 4, 4, 2), steps=3)
def hooks_that_keep_things_in_variables(m, o, k):
    seen, inputs, total, count = [], [], torch.zeros(()), 0

    def keep_and_return(module, args, out):
        seen.append(out)
        return out

    def add_up(module, args, out):
        nonlocal total, count
        total, count = total + out.square().mean(), count + len(out)

    def add_to_a_global(module, args, out):
        global TOTAL
        TOTAL = TOTAL + out.detach().sum(0).mean()

    handles = [
        m.net[1].register_forward_hook(keep_and_return),
        m.net[3].register_forward_hook(add_up),
        m.net[2].register_forward_hook(add_to_a_global),
        m.net[2].register_forward_pre_hook(lambda _, args: inputs.append(args[0])),
    ]
    outs = m.net(randn(k, 7, 3)), m.net(randn(k + 9, 4, 3))
    for handle in handles:
        handle.remove()
    kept = sum(x.square().mean() for x in (*seen, *inputs))
    update(o.net, outs[0].mean() + outs[1].mean() + total + kept)
    return count, seen, inputs, total


class Unmeasured(tuple):
    """As e3nn's Irreps: a tuple that is not asked for its length."""

    def __len__(self):
        raise NotImplementedError


class Choosing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.layers, self.numbers = Unmeasured([self.a]), Unmeasured([1, 2])

    def forward(self, x):
        return next(iter(self.layers))(x) * next(iter(self.numbers))


@step(net=Choosing)
def tuples_without_length(m, o, k):
    update(o.net, m.net(randn(k, 7, 3)).square().mean())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.rnn(x)[0][:, -1])


@step(net=Recurrent)
def hook_on_a_layer_with_other_outputs(m, o, k):
    """Looks at what can be looked at in a shard: how many axes there are."""
    axes = []
    handle = m.net.rnn.register_forward_hook(lambda _, args, out: axes.append(out[1][0].ndim))
    out = m.net(randn(k, 7, 5, 3))
    handle.remove()
    update(o.net, out.square().mean())
    return axes


class Constrained(nn.Linear):
    """Bounds its weight's norm before it is used, as EEGNet does."""

    def forward(self, input):
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.2)
        return super().forward(input)


@step(net=lambda: nn.Sequential(Constrained(3, 4), nn.Tanh(), Constrained(4, 2)))
def weights_given_other_data_in_forward(m, o, k):
    out = m.net(randn(k, 7, 3))
    update(o.net, out.square().mean() + m.net[0].weight.sum())
    return out


class SpectrallyNormed(nn.Module):
    """Keeps the weight of the layer in it, and what it is estimated by, on that layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        weight = layer.weight.detach()
        del layer.weight
        layer.register_parameter("weight_bar", nn.Parameter(weight))
        for name, size in ("weight_u", len(weight)), ("weight_v", weight.shape[1]):
            vector = nn.functional.normalize(torch.ones(size), dim=0)
            layer.register_parameter(name, nn.Parameter(vector, requires_grad=False))

    def forward(self, input):
        kept: Any = self.layer
        u, v, weight = kept.weight_u, kept.weight_v, kept.weight_bar
        v.data = nn.functional.normalize(weight.data.T @ u.data, dim=0)
        u.data = nn.functional.normalize(weight.data @ v.data, dim=0)
        self.layer.weight = weight / (u @ weight @ v)
        return self.layer(input)


def spectrally_normed() -> nn.Module:
    layers = SpectrallyNormed(nn.Linear(3, 4)), nn.Tanh(), SpectrallyNormed(nn.Linear(4, 2))
    return nn.Sequential(*layers)


@step(net=spectrally_normed)
def layers_on_which_the_forward_of_others_sets_weights(m, o, k):
    """Spectral norm as SAGAN and others have it."""
    out = m.net(randn(k, 7, 3))
    update(o.net, out.square().mean())
    return out, m.net[0].layer.weight
