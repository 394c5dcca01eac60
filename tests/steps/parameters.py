"""Parameters that are unused, frozen, replaced, tied, added, or used directly by the step."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .registry import SGD, mlp, randn, step, update


def net() -> nn.Sequential:
    return mlp(3, 5, 2)


def ordinary(m, o, k):
    out = m.net(randn(k, 7, 3))
    update(o.net, F.mse_loss(out, randn(k, 7, 2)))
    return out


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x, which="a"):
        return getattr(self, which)(x)


@step(net=Branches, steps=4)
def branches_that_differ_between_steps(m, o, k):
    update(o.net, m.net(randn(k, 7, 3), which="abab"[k]).square().mean())


@step(net=Branches)
def branches_that_differ_between_forwards(m, o, k):
    a, b = m.net(randn(k, 7, 3), "a"), m.net(randn(k, 7, 3), "b")
    update(o.net, a.square().mean() + (b.mean() if k == 1 else 0))


class RowBranches(nn.Module):
    """Each expert gets its rows, as in a mixture of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(3, 2) for _ in range(4))

    def forward(self, x):
        out = x.new_zeros(len(x), 2)
        which = x[:, 0].gt(0).long() + 2 * (x[:, 1] > 1.5).long()
        for i, expert in enumerate(self.experts):
            if (which == i).any():
                out[which == i] = expert(x[which == i])
        return out


@step(net=RowBranches)
def branches_that_differ_between_rows(m, o, k):
    out = m.net(randn(k, 7, 3))
    update(o.net, out.square().mean())
    return out


@step(net=RowBranches)
def a_branch_that_only_the_last_row_takes(m, o, k):
    x = -randn(k, 7, 3).abs()
    x[-1] *= -1
    update(o.net, m.net(x)[-1:].square().sum())


def half_frozen() -> nn.Sequential:
    model = mlp(3, 5, 2)
    model[0].requires_grad_(False)
    return model


def all_trainable(m):
    return {"net": SGD(m.net.parameters())}


@step(net=half_frozen, optimizers=all_trainable, steps=4)
def frozen_when_wrapped_and_thawed_later(m, o, k):
    if k == 2:
        m.net.requires_grad_(True)
    return ordinary(m, o, k)


@step(net=net, steps=4)
def frozen_midway_and_thawed_again(m, o, k):
    for name, p in m.net.named_parameters():
        p.requires_grad_(not (name.startswith("0") and k in (1, 2)))
    return ordinary(m, o, k)


@step(net=net)
def all_frozen_but_the_input(m, o, k):
    m.net.requires_grad_(False)
    x = randn(k, 7, 3).requires_grad_()
    out = m.net(x)
    out.square().mean().backward()
    m.net.requires_grad_(True)
    o.net.zero_grad()
    return x.grad, ordinary(m, o, k)


@step(net=net)
def all_frozen_and_nothing_else(m, o, k):
    m.net.requires_grad_(False)
    out = m.net(randn(k, 7, 3))
    m.net.requires_grad_(True)
    return out, ordinary(m, o, k)


@step(net=net, steps=4)
def thawed_between_forward_and_backward(m, o, k):
    first, *_ = m.net.parameters()
    first.requires_grad_(k % 2 == 0)
    out = m.net(randn(k, 7, 3))
    first.requires_grad_(True)
    update(o.net, out.square().mean())


@step(net=net, steps=4)
def frozen_between_forward_and_backward(m, o, k):
    first, *_ = m.net.parameters()
    out = m.net(randn(k, 7, 3))
    first.requires_grad_(k % 2 == 0)
    update(o.net, out.square().mean())
    first.requires_grad_(True)


@step(net=net)
def frozen_between_two_forwards_of_one_backward(m, o, k):
    first, *_ = m.net.parameters()
    a = m.net(randn(k, 7, 3))
    first.requires_grad_(False)
    b = m.net(randn(k + 1, 5, 3))
    first.requires_grad_(True)
    c = m.net(randn(k + 2, 3, 3))
    update(o.net, a.mean() + b.square().mean() - c.exp().mean())


@step(net=net)
def one_parameter_trained_each_step(m, o, k):
    for i, p in enumerate(m.net.parameters()):
        p.requires_grad_(i == k)
    return ordinary(m, o, k)


@step(net=lambda: mlp(3, 5, 2).float(), steps=4, rtol=1e-4, optimizers=all_trainable)
def cast_after_wrapping(m, o, k):
    if k == 2:
        m.net.double()
    dtype = next(m.net.parameters()).dtype
    out = m.net(randn(k, 7, 3).to(dtype))
    o.net.state.clear()
    update(o.net, out.square().mean())
    return out


@step(net=net)
def cast_there_and_back(m, o, k):
    m.net.float()
    with torch.no_grad():
        m.net(randn(k, 7, 3).float())
    m.net.double()
    return ordinary(m, o, k)


@step(net=net)
def parameter_replaced(m, o, k):
    if k == 1:
        inner = m.net[0]
        inner.weight = nn.Parameter(inner.weight.detach() * 2)
        o.net = SGD(m.net.parameters())
    return ordinary(m, o, k)


class Growing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList([nn.Linear(3, 4)]), nn.Linear(4, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(x)


@step(net=Growing)
def submodule_added(m, o, k):
    if k:
        m.net.layers.append(nn.Linear(4, 4))
        o.net.add_param_group({"params": m.net.layers[-1].parameters()})
    return ordinary(m, o, k)


@step(net=Growing)
def submodule_replaced(m, o, k):
    if k == 1:
        m.net.head = nn.Linear(4, 2)
        o.net.add_param_group({"params": m.net.head.parameters()})
    return ordinary(m, o, k)


@step(net=net)
def layers_added_to_a_sequential(m, o, k):
    if k == 1:
        layer = nn.Linear(2, 2)
        m.net.add_module("3", layer)
        o.net.add_param_group({"params": layer.parameters()})
    if k == 2:
        layer = nn.Linear(2, 2)
        m.net.append(layer)
        o.net.add_param_group({"params": layer.parameters()})
    return ordinary(m, o, k)


@step(net=net)
def layers_by_index_and_iteration(m, o, k):
    x = h = randn(k, 7, 3)
    for layer in m.net:
        h = layer(h)
    out = m.net(x)
    loss = (out - h.detach() + h).square().mean() + m.net[0].weight.square().sum() / len(m.net)
    update(o.net, loss)
    return h, out


@step(net=net)
def modules_looked_up_by_name(m, o, k):
    m.net.get_submodule("0").requires_grad_(k != 1)
    decay = m.net.get_parameter("2.weight").square().sum()
    modules = dict(m.net.named_modules())
    assert isinstance(modules["0"], nn.Linear)
    assert [name for name, _ in m.net.named_children()] == ["0", "1", "2"]
    update(o.net, m.net(randn(k, 7, 3)).mean() + decay)
