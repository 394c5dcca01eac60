"""Rows that are views, images, sequences, selected, missing."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .registry import mlp, randint, randn, step, update


class Returns(nn.Module):
    """Returns its input, a view of it, and a parameter with a row for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.a = nn.Parameter(torch.randn(4)), nn.Linear(3, 4)

    def forward(self, x):
        return x, x[:, 1:], self.bias.expand(len(x), -1), self.a(x).unbind(1)


@step(net=Returns)
def outputs_that_are_inputs_views_and_parameters(m, o, k):
    x = randn(k, 7, 3).requires_grad_()
    same, view, bias, columns = m.net(x)
    bias_then = bias.clone()
    update(o.net, (same * 2 + x).sum() + view.square().sum() + (bias * columns[0][:, None]).mean())
    return same, view, bias_then, columns, x.grad


@step(net=lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)))
def in_place_first_layer(m, o, k):
    x = randn(k, 7, 3)
    out = m.net(x.clone())
    update(o.net, out.square().mean())
    return out


def trunk_and_heads() -> dict[str, nn.Module]:
    head = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2))
    return {"trunk": nn.Linear(3, 4), "a": head, "b": nn.Linear(4, 2)}


@step(trunk_and_heads)
def in_place_first_layer_on_features_used_again(m, o, k):
    features = m.trunk(randn(k, 7, 3))
    a, b = m.a(features), m.b(features)
    for optimizer in vars(o).values():
        optimizer.zero_grad()
    (a.square().mean() + b.mean() + features.mean()).backward()
    for optimizer in vars(o).values():
        optimizer.step()
    return a, b, features


@step(net=lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2)))
def images(m, o, k):
    x = randn(k, 7, 2, 5, 5).to(memory_format=torch.channels_last)
    out = m.net(x)
    update(o.net, F.cross_entropy(out, randint(k, 2, 7)))
    return out


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, tokens, mask):
        return (
            self.out(self.embed(tokens).masked_fill(~mask[..., None], 0.0)),
            tokens + 1,
            mask.any(1),
        )


@step(net=Masked)
def integer_and_bool_inputs_and_outputs(m, o, k):
    out, tokens, mask = m.net(randint(k, 9, 7, 4), randint(k, 2, 7, 4).bool())
    update(o.net, F.cross_entropy(out.flatten(0, 1), tokens.flatten() % 3))
    return out, tokens, mask


class Chunked(nn.Module):
    """Works through its rows in chunks, as memory-saving code does, and in sorted order."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(3, 6, 2)

    def forward(self, x):
        order = x[:, 0].argsort()
        out = torch.cat([self.body(part) for part in x[order].split(2)])
        return out[order.argsort()]


@step(net=Chunked)
def rows_chunked_and_sorted_inside(m, o, k):
    out = m.net(randn(k, 7, 3))
    update(o.net, out.square().mean())
    return out


@step(net=lambda: mlp(3, 4, 2))
def boolean_selection_of_rows(m, o, k):
    x = randn(k, 9, 3)
    out = torch.zeros(9, 2)
    keep = x[:, 0] > (-0.5, 0.0, 0.6)[k]
    out[keep] = m.net(x[keep])
    update(o.net, (out - 1).square().mean())
    return out


@step(net=lambda: mlp(3, 4, 2))
def no_rows_at_all(m, o, k):
    out = torch.cat([m.net(randn(k, 0, 3)), m.net(randn(k, 3, 3))])
    update(o.net, out.square().sum())
    return out


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 4)

    def forward(self, packed):
        return self.rnn(packed)[0]


@step(net=Sequence, refused="rows")
def packed_sequence(m, o, k):
    x = [randn(k, n, 3) for n in (5, 4, 2)]
    out = m.net(nn.utils.rnn.pack_sequence(x))
    update(o.net, out.data.square().mean())


@step(net=lambda: nn.Bilinear(3, 2, 4), refused="rows")
def inputs_with_other_numbers_of_rows(m, o, k):
    m.net(randn(k, 7, 3), randn(k, 7, 2)).sum().backward()
    m.net(randn(k, 7, 3), randn(k, 1, 2).expand(7, 2)).sum().backward()
    if k:
        m.net(randn(k, 7, 3), nn.functional.pad(randn(k, 6, 2), (0, 0, 0, 1))).sum().backward()
    try:
        m.net(randn(k, 7, 3), randn(k, 1, 2))
    except RuntimeError:  # plain torch refuses, too
        return
