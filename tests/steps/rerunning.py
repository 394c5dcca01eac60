"""Models run again in backward, by parts, by methods, under transforms."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .registry import mlp, randint, randn, step, update


class Reversible(torch.autograd.Function):
    """Runs its modules again in backward, as reversible networks do."""

    @staticmethod
    def forward(ctx, x, f, g, *parameters):
        ctx.f, ctx.g, ctx.parameters = f, g, parameters
        with torch.no_grad():
            a, b = x.chunk(2, 1)
            y1 = a + f(b)
            y2 = b + g(y1)
        ctx.save_for_backward(y1, y2)
        return torch.cat([y1, y2], 1)

    @staticmethod
    def backward(ctx, *grads):
        y1, y2 = (y.detach() for y in ctx.saved_tensors)
        with torch.no_grad():
            b = y2 - ctx.g(y1)
            a = y1 - ctx.f(b)
        with torch.enable_grad():
            a, b = a.requires_grad_(), b.requires_grad_()
            z1 = a + ctx.f(b)
            out = torch.cat([z1, b + ctx.g(z1)], 1)
            found = torch.autograd.grad(out, [a, b, *ctx.parameters], grads[0])
        return torch.cat(found[:2], 1), None, None, *found[2:]


class ReversibleNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.out = mlp(2, 3, 2), mlp(2, 3, 2), nn.Linear(4, 2)

    def forward(self, x):
        ps = [*self.f.parameters(), *self.g.parameters()]
        return self.out(Reversible.apply(x, self.f, self.g, *ps))


@step(net=ReversibleNet)
def reversible_blocks(m, o, k):
    x = randn(k, 7, 4).requires_grad_()
    out = m.net(x)
    update(o.net, out.square().mean())
    return out, x.grad


class Accumulating(torch.autograd.Function):
    """As `Reversible`, but with a `backward` of its own inside backward."""

    @staticmethod
    def forward(ctx, x, f):
        ctx.f = f
        ctx.save_for_backward(x)
        with torch.no_grad():
            return f(x)

    @staticmethod
    def backward(ctx, *grads):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            torch.autograd.backward(ctx.f(x), grads[0])
        return x.grad, None


class AccumulatingNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.f, self.out = nn.Linear(3, 3), mlp(3, 4, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.out(Accumulating.apply(self.first(x), self.f))


@step(net=AccumulatingNet)
def backward_inside_backward(m, o, k):
    out = m.net(randn(k, 7, 3))
    update(o.net, out.square().mean())
    return out


class Equilibrium(nn.Module):
    """A fixed point, whose derivative a hook solves for."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.inject, self.out = nn.Linear(4, 4), nn.Linear(3, 4), nn.Linear(4, 2)
        with torch.no_grad():
            self.f.weight.mul_(0.3)

    def cell(self, z, x):
        return (self.f(z) + self.inject(x)).tanh()

    def forward(self, x):
        with torch.no_grad():
            z = x.new_zeros(len(x), 4)
            for _ in range(15):
                z = self.cell(z, x)
        z = self.cell(z, x)
        if torch.is_grad_enabled():
            z0 = z.detach().requires_grad_()
            f0 = self.cell(z0, x)

            def solve(grad):
                g = grad
                for _ in range(15):
                    g = torch.autograd.grad(f0, z0, g, retain_graph=True)[0] + grad
                return g

            z.register_hook(solve)
        return self.out(z)


@step(net=Equilibrium)
def equilibrium_with_an_implicit_derivative(m, o, k):
    out = m.net(randn(k, 7, 3))
    update(o.net, out.square().mean())
    return out


class Backbone(nn.Module):
    """Part of it runs without gradients, some steps."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.finetune = mlp(3, 5, 4), nn.Linear(4, 2), False

    def forward(self, x):
        with torch.set_grad_enabled(self.finetune and torch.is_grad_enabled()):
            h = self.body(x)
        return (self.head(h), h.detach()) if self.training else self.head(h)


@step(net=Backbone)
def part_of_the_model_without_gradients(m, o, k):
    m.net.finetune = k > 0
    out, h = m.net(randn(k, 7, 3))
    update(o.net, out.square().mean() + 0 * h.sum())
    m.net.eval()
    evaluated = m.net(randn(k, 7, 3))
    m.net.train()
    return out, h, evaluated


class Module(nn.Module):
    """A model with its training step as a method."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = mlp(3, 5, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.encoder(x))

    def training_step(self, batch, index: int):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        return {"loss": loss, "index": index}

    def configure(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


@step(net=Module, methods=("training_step",))
def training_step_as_a_method(m, o, k):
    if k == 0:
        o.net = m.net.configure()
    update(o.net, m.net.training_step((randn(k, 7, 3), randint(k, 2, 7)), k)["loss"])


@step(net=Module)
def submodules_called_directly(m, o, k):
    x = randn(k, 7, 3)
    h = m.net.encoder(x)
    out = m.net.head(h) + m.net(x) + m.net.forward(x)
    update(o.net, out.square().mean())
    return out


@step(net=Module, refused="methods=")
def a_method_that_was_not_named(m, o, k):
    m.net.training_step((randn(k, 7, 3), randint(k, 2, 7)), k)["loss"].backward()


def compiled() -> nn.Module:
    model: Any = torch.compile(mlp(3, 5, 2), backend="eager")
    return model


@step(net=compiled)
def compiled_module(m, o, k):
    update(o.net, m.net(randn(k, 7, 3)).square().mean())


@step(net=lambda: mlp(3, 5, 2))
def compiled_wrapper(m, o, k):
    if not k:
        m.net.compile(backend="eager")
    update(o.net, m.net(randn(k, 7, 3)).square().mean())


@step(net=lambda: nn.Linear(3, 2))
def a_step_ahead_with_the_models_own_parameters(m, o, k):
    x = randn(k, 7, 3)
    parameters = dict(m.net.named_parameters())
    grads = torch.autograd.grad(m.net(x).square().mean(), [*parameters.values()], create_graph=True)
    ahead = {n: p - 0.1 * g for (n, p), g in zip(parameters.items(), grads, strict=True)}
    out = torch.func.functional_call(m.net, ahead, (x,))
    update(o.net, out.square().mean())
    return out, list(m.net.state_dict())
