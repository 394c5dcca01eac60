# type: ignore  # torch's types are wider than what a step knows
"""Losses and updates that are made from gradients."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .gradients import linear_maml, net, parameters
from .registry import SGD, mlp, randint, randn, step, update


class Forces(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(3, 6, 1, act=nn.SiLU)

    def forward(self, positions):
        with torch.enable_grad():
            positions = positions.requires_grad_()
            energy = self.body(positions).sum((1, 2))
            (grad,) = torch.autograd.grad(energy.sum(), positions, create_graph=self.training)
        return energy, -grad


@step(net=Forces)
def forces_from_an_energy_inside_forward(m, o, k):
    energy, forces = m.net(randn(k, 7, 4, 3))
    update(o.net, energy.square().mean() + (forces - 1).square().mean())
    m.net.eval()
    with torch.no_grad():
        evaluated = m.net(randn(k, 7, 4, 3))[1].detach()
    m.net.train()
    return energy, forces, evaluated


@step(net=lambda: mlp(3, 5, 5, 2), critic=lambda: mlp(2, 4, 1))
def adaptive_weight_from_gradient_norms(m, o, k):
    """The discriminator weight of VQGAN."""
    out = m.net(randn(k, 7, 3))
    reconstruction, adversarial = (out - randn(k, 7, 2)).abs().mean(), -m.critic(out).mean()
    last = list(m.net.parameters())[-2]
    (g1,) = torch.autograd.grad(reconstruction, last, retain_graph=True)
    (g2,) = torch.autograd.grad(adversarial, last, retain_graph=True)
    weight = (g1.norm() / (g2.norm() + 1e-4)).clamp(0, 1e4).detach()
    update(o.net, reconstruction + weight * adversarial)
    return weight


class Tasks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = mlp(3, 5, 5)
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(2))
        self.weights = nn.Parameter(torch.ones(2))

    def forward(self, x):
        h = self.trunk(x)
        return [head(h) for head in self.heads]


@step(net=Tasks)
def gradnorm(m, o, k):
    outs = m.net(randn(k, 7, 3))
    losses = torch.stack([out.sub(i).square().mean() for i, out in enumerate(outs)])
    last = m.net.trunk[-1].weight
    norms = torch.stack(
        [
            torch.autograd.grad(w * loss, last, create_graph=True)[0].norm()
            for w, loss in zip(m.net.weights, losses, strict=True)
        ]
    )
    o.net.zero_grad()
    (m.net.weights.detach() * losses).sum().backward(retain_graph=True)
    balance = (norms - norms.mean().detach()).abs().sum()
    m.net.weights.grad = torch.autograd.grad(balance, m.net.weights)[0]
    o.net.step()
    return norms


@step(net=Tasks)
def pcgrad(m, o, k):
    outs = m.net(randn(k, 7, 3))
    grads = []
    for out in outs:
        o.net.zero_grad(set_to_none=True)
        out.square().mean().backward(retain_graph=True)
        grads.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                    for p in m.net.parameters()
                ]
            )
        )
    a, b = grads
    projected = a - (a @ b).clamp(max=0) / b.square().sum() * b + b
    for p, part in zip(
        m.net.parameters(), projected.split([p.numel() for p in m.net.parameters()]), strict=True
    ):
        p.grad = part.view_as(p)
    o.net.step()


@step(net=net)
def dataset_distillation_by_matching_gradients(m, o, k):
    if k == 0:
        m.synthetic = randn(5, 4, 3).requires_grad_()
    labels = randint(k, 2, 7)
    real = torch.autograd.grad(F.cross_entropy(m.net(randn(k, 7, 3)), labels), parameters(m.net))
    fake = torch.autograd.grad(
        F.cross_entropy(m.net(m.synthetic), labels[:4]), parameters(m.net), create_graph=True
    )
    match = sum(
        1 - F.cosine_similarity(a.flatten(), b.flatten(), 0)
        for a, b in zip(real, fake, strict=True)
    )
    (grad,) = torch.autograd.grad(match, m.synthetic)
    m.synthetic = (m.synthetic - grad).detach().requires_grad_()
    update(o.net, F.cross_entropy(m.net(m.synthetic.detach()), labels[:4]))
    return m.synthetic


@step(net=net)
def sharpness_aware_minimization(m, o, k):
    x, y = randn(k, 7, 3), randn(k, 7, 2)
    o.net.zero_grad()
    F.mse_loss(m.net(x), y).backward()
    norm = torch.stack([p.grad.norm() for p in m.net.parameters()]).norm()
    with torch.no_grad():
        moves = [0.05 * p.grad / norm for p in m.net.parameters()]
        for p, move in zip(m.net.parameters(), moves, strict=True):
            p.add_(move)
    o.net.zero_grad()
    F.mse_loss(m.net(x), y).backward()
    with torch.no_grad():
        for p, move in zip(m.net.parameters(), moves, strict=True):
            p.sub_(move)
    o.net.step()


@step(net=net)
def hypergradient_through_one_unrolled_step(m, o, k):
    log_decay = torch.tensor(-2.0, requires_grad=True)
    ps = parameters(m.net)
    loss = m.net(randn(k, 7, 3)).square().mean()
    loss = loss + log_decay.exp() * sum(p.square().sum() for p in ps)
    grads = torch.autograd.grad(loss, ps, create_graph=True)
    fast = {n: p - 0.1 * g for (n, p), g in zip(m.net.named_parameters(), grads, strict=True)}
    validation = torch.func.functional_call(m.net, fast, randn(k, 5, 3)).square().mean()
    (grad,) = torch.autograd.grad(validation, log_decay)
    update(o.net, m.net(randn(k, 7, 3)).square().mean())
    return grad


@step(net=net)
def adversarial_training(m, o, k):
    """Projected gradient descent on inputs, in evaluation mode."""
    x, y = randn(k, 7, 3), randint(k, 2, 7)
    m.net.eval()
    delta = torch.zeros_like(x).uniform_(-0.1, 0.1).requires_grad_()
    for _ in range(3):
        F.cross_entropy(m.net(x + delta), y).backward()
        with torch.no_grad():
            delta.add_(0.05 * delta.grad.sign()).clamp_(-0.1, 0.1)
        delta.grad = None
    m.net.train()
    update(o.net, F.cross_entropy(m.net(x + delta.detach()), y))
    return delta


@step(net=net)
def virtual_adversarial_training(m, o, k):
    x = randn(k, 7, 3)
    with torch.no_grad():
        clean = m.net(x).softmax(1)
    d = F.normalize(torch.randn_like(x), dim=1).requires_grad_()
    F.kl_div(m.net(x + 0.1 * d).log_softmax(1), clean, reduction="batchmean").backward()
    d = F.normalize(d.grad, dim=1)
    o.net.zero_grad()
    F.kl_div(m.net(x + 0.5 * d).log_softmax(1), clean, reduction="batchmean").backward()
    o.net.step()


@step(net=net)
def elastic_weight_consolidation(m, o, k):
    if k == 0:
        m.net(randn(k, 7, 3)).log_softmax(1)[:, 0].mean().backward()
        m.fisher = {n: p.grad.clone().square() for n, p in m.net.named_parameters()}
        m.anchor = {n: p.detach().clone() for n, p in m.net.named_parameters()}
    loss = F.cross_entropy(m.net(randn(k, 7, 3)), randint(k, 2, 7))
    for n, p in m.net.named_parameters():
        loss = loss + (m.fisher[n] * (p - m.anchor[n]).square()).sum()
    update(o.net, loss)


@step(net=net, optimizers=lambda m: {"net": SGD(m.net.parameters()), "lr": None})
def meta_sgd_with_a_learned_rate(m, o, k):
    if k == 0:
        m.rates = [torch.full_like(p, 0.1).requires_grad_() for p in m.net.parameters()]
    grads = torch.autograd.grad(
        m.net(randn(k, 5, 3)).square().mean(), parameters(m.net), create_graph=True
    )
    fast = [p - r * g for p, r, g in zip(m.net.parameters(), m.rates, grads, strict=True)]
    loss = linear_maml(fast, randn(k + 1, 7, 3)).square().mean()
    grads = torch.autograd.grad(loss, [*m.net.parameters(), *m.rates])
    o.net.zero_grad()
    for p, g in zip([*m.net.parameters(), *m.rates], grads, strict=True):
        p.grad = g
    o.net.step()
    return grads
