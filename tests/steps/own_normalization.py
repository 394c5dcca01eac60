# type: ignore  # torch's types are wider than what a step knows
"""Batch norms and statistics that are the user's own."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from wraploop import batch_mean

from .normalization import normed, ordinary
from .registry import mine, mlp, randn, step, update


class OwnBatchNorm(nn.BatchNorm1d):
    """As found in many repositories: a subclass that does something before and after."""

    def __init__(self) -> None:
        super().__init__(4)
        self.calls = 0

    def forward(self, input):
        self.calls += 1
        return super().forward(input * 2.0) + 1.0


@step(net=partial(normed, OwnBatchNorm))
def batchnorm_subclass_that_calls_super(m, o, k):
    out = ordinary(m, o, k)
    return out, [layer.calls for layer in m.net.modules() if isinstance(layer, OwnBatchNorm)]


class Functional(nn.BatchNorm1d):
    """A subclass with a forward of its own."""

    def __init__(self) -> None:
        super().__init__(4)

    def forward(self, input):
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1
        )


@step(net=partial(normed, Functional))
def batchnorm_subclass_that_calls_the_function(m, o, k):
    return ordinary(m, o, k)


class WithActivation(nn.BatchNorm2d):
    """As timm's: a copy of torch's forward, and an activation behind it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, momentum=None)
        self.act = nn.LeakyReLU()

    def forward(self, x):
        if self.training:
            self.num_batches_tracked.add_(1)
        step = 1.0 / float(self.num_batches_tracked) if self.training else 0.0
        running = self.running_mean, self.running_var
        out = F.batch_norm(
            x, *running, self.weight, self.bias, training=self.training, momentum=step, eps=self.eps
        )
        return self.act(out)


def images() -> nn.Sequential:
    layers = nn.Conv2d(2, 4, 3), WithActivation(4), nn.Conv2d(4, 3, 1), nn.Flatten(1)
    return nn.Sequential(*layers, nn.Linear(12, 2))


@step(net=images, local="mean")
def batchnorm_with_an_activation(m, o, k):
    update(o.net, m.net(mine(randn(k, 7, 2, 4, 4))).square().mean())
    m.net.eval()
    m.net(mine(randn(k, 7, 2, 4, 4)))
    m.net.train()


@step(net=images)
def batchnorm_with_an_activation_and_gradient_penalty(m, o, k):
    x = randn(k, 7, 2, 4, 4).requires_grad_()
    out = m.net(x)
    (slopes,) = torch.autograd.grad(out.square().mean(), x, create_graph=True)
    update(o.net, out.square().mean() + slopes.square().mean())
    return out


class Functions(nn.Module):
    """Batch norms by torch's functions, weights and statistics kept by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(4, 3), torch.randn(2, 4)])
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("running", torch.stack([torch.zeros(4), torch.ones(4)]))
        self.register_buffer("size", torch.ones(()))

    def normalise(self, x):
        mean, variance = self.running
        return torch.batch_norm(x, self.scale, None, mean, variance, True, 0.2, 1e-5, False)

    def forward(self, x):
        self.size.mul_(0.9).add_(x.abs().mean(), alpha=0.1)
        hidden = self.normalise(x @ self.weights[0].T).relu()
        return F.batch_norm(hidden @ self.weights[1].T, None, None, training=True)


@step(net=Functions)
def batch_norms_by_functions(m, o, k):
    out = m.net(randn(k, 7, 3))
    update(o.net, out[:, 0].sigmoid().mean() + out[:, 1].abs().mean())
    return out


class Interpolated(nn.Module):
    """Counts and sums: not means of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.register_buffer("total", torch.zeros(2))

    def forward(self, x):
        out = self.a(x)
        self.total += out.detach().sum(0)
        return out


@step(net=Interpolated, refused="couples rows")
def buffer_that_sums_the_batch(m, o, k):
    update(o.net, m.net(randn(k, 7, 3)).square().mean())


class Rows(nn.Module):
    """A sum over the batch, by `batch_mean`."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(5, 3), requires_grad=False)
        self.a = mlp(3, 3)
        self.register_buffer("size", torch.ones(5))
        self.register_buffer("sums", self.codes.detach().clone())

    def forward(self, x):
        z = self.a(x)
        index = torch.cdist(z, self.codes).argmin(1)
        if self.training:
            onehot = F.one_hot(index, 5).to(z.dtype)
            self.size.mul_(0.9).add_(batch_mean(onehot), alpha=0.1)
            self.sums.mul_(0.9).add_(
                batch_mean(onehot[:, :, None] * z.detach()[:, None]), alpha=0.1
            )
            self.codes.data.copy_(self.sums / self.size[:, None])
        quantized = self.codes[index]
        return z + (quantized - z).detach(), (z - quantized.detach()).square().mean(), index


@step(net=Rows)
def codebook_moved_by_batch_means(m, o, k):
    """A VQ-VAE whose codebook is a moving average."""
    x = randn(k, 7, 3)
    out, commitment, index = m.net(x)
    update(o.net, F.mse_loss(out, x) + 0.25 * commitment)
    return out, commitment, index


class AdaIN(nn.Module):
    """As MUNIT's: an instance norm by the function for batch norms, of one row."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        rows, channels, length = x.shape
        as_channels = self.a(x).reshape(1, rows * channels, length)
        return F.batch_norm(as_channels, None, None, training=True).view(x.shape)


@step(net=AdaIN, refused="rows seem to be among its channels.*sync_batchnorm=False", local="mean")
def instance_norm_by_the_function_for_batch_norms(m, o, k):
    update(o.net, m.net(mine(randn(k, 12, 3, 4))).pow(3).square().mean())
