# type: ignore  # torch's types are wider than what a step knows
"""At the edge of what can be kept: what is refused, and what is not."""

from __future__ import annotations

import copy
import functools
import warnings

import torch
from torch import nn
from torch.nn import functional as F

from wraploop import batch_mean

from .registry import mlp, randn, space, step, update
from .structures import twice


class Captions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.embed = nn.Linear(3, 2), nn.Embedding(5, 2)

    def forward(self, x, captions):
        codes = torch.tensor([len(c) % 5 for _, c in zip(x, captions, strict=False)])
        return self.a(x) + self.embed(codes)


@step(net=Captions, refused="captions|list|rows")
def list_with_an_item_for_each_row(m, o, k):
    update(o.net, m.net(randn(k, 7, 3), ["a" * i for i in range(7)]).square().mean())


class Extra(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.a, self.codes = nn.Linear(3, 2), nn.Parameter(torch.randn(rows, 2))

    def forward(self, x):
        return self.a(x), self.codes * 2


@step(net=lambda: Extra(5), refused="first axis|rows")
def output_without_rows(m, o, k):
    out, codes = m.net(randn(k, 7, 3))
    update(o.net, out.mean() + codes.square().sum())


@step(net=lambda: Extra(2), refused="first axis|rows")
def output_with_as_many_rows_as_a_shard_has(m, o, k):
    for rows in (4, 6, 8, 10):
        out, codes = m.net(randn(k, rows, 3))
        update(o.net, out.mean() + codes.square().sum())


@step(net=lambda: Extra(2), refused="first axis|rows")
def output_with_as_many_rows_as_a_shard_has_in_every_batch(m, o, k):
    out, codes = m.net(randn(k, 4, 3))
    update(o.net, out.mean() + codes.square().sum())


@step(net=lambda: nn.Sequential(nn.Dropout(0.5), Extra(2)), refused="first axis|rows")
def output_with_as_many_rows_as_a_shard_has_and_dropout(m, o, k):
    out, codes = m.net(randn(k, 4, 3))
    update(o.net, out.mean() + codes.square().sum())


class SumLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2)

    def forward(self, x):
        return self.a(x).square().sum()


@step(net=SumLoss, refused="couples rows")
def loss_in_the_model_summed_over_rows(m, o, k):
    update(o.net, m.net(randn(k, 7, 3)))


@step(net=lambda: mlp(3, 5, 2))
def cached_gradients_of_representations(m, o, k):
    """GradCache: the loss is over all rows, the network runs on some at a time, twice."""
    parts = randn(k, 9, 3).split(4)
    with torch.no_grad():
        z = torch.cat([m.net(part) for part in parts])
    z = z.requires_grad_()
    F.cross_entropy(z @ z.T, torch.arange(9).roll(1)).backward()
    o.net.zero_grad()
    for part, grad in zip(parts, z.grad.split(4), strict=True):
        (m.net(part) * grad).sum().backward()
    o.net.step()


@step(net=lambda: mlp(3, 5, 2))
def gradients_materialized_unused_and_of_outputs(m, o, k):
    x, y = randn(k, 7, 3).requires_grad_(), randn(k, 7, 3).requires_grad_()
    out = m.net(x * 2)
    ps = list(m.net.parameters())
    loss = out.square().mean()
    (inner,) = torch.autograd.grad(loss, out, retain_graph=True)
    gx, gy = torch.autograd.grad(
        loss, [x, y], allow_unused=True, materialize_grads=True, retain_graph=True
    )
    rest = torch.autograd.grad(out, ps, inner)
    o.net.zero_grad()
    for p, grad in zip(ps, rest, strict=True):
        p.grad = grad
    o.net.step()
    return gx, gy, inner


@step(net=lambda: mlp(3, 5, 2))
def forward_mode_derivatives(m, o, k):
    x, v = randn(k, 7, 3), randn(k + 5, 7, 3)
    with warnings.catch_warnings(), torch.autograd.forward_ad.dual_level():
        warnings.simplefilter("ignore")  # torch's own use of torch.jit
        out = m.net(torch.autograd.forward_ad.make_dual(x, v))
        tangent = torch.autograd.forward_ad.unpack_dual(out).tangent
        loss = tangent.square().mean()
    update(o.net, m.net(x).square().mean())
    return tangent.detach(), loss.detach()


@step(net=lambda: mlp(3, 5, 2))
def jacobian_and_hessian_by_transforms(m, o, k):
    x = randn(k, 3)

    def f(x):
        return m.net(x[None])[0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own use of torch.jit
        jacobian = torch.func.jacrev(f)(x)
        hessian = torch.func.hessian(lambda x: f(x).sum())(x)
    update(o.net, m.net(randn(k, 7, 3)).square().mean())
    return jacobian, hessian


@step(net=lambda: mlp(3, 5, 2))
def model_in_partials_maps_and_lists(m, o, k):
    models = {"net": [m.net]}
    outs = list(map(models["net"][0], randn(k, 9, 3).split([2, 3, 4])))
    state = space(outs=outs, call=functools.partial(m.net, input=randn(k, 5, 3)))
    update(o.net, sum(out.mean() for out in state.outs) + state.call().square().mean())
    return outs


@step(net=lambda: mlp(3, 5, 2))
def attributes_of_parameters(m, o, k):
    for i, p in enumerate(m.net.parameters()):
        p.rate = 0.1 * (i + 1)
    m.net(randn(k, 7, 3)).square().mean().backward()
    with torch.no_grad():
        for p in m.net.parameters():
            p -= p.rate * p.grad
            p.grad = None


class Distinct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2)

    def forward(self, x):
        y = self.a(x)
        return {"y": y, "again": y, "nested": [y, (y,)], "detached": y.detach(), "view": y[:, :1]}


@step(net=Distinct)
def one_tensor_returned_several_times(m, o, k):
    out = m.net(randn(k, 7, 3))
    (grad,) = torch.autograd.grad(
        out["y"].square().sum() + out["view"].sum(), m.net.a.weight, retain_graph=True
    )
    update(o.net, out["y"].mean() + out["again"].square().mean() + out["nested"][1][0].exp().mean())
    return out, grad


class Dispatch(nn.Module):
    """Hooks that are closures over the model, made when it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.side = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)
        self.kept: dict[str, torch.Tensor] = {}
        self.a.register_forward_hook(lambda module, args, out: out * self.side.weight.sum())
        self.b.register_forward_pre_hook(self.keep)

    def keep(self, module, args):
        self.kept["h"] = args[0]

    def forward(self, x):
        return self.b(self.a(x)) + self.side(self.kept["h"])


@step(net=Dispatch)
def hooks_that_refer_to_the_model(m, o, k):
    return twice(m, o, k), m.net.kept["h"]


class Masked(nn.Module):
    """A language model's loss, over the labels that are not left out."""

    def __init__(self, drop: float, agreed: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(drop))
        self.last, self.agreed = nn.Linear(6, 4), agreed

    def forward(self, x, labels):
        logits = self.last(self.body(x))
        if not self.agreed:
            return F.cross_entropy(logits, labels), logits
        losses = F.cross_entropy(logits, labels, reduction="none")
        return batch_mean(losses) / batch_mean(labels.ne(-100).to(losses)), logits


def half_masked(k):
    return torch.tensor([-100, -100, -100, -100, 1, 2, 3, 0, k])


@step(net=lambda: Masked(0.1), refused="couples rows")
def loss_over_some_labels_and_dropout(m, o, k):
    update(o.net, m.net(randn(k, 9, 3), half_masked(k))[0])


@step(net=lambda: Masked(1e-300, agreed=True), draws=True)
def loss_over_some_labels_agreed_on_and_dropout(m, o, k):
    loss, logits = m.net(randn(k, 9, 3), half_masked(k))
    update(o.net, loss)
    return loss, logits


class Bootstrapped(nn.Module):
    """As BYOL in some packages: makes its target when it is first called."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        self.target = None

    def forward(self, x):
        if self.target is None:
            self.target = copy.deepcopy(self.net).requires_grad_(False)
        return self.net(x) - self.target(x)


@step(net=Bootstrapped, refused="deepcopy|makes, replaces or removes layers")
def layers_made_by_the_forward(m, o, k):
    update(o.net, m.net(randn(k, 7, 3)).square().mean())


class Growing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3)])

    def forward(self, x):
        self.layers.append(nn.Tanh())
        for layer in self.layers:
            x = layer(x)
        return x


@step(net=Growing, refused="makes, replaces or removes layers")
def layers_added_by_the_forward(m, o, k):
    update(o.net, m.net(randn(k, 7, 3)).square().mean())


class GivingAFunction(nn.Module):
    """Its rows are in a function, which it returns, or keeps."""

    def __init__(self, how):
        super().__init__()
        self.how, self.layer, self.act, self.loss = how, nn.Linear(3, 2), nn.Tanh(), None

    def forward(self, x):
        h = self.layer(x)
        if self.how == "kept":
            self.loss = lambda: h.square().mean()
        functions = {
            "returned": lambda: h.square().mean(),
            "partial": functools.partial(torch.mul, h),
        }
        return h, functions.get(self.how, torch.tanh)


@step(net=functools.partial(GivingAFunction, "returned"), refused="that holds tensors")
def rows_in_a_function_that_is_returned(m, o, k):
    update(o.net, m.net(randn(k, 7, 3))[1]())


@step(net=functools.partial(GivingAFunction, "partial"), refused="that holds tensors")
def rows_in_a_partial_that_is_returned(m, o, k):
    update(o.net, m.net(randn(k, 7, 3))[1](2.0).square().mean())


@step(net=functools.partial(GivingAFunction, "kept"), refused="that holds tensors")
def rows_in_a_function_that_is_kept(m, o, k):
    m.net(randn(k, 7, 3))
    update(o.net, m.net.loss())


@step(net=functools.partial(GivingAFunction, ""))
def function_without_rows_that_is_returned(m, o, k):
    h, act = m.net(randn(k, 7, 3))
    update(o.net, act(h).square().mean())
    return h
