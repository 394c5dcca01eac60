# type: ignore  # torch's types are wider than what a step knows
"""Batch norms and statistics that are the user's own."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from wraploop import batch_mean

from .normalization import normed, ordinary
from .registry import mlp, randn, step, update


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


@step(net=partial(normed, Functional), refused="couples rows|1 value per channel")
def batchnorm_subclass_that_calls_the_function(m, o, k):
    return ordinary(m, o, k)


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
