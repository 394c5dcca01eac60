"""Random numbers that models draw: others than the plain model's, but the same on every run."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from .registry import SGD, mlp, randn, step, update


def dropping(i: int = 3, o: int = 64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(i, 64), nn.Dropout(0.5), nn.Linear(64, o), nn.Dropout(0.5))


@step(net=dropping, draws=True)
def noise_that_comes_again_with_its_seed(m, o, k):
    x = torch.ones(8, 3)
    torch.manual_seed(k)
    first, second = m.net(x), m.net(x)
    torch.manual_seed(k)
    again = m.net(x)
    alike = [torch.equal(first[i], first[j]) for i in range(8) for j in range(i)]
    return {
        "again": torch.equal(first, again),
        "the next call's too": torch.equal(first, second),
        "two rows'": any(alike),
    }


class Noisy(nn.Module):
    """Draws by functions, methods, initialisers and recurrent layers."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 4, num_layers=2, dropout=0.5, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)

    def forward(self, x):
        h, _ = self.rnn(x)
        h = h + self.attention(h, h, h)[0] + 0.1 * torch.empty_like(h).normal_()
        h = F.gumbel_softmax(h + nn.init.uniform_(torch.empty(4)), dim=-1) + F.dropout1d(h, 0.3)
        return F.rrelu(h, training=True) * torch.bernoulli(torch.full_like(h, 0.7))


@step(net=Noisy, draws=True)
def noise_of_many_kinds_that_comes_again_with_its_seed(m, o, k):
    x = randn(k, 7, 5, 3)
    torch.manual_seed(k)
    first = m.net(x)
    torch.manual_seed(k)
    again = m.net(x)
    return torch.equal(first, again)


def trained(models, seed: int):
    """The parameters after some steps of adversarial training, from `seed` on."""
    torch.manual_seed(seed)
    g, d = copy.deepcopy(models.g), copy.deepcopy(models.d)
    optimizers = {"g": SGD(g.parameters()), "d": SGD(d.parameters())}
    for k in range(3):
        fake = g(torch.randn(7, 2))
        loss = F.softplus(d(fake.detach())).mean() + F.softplus(-d(randn(k, 7, 3))).mean()
        update(optimizers["d"], loss)
        update(optimizers["g"], F.softplus(-d(fake)).mean())
    return [parameter.detach().clone() for model in (g, d) for parameter in model.parameters()]


def critic() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))


@step(g=lambda: mlp(2, 8, 3), d=critic, draws=True, steps=1)
def training_with_noise_that_is_the_same_to_the_bit(m, o, k):
    first, again, other = trained(m, 5), trained(m, 5), trained(m, 6)
    return {
        "again": all(map(torch.equal, first, again)),
        "with another seed": all(map(torch.equal, first, other)),
    }
