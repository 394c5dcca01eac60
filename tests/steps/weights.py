"""Weights that are tied, computed, penalized, written, copied."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from .parameters import net, ordinary
from .registry import SGD, mlp, randn, step, update


class TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4, bias=False), nn.Linear(4, 3)
        self.b.weight = nn.Parameter(self.b.weight.detach())
        self.c = nn.Linear(3, 4)
        self.c.weight = self.a.weight

    def forward(self, x):
        return F.linear(self.c(self.b(self.a(x).tanh())), self.a.weight.T)


@step(net=TiedAutoencoder)
def weights_tied_in_one_model(m, o, k):
    x = randn(k, 7, 3)
    update(o.net, F.mse_loss(m.net(x), x))


def tied_pair() -> dict[str, nn.Module]:
    trunk = nn.Linear(3, 4)
    return {
        "a": nn.Sequential(trunk, nn.Tanh(), nn.Linear(4, 1)),
        "b": nn.Sequential(trunk, nn.Tanh(), nn.Linear(4, 2)),
    }


@step(tied_pair, optimizers=lambda m: {"a": SGD({*m.a.parameters(), *m.b.parameters()})})
def weights_tied_between_two_models(m, o, k):
    a, b = m.a(randn(k, 7, 3)), m.b(randn(k + 5, 5, 3))
    update(o.a, a.square().mean() + b.mean())
    o.a.zero_grad()
    m.a(randn(k, 4, 3)).mean().backward()
    m.b(randn(k, 4, 3)).mean().backward()
    o.a.step()


def overlapping(m):
    ps = list(m.net.parameters())
    return {"all": SGD(ps), "last": torch.optim.Adam(ps[2:], lr=0.01)}


@step(net=net, optimizers=overlapping)
def two_optimizers_over_overlapping_parameters(m, o, k):
    update(o.all, m.net(randn(k, 7, 3)).square().mean())
    update(o.last, m.net(randn(k, 7, 3)).mean())


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(3, 4), torch.randn(4, 2)])
        self.scales = nn.ParameterDict({"a": torch.randn(2), "b": torch.zeros(2)})
        self.dict = nn.ModuleDict({"x": nn.Linear(2, 2), "y": nn.Identity()})
        self.matrix = nn.Parameter(torch.randn(2, 2), requires_grad=False)

    def forward(self, x):
        for weight in self.weights:
            x = (x @ weight).tanh()
        for layer in self.dict.values():
            x = layer(x)
        return x * self.scales["a"] + self.scales.b @ self.matrix  # pyright: ignore


@step(net=Lists)
def parameter_lists_and_dicts(m, o, k):
    return ordinary(m, o, k)


class ReadsItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(3, 4, 2)

    def forward(self, x):
        size = sum(p.square().sum() for p in self.parameters())
        names = len(dict(self.named_parameters())) + len(self.state_dict())
        return self.body(x) * names, size


@step(net=ReadsItself)
def forward_that_reads_its_own_parameters(m, o, k):
    out, size = m.net(randn(k, 7, 3))
    update(o.net, out.square().mean() + 0.1 * size)
    return out, size


@step(net=net)
def weight_penalties_in_the_step(m, o, k):
    l2 = sum(p.square().sum() for p in m.net.parameters())
    l1 = sum(p.abs().sum() for n, p in m.net.named_parameters() if n.endswith("weight"))
    update(o.net, m.net(randn(k, 7, 3)).square().mean() + 0.1 * l2 + 0.01 * l1)


@step(net=net)
def weight_penalty_alone(m, o, k):
    m.net(randn(k, 7, 3))
    update(o.net, sum(p.square().sum() for p in m.net.parameters()))


@step(net=net)
def orthogonal_regularization(m, o, k):
    penalty = 0.0
    for name, p in m.net.named_parameters():
        if p.ndim > 1 and "bias" not in name:
            gram = p.flatten(1) @ p.flatten(1).T
            penalty = penalty + (gram * (1 - torch.eye(len(gram)))).square().sum()
    update(o.net, m.net(randn(k, 7, 3)).mean() + penalty)


@step(net=lambda: nn.Linear(3, 2))
def weight_of_the_model_in_the_loss(m, o, k):
    x = randn(k, 7, 3)
    out = m.net(x)
    direct = F.linear(x, m.net.weight, m.net.bias)
    update(o.net, (out * direct.sigmoid()).mean() + m.net.weight.norm())
    return out - direct


@step(net=net)
def weights_written_through_data(m, o, k):
    ps = list(m.net.parameters())
    ps[0].data = ps[0].data * 0.9
    ps[1].data.add_(0.1)
    with torch.no_grad():
        ps[2].copy_(ps[2] + 0.01)
        nn.init.constant_(ps[3], 0.1)
    return ordinary(m, o, k)


@step(net=net)
def weights_set_from_one_vector(m, o, k):
    vector = nn.utils.parameters_to_vector(m.net.parameters()).detach()
    nn.utils.vector_to_parameters(vector * 0.9 + 0.01, m.net.parameters())
    return ordinary(m, o, k)


@step(net=net)
def lora(m, o, k):
    if k == 0:
        m.net.requires_grad_(False)

        class Low(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = nn.Parameter(randn(0, 1, 3)), nn.Parameter(torch.zeros(5, 1))

            def forward(self, weight):
                return weight + self.b @ self.a

        parametrize.register_parametrization(m.net[0], "weight", Low())
        o.net = SGD([p for p in m.net.parameters() if p.requires_grad])
    return ordinary(m, o, k)


for _name, _norm in {
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "orthogonal_weights": parametrizations.orthogonal,
    "old_spectral_norm": nn.utils.spectral_norm,
}.items():

    def _run(m, o, k):
        a, b = m.net(randn(k, 7, 3)), m.net(randn(k + 1, 2, 3))
        update(o.net, a.square().mean() + b.mean())
        m.net.eval()
        evaluated = m.net(randn(k, 7, 3))
        m.net.train()
        return a, b, evaluated

    def _make(norm=_norm):
        return nn.Sequential(norm(nn.Linear(3, 4)), nn.Tanh(), norm(nn.Linear(4, 2)))

    _run.__name__ = _name
    step(net=_make)(_run)
