"""Ordinary training, and the forms that batches, losses and outputs take."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .registry import each, mlp, randn, step, update


def net() -> nn.Sequential:
    return mlp(3, 8, 8, 2)


@step(net=net)
def supervised(m, o, k):
    x, y = randn(k, 8, 3), randn(k, 8, 2)
    out = m.net(x)
    update(o.net, F.mse_loss(out, y))
    return out


@step(net=net, steps=5)
def uneven_batches(m, o, k):
    rows = (8, 8, 7, 5, 1)[k]
    update(o.net, F.mse_loss(m.net(randn(k, rows, 3)), randn(k, rows, 2)))


@step(net=net, steps=5)
def uneven_batches_and_a_sum_loss(m, o, k):
    rows = (8, 1, 7, 2, 5)[k]
    out = m.net(randn(k, rows, 3))
    update(o.net, F.mse_loss(out, randn(k, rows, 2), reduction="sum"))
    return out


@step(net=net)
def fewer_rows_than_shards(m, o, k):
    out = m.net(randn(k, k + 1, 3))
    update(o.net, out.square().mean())
    return out


@step(net=net)
def contrastive_over_all_pairs(m, o, k):
    a = F.normalize(m.net(randn(k, 7, 3)), dim=1)
    b = F.normalize(m.net(randn(k + 9, 7, 3)), dim=1)
    update(o.net, F.cross_entropy(a @ b.T / 0.2, torch.arange(7)))


@step(net=net)
def accumulation_over_microbatches(m, o, k):
    o.net.zero_grad()
    for i in range(3):
        (m.net(randn(10 * k + i, 5, 3)).square().mean() / 3).backward()
    o.net.step()


@step(net=net, optimizers=each(torch.optim.Adam))
def adam(m, o, k):
    update(o.net, F.mse_loss(m.net(randn(k, 7, 3)), randn(k, 7, 2)))


@step(net=net)
def several_forwards_before_one_backward(m, o, k):
    a, b, c = (m.net(randn(3 * k + i, 5 + i, 3)) for i in range(3))
    update(o.net, a.mean() + b.square().mean() + c.exp().sum())
    return a, b, c


@step(net=net)
def gradient_of_parameters_by_autograd_grad(m, o, k):
    parameters = list(m.net.parameters())
    loss = F.mse_loss(m.net(randn(k, 7, 3)), randn(k, 7, 2))
    grads = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter -= 0.1 * grad
    return grads


@step(net=net)
def gradient_penalty(m, o, k):
    x = randn(k, 7, 3).requires_grad_()
    out = m.net(x)
    (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    update(o.net, out.mean() + 10 * (grad.norm(dim=1) - 1).square().mean())
    return grad
