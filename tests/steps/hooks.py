"""Functions and hooks of the user's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .layers import ordinary
from .registry import SGD, mlp, randint, randn, step, update


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, strength):
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grads):
        return -ctx.strength * grads[0], None


class DomainNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features, self.label, self.domain = mlp(3, 4, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x, strength=1.0):
        h = self.features(x)
        return self.label(h), self.domain(Reverse.apply(h, strength))


@step(net=DomainNet)
def gradient_reversal(m, o, k):
    label, _ = m.net(randn(k, 5, 3))
    _, domain = m.net(torch.cat([randn(k, 5, 3), randn(k + 1, 4, 3) + 1]), strength=0.1 * k)
    domains = torch.tensor([0] * 5 + [1] * 4)
    update(o.net, F.cross_entropy(label, randint(k, 2, 5)) + F.cross_entropy(domain, domains))


class Clamped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = self.a(x)
        if h.requires_grad:
            h.register_hook(lambda grad: grad.clamp(-0.05, 0.05))
        return self.b(h)


@step(net=Clamped)
def gradients_of_activations_clamped(m, o, k):
    return ordinary(m, o, k)


@step(net=lambda: mlp(3, 4, 2))
def hooks_on_parameters(m, o, k):
    ps = list(m.net.parameters())
    handles = [p.register_hook(lambda grad: grad.clamp(-0.1, 0.1) * 2) for p in ps[:2]]
    out = ordinary(m, o, k)
    grads = torch.autograd.grad(m.net(randn(k, 7, 3)).square().sum(), ps)
    for handle in handles:
        handle.remove()
    return out, grads


@step(net=lambda: mlp(3, 4, 2))
def hook_on_a_parameter_that_keeps_what_it_sees(m, o, k):
    seen = []
    handle = next(m.net.parameters()).register_hook(lambda grad: seen.append(grad.norm()))
    o.net.zero_grad()
    m.net(randn(k, 7, 3)).square().mean().backward()
    m.net(randn(k + 1, 5, 3)).mean().backward()
    handle.remove()
    o.net.step()
    return seen


@step(net=lambda: mlp(3, 4, 2))
def hook_over_several_parameters(m, o, k):
    norms = []

    def hook(grads):
        norms.append(torch.stack([grad.norm() for grad in grads if grad is not None]).norm())

    handle = torch.autograd.graph.register_multi_grad_hook(list(m.net.parameters()), hook)
    out = ordinary(m, o, k)
    handle.remove()
    return out, norms


@step(
    net=lambda: mlp(3, 4, 2),
    optimizers=lambda m: {"net": None, **{n: SGD([p]) for n, p in m.net.named_parameters()}},
)
def optimizers_in_hooks_after_accumulation(m, o, k):
    if k == 0:
        for name, p in m.net.named_parameters():

            def hook(p, name=name):
                p.grad.clamp_(-0.1, 0.1)
                getattr(o, name).step()
                getattr(o, name).zero_grad()

            p.register_post_accumulate_grad_hook(hook)
    out = m.net(randn(k, 7, 3))
    out.square().mean().backward()
    return out


@step(net=lambda: mlp(3, 4, 2))
def backward_hooks_on_modules(m, o, k):
    def scale(module, grad_in, grad_out):
        return tuple(None if g is None else g * 0.5 for g in grad_in)

    inner = m.net[1]
    handles = [inner.register_full_backward_hook(scale)]
    handles.append(
        inner.register_full_backward_pre_hook(lambda _, grads: tuple(g * 3 for g in grads))
    )
    x = randn(k, 7, 3).requires_grad_()
    out = m.net(x)
    update(o.net, out.square().mean())
    for handle in handles:
        handle.remove()
    return out, x.grad


@step(net=lambda: mlp(3, 4, 2))
def hooks_on_the_model_itself(m, o, k):
    seen = []
    handles = [
        m.net.register_forward_pre_hook(lambda _, args: (args[0] * 2,)),
        m.net.register_forward_hook(
            lambda _, args, out: seen.append(out.detach().mean()) or out + 1
        ),
        m.net.register_full_backward_hook(lambda _, gi, go: seen.append(go[0].sum())),
    ]
    out = m.net(randn(k, 7, 3).requires_grad_())
    update(o.net, out.square().mean())
    for handle in handles:
        handle.remove()
    return out, seen


@step(net=lambda: mlp(3, 4, 2))
def forward_hooks_that_change_activations(m, o, k):
    handle = m.net[1].register_forward_hook(lambda _, args, out: out * 0.5 + args[0])
    pre = m.net[2].register_forward_pre_hook(lambda _, args: (args[0].relu(),))
    out = ordinary(m, o, k)
    handle.remove()
    pre.remove()
    return out


@step(net=lambda: mlp(3, 4, 2))
def forward_hook_that_keeps_features_on_the_module(m, o, k):
    if k == 0:

        def keep(module, args, out):
            module.features = out

        m.net[1].register_forward_hook(keep)
    out = m.net(randn(k, 7, 3))
    update(o.net, out.mean() + m.net[1].features.square().mean())
    return m.net[1].features


@step(net=lambda: mlp(3, 4, 2))
def forward_hook_that_keeps_features_elsewhere(m, o, k):
    features = {}
    handle = m.net[1].register_forward_hook(lambda _, args, out: features.update(tanh=out))
    out = m.net(randn(k, 7, 3))
    update(o.net, out.mean() + features["tanh"].square().mean())
    handle.remove()


@step(net=lambda: mlp(3, 4, 2))
def forward_hook_used_to_look_at_shapes(m, o, k):
    seen = []
    handle = m.net[1].register_forward_hook(lambda _, args, out: seen.append(out.shape[1:]))
    out = ordinary(m, o, k)
    handle.remove()
    return out, list(seen[0]) if seen else None


class Recorder:
    """Keeps what its hooks see, as tools that look into models do."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.features: list[torch.Tensor] = []
        self.means: dict[str, torch.Tensor] = {}
        layers = [(n, layer) for n, layer in model.named_modules() if isinstance(layer, nn.Tanh)]
        self.handles = [layer.register_forward_hook(self.hook_for(name)) for name, layer in layers]

    def hook_for(self, name):
        def hook(module, args, output):
            self.features.append(output)
            self.means[name] = output.detach().mean() - args[0].detach().mean()

        return hook


@step(net=lambda: mlp(3, 4, 5, 2), d=lambda: mlp(2, 4, 4, 1))
def features_matched_by_a_recorder(m, o, k):
    recorder = Recorder(m.d)
    m.d(randn(k, 7, 2))
    real, recorder.features = recorder.features, []
    out = m.net(randn(k, 7, 3))
    m.d(out)
    pairs = zip(recorder.features, real, strict=True)
    update(o.net, sum((a.mean(0) - b.detach().mean(0)).square().sum() for a, b in pairs))
    for handle in recorder.handles:
        handle.remove()
    return recorder.means, len(real)


@step(net=lambda: mlp(3, 4, 2))
def forward_hook_that_keeps_features_and_changes_them(m, o, k):
    seen, last = [], randn(0, 1)

    def hook(layer, args, out):
        nonlocal last
        last = args[0]
        seen.append(out)
        return out * 0.5

    handle = m.net[1].register_forward_hook(hook)
    out = m.net(randn(k, 7, 3))
    handle.remove()
    update(o.net, out.mean() + seen[0].square().mean() + last.square().mean())
    return out, seen, last


@step(net=lambda: mlp(3, 4, 2), refused="registers a hook on a tensor that it sees")
def forward_hook_that_keeps_gradients(m, o, k):
    seen = []
    handle = m.net[1].register_forward_hook(
        lambda _, args, out: out.register_hook(lambda grad: seen.append(grad.clone())) and None
    )
    ordinary(m, o, k)
    handle.remove()
    return seen


@step(net=lambda: mlp(3, 4, 2))
def forward_hook_that_removes_itself(m, o, k):
    seen = []

    def hook(layer, args, out):
        seen.append(out)
        handle.remove()

    handle = m.net[1].register_forward_hook(hook)
    out = m.net(randn(k, 7, 3)) + m.net(randn(k + 9, 7, 3))
    update(o.net, out.mean() + seen[0].square().mean())
    return out, seen, len(m.net[1]._forward_hooks)


SEEN: list[torch.Tensor] = []


@step(net=lambda: mlp(3, 4, 2))
def forward_hook_that_appends_to_a_global(m, o, k):
    handle = m.net[1].register_forward_hook(lambda _, args, out: SEEN.append(out))
    SEEN.clear()
    first, second = m.net(randn(k, 7, 3)), m.net(randn(k + 9, 3, 3))
    handle.remove()
    update(o.net, first.mean() + second.mean() + sum(x.square().mean() for x in SEEN))
    return SEEN


class Recording(nn.Module):
    """Holds the model, and a list in which hooks on its layers put what they make."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = net
        self.seen: list[torch.Tensor] = []
        self.has_hooks = False

    def keep(self, layer, inputs, output):
        self.seen.append(output)

    def forward(self, x):
        self.seen.clear()
        if not self.has_hooks:
            self.has_hooks = bool(self.net[0].register_forward_hook(self.keep))
        return self.net(x), torch.stack(self.seen, 1)


@step(net=lambda: mlp(3, 4, 2))
def features_kept_by_a_module_around_the_model(m, o, k):
    if k == 0:
        m.around = Recording(m.net)
    out, seen = m.around(randn(k, 7, 3))
    update(o.net, out.square().mean() + seen.square().mean())
    return seen


class Equalized:
    """Scales a layer's weight before its forward, as ProGAN does."""

    def __call__(self, layer, inputs):
        layer.weight = layer.weight_orig * (2 / layer.weight_orig.shape[1]) ** 0.5


def equalized(layer: nn.Linear) -> nn.Linear:
    weight: Any = layer.weight
    del layer.weight
    layer.register_parameter("weight_orig", weight)
    layer.register_forward_pre_hook(Equalized())
    return layer


@step(net=lambda: nn.Sequential(equalized(nn.Linear(3, 4)), nn.Tanh(), equalized(nn.Linear(4, 2))))
def weights_scaled_by_hooks(m, o, k):
    out = m.net(randn(k, 7, 3))
    update(o.net, out.square().mean())
    return out


class EqualizedCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = equalized(nn.Linear(3, 4)), equalized(nn.Linear(5, 1))

    def forward(self, x):
        h = self.a(x)
        return self.b(torch.cat([h, h.std(0, correction=0).mean().expand(len(x), 1)], 1))


@step(net=EqualizedCritic, refused="couples rows")
def coupled_rows_of_a_model_with_hooks(m, o, k):
    update(o.net, m.net(randn(k, 7, 3)).square().mean())


class HooksItself(nn.Module):
    """Registers a hook when it is first called, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.is_hooked = nn.Linear(3, 2), False

    def forward(self, x):
        if not self.is_hooked:
            self.layer.register_forward_hook(lambda _, args, out: torch.neg(torch.as_tensor(out)))
            self.is_hooked = True
        return self.layer(x)


@step(net=HooksItself, refused="registers or removes hooks")
def hooks_registered_by_the_first_forward(m, o, k):
    update(o.net, m.net(randn(k, 7, 3)).square().mean())
