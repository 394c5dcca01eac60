# type: ignore  # torch's types are wider than what a step knows
"""Operators, graphs, hypernetworks, and weights that are drawn."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from wraploop import shared

from .registry import mlp, randint, randn, step, update


class DeepONet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch, self.trunk, self.bias = (
            mlp(4, 6, 5),
            mlp(1, 6, 5),
            nn.Parameter(torch.zeros(())),
        )

    def forward(self, functions, where):
        return self.branch(functions) @ self.trunk(where).T + self.bias


@step(net=DeepONet)
def operator_network_at_shared_points(m, o, k):
    where = torch.linspace(0, 1, 6)[:, None].requires_grad_()
    out = m.net(randn(k, 7, 4), shared(where))
    (derivative,) = torch.autograd.grad(out.sum(), where, create_graph=True)
    update(o.net, out.square().mean() + derivative.square().mean())
    return out, derivative


class GraphNet(nn.Module):
    """Message passing on dense graphs, one graph a row."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.update_, self.readout = mlp(6, 5, 3), nn.GRUCell(3, 3), nn.Linear(3, 2)

    def forward(self, nodes, adjacency):
        b, n, d = nodes.shape
        for _ in range(2):
            pairs = torch.cat(
                [nodes[:, :, None].expand(-1, -1, n, -1), nodes[:, None].expand(-1, n, -1, -1)], 3
            )
            messages = (self.message(pairs) * adjacency[..., None]).sum(2)
            nodes = self.update_(messages.reshape(-1, d), nodes.reshape(-1, d)).view(b, n, d)
        return self.readout(nodes.mean(1)), nodes


@step(net=GraphNet)
def graph_network_on_dense_graphs(m, o, k):
    out, nodes = m.net(randn(k, 7, 4, 3), randint(k, 2, 7, 4, 4).to(torch.float64))
    update(o.net, F.cross_entropy(out, randint(k, 2, 7)) + 0.1 * nodes.square().mean())
    return out


class NodeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2)

    def forward(self, x, edges):
        return torch.zeros(len(x), 2).index_add(0, edges[1], self.a(x)[edges[0]])


@step(net=NodeNet, refused="rows")
def graph_network_over_one_graphs_nodes(m, o, k):
    update(o.net, m.net(randn(k, 7, 3), torch.tensor([[0, 1, 6], [6, 5, 0]])).square().mean())


class Hyper(nn.Module):
    """Makes the weights of a small network for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.make = mlp(2, 5, 8)

    def forward(self, z, x):
        w, b = self.make(z).split([6, 2], 1)
        return torch.einsum("bi,bio->bo", x, w.view(-1, 3, 2)) + b


@step(net=Hyper)
def hypernetwork(m, o, k):
    out = m.net(randn(k, 7, 2), randn(k, 7, 3))
    update(o.net, out.square().mean())
    return out


class Bayes(nn.Module):
    """Weights are drawn from parameters, with noise that the step sets; layers keep their KL."""

    class Layer(nn.Module):
        def __init__(self, i: int, o: int) -> None:
            super().__init__()
            self.mu, self.rho = (
                nn.Parameter(torch.randn(o, i)),
                nn.Parameter(torch.full((o, i), -3.0)),
            )
            self.noise, self.kl = torch.zeros(o, i), torch.zeros(())

        def forward(self, x):
            sigma = F.softplus(self.rho)
            self.kl = (self.mu.square() + sigma.square() - 2 * sigma.log()).sum()
            return F.linear(x, self.mu + sigma * self.noise)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Bayes.Layer(3, 4), nn.Tanh(), Bayes.Layer(4, 2))

    def forward(self, x):
        return self.layers(x)


@step(net=Bayes)
def bayes_by_backprop(m, o, k):
    layers = [layer for layer in m.net.modules() if isinstance(layer, Bayes.Layer)]
    out = 0
    for _ in range(2):
        for layer in layers:
            layer.noise = torch.randn_like(layer.mu)
        out = out + m.net(randn(k, 7, 3)) / 2
    kl = sum(layer.kl for layer in layers)
    update(o.net, F.cross_entropy(out, randint(k, 2, 7)) + 0.01 * kl)
    return out, kl
