"""Adversarial training."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn import functional as F

from .registry import SGD, mlp, randn, step, update

bce = F.binary_cross_entropy_with_logits


def generator() -> nn.Sequential:
    return mlp(2, 5, 3, act=nn.ReLU)


def critic() -> nn.Sequential:
    return mlp(3, 5, 1)


def normed_generator() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))


def normed_critic() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.LeakyReLU(0.2), nn.Linear(5, 1))


def latent(n: int = 7):
    return torch.randn(n, 2)


@step(g=generator, d=critic)
def alternate_halves(m, o, k):
    fake = m.g(latent())
    update(o.d, F.softplus(m.d(fake.detach())).mean() + F.softplus(-m.d(randn(k, 7, 3))).mean())
    update(o.g, F.softplus(-m.d(fake)).mean())
    return fake


@step(g=generator, d=critic)
def alternate_halves_with_freezing(m, o, k):
    m.g.requires_grad_(False)
    update(o.d, F.softplus(m.d(m.g(latent()))).mean() + F.softplus(-m.d(randn(k, 7, 3))).mean())
    m.g.requires_grad_(True)
    m.d.requires_grad_(False)
    update(o.g, F.softplus(-m.d(m.g(latent()))).mean())
    m.d.requires_grad_(True)


@step(g=normed_generator, d=normed_critic)
def dcgan(m, o, k):
    o.d.zero_grad()
    bce(m.d(randn(k, 7, 3)), torch.ones(7, 1)).backward()
    fake = m.g(latent())
    bce(m.d(fake.detach()), torch.zeros(7, 1)).backward()
    o.d.step()
    o.g.zero_grad()
    bce(m.d(fake), torch.ones(7, 1)).backward()
    o.g.step()


@step(g=generator, d=critic)
def single_forward_gan(m, o, k):
    fake = m.g(latent())
    out = m.d(fake)
    d_loss = F.softplus(out).mean() + F.softplus(-m.d(randn(k, 7, 3))).mean()
    o.d.zero_grad()
    d_loss.backward(retain_graph=True)
    d_grads = [p.grad.clone() for p in m.d.parameters()]
    o.g.zero_grad()
    F.softplus(-out).mean().backward()
    for p, grad in zip(m.d.parameters(), d_grads, strict=True):
        p.grad = grad
    o.d.step()
    o.g.step()


@step(g=normed_generator, d=normed_critic)
def real_and_fake_in_one_batch(m, o, k):
    out = m.d(torch.cat([randn(k, 6, 3), m.g(latent(5)).detach()]))
    real, fake = out.split([6, 5])
    update(o.d, F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    update(o.g, -m.d(m.g(latent())).mean())


@step(g=generator, d=critic)
def wasserstein_with_gradient_penalty(m, o, k):
    for i in range(2):
        real, fake = randn(10 * k + i, 7, 3), m.g(latent()).detach()
        mix = torch.lerp(real, fake, torch.rand(7, 1)).requires_grad_()
        out = m.d(mix)
        (grad,) = torch.autograd.grad(
            outputs=out,
            inputs=mix,
            grad_outputs=torch.ones_like(out),
            create_graph=True,
            retain_graph=True,
            only_inputs=True,
        )
        penalty = ((grad.norm(2, dim=1) - 1) ** 2).mean()
        update(o.d, m.d(fake).mean() - m.d(real).mean() + 10 * penalty)
    update(o.g, -m.d(m.g(latent())).mean())


@step(g=generator, d=critic)
def gradient_penalty_in_a_backward_of_its_own(m, o, k):
    o.d.zero_grad()
    F.softplus(-m.d(randn(k, 7, 3))).mean().backward()
    F.softplus(m.d(m.g(latent()).detach())).mean().backward()
    real = randn(k, 7, 3).requires_grad_()
    (grad,) = torch.autograd.grad(m.d(real).sum(), real, create_graph=True)
    grad.square().sum(1).mean().backward()
    o.d.step()


@step(g=generator, d=critic, steps=4)
def lazy_r1(m, o, k):
    update(o.d, F.softplus(m.d(m.g(latent()).detach())).mean())
    if k % 2 == 0:
        real = randn(k, 5, 3).requires_grad_()
        (grad,) = torch.autograd.grad(m.d(real).sum(), real, create_graph=True)
        update(o.d, 5 * grad.square().sum(1).mean())


@step(g=normed_generator, d=normed_critic)
def r1_through_batchnorm(m, o, k):
    real = randn(k, 7, 3).requires_grad_()
    out = m.d(real)
    (grad,) = torch.autograd.grad(out.sum() + out.square().sum(), real, create_graph=True)
    update(o.d, F.softplus(-out).mean() + grad.square().sum(1).mean())
    return grad


@step(g=generator, d=critic)
def path_length(m, o, k):
    if k == 0:
        m.mean = torch.zeros(())
    z = latent().requires_grad_()
    fake = m.g(z)
    (grad,) = torch.autograd.grad((fake * torch.randn_like(fake)).sum(), z, create_graph=True)
    lengths = grad.square().sum(1).sqrt()
    m.mean = m.mean.lerp(lengths.mean().detach(), 0.1)
    update(o.g, (lengths - m.mean).square().mean() + 0 * fake[0, 0])
    return m.mean


def cycle_optimizers(m):
    chain = itertools.chain
    return {
        "g": torch.optim.Adam(chain(m.ab.parameters(), m.ba.parameters()), lr=0.01),
        "d": SGD(chain(m.da.parameters(), m.db.parameters())),
    }


@step(
    ab=lambda: mlp(3, 4, 3),
    ba=lambda: mlp(3, 4, 3),
    da=critic,
    db=critic,
    optimizers=cycle_optimizers,
)
def cycle_of_two_generators(m, o, k):
    a, b = randn(k, 7, 3), randn(k + 5, 7, 3)
    for d in (m.da, m.db):
        d.requires_grad_(False)
    fake_a, fake_b = m.ba(b), m.ab(a)
    cycle = (m.ba(fake_b) - a).abs().mean() + (m.ab(fake_a) - b).abs().mean()
    identity = (m.ab(b) - b).abs().mean() + (m.ba(a) - a).abs().mean()
    adversarial = (m.da(fake_a) - 1).square().mean() + (m.db(fake_b) - 1).square().mean()
    update(o.g, adversarial + 10 * cycle + 5 * identity)
    for d in (m.da, m.db):
        d.requires_grad_(True)
    o.d.zero_grad()
    for d, real, fake in ((m.da, a, fake_a), (m.db, b, fake_b)):
        loss = (d(real) - 1).square().mean() + d(fake.detach()).square().mean()
        (loss / 2).backward()
    o.d.step()


@step(g=generator, d=critic)
def one_loss_over_two_models(m, o, k):
    o.g.zero_grad()
    o.d.zero_grad()
    (m.d(m.g(latent())) - m.d(randn(k, 7, 3))).square().mean().backward()
    o.g.step()
    o.d.step()


@step(g=generator, d=critic)
def relativistic_average(m, o, k):
    real, fake = randn(k, 7, 3), m.g(latent())
    r, f = m.d(real), m.d(fake.detach())
    update(o.d, bce(r - f.mean(), torch.ones(7, 1)) + bce(f - r.mean(), torch.zeros(7, 1)))
    r, f = m.d(real), m.d(fake)
    update(o.g, bce(f - r.mean(), torch.ones(7, 1)) + bce(r - f.mean(), torch.zeros(7, 1)))
