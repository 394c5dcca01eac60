# type: ignore  # torch's types are wider than what a step knows
"""Forms that inputs and outputs take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wraploop import shared

from .registry import mlp, randint, randn, step, update


@dataclass
class Pair:
    left: Tensor
    right: Tensor
    name: str = "pair"
    weight: Tensor | None = None


class Views(NamedTuple):
    one: Tensor
    two: Tensor
    note: str | None = None


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, batch: dict[str, Any], *more: Any) -> dict[str, Any]:
        a, b = self.a(batch["x"]), self.b(batch["extra"][0])
        return {"sum": a + b, "parts": [a, (b, more[0][0] * a)], "none": None, "name": "nested"}


@step(net=Nested)
def nested_inputs_and_outputs(m, o, k):
    batch = {"x": randn(k, 7, 3), "extra": [randn(k, 7, 2), None], "label": "batch"}
    out = m.net(batch, (randn(k, 7, 1), "more"))
    update(o.net, out["sum"].square().mean() + out["parts"][1][1].tanh().mean())
    return out


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x, *, context=None, scale=1.0, mode="add", flag=False):
        out = self.a(x) * scale
        if context is not None:
            out = out + self.b(context) if mode == "add" else out * self.b(context)
        return (out, mode, flag)


@step(net=Keywords)
def keyword_inputs_strings_and_none(m, o, k):
    context = (None, randn(k, 7, 3), randn(k, 7, 3))[k]
    mode = ("add", "add", "multiply")[k]
    out = m.net(randn(k, 7, 3), context=context, scale=0.5, mode=mode, flag=k == 1)
    update(o.net, out[0].square().mean())
    return out


class DataclassNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)

    def forward(self, pair: Pair) -> Pair:
        return Pair(self.a(pair.left), self.a(pair.right) * 2, name=pair.name + "!")


@step(net=DataclassNet)
def dataclass_inputs_and_outputs(m, o, k):
    out = m.net(Pair(randn(k, 7, 3), randn(k + 5, 7, 3)))
    update(o.net, (out.left - out.right).square().mean())
    return out


class ViewsNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = mlp(3, 4, 4)

    def forward(self, views: Views) -> Views:
        return Views(self.a(views.one), self.a(views.two))


@step(net=ViewsNet)
def named_tuple_inputs_and_outputs(m, o, k):
    out = m.net(Views(randn(k, 7, 3), randn(k + 5, 7, 3), "note"))
    update(o.net, F.cosine_similarity(out.one, out.two).mean())
    return out


class LossInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(3, 6, 4)

    def forward(self, x, labels=None):
        logits = self.body(x)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


@step(net=LossInside)
def loss_computed_by_the_model(m, o, k):
    out = m.net(randn(k, 7, 3), labels=randint(k, 4, 7))
    update(o.net, out["loss"])
    return out


@step(net=LossInside)
def loss_computed_by_the_model_for_few_rows(m, o, k):
    out = m.net(randn(k, k + 1, 3), randint(k, 4, k + 1))
    update(o.net, out["loss"] + 0.01 * out["logits"].square().sum())
    return out


class Conditioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.query = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x, table, temperature=1.0):
        attention = (self.query(self.a(x)) @ table.T / temperature).softmax(1)
        return attention @ table


@step(net=Conditioned)
def shared_input(m, o, k):
    out = m.net(randn(k, 7, 3), shared(randn(k, 5, 4)))
    update(o.net, out.square().mean())
    return out


@step(net=Conditioned)
def shared_input_with_gradient(m, o, k):
    if k == 0:
        m.table = randn(3, 7, 4).requires_grad_()
        o.table = torch.optim.SGD([m.table], lr=0.1, momentum=0.9)
    o.table.zero_grad()
    update(o.net, m.net(randn(k, 7, 3), shared(m.table)).square().mean())
    grad = m.table.grad.clone()
    o.table.step()
    return grad, m.table


@step(net=Conditioned)
def zero_dim_input_with_gradient(m, o, k):
    t = torch.tensor(0.7, requires_grad=True)
    out = m.net(randn(k, 7, 3), shared(randn(k, 5, 4)), temperature=t.exp())
    update(o.net, out.square().mean())
    return t.grad


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x, y):
        return self.a(x) * self.b(y).sigmoid()


@step(net=Two)
def same_tensor_as_two_inputs(m, o, k):
    x = randn(k, 7, 3).requires_grad_()
    out = m.net(x, x)
    update(o.net, out.square().mean())
    return out, x.grad


@step(net=Two)
def inputs_that_are_views(m, o, k):
    wide = randn(k, 6, 7).requires_grad_()
    x, y = wide[:3].T, wide[3:, :1].T.expand(7, 3)
    out = m.net(x, y)
    update(o.net, out.square().mean())
    return out, wide.grad


class OtherOrder(nn.Module):
    """Outputs that lie in memory in another order than that of their axes."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.layer = nn.Linear(3, 2)

    def forward(self, x, sequence):
        return self.convolution(x), self.layer(sequence).transpose(1, 2)


@step(net=OtherOrder)
def outputs_in_another_order_in_memory(m, o, k):
    x = randn(k, 7, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    images, sequence = m.net(x, randn(k, 7, 5, 3))
    pixels, flat = images.permute(0, 2, 3, 1).view(-1, 4), sequence.transpose(1, 2).view(-1, 2)
    update(o.net, pixels.square().mean() + flat.square().mean())
    return pixels, flat
