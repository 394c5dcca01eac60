"""Optimizers, averages, schedules, and what is saved and loaded between steps."""

from __future__ import annotations

import copy
import io
import pickle
from contextlib import nullcontext
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from .registry import SGD, each, mlp, randint, randn, step, update


def net() -> nn.Sequential:
    return mlp(3, 6, 2)


def ordinary(m, o, k):
    out = m.net(randn(k, 7, 3))
    update(o.net, F.cross_entropy(out, randint(k, 2, 7)))
    return out


for _name, _optimizer in {
    "adamw_amsgrad": partial(torch.optim.AdamW, amsgrad=True),
    "adam_fused": partial(torch.optim.Adam, fused=True),
    "sgd_foreach_nesterov": partial(SGD, nesterov=True, foreach=True),
    "sgd_maximize": partial(SGD, maximize=True),
    "rmsprop_centered": partial(torch.optim.RMSprop, centered=True, momentum=0.5),
    "adagrad": torch.optim.Adagrad,
    "nadam": torch.optim.NAdam,
    "rprop": torch.optim.Rprop,
    "averaged_sgd": torch.optim.ASGD,
}.items():

    def _run(m, o, k):
        return ordinary(m, o, k)

    _run.__name__ = _name
    step(net=net, optimizers=each(_optimizer))(_run)


@step(
    net=net,
    optimizers=each(partial(torch.optim.LBFGS, max_iter=4, line_search_fn="strong_wolfe")),
    rtol=1e-8,
)
def lbfgs_with_closures(m, o, k):
    x, y = randn(k, 7, 3), randn(k, 7, 2)

    def closure():
        o.net.zero_grad()
        loss = F.mse_loss(m.net(x), y)
        loss.backward()
        return loss

    return o.net.step(closure)


@step(net=net)
def sgd_with_a_closure(m, o, k):
    def closure():
        o.net.zero_grad()
        loss = m.net(randn(k, 7, 3)).square().mean()
        loss.backward()
        return loss

    return o.net.step(closure)


def grouped(m):
    decayed = [p for n, p in m.net.named_parameters() if p.ndim > 1]
    plain = [p for n, p in m.net.named_parameters() if n.endswith("bias")]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "lr": 0.5}]
    return {"net": torch.optim.SGD(groups, lr=0.05, momentum=0.9)}


@step(net=net, optimizers=grouped, steps=4)
def groups_by_name_and_a_schedule(m, o, k):
    if k == 0:
        m.schedule = torch.optim.lr_scheduler.OneCycleLR(o.net, max_lr=[0.1, 0.2], total_steps=6)
    out = ordinary(m, o, k)
    m.schedule.step()
    return out, m.schedule.get_last_lr()


@step(net=net)
def clipping_by_norm(m, o, k):
    o.net.zero_grad()
    m.net(randn(k, 7, 3)).square().sum().backward()
    norm = nn.utils.clip_grad_norm_(m.net.parameters(), 0.3)
    o.net.step()
    return norm


@step(net=net, steps=6)
def accumulation_over_steps(m, o, k):
    (m.net(randn(k, 1 + k, 3)).square().mean() / 3).backward()
    if (k + 1) % 3 == 0:
        o.net.step()
        o.net.zero_grad()


@step(net=net)
def accumulation_with_no_sync(m, o, k):
    o.net.zero_grad()
    for i in range(3):
        skip = getattr(m.net, "no_sync", nullcontext) if i < 2 else nullcontext
        with skip():
            m.net(randn(10 * k + i, 5, 3)).square().mean().backward()
    o.net.step()


@step(net=lambda: nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)))
def stochastic_weight_averaging(m, o, k):
    if k == 0:
        m.average = AveragedModel(m.net)
        m.ema = AveragedModel(m.net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    ordinary(m, o, k)
    m.average.update_parameters(m.net)
    m.ema.update_parameters(m.net)
    update_bn([randn(5, 7, 3), randn(6, 4, 3)], m.average)
    m.ema.eval()
    return m.ema(randn(k, 7, 3)), m.average(randn(k, 7, 3))


@step(net=net)
def lookahead(m, o, k):
    if k == 0:
        m.slow = [p.detach().clone() for p in m.net.parameters()]
    for i in range(2):
        ordinary(m, o, 10 * k + i)
    with torch.no_grad():
        for p, slow in zip(m.net.parameters(), m.slow, strict=True):
            slow += 0.5 * (p - slow)
            p.copy_(slow)


@step(net=net)
def layerwise_rates_and_gradient_noise(m, o, k):
    o.net.zero_grad()
    m.net(randn(k, 7, 3)).square().mean().backward()
    with torch.no_grad():
        for p in m.net.parameters():
            ratio = p.norm() / (p.grad.norm() + 1e-9)
            p.grad = p.grad * ratio.clamp(max=10) + 0.01 * torch.randn_like(p)
    o.net.step()


@step(net=net)
def state_saved_and_loaded_through_a_file(m, o, k):
    ordinary(m, o, k)
    file = io.BytesIO()
    torch.save({"model": m.net.state_dict(), "optimizer": o.net.state_dict()}, file)
    m.net(randn(k, 7, 3)).sum().backward()
    o.net.step()
    file.seek(0)
    state = torch.load(file)
    m.net.load_state_dict(state["model"])
    o.net.load_state_dict(state["optimizer"])


@step(net=net)
def model_pickled_and_trained_on(m, o, k):
    m.net = pickle.loads(pickle.dumps(m.net))
    o.net = SGD(m.net.parameters())
    return ordinary(m, o, k)


@step(net=net)
def model_saved_whole_and_trained_on(m, o, k):
    file = io.BytesIO()
    torch.save(m.net, file)
    file.seek(0)
    m.net = torch.load(file, weights_only=False)
    o.net = SGD(m.net.parameters())
    return ordinary(m, o, k)


@step(net=net)
def deepcopy_after_a_backward(m, o, k):
    out = ordinary(m, o, k)
    twin = copy.deepcopy(m.net)
    assert all(p is not q for p, q in zip(twin.parameters(), m.net.parameters(), strict=True))
    twin(randn(k, 7, 3)).sum().backward()
    for p, q in zip(m.net.parameters(), twin.parameters(), strict=True):
        p.grad = q.grad
    o.net.step()
    return out


class Holder(nn.Module):
    """A model of the user's that has wrapped ones inside."""

    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x):
        return self.b(self.a(x).tanh())


@step(a=lambda: nn.Linear(3, 4), b=lambda: nn.Linear(4, 2))
def wrapped_models_inside_a_module(m, o, k):
    if k == 0:
        m.both = Holder(m.a, m.b)
        o.both = SGD(m.both.parameters())
    out = m.both(randn(k, 7, 3))
    update(o.both, out.square().mean())
    state = copy.deepcopy(m.both.state_dict())
    m.both.load_state_dict(state)
    return out, list(state), [name for name, _ in m.both.named_parameters()]


class Around(nn.Module):
    """Has another model, wrapped as it is itself, that its forward calls."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.inner = nn.Linear(3, 3), nn.Identity()

    def forward(self, x):
        h = self.own(x).tanh()
        return self.inner(h), self.inner(h * 2)


def around_optimizers(m):
    return {"inner": SGD(m.inner.parameters()), "own": SGD(m.around.own.parameters())}


def around_another(m, o, k):
    m.around.inner = m.inner
    x = randn(k, 7, 3).requires_grad_()
    a, b = m.around(x)
    (slopes,) = torch.autograd.grad(a.square().sum(), x, create_graph=True)
    o.own.zero_grad()
    update(o.inner, slopes.square().mean() + b.square().mean() + m.inner(x).mean())
    o.own.step()
    return a, b, x.grad


@step(inner=lambda: mlp(3, 5, 2), around=Around, optimizers=around_optimizers)
def wrapped_model_that_calls_another(m, o, k):
    return around_another(m, o, k)


def normed():
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))


@step(inner=normed, around=Around, optimizers=around_optimizers)
def wrapped_model_that_calls_another_with_batchnorm(m, o, k):
    return around_another(m, o, k)
