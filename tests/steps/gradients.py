# type: ignore  # torch's types are wider than what a step knows
"""Derivatives taken by hand, and of higher order."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import nn
from torch.nn import functional as F

from .registry import mlp, randn, step, update


def net() -> nn.Sequential:
    return mlp(3, 5, 2)


def scalar() -> nn.Sequential:
    return mlp(2, 6, 6, 1)


def parameters(model):
    return list(model.parameters())


@step(net=net)
def gradients_by_autograd_grad_set_as_grad(m, o, k):
    loss = F.mse_loss(m.net(randn(k, 7, 3)), randn(k, 7, 2))
    grads = torch.autograd.grad(loss, parameters(m.net)[1:], allow_unused=True)
    for parameter, grad in zip(parameters(m.net)[1:], grads, strict=True):
        parameter.grad = grad
    o.net.step()


@step(net=net)
def hessian_vector_product(m, o, k):
    loss = m.net(randn(k, 7, 3)).square().mean()
    grads = torch.autograd.grad(loss, parameters(m.net), create_graph=True)
    vector = [torch.randn_like(p) for p in m.net.parameters()]
    product = torch.autograd.grad(grads, parameters(m.net), vector)
    update(o.net, m.net(randn(k, 7, 3)).mean())
    return grads, product


@step(net=net)
def hutchinson_trace_of_the_hessian(m, o, k):
    loss = m.net(randn(k, 7, 3)).square().mean()
    grads = torch.autograd.grad(loss, parameters(m.net), create_graph=True)
    trace = 0.0
    for _ in range(2):
        zs = [torch.randint_like(p, 2) * 2 - 1 for p in m.net.parameters()]
        products = torch.autograd.grad(grads, parameters(m.net), zs, retain_graph=True)
        trace += sum((z * p).sum() for z, p in zip(zs, products, strict=True))
    update(o.net, loss)
    return trace


@step(net=net)
def third_order(m, o, k):
    loss = m.net(randn(k, 7, 3)).square().mean()
    grads = torch.autograd.grad(loss, parameters(m.net), create_graph=True)
    second = torch.autograd.grad(
        sum(g.square().sum() for g in grads), parameters(m.net), create_graph=True
    )
    update(o.net, sum(g.pow(3).sum() for g in second))
    return grads, second


@step(net=net)
def backward_with_create_graph(m, o, k):
    o.net.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        m.net(randn(k, 7, 3)).square().mean().backward(create_graph=True)
    grads = [p.grad for p in m.net.parameters()]
    o.net.zero_grad()
    sum(g.square().sum() for g in grads).backward()
    o.net.step()


@step(net=net)
def backward_with_create_graph_accumulated(m, o, k):
    o.net.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        m.net(randn(k, 7, 3)).square().mean().backward(create_graph=True)
    penalty = sum(p.grad.square().sum() for p in m.net.parameters())
    penalty.backward()
    for p in m.net.parameters():
        p.grad = p.grad.detach()
    o.net.step()


def linear_maml(weights, x):
    (w1, b1, w2, b2) = weights
    return F.linear(F.linear(x, w1, b1).tanh(), w2, b2)


@step(net=net)
def maml_with_weights_taken_out(m, o, k):
    o.net.zero_grad()
    for task in range(2):
        loss = F.mse_loss(m.net(randn(10 * k + task, 5, 3)), randn(k, 5, 2))
        grads = torch.autograd.grad(loss, parameters(m.net), create_graph=True)
        fast = [p - 0.1 * g for p, g in zip(m.net.parameters(), grads, strict=True)]
        F.mse_loss(linear_maml(fast, randn(k + task, 6, 3)), randn(k, 6, 2)).backward()
    o.net.step()


@step(net=net)
def maml_with_functional_call(m, o, k):
    o.net.zero_grad()
    names = [name for name, _ in m.net.named_parameters()]
    loss = F.mse_loss(m.net(randn(k, 5, 3)), randn(k, 5, 2))
    grads = torch.autograd.grad(loss, parameters(m.net), create_graph=True)
    fast = [p - 0.1 * g for p, g in zip(m.net.parameters(), grads, strict=True)]
    weights = dict(zip(names, fast, strict=True))
    out = torch.func.functional_call(m.net, weights, (randn(k, 7, 3),))
    F.mse_loss(out, randn(k, 7, 2)).backward()
    o.net.step()
    return out


@step(net=net)
def first_order_maml_by_deepcopy(m, o, k):
    o.net.zero_grad()
    for task in range(2):
        learner = copy.deepcopy(m.net)
        inner = torch.optim.SGD(learner.parameters(), lr=0.1)
        for _ in range(2):
            update(inner, learner(randn(10 * k + task, 5, 3)).square().mean())
        inner.zero_grad()
        learner(randn(k + task, 7, 3)).mean().backward()
        for p, q in zip(m.net.parameters(), learner.parameters(), strict=True):
            p.grad = q.grad.clone() if p.grad is None else p.grad + q.grad
    o.net.step()


@step(net=net)
def reptile(m, o, k):
    before = copy.deepcopy(m.net.state_dict())
    for i in range(3):
        update(o.net, m.net(randn(10 * k + i, 5, 3)).square().mean())
    after = m.net.state_dict()
    m.net.load_state_dict({n: before[n] + 0.5 * (after[n] - before[n]) for n in before})


@step(net=net)
def gradients_of_single_rows(m, o, k):
    x = randn(k, 5, 3)
    out = m.net(x).square().sum(1)
    rows = [torch.autograd.grad(row, parameters(m.net), retain_graph=True) for row in out]
    o.net.zero_grad()
    for i, p in enumerate(m.net.parameters()):
        grads = torch.stack([row[i] for row in rows])
        norms = grads.flatten(1).norm(dim=1).clamp(min=0.1)
        p.grad = (grads / norms.view(-1, *[1] * (grads.ndim - 1))).mean(0)
    o.net.step()


@step(net=net)
def gradients_of_single_rows_by_vmap(m, o, k):
    weights = {n: p.detach() for n, p in m.net.named_parameters()}

    def loss(weights, x):
        return torch.func.functional_call(m.net, weights, (x[None],)).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, randn(k, 5, 3))
    o.net.zero_grad()
    for name, p in m.net.named_parameters():
        p.grad = grads[name].mean(0)
    o.net.step()
    return grads


@step(net=net)
def jacobian_of_the_outputs(m, o, k):
    x = randn(k, 4, 3)
    jacobian = torch.autograd.functional.jacobian(lambda x: m.net(x).sum(0), x, create_graph=True)
    update(o.net, jacobian.square().sum())
    return jacobian


@step(net=net, refused="many directions|once for each")
def jacobian_by_batched_derivatives(m, o, k):
    x = randn(k, 4, 3).requires_grad_()
    out = m.net(x).sum(0)
    (jacobian,) = torch.autograd.grad(out, x, torch.eye(2), is_grads_batched=True)
    update(o.net, m.net(x).square().mean())
    return jacobian


@step(net=scalar)
def laplacian_of_the_output(m, o, k):
    """A physics-informed step."""
    x = randn(k, 7, 2).requires_grad_()
    u = m.net(x)
    (du,) = torch.autograd.grad(u, x, torch.ones_like(u), create_graph=True)
    laplacian = sum(
        torch.autograd.grad(du[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)
    )
    boundary = m.net(randn(k + 5, 5, 2).sign())
    update(o.net, (laplacian + x.sin().prod(1)).square().mean() + boundary.square().mean())
    return laplacian
