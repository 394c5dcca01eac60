# type: ignore  # torch's types are wider than what a step knows
"""What public code does to train diffusion, energies, fields, graphs and weights."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F

from .registry import mlp, randn, step, update


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.time = (
            mlp(3, 8, 3),
            nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 3)),
        )
        self.register_buffer("betas", torch.linspace(0.01, 0.2, 10))
        self.register_buffer("alphas", (1 - self.betas).cumprod(0))

    def forward(self, x, t, context=None):
        angles = t[:, None] * torch.exp(-math.log(100.0) * torch.arange(2) / 2)
        h = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        return self.body(x + h + (0 if context is None else context))


@step(net=Denoiser)
def diffusion_with_moving_average(m, o, k):
    if k == 0:
        m.ema = copy.deepcopy(m.net).eval()
    x, t, noise = randn(k, 7, 3), torch.randint(0, 10, (7,)), torch.randn(7, 3)
    alpha = m.net.alphas[t][:, None]
    keep = (torch.rand(7, 1) > 0.1).to(x.dtype)
    out = m.net(alpha.sqrt() * x + (1 - alpha).sqrt() * noise, t, context=randn(k, 7, 3) * keep)
    weight = torch.minimum(alpha / (1 - alpha), torch.tensor(5.0))
    update(o.net, (weight * (out - noise).square()).mean())
    with torch.no_grad():
        for p, q in zip(m.ema.parameters(), m.net.parameters(), strict=True):
            p.mul_(0.9).add_(q, alpha=0.1)
        sample = torch.randn(4, 3)
        for i in reversed(range(3)):
            eps = m.ema(sample, torch.full((4,), i))
            sample = sample - m.ema.betas[i] * eps + 0.1 * torch.randn(4, 3)
    return out, sample


@step(net=lambda: mlp(4, 6, 3))
def flow_matching_with_self_conditioning(m, o, k):
    x, noise, t = randn(k, 7, 3), torch.randn(7, 3), torch.rand(7, 1)
    mix = (1 - t) * noise + t * x
    if torch.rand(()) < 0.7:
        with torch.no_grad():
            mix = mix + 0.1 * m.net(torch.cat([mix, t], 1))
    update(o.net, (m.net(torch.cat([mix, t], 1)) - (x - noise)).square().mean())


@step(net=lambda: mlp(4, 6, 3))
def consistency_training(m, o, k):
    if k == 0:
        m.target = copy.deepcopy(m.net).requires_grad_(False)
    x, noise, t = randn(k, 7, 3), torch.randn(7, 3), torch.rand(7, 1)
    out = m.net(torch.cat([x + (t + 0.1) * noise, t + 0.1], 1))
    with torch.no_grad():
        target = m.target(torch.cat([x + t * noise, t], 1))
    difference = (out - target).square().sum(1)
    update(o.net, ((difference + 0.03**2).sqrt() - 0.03).mean())
    with torch.no_grad():
        for p, q in zip(m.target.parameters(), m.net.parameters(), strict=True):
            p.data.copy_(p.data * 0.9 + q.data * 0.1)


@step(net=lambda: mlp(3, 6, 3))
def sliced_score_matching(m, o, k):
    x = randn(k, 7, 3).requires_grad_()
    v = torch.randn_like(x)
    score = m.net(x)
    (grad,) = torch.autograd.grad((score * v).sum(), x, create_graph=True)
    update(o.net, ((grad * v).sum(1) + 0.5 * (score * v).sum(1).square()).mean())


@step(net=lambda: mlp(3, 6, 1, act=nn.SiLU))
def energy_model_with_langevin_sampling(m, o, k):
    if k == 0:
        m.buffer = torch.rand(20, 3)
    index = torch.randint(0, 20, (7,))
    x = m.buffer[index].clone()
    m.net.eval()
    m.net.requires_grad_(False)
    for _ in range(3):
        x.requires_grad_()
        (grad,) = torch.autograd.grad(m.net(x).sum(), x)
        x = (x - 0.1 * grad + 0.01 * torch.randn_like(x)).detach()
    m.net.requires_grad_(True)
    m.net.train()
    m.buffer[index] = x
    real, fake = m.net(torch.cat([randn(k, 7, 3), x])).chunk(2)
    update(o.net, real.mean() - fake.mean() + 0.1 * (real.square() + fake.square()).mean())
    return m.buffer


@step(net=lambda: mlp(3, 6, 1, act=nn.SiLU))
def energy_model_with_differentiable_sampling(m, o, k):
    x = randn(k, 7, 3).requires_grad_()
    for _ in range(2):
        (grad,) = torch.autograd.grad(m.net(x).sum(), x, create_graph=True)
        x = x - 0.1 * grad
    update(o.net, (x - 1).square().mean())
    return x


class RBM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.v, self.h = (nn.Parameter(0.1 * torch.randn(*s)) for s in ((4, 3), (4,), (3,)))

    def hidden(self, v):
        return (v @ self.w + self.h).sigmoid()

    def visible(self, h):
        return (h @ self.w.T + self.v).sigmoid()

    def forward(self, v):
        return -(v @ self.v) - F.softplus(v @ self.w + self.h).sum(1)


@step(net=RBM, methods=("hidden", "visible"))
def contrastive_divergence(m, o, k):
    v = fake = (randn(k, 7, 4) > 0).to(torch.float64)
    for _ in range(2):
        fake = torch.bernoulli(m.net.visible(torch.bernoulli(m.net.hidden(fake)))).detach()
    update(o.net, m.net(v).mean() - m.net(fake).mean())
    return fake


class Field(nn.Module):
    """A radiance field: a coarse and a fine pass along each ray, in chunks of rays."""

    def __init__(self) -> None:
        super().__init__()
        self.coarse, self.fine = mlp(12, 8, 4), mlp(12, 8, 4)
        self.near, self.far = 0.0, 1.0

    def encode(self, x):
        return torch.cat([f(x * 2**i) for i in range(2) for f in (torch.sin, torch.cos)], -1)

    def render(self, net, origins, directions, depths):
        points = origins[:, None] + depths[..., None] * directions[:, None]
        color, density = net(self.encode(points)).split([3, 1], -1)
        deltas = F.pad(depths.diff(dim=1), (0, 1), value=1e3)
        alpha = 1 - (-F.softplus(density[..., 0]) * deltas).exp()
        transparency = (1 - alpha + 1e-10).cumprod(1).roll(1, 1)
        transparency = torch.cat([torch.ones_like(transparency[:, :1]), transparency[:, 1:]], 1)
        weights = alpha * transparency
        return (weights[..., None] * color.sigmoid()).sum(1), weights

    def forward(self, origins, directions, jitter):
        found = []
        for o, d, u in zip(origins.split(2), directions.split(2), jitter.split(2), strict=True):
            depths = self.near + (self.far - self.near) * (torch.arange(4) + u) / 4
            rgb, weights = self.render(self.coarse, o, d, depths)
            extra = (weights.detach() * depths).sum(1, keepdim=True)
            fine, _ = self.render(self.fine, o, d, torch.cat([depths, extra], 1).sort(1).values)
            found.append({"coarse": rgb, "fine": fine, "opacity": weights.sum(1)})
        return {key: torch.cat([part[key] for part in found]) for key in found[0]}


@step(net=Field)
def radiance_field(m, o, k):
    out = m.net(randn(k, 7, 3), F.normalize(randn(k + 5, 7, 3), dim=1), torch.rand(7, 4))
    target = randn(k + 1, 7, 3).sigmoid()
    update(
        o.net,
        sum(F.mse_loss(out[key], target) for key in ("coarse", "fine")) + out["opacity"].var(),
    )
    return out


@step(net=lambda: mlp(3, 8, 1, act=lambda: nn.Softplus(beta=10)))
def signed_distance_with_eikonal_penalty(m, o, k):
    x = randn(k, 7, 3).requires_grad_()
    distance = m.net(x)
    (normal,) = torch.autograd.grad(distance, x, torch.ones_like(distance), create_graph=True)
    far = torch.empty(5, 3).uniform_(-1, 1).requires_grad_()
    (grad,) = torch.autograd.grad(m.net(far).sum(), far, create_graph=True)
    loss = distance.abs().mean() + (normal - randn(k + 1, 7, 3)).abs().norm(2, dim=1).mean()
    update(o.net, loss + 0.1 * (grad.norm(2, dim=-1) - 1).square().mean())
