"""Several forwards, several backwards, and what stands between them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from .registry import mlp, randn, step, update


def net() -> nn.Sequential:
    return mlp(3, 6, 2)


@step(net=net)
def several_backwards_before_one_step(m, o, k):
    o.net.zero_grad()
    a, b = m.net(randn(k, 7, 3)), m.net(randn(k + 5, 5, 3))
    a.square().mean().backward()
    b.mean().backward()
    o.net.step()


@step(net=net)
def retain_graph_twice(m, o, k):
    o.net.zero_grad()
    out = m.net(randn(k, 7, 3))
    out.square().mean().backward(retain_graph=True)
    out.mean().backward(retain_graph=True)
    out.exp().mean().backward()
    o.net.step()


@step(net=net)
def one_forward_two_losses_with_zero_grad_between(m, o, k):
    out = m.net(randn(k, 7, 3))
    o.net.zero_grad()
    out.square().mean().backward(retain_graph=True)
    first = [p.grad.clone() for p in m.net.parameters()]
    o.net.zero_grad()
    out.mean().backward()
    o.net.step()
    return first


@step(net=net)
def outputs_never_used(m, o, k):
    m.net(randn(k, 7, 3))
    out = m.net(randn(k + 5, 7, 3))
    m.net(randn(k, 3, 3))
    update(o.net, out.mean())
    m.net(randn(k, 2, 3))


@step(net=net)
def forwards_under_no_grad_and_inference_mode(m, o, k):
    with torch.no_grad():
        before = m.net(randn(k, 7, 3))
    with torch.inference_mode():
        also = m.net(randn(k + 5, 7, 3)).sum().item()
    out = m.net(randn(k, 7, 3))
    update(o.net, (out - 2 * before).square().mean() * (1 + abs(also)))
    with torch.inference_mode():
        after = m.net(randn(k, 7, 3)).clone()
    return before, after.sum().item() * 0 + 1


@step(
    net=lambda: nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.0), nn.Linear(6, 2))
)
def evaluation_between_training_steps(m, o, k):
    m.net.eval()
    with torch.no_grad():
        before = m.net(randn(9, 5, 3))
    m.net.train()
    update(o.net, F.mse_loss(m.net(randn(k, 7, 3)), randn(k, 7, 2)))
    return before


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(5, 1)

    def forward(self, x):
        h = self.trunk(x).tanh()
        return self.a(h), self.b(h)


@step(net=Heads)
def only_one_of_two_outputs_used(m, o, k):
    a, b = m.net(randn(k, 7, 3))
    update(o.net, (a, b, a)[k].square().mean())
    return a, b


@step(net=Heads)
def two_outputs_two_backwards(m, o, k):
    a, b = m.net(randn(k, 7, 3))
    o.net.zero_grad()
    a.square().mean().backward(retain_graph=True)
    b.mean().backward()
    o.net.step()


@step(net=lambda: mlp(3, 5, 3))
def model_applied_to_its_own_output(m, o, k):
    x = randn(k, 7, 3)
    states = [x]
    for _ in range(4):
        states.append(states[-1] + 0.1 * m.net(states[-1]))
    update(o.net, states[-1].square().mean() + states[2].mean())
    return states


@step(net=net)
def backward_with_a_given_derivative(m, o, k):
    o.net.zero_grad()
    out = m.net(randn(k, 7, 3))
    out.backward(randn(k, 7, 2))
    a, b = m.net(randn(k, 5, 3)), m.net(randn(k + 3, 5, 3))
    torch.autograd.backward([a, b], [randn(k, 5, 2), torch.ones(5, 2)])
    o.net.step()


@step(net=net)
def backward_into_chosen_inputs(m, o, k):
    o.net.zero_grad()
    x = randn(k, 7, 3).requires_grad_()
    chosen = list(m.net.parameters())[:2]
    m.net(x).square().mean().backward(inputs=chosen if k != 1 else [x, chosen[0]])
    o.net.step()
    return x.grad


@step(net=net)
def hooks_and_retained_gradients_on_outputs(m, o, k):
    o.net.zero_grad()
    out = m.net(randn(k, 7, 3))
    out.retain_grad()
    out.register_hook(lambda grad: grad.clamp(-0.05, 0.05) * 2)
    out.square().mean().backward()
    o.net.step()
    return out.grad


@step(net=net)
def inputs_being_optimized(m, o, k):
    if k == 0:
        m.latent = randn(k, 7, 3).requires_grad_()
        o.latent = torch.optim.Adam([m.latent], lr=0.1)
    for _ in range(2):
        o.latent.zero_grad()
        update(o.net, (m.net(m.latent) - 1).square().mean())
        o.latent.step()
    return m.latent, m.latent.grad


@step(net=net)
def saved_tensors_packed_by_hooks(m, o, k):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t * 1.0):
        out = m.net(randn(k, 7, 3))
    update(o.net, out.square().mean())
    with torch.autograd.graph.save_on_cpu():
        update(o.net, m.net(randn(k, 7, 3)).square().mean())


@step(net=net)
def anomaly_detection(m, o, k):
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        update(o.net, m.net(randn(k, 7, 3)).square().mean())


@step(net=net)
def grad_mode_set_by_decorator_and_function(m, o, k):
    torch.set_grad_enabled(False)
    target = m.net(randn(k, 7, 3))
    torch.set_grad_enabled(True)
    with torch.no_grad(), torch.enable_grad():
        out = m.net(randn(k, 7, 3))
    update(o.net, (out - 2 * target).square().mean())
    return target


@step(net=net)
def outputs_collected_over_batches_and_one_loss(m, o, k):
    outs = torch.cat([m.net(randn(10 * k + i, 1 + 2 * i, 3)) for i in range(4)])
    update(o.net, torch.pdist(outs).exp().mean())
    return outs


@step(net=net)
def output_changed_in_place(m, o, k):
    out = m.net(randn(k, 7, 3))
    out *= 2
    out[0] = 0.0
    out[:, 1].mul_(3)
    update(o.net, out.square().mean())
    return out


@step(net=net)
def input_changed_in_place_after_forward(m, o, k):
    x = randn(k, 7, 3)
    with torch.no_grad():
        out = m.net(x)
        x.zero_()
    update(o.net, (m.net(x + 1) - out).square().mean())
    return out


@step(net=net)
def loss_that_is_not_finite_is_skipped(m, o, k):
    o.net.zero_grad()
    loss = m.net(randn(k, 7, 3)).square().mean() * (float("nan") if k == 1 else 1.0)
    loss.backward()
    grads = [p.grad for p in m.net.parameters()]
    if all(grad.isfinite().all() for grad in grads):
        o.net.step()
    else:
        o.net.zero_grad()


@step(net=net)
def nothing_requires_grad_in_the_loss(m, o, k):
    o.net.zero_grad()
    out = m.net(randn(k, 7, 3))
    weight = torch.ones((), requires_grad=True)
    (out.detach().mean() * weight).backward()
    o.net.step()  # does nothing
    update(o.net, out.mean())
    return weight.grad


@step(net=net)
def exceptions_in_forward_and_between(m, o, k):
    for broken in (lambda: m.net(randn(k, 7, 4)), lambda: m.net(randn(k, 7, 3)) @ randn(k, 5, 5)):
        with pytest.raises(RuntimeError):
            broken()
    update(o.net, m.net(randn(k, 7, 3)).square().mean())


class Angry(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *grads):
        raise ValueError("angry")


class MaybeAngry(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.angry = nn.Linear(3, 4), nn.Linear(4, 2), False

    def forward(self, x):
        h = self.a(x)
        return self.b(Angry.apply(h) if self.angry else h)


@step(net=MaybeAngry)
def exceptions_in_backward(m, o, k):
    o.net.zero_grad()
    m.net.angry = True
    out = m.net(randn(k, 7, 3))
    with pytest.raises(ValueError, match="angry"):
        out.mean().backward()
    m.net.angry = False
    update(o.net, m.net(randn(k, 7, 3)).square().mean())
