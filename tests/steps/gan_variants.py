# type: ignore  # torch's types are wider than what a step knows
"""Adversarial training with more networks, heads, averages and other updates."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from wraploop import batch_mean

from .gans import critic, generator, latent, normed_generator
from .registry import SGD, each, mlp, randint, randn, step, update


class Joint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(5, 6, 1)

    def forward(self, x, z):
        return self.body(torch.cat([x, z], 1))


@step(g=generator, e=lambda: mlp(3, 4, 2), d=Joint)
def adversarially_learned_inference(m, o, k):
    x, z = randn(k, 7, 3), latent()
    fake, code = m.g(z), m.e(x)
    real_out, fake_out = m.d(x, code), m.d(fake, z)
    loss = F.softplus(-real_out).mean() + F.softplus(fake_out).mean()
    ps = list(m.d.parameters())
    grads = torch.autograd.grad(loss, ps, retain_graph=True)
    o.g.zero_grad()
    o.e.zero_grad()
    (-loss).backward(inputs=[*m.g.parameters(), *m.e.parameters()])
    for p, grad in zip(ps, grads, strict=True):
        p.grad = grad
    for optimizer in vars(o).values():
        optimizer.step()


class Projection(nn.Module):
    """A projection discriminator with spectral norm."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.spectral_norm
        self.body, self.out = norm(nn.Linear(3, 5)), norm(nn.Linear(5, 1))
        self.embed = norm(nn.Embedding(4, 5))

    def forward(self, x, y):
        h = self.body(x).relu()
        return self.out(h) + (self.embed(y) * h).sum(1, keepdim=True)


class Conditional(nn.Module):
    """Conditional batch norm: one normalisation, a gain and bias for each class."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 5), nn.Linear(5, 3)
        self.norm, self.gain = nn.BatchNorm1d(5, affine=False), nn.Embedding(4, 10)

    def forward(self, z, y):
        scale, shift = self.gain(y).chunk(2, 1)
        return self.b((self.norm(self.a(z)) * (1 + scale) + shift).relu())


@step(g=Conditional, d=Projection)
def conditional_gan_with_hinge_loss(m, o, k):
    y, fake_y = randint(k, 4, 7), randint(k + 5, 4, 7)
    with torch.no_grad():
        fake = m.g(latent(), fake_y)
    update(o.d, F.relu(1 - m.d(randn(k, 7, 3), y)).mean() + F.relu(1 + m.d(fake, fake_y)).mean())
    update(o.g, -m.d(m.g(latent(), fake_y), fake_y).mean())


class TwoHeads(nn.Module):
    """Real or fake, and what the latent code was."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.real, self.code = mlp(3, 5, 5), nn.Linear(5, 1), nn.Linear(5, 2)

    def forward(self, x):
        h = self.trunk(x)
        return self.real(h), self.code(h), h


@step(
    g=generator,
    d=TwoHeads,
    optimizers=lambda m: {
        "g": SGD(m.g.parameters()),
        "d": SGD(m.d.parameters()),
        "info": torch.optim.SGD([*m.g.parameters(), *m.d.code.parameters()], lr=0.01, momentum=0.5),
    },
)
def infogan(m, o, k):
    z = latent()
    fake = m.g(z)
    real_out, fake_out = m.d(randn(k, 7, 3))[0], m.d(fake.detach())[0]
    update(o.d, F.softplus(-real_out).mean() + F.softplus(fake_out).mean())
    update(o.g, F.softplus(-m.d(fake)[0]).mean())
    update(o.info, F.mse_loss(m.d(m.g(z))[1], z))


@step(g=generator, d=TwoHeads)
def feature_matching(m, o, k):
    real = m.d(randn(k, 7, 3))[2].detach()
    fake = m.d(m.g(latent(5)))[2]
    update(o.g, (real.mean(0) - fake.mean(0)).square().sum())


class MinibatchStd(nn.Module):
    """The last feature is the standard deviation over the batch, as in ProGAN."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(5, 1)
        self.alpha = 0.5

    def forward(self, x):
        h = self.a(x).tanh()
        std = (batch_mean(h.square()) - batch_mean(h).square() + 1e-8).sqrt().mean()
        return self.b(torch.cat([h, std.expand(len(x), 1)], 1)) * self.alpha


@step(g=generator, d=MinibatchStd)
def minibatch_standard_deviation_and_fade_in(m, o, k):
    m.d.alpha = (k + 1) / 3
    fake = m.g(latent())
    real = randn(k, 7, 3).requires_grad_()
    out = m.d(real)
    (grad,) = torch.autograd.grad(out.sum(), real, create_graph=True)
    update(o.d, F.softplus(m.d(fake.detach()) - out).mean() + grad.square().mean())
    update(o.g, -m.d(fake).mean())


@step(g=normed_generator, d=critic)
def moving_average_of_the_generator(m, o, k):
    if k == 0:
        m.average = copy.deepcopy(m.g).eval().requires_grad_(False)
    update(o.g, F.softplus(-m.d(m.g(latent()))).mean())
    with torch.no_grad():
        for mine, theirs in zip(m.average.parameters(), m.g.parameters(), strict=True):
            mine.lerp_(theirs, 0.1)
        for mine, theirs in zip(m.average.buffers(), m.g.buffers(), strict=True):
            mine.copy_(theirs)
        return m.average(latent())


@step(g=generator, d=critic)
def unrolled_gan(m, o, k):
    real, z = randn(k, 7, 3), latent()
    backup = copy.deepcopy(m.d.state_dict())
    for _ in range(2):
        update(o.d, F.softplus(-m.d(real)).mean() + F.softplus(m.d(m.g(z).detach())).mean())
    update(o.g, F.softplus(-m.d(m.g(z))).mean())
    m.d.load_state_dict(backup)


@step(g=generator, d=critic)
def best_fakes_only(m, o, k):
    out = m.d(m.g(latent(9))).squeeze(1)
    update(o.g, -out.topk(5).values.mean())
    return out


@step(g=generator, d=critic)
def consistency_regularization(m, o, k):
    real = randn(k, 7, 3)
    a, b = m.d(real), m.d(real + 0.1 * torch.randn_like(real))
    update(o.d, F.softplus(-a).mean() + 10 * (a - b).square().mean())


@step(g=generator, d=critic)
def latent_optimization(m, o, k):
    z = latent().requires_grad_()
    out = m.d(m.g(z))
    (grad,) = torch.autograd.grad(out.sum(), z, create_graph=True)
    moved = z + 0.5 * grad / (grad.square().sum(1, keepdim=True) + 0.1)
    update(o.g, F.softplus(-m.d(m.g(moved))).mean())


@step(g=generator, d=critic, optimizers=each(torch.optim.RMSprop))
def weight_clipping(m, o, k):
    for i in range(2):
        update(o.d, m.d(m.g(latent()).detach()).mean() - m.d(randn(10 * k + i, 7, 3)).mean())
        for p in m.d.parameters():
            p.data.clamp_(-0.1, 0.1)
    update(o.g, -m.d(m.g(latent())).mean())


class StyleGenerator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mapping, self.synthesis = mlp(2, 4, 4), mlp(4, 5, 3)
        self.register_buffer("w_avg", torch.zeros(4))

    def style(self, z):
        w = self.mapping(z)
        if self.training:
            self.w_avg.copy_(batch_mean(w.detach()).lerp(self.w_avg, 0.9))
        return w

    def draw(self, w, truncation=1.0):
        return self.synthesis(self.w_avg.lerp(w, truncation))

    def forward(self, z):
        return self.draw(self.style(z))


@step(g=StyleGenerator, d=critic, methods=("style", "draw"))
def style_mixing_by_named_methods(m, o, k):
    w, other = m.g.style(latent()), m.g.style(latent())
    mixed = torch.where(torch.rand(7, 1) < 0.5, w, other)
    out = m.d(m.g.draw(mixed, truncation=0.7))
    update(o.g, F.softplus(-out).mean())
    (grad,) = torch.autograd.grad(
        m.g.draw(m.g.style(latent())).square().sum(), m.g.mapping[0].weight
    )
    return out, grad


@step(g=generator, d=critic)
def gan_with_frozen_critic_layers(m, o, k):
    for layer in list(m.d.children())[:1]:
        layer.requires_grad_(False)
    update(o.d, F.softplus(-m.d(randn(k, 7, 3))).mean() + F.softplus(m.d(m.g(latent()))).mean())
    update(o.g, F.softplus(-m.d(m.g(latent()))).mean())


@step(g=generator, d=critic)
def losses_of_generator_and_critic_from_one_graph(m, o, k):
    """Two `autograd.grad`, each over one model's parameters, from shared forwards."""
    fake = m.g(latent())
    out = m.d(fake)
    d_loss = F.softplus(out).mean() + F.softplus(-m.d(randn(k, 7, 3))).mean()
    pairs = [(m.d, o.d, d_loss), (m.g, o.g, -out.mean())]
    grads = [
        torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
        for net, _, loss in pairs
    ]
    for (net, optimizer, _), mine in zip(pairs, grads, strict=True):
        for p, grad in zip(net.parameters(), mine, strict=True):
            p.grad = grad
        optimizer.step()
