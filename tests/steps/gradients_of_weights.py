# type: ignore  # torch's types are wider than what a step knows
"""Gradients that the step edits, keeps and places; models that it loads and copies."""

from __future__ import annotations

import copy
import itertools

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from .registry import SGD, randint, randn, step, update
from .weights import net, ordinary


class OldWeightNorm(nn.Module):
    """What torch.nn.utils.weight_norm did, and much code does: a weight made in a pre-hook."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2)
        weight = self.a._parameters.pop("weight")
        self.a.register_parameter("weight_g", nn.Parameter(weight.norm(dim=1, keepdim=True)))
        self.a.register_parameter("weight_v", nn.Parameter(weight.detach()))
        self.a.register_forward_pre_hook(self.compute)
        self.compute(self.a, None)

    @staticmethod
    def compute(layer, _):
        layer.weight = layer.weight_v * (layer.weight_g / layer.weight_v.norm(dim=1, keepdim=True))

    def forward(self, x):
        return self.a(x)


@step(net=OldWeightNorm)
def weight_made_in_a_pre_hook(m, o, k):
    out = m.net(randn(k, 7, 3))
    update(o.net, out.square().mean() + m.net.a.weight.abs().sum())
    return out, m.net.a.weight


@step(net=net)
def pruned_weights(m, o, k):
    if k == 1:
        prune.l1_unstructured(m.net[0], "weight", amount=0.3)
        o.net = SGD(m.net.parameters())
    return ordinary(m, o, k)


@step(net=net)
def gradients_edited_before_the_step(m, o, k):
    o.net.zero_grad(set_to_none=k == 1)
    m.net(randn(k, 7, 3)).square().mean().backward()
    nn.utils.clip_grad_norm_(m.net.parameters(), 0.1)
    for p in m.net.parameters():
        if p.ndim > 1:
            p.grad -= p.grad.mean(1, keepdim=True)
        p.grad.add_(torch.randn_like(p), alpha=0.01)
    nn.utils.clip_grad_value_(m.net.parameters(), 0.05)
    o.net.step()


@step(net=net)
def gradients_kept_from_step_to_step(m, o, k):
    for p in m.net.parameters():
        if p.grad is not None:
            p.grad.mul_(0.9)
    m.net(randn(k, 7, 3)).square().mean().backward()
    o.net.step()


@step(net=net)
def gradients_in_tensors_of_the_users_own(m, o, k):
    flat = torch.zeros(sum(p.numel() for p in m.net.parameters()))
    parts = flat.split([p.numel() for p in m.net.parameters()])
    for p, part in zip(m.net.parameters(), parts, strict=True):
        p.grad = part.view_as(p)
    m.net(randn(k, 7, 3)).square().mean().backward()
    assert all(
        p.grad.data_ptr() == part.data_ptr()
        for p, part in zip(m.net.parameters(), parts, strict=True)
    )
    o.net.step()
    return flat


class Requires(nn.Module):
    """A buffer and a plain attribute that require grad."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.scale = torch.ones(2, requires_grad=True)
        self.register_buffer("shift", torch.zeros(2))
        self.shift.requires_grad_()

    def forward(self, x):
        return self.a(x) * self.scale + self.shift


@step(net=Requires)
def plain_tensors_that_require_grad(m, o, k):
    m.net.scale.grad = m.net.shift.grad = None
    out = ordinary(m, o, k)
    return out, m.net.scale.grad, m.net.shift.grad


@step(net=net, other=net)
def state_loaded_and_interpolated(m, o, k):
    ordinary(m, o, k)
    m.other.load_state_dict(m.net.state_dict())
    with torch.no_grad():
        for p, q in zip(m.net.parameters(), m.other.parameters(), strict=True):
            p.lerp_(q * 2, 0.1)
    update(o.other, m.other(randn(k, 7, 3)).mean())


@step(net=net)
def copied_and_the_copy_trained(m, o, k):
    if k == 0:
        m.copy = copy.deepcopy(m.net)
        o.copy = SGD(itertools.chain(m.copy.parameters()))
    out = ordinary(m, o, k)
    update(o.copy, F.cross_entropy(m.copy(randn(k, 7, 3)), randint(k, 2, 7)))
    return out


@step(net=net)
def shared_memory_and_reinitialized(m, o, k):
    if k == 1:
        m.net.apply(lambda layer: nn.init.eye_(layer.weight) if hasattr(layer, "weight") else None)
    if k == 2:
        for layer in m.net.children():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
    return ordinary(m, o, k)
