"""Layers of all kinds, precisions, checkpointing, and hooks."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .registry import each, mlp, randint, randn, step, update


def ordinary(m, o, k, *shape: int):
    out = m.net(randn(k, *(shape or (7, 3))))
    update(o.net, out.square().mean() + out.mean())
    return out


class Last(nn.Module):
    """The first output of a module that returns several."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)[0][:, -1]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x, mask=None):
        out, weights = self.attention(x, x, x, key_padding_mask=mask)
        return out, weights


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


for _name, (_make, *_shape) in {
    "lstm": (lambda: Last(nn.LSTM(3, 4, 2, batch_first=True)), 7, 5, 3),
    "gru": (lambda: Last(nn.GRU(3, 4, batch_first=True, bidirectional=True)), 7, 5, 3),
    "transformer": (transformer, 7, 3, 4),
    "transposed_convolution": (lambda: nn.ConvTranspose2d(2, 3, 2, stride=2), 7, 2, 3, 3),
    "prelu_and_pixel_shuffle": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 1), nn.PReLU(4), nn.PixelShuffle(2)),
        7,
        1,
        3,
        3,
    ),
    "pooling_and_upsampling": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 1), nn.MaxPool1d(2), nn.Upsample(scale_factor=2)),
        7,
        2,
        6,
    ),
    "bidirectional_masking": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Softmax(1), nn.LogSigmoid()),
        7,
        3,
    ),
    "no_parameters": (lambda: nn.Sequential(nn.Tanh(), nn.Linear(3, 1)), 2, 3),
}.items():

    def _run(m, o, k, shape=tuple(_shape)):
        return ordinary(m, o, k, *shape)

    _run.__name__ = _name
    step(net=_make)(_run)


@step(net=Attention)
def attention_with_padding(m, o, k):
    mask = torch.arange(4) >= torch.tensor([4, 3, 1, 4, 2, 2, 4])[:, None]
    out, weights = m.net(randn(k, 7, 4, 4), mask=mask if k else None)
    update(o.net, out.square().mean() + weights.square().sum())
    return out, weights


class Unrolled(nn.Module):
    """A recurrence over time, for as long as each sequence is."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.start = nn.LSTMCell(3, 4), nn.Parameter(torch.zeros(4))

    def forward(self, x, lengths, state=None):
        h = c = self.start.expand(len(x), -1)
        if state is not None:
            h, c = state
        t = 0
        while (running := lengths > t).any():
            h2, c2 = self.cell(x[:, t], (h, c))
            h, c = torch.where(running[:, None], h2, h), torch.where(running[:, None], c2, c)
            t += 1
        return h, (h, c)


@step(net=Unrolled)
def recurrence_over_lengths_with_state_carried(m, o, k):
    state = None
    losses = []
    for part in range(3):
        out, state = m.net(
            randn(10 * k + part, 7, 5, 3), torch.tensor([5, 1, 2, 3, 0, 4, 1]), state
        )
        losses.append(out.square().mean())
        if part == 1:
            state = tuple(s.detach() for s in state)
    update(o.net, torch.stack(losses).sum())
    return state


class Stateful(nn.Module):
    """Keeps its hidden state from call to call, with a row for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.state = nn.GRUCell(3, 4), None

    def forward(self, x):
        self.state = self.cell(x, self.state)
        return self.state


@step(net=Stateful)
def state_kept_in_an_attribute(m, o, k):
    """Spiking and recurrent models reset it before each sequence."""
    m.net.state = None
    outs = [m.net(randn(10 * k + t, 7, 3)) for t in range(3)]
    update(o.net, torch.stack(outs).square().mean())
    return outs


@step(net=Stateful)
def state_kept_in_an_attribute_and_detached(m, o, k):
    if k:
        m.net.state = m.net.state.detach()
    out = m.net(randn(k, 7, 3))
    update(o.net, out.square().mean())
    return out, m.net.state


class SparseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.bag = nn.Embedding(9, 3, sparse=True), nn.EmbeddingBag(9, 3, mode="mean")
        self.out = nn.Linear(6, 2)

    def forward(self, tokens):
        return self.out(torch.cat([self.embed(tokens).mean(1), self.bag(tokens)], 1))


@step(net=SparseNet, optimizers=each(lambda ps: torch.optim.SGD(ps, lr=0.1)))
def sparse_embedding(m, o, k):
    out = m.net(randint(k, 9, 7, 4))
    update(o.net, out.square().mean())
    return out


@step(
    net=lambda: nn.Embedding(9, 3, sparse=True),
    optimizers=each(lambda ps: torch.optim.SparseAdam(list(ps), lr=0.1)),
)
def sparse_embedding_accumulated(m, o, k):
    o.net.zero_grad()
    m.net(randint(k, 9, 7)).square().mean().backward()
    m.net(randint(k + 1, 9, 3, 2)).sum().backward()
    o.net.step()


class ComplexNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.complex128))
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        z = torch.fft.fft(x.to(self.weight.dtype) @ self.weight) * self.scale
        return z, z.abs(), z.conj()


@step(net=ComplexNet)
def complex_parameters_and_outputs(m, o, k):
    z, size, conjugate = m.net(randn(k, 7, 3))
    update(o.net, size.mean() + (z * conjugate.flip(1)).real.mean())
    return z, size, conjugate.resolve_conj()


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4).float(), nn.Linear(4, 2)

    def forward(self, x):
        h = self.a(x.float())
        return self.b(h.double()), h


@step(net=Mixed, rtol=1e-4)
def mixed_precisions(m, o, k):
    out, h = m.net(randn(k, 7, 3))
    update(o.net, out.square().mean() + h.mean().double())
    return out, h


@step(net=lambda: mlp(3, 5, 2).to(torch.bfloat16), rtol=0.03)
def half_precision(m, o, k):
    out = m.net(randn(k, 7, 3).bfloat16())
    update(o.net, out.float().square().mean())
    return out


def normed() -> nn.Module:
    layers = [nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)]
    return nn.Sequential(*layers).float()


@step(net=normed, rtol=0.05)
def autocast(m, o, k):
    with torch.autocast("cpu", torch.bfloat16):
        out = m.net(randn(k, 7, 3).float())
        loss = F.cross_entropy(out, randint(k, 2, 7))
    update(o.net, loss)
    return out


@step(net=lambda: mlp(3, 5, 2).float(), rtol=1e-4)
def gradient_scaler(m, o, k):
    if k == 0:
        m.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    o.net.zero_grad()
    loss = m.net(randn(k, 7, 3).float()).square().mean()
    m.scaler.scale(loss * (float("inf") if k == 1 else 1.0)).backward()
    m.scaler.unscale_(o.net)
    nn.utils.clip_grad_norm_(m.net.parameters(), 0.5)
    m.scaler.step(o.net)
    m.scaler.update()
    return m.scaler.get_scale()
