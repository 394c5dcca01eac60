# type: ignore  # torch's types are wider than what a step knows
"""What public code does to train autoencoders, flows, diffusion, energies and fields."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from wraploop import batch_mean

from .registry import SGD, mlp, randn, step, update


class VAE(nn.Module):
    """Keeps mean and variance on itself, where the loss looks; noise comes from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(3, 6, 4), mlp(2, 6, 3)
        self.mu: torch.Tensor | None = None
        self.logvar: torch.Tensor | None = None
        self.beta = 1.0

    def forward(self, x, noise):
        self.mu, self.logvar = self.encoder(x).chunk(2, 1)
        return self.decoder(self.mu + noise * (0.5 * self.logvar).exp())

    def encode(self, x):
        mu, logvar = self.encoder(x).chunk(2, 1)
        return torch.distributions.Normal(mu, (0.5 * logvar).exp()).mean, logvar

    def decode(self, z):
        return self.decoder(z)

    def kl(self):
        return -0.5 * (1 + self.logvar - self.mu.square() - self.logvar.exp()).sum(1).mean()


@step(net=VAE)
def vae_with_attributes_read_by_the_loss(m, o, k):
    x = randn(k, 7, 3)
    out = m.net(x, torch.randn(7, 2))
    kl = -0.5 * (1 + m.net.logvar - m.net.mu.square() - m.net.logvar.exp()).sum(1).mean()
    update(o.net, F.mse_loss(out, x, reduction="sum") / 7 + kl)
    return out, m.net.mu, m.net.logvar


@step(net=VAE)
def vae_with_a_loss_method_of_the_model(m, o, k):
    x = randn(k, 7, 3)
    out = m.net(x, torch.randn(7, 2))
    m.net.beta = 0.1 * k
    update(o.net, F.mse_loss(out, x) + m.net.beta * m.net.kl())
    return m.net.kl()


@step(net=VAE, methods=("encode", "decode"))
def vae_by_encode_and_decode(m, o, k):
    x = randn(k, 7, 3)
    mu, logvar = m.net.encode(x)
    z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
    out = m.net.decode(z)
    update(o.net, F.mse_loss(out, x) - 0.5 * (1 + logvar - mu.square() - logvar.exp()).mean())
    return out, z


@step(net=VAE, methods=("encode", "decode"))
def vae_with_total_correlation_and_free_bits(m, o, k):
    x = randn(k, 7, 3)
    mu, logvar = m.net.encode(x)
    z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
    pairs = -(z[:, None] - mu[None]).square() / logvar.exp()[None] - logvar[None]
    total = (pairs.sum(2).logsumexp(1) - pairs.logsumexp(1).sum(1)).mean()
    kl = (-0.5 * (1 + logvar - mu.square() - logvar.exp())).mean(0).clamp(min=0.05).sum()
    update(o.net, F.mse_loss(m.net.decode(z), x) + total + kl)


def vae_gan_optimizers(m):
    return {
        "encoder": SGD(m.vae.encoder.parameters()),
        "decoder": SGD(m.vae.decoder.parameters()),
        "d": SGD(m.d.parameters()),
    }


@step(vae=VAE, d=lambda: mlp(3, 5, 1), methods=("encode", "decode"), optimizers=vae_gan_optimizers)
def vae_gan_with_three_optimizers(m, o, k):
    x = randn(k, 7, 3)
    mu, logvar = m.vae.encode(x)
    fake, sample = m.vae.decode(mu + torch.randn_like(mu)), m.vae.decode(torch.randn(7, 2))
    real_out, fake_out, sample_out = m.d(x), m.d(fake), m.d(sample)
    d_loss = (
        F.softplus(-real_out).mean() + F.softplus(fake_out).mean() + F.softplus(sample_out).mean()
    )
    reconstruction = (fake - x).square().mean()
    losses = {
        "encoder": reconstruction + (mu.square() + logvar.exp() - logvar).mean(),
        "decoder": reconstruction - d_loss,
        "d": d_loss,
    }
    parts = {"encoder": m.vae.encoder, "decoder": m.vae.decoder, "d": m.d}
    for name, loss in losses.items():
        loss.backward(retain_graph=True, inputs=list(parts[name].parameters()))
    for optimizer in vars(o).values():
        optimizer.step()
        optimizer.zero_grad()


class VQ(nn.Module):
    """A codebook trained by its loss, with straight-through gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder, self.codes = mlp(3, 4, 2), mlp(2, 4, 3), nn.Embedding(5, 2)

    def forward(self, x):
        z = self.encoder(x)
        distances = z.square().sum(1, keepdim=True) - 2 * z @ self.codes.weight.T
        index = (distances + self.codes.weight.square().sum(1)).argmin(1)
        q = self.codes(index)
        loss = F.mse_loss(q, z.detach()) + 0.25 * F.mse_loss(z, q.detach())
        usage = batch_mean(F.one_hot(index, 5).to(x.dtype))
        perplexity = (-(usage * (usage + 1e-10).log()).sum()).exp()
        return loss, self.decoder(z + (q - z).detach()), perplexity, index


@step(net=VQ)
def vq_vae(m, o, k):
    x = randn(k, 7, 3)
    loss, out, perplexity, index = m.net(x)
    update(o.net, loss + F.mse_loss(out, x))
    return out, perplexity, index


class Coupling(nn.Module):
    """A flow: the layers add to log_det."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(mlp(2, 5, 4) for _ in range(3))
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(4, 4))[0])
        self.register_buffer("order", torch.tensor([2, 3, 0, 1]))

    def forward(self, x, reverse=False):
        log_det = x.new_zeros(len(x))
        for net in self.nets:
            x = (x @ self.weight)[:, self.order]
            a, b = x.chunk(2, 1)
            log_scale, shift = net(a).chunk(2, 1)
            x = torch.cat([a, b * log_scale.tanh().exp() + shift], 1)
            log_det = log_det + log_scale.tanh().sum(1) + torch.linalg.slogdet(self.weight)[1]
        return x, log_det


@step(net=Coupling)
def normalizing_flow(m, o, k):
    z, log_det = m.net(randn(k, 7, 4))
    prior = torch.distributions.Normal(torch.zeros(4), torch.ones(4))
    update(o.net, -(prior.log_prob(z).sum(1) + log_det).mean())
    return z, log_det


@step(net=lambda: mlp(3, 6, 2))
def neural_ode_by_runge_kutta(m, o, k):
    z, dt = randn(k, 7, 2), 0.25

    def f(t, z):
        return m.net(torch.cat([z, torch.full((len(z), 1), t)], 1))

    for i in range(3):
        t = i * dt
        k1 = f(t, z)
        k2 = f(t + dt / 2, z + dt / 2 * k1)
        k3 = f(t + dt / 2, z + dt / 2 * k2)
        z = z + dt / 6 * (k1 + 2 * k2 + 2 * k3 + f(t + dt, z + dt * k3))
    update(o.net, z.square().mean())
    return z


@step(net=lambda: mlp(3, 6, 2))
def continuous_flow_with_trace_estimate(m, o, k):
    z = randn(k, 7, 2).requires_grad_()
    e = torch.randn(7, 2)
    log_p = 0
    for i in range(2):
        dz = m.net(torch.cat([z, torch.full((7, 1), 0.5 * i)], 1))
        (vjp,) = torch.autograd.grad(dz, z, e, create_graph=True)
        log_p = log_p - 0.5 * (vjp * e).sum(1)
        z = z + 0.5 * dz
    update(o.net, (log_p + z.square().sum(1)).mean())
    return log_p
