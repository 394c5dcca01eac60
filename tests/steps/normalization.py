# type: ignore  # torch's types are wider than what a step knows
"""Batch norms of all kinds, and statistics of one's own."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from wraploop import batch_mean

from .registry import SGD, randn, step, update


def normed(norm: Any = None, after=nn.Tanh) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, 4), (norm or partial(nn.BatchNorm1d, 4))(), after(), nn.Linear(4, 2)
    )


def ordinary(m, o, k, *shape: int):
    x = randn(k, *(shape or (7, 3)))
    out = m.net(x)
    update(o.net, out.square().mean() + out.exp().mean())
    m.net.eval()
    with torch.no_grad():
        evaluated = m.net(x)
    m.net.train()
    return out, evaluated


for _name, _norm in {
    "batchnorm": nn.BatchNorm1d,
    "batchnorm_without_momentum": partial(nn.BatchNorm1d, momentum=None),
    "batchnorm_not_affine": partial(nn.BatchNorm1d, affine=False),
    "batchnorm_without_running_statistics": partial(nn.BatchNorm1d, track_running_stats=False),
    "instance_norm": lambda n: nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, affine=True), nn.Flatten()
    ),
    "instance_norm_with_running_statistics": lambda n: nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten()
    ),
    "group_norm": partial(nn.GroupNorm, 2),
    "layer_norm": nn.LayerNorm,
}.items():

    def _run(m, o, k):
        return ordinary(m, o, k)

    _run.__name__ = _name
    step(net=partial(normed, partial(_norm, 4)))(_run)


@step(
    net=lambda: nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)
    )
)
def batchnorm_of_images(m, o, k):
    return ordinary(m, o, k, 7, 1, 3, 3)


@step(
    net=lambda: nn.Sequential(
        nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2), nn.ReLU(), nn.Flatten(), nn.Linear(2, 2)
    )
)
def batchnorm_of_volumes_with_single_rows(m, o, k):
    return ordinary(m, o, k, 3, 1, 2, 2, 2)


@step(net=lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Conv1d(3, 2, 2), nn.BatchNorm1d(2, eps=1e-3)))
def batchnorm_of_sequences(m, o, k):
    return ordinary(m, o, k, 5, 3, 4)


@step(net=normed, steps=5)
def batchnorm_and_uneven_batches(m, o, k):
    return ordinary(m, o, k, (8, 2, 7, 5, 3)[k], 3)


@step(net=normed)
def batchnorm_frozen_midway(m, o, k):
    m.net.train()
    if k == 1:
        for layer in m.net.modules():
            if isinstance(layer, nn.BatchNorm1d):
                layer.eval()
                layer.requires_grad_(False)
    out = m.net(randn(k, 7, 3))
    update(o.net, out.square().mean())
    return out


@step(net=normed)
def batchnorm_twice_before_one_backward(m, o, k):
    a, b = m.net(randn(k, 7, 3)), m.net(randn(k + 5, 4, 3) + 1)
    update(o.net, a.mean() - b.square().mean())


@step(net=normed)
def batchnorm_under_no_grad_moves_its_statistics(m, o, k):
    with torch.no_grad():
        m.net(randn(k + 5, 7, 3) + 2)
    update(o.net, m.net(randn(k, 7, 3)).square().mean())


@step(net=normed)
def batchnorm_statistics_reset_and_momentum_changed(m, o, k):
    for layer in m.net.modules():
        if isinstance(layer, nn.BatchNorm1d):
            layer.momentum = 0.1 * (k + 1)
            if k == 1:
                layer.reset_running_stats()
    return ordinary(m, o, k)


@step(net=normed)
def batchnorm_and_third_party_gradients(m, o, k):
    x = randn(k, 7, 3).requires_grad_()
    out = m.net(x)
    grads = torch.autograd.grad(out.square().mean(), [x, *m.net.parameters()], create_graph=True)
    update(o.net, sum(g.square().sum() for g in grads))
    return grads


@step(net=lambda: nn.Sequential(nn.Linear(3, 4), nn.SyncBatchNorm(4), nn.Linear(4, 2)))
def sync_batchnorm_in_evaluation(m, o, k):
    m.net.eval()
    out = m.net(randn(k, 7, 3))
    update(o.net, out.square().mean())
    return out


class Whitening(nn.Module):
    """Statistics of the batch in a layer of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        h = self.a(x)
        mean = batch_mean(h)
        centred = h - mean
        covariance = batch_mean(centred[:, :, None] * centred[:, None, :])
        if self.training:
            self.mean.mul_(0.9).add_(mean.detach(), alpha=0.1)
            self.seen += 1
        factor = torch.linalg.cholesky(covariance + 0.1 * torch.eye(4))
        return self.b(torch.linalg.solve_triangular(factor, centred.T, upper=False).T)


@step(net=Whitening)
def whitening_by_batch_mean(m, o, k):
    return ordinary(m, o, k)


class Buffers(nn.Module):
    """Buffers changed in all the ways that are found: in place, set anew, counted."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.register_buffer("moving", torch.zeros(2))
        self.register_buffer("anew", torch.zeros(2), persistent=False)
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("lazy", None)
        self.calls = 0

    def forward(self, x):
        out = self.a(x)
        before = self.moving + self.anew
        if self.training:
            mean = out.detach().mean(0)
            self.moving.mul_(0.9).add_(mean, alpha=0.1)
            self.anew = 0.5 * self.anew + 0.5 * mean
            self.count += 1
            self.calls += 1
            self.lazy = mean if self.lazy is None else self.lazy - 0.3 * (self.lazy - mean)
        return out - before


@step(net=Buffers)
def buffers_moved_by_means_of_the_batch(m, o, k):
    a, b = m.net(randn(k, 7, 3)), m.net(randn(k, 2, 3))
    update(o.net, a.square().mean() + b.mean())
    return m.net.calls, m.net.lazy, m.net.anew, a


class ActNorm(nn.Module):
    """Sets its parameters from the first batch that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.log_scale = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, x):
        if not self.initialized:
            with torch.no_grad():
                mean = batch_mean(x)
                std = batch_mean((x - mean).square()).sqrt()
                self.bias.data.copy_(-mean)
                self.log_scale.data.copy_(-(std + 1e-6).log())
                self.initialized.fill_(True)
        return (x + self.bias) * self.log_scale.exp(), self.log_scale.sum().expand(len(x))


@step(net=ActNorm)
def parameters_initialized_by_the_first_batch(m, o, k):
    z, log_det = m.net(randn(k, 7, 3) * 2 + 1)
    update(o.net, (0.5 * z.square().sum(1) - log_det).mean())
    return z, log_det


@step(net=lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), head=lambda: nn.Linear(4, 2))
def cross_correlation_of_normalized_features(m, o, k):
    """Barlow Twins."""
    a, b = m.net(randn(k, 7, 3)), m.net(randn(k, 7, 3) + 0.1 * torch.randn(7, 3))
    a, b = ((z - z.mean(0)) / z.std(0) for z in (a, b))
    c = a.T @ b / 7
    update(
        o.net, (1 - c.diagonal()).square().sum() + 0.01 * (c - c.diagonal().diag()).square().sum()
    )
    return c


class NormOfSome(nn.Module):
    """Normalises the rows whose first number is positive."""

    def __init__(self):
        super().__init__()
        self.net = normed()

    def forward(self, x):
        kept = x[:, 0] > 0
        return x.new_zeros(len(x), 2).index_put((kept,), self.net(x[kept]))


@step(net=NormOfSome)
def batchnorm_of_rows_that_not_every_shard_has(m, o, k):
    x = randn(k, 8, 3)
    x[:, 0] = torch.where(torch.arange(8) < 2, 1.0, -1.0) * x[:, 0].abs()
    out = m.net(x)
    update(o.net, out.square().mean())
    return out


@step(net=NormOfSome)
def batchnorm_of_rows_that_no_shard_has(m, o, k):
    x = randn(k, 8, 3)
    x[:, 0] = -x[:, 0].abs() if k % 2 else x[:, 0].abs()
    out = m.net(x)
    update(o.net, (out - 1).square().mean())
    return out


@step(net=partial(nn.BatchNorm1d, 3))
def batchnorm_of_infinity(m, o, k):
    x = randn(k, 7, 3)
    x[2, 1] = torch.inf
    return m.net(x)


@step(
    lambda: dict.fromkeys(("net", "unwrapped"), normed()),
    optimizers=lambda m: {"net": SGD(m.net.parameters())},
    plain=("unwrapped",),
)
def batchnorm_with_and_without_wrapper_before_one_backward(m, o, k):
    a, b, c = m.unwrapped(randn(k, 7, 3)), m.net(randn(k + 1, 7, 3)), m.unwrapped(randn(k, 4, 3))
    update(o.net, a.square().mean() + b.mean() + c.square().mean())
    return a, b, c
