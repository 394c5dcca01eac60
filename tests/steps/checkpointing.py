"""Activation checkpointing, inside the model and around it."""

from __future__ import annotations

from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from .layers import ordinary
from .registry import mlp, randn, step, update


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool, twice: bool) -> None:
        super().__init__()
        self.a, self.b, self.reentrant, self.twice = mlp(3, 5, 3), nn.Linear(3, 2), reentrant, twice

    def forward(self, x):
        h = checkpoint(self.a, x, use_reentrant=self.reentrant)
        if self.twice:
            h = checkpoint(self.a, h, use_reentrant=self.reentrant)
        return self.b(h)


for _reentrant in (False, True):
    for _twice in (False, True):

        def _checkpointed(m, o, k, reentrant=_reentrant):
            x = randn(k, 7, 3).requires_grad_(reentrant)
            out = m.net(x)
            update(o.net, out.square().mean())
            return out, x.grad

        _checkpointed.__name__ = (
            f"checkpoint_{'reentrant' if _reentrant else 'plain'}_{'twice' if _twice else 'once'}"
        )
        step(net=lambda r=_reentrant, t=_twice: Checkpointed(r, t))(_checkpointed)


@step(net=lambda: mlp(3, 5, 2), head=lambda: nn.Linear(2, 2))
def checkpoint_around_the_model(m, o, k):
    x = randn(k, 7, 3)
    out = checkpoint(m.net, x, use_reentrant=False)
    o.head.zero_grad()
    update(o.net, m.head(out).square().mean())
    o.head.step()
    return out


@step(net=lambda: mlp(3, 5, 2))
def reentrant_checkpoint_around_the_model(m, o, k):
    x = randn(k, 7, 3).requires_grad_()
    a, b = (checkpoint(m.net, x + i, use_reentrant=True) for i in range(2))
    update(o.net, a.square().mean() + b.mean())
    return a, x.grad


class CheckpointedStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh()) for _ in range(4)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return checkpoint_sequential(self.layers, 2, x, use_reentrant=False)


@step(net=CheckpointedStack)
def checkpoint_sequential_with_batchnorm(m, o, k):
    return ordinary(m, o, k)


# Functions and hooks of the user's own
