# type: ignore  # torch's types are wider than what a step knows
"""Objects, distributions and containers that forwards take, return, and put things into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import distributions, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, kl_divergence
from torch.nn import functional as F

from .registry import mine, mlp, randint, randn, step, update


class Images:
    """Images and where they end, as detectors pass them."""

    def __init__(self, tensors, mask, note="images"):
        self.tensors, self.mask, self.note = tensors, mask, note

    def decompose(self):
        return self.tensors, self.mask


class Posterior:
    def __init__(self, parameters):
        self.parameters = parameters
        self.mean, self.log_var = parameters.chunk(2, 1)
        self.deterministic = False

    def kl(self):
        return 0.5 * (self.mean.square() + self.log_var.exp() - 1 - self.log_var).sum(1)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp(3, 6, 8)

    def forward(self, images):
        tensors, mask = images.decompose()
        return {"posterior": Posterior(self.body(tensors * mask)), "seen": images}


@step(net=Encoder, local="mean")
def objects_as_inputs_and_outputs(m, o, k):
    x, mask = mine(randn(k, 7, 3), randn(k + 3, 7, 3).gt(0).to(torch.get_default_dtype()))
    out = m.net(Images(x, mask))
    posterior, seen = out["posterior"], out["seen"]
    update(o.net, posterior.kl().mean() + posterior.mean.square().mean())
    return seen.note, posterior.deterministic, len(seen.mask) == len(x)


class Policy(nn.Module):
    """One head for each kind of distribution."""

    def __init__(self):
        super().__init__()
        self.body = mlp(3, 6)
        self.heads = nn.ModuleList(nn.Linear(6, n) for n in (4, 4, 6, 4))
        self.log_std = nn.Parameter(torch.zeros(2))
        self.scale = nn.Parameter(torch.eye(2))

    def forward(self, x):
        a, b, c, d = (head(self.body(x)) for head in self.heads)
        mean, log_std = a.chunk(2, 1)
        bumps = Independent(Normal(c.view(-1, 3, 2), self.log_std.exp()), 1)
        return (
            Normal(mean, log_std.exp()),
            Categorical(logits=b),
            MixtureSameFamily(Categorical(logits=b[:, :3]), bumps),
            distributions.MultivariateNormal(d[:, :2], scale_tril=self.scale.tril()),
            distributions.TransformedDistribution(
                Independent(Normal(d[:, 2:], self.log_std.exp()), 1),
                [distributions.TanhTransform(), distributions.AffineTransform(0.0, 2.0)],
            ),
        )


@step(net=Policy, local="mean")
def distributions_as_outputs(m, o, k):
    x, points, action = mine(randn(k, 7, 3), randn(k + 1, 7, 2), randint(k, 3, 7))
    gaussian, categorical, mixture, multivariate, squashed = m.net(x)
    prior = Normal(torch.zeros_like(points), 1.0)
    terms = (
        kl_divergence(gaussian, prior).sum(1),
        -categorical.log_prob(action) - 0.1 * categorical.entropy(),
        -mixture.log_prob(points),
        -multivariate.log_prob(points),
        -squashed.log_prob(points.tanh()),
    )
    update(o.net, sum(term.mean() for term in terms))
    return multivariate.batch_shape == mixture.batch_shape == (len(x),)


@step(net=Policy)
def samples_of_distributions(m, o, k):
    torch.manual_seed(k)
    gaussian, categorical, mixture, multivariate, squashed = m.net(randn(k, 6, 3))
    drawn = gaussian.rsample(), multivariate.rsample(), squashed.rsample()
    update(o.net, sum(each.square().mean() for each in drawn))
    return drawn, categorical.sample(), mixture.sample()


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp(2, 5)

    def forward(self, prior, points):
        return self.body(prior.mean) * prior.log_prob(points).sum(1, keepdim=True)


@step(net=Decoder, local="mean")
def distributions_as_inputs(m, o, k):
    mean = randn(k, 7, 2).requires_grad_()
    own, points = mine(mean, randn(k + 1, 7, 2))
    update(o.net, m.net(Normal(own, 1.5), points).square().mean())
    return mean.grad


class Keeps(nn.Module):
    """Keeps its posterior, as variational models do for their loss."""

    def __init__(self):
        super().__init__()
        self.body = mlp(3, 4)
        self.posterior = None

    def forward(self, x):
        mean, log_std = self.body(x).chunk(2, 1)
        self.posterior = Normal(mean, log_std.exp())
        return mean


@step(net=Keeps)
def distributions_in_attributes(m, o, k):
    out = m.net(randn(k, 7, 3))
    prior = Normal(torch.zeros_like(out), 1.0)
    update(o.net, out.square().mean() + kl_divergence(m.net.posterior, prior).mean())
    return m.net.posterior.mean


class Blackboard(nn.Module):
    """Writes what it finds to what it was passed, and reads there."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, batch, trace, *, state):
        batch["hidden"] = self.first(batch.pop("x")).tanh()
        trace.append(batch["hidden"])
        trace[0] = "hidden"
        batch["nested"]["logits"] = self.second(batch["hidden"])
        state.last, state.calls = batch["hidden"], state.calls + 1
        del state.spare
        return F.cross_entropy(batch["nested"]["logits"], batch["labels"])


class State:
    def __init__(self, rows):
        self.calls, self.rows, self.spare = 3, rows, None


@step(net=Blackboard, local="mean")
def containers_that_the_forward_writes_to(m, o, k):
    x, labels = mine(randn(k, 7, 3), randint(k, 2, 7))
    batch, trace, state = {"x": x, "labels": labels, "nested": {}}, ["start"], State(x)
    loss = m.net(batch, trace, state=state)
    update(o.net, loss + batch["hidden"].square().mean() + 0.1 * trace[1].mean())
    kept = batch["labels"] is labels, state.rows is x, hasattr(state, "spare"), state.calls
    return list(batch), list(batch["nested"]), trace[0], len(trace), kept, len(state.last) == len(x)


class Cache:
    """What is kept of earlier steps in time: nothing at first."""

    def __init__(self):
        self.layers, self.calls = [], 0


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 4)

    def forward(self, x, cache):
        cache.calls += 1
        cache.layers.append(self.body(x).tanh())
        return torch.stack(cache.layers, 1).sum(1)


@step(net=Recurrent, local="mean")
def objects_that_are_empty_before_their_first_use(m, o, k):
    cache, x = Cache(), mine(randn(k, 7, 3))
    outs = [m.net(x * (i + 1), cache) for i in range(3)]
    update(o.net, sum(out.square().mean() for out in outs) + cache.layers[0].mean())
    return cache.calls, len(cache.layers), len(cache.layers[2]) == len(x)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 4)

    def forward(self, x, first, *, second):
        first.append(self.body(x))
        second.append(first[0].tanh())
        return second[-1] * len(first)


@step(net=Twice, local="mean")
def one_list_in_two_places(m, o, k):
    trace = []
    out = m.net(mine(randn(k, 7, 3)), trace, second=trace)
    update(o.net, out.square().mean() + sum(part.mean() for part in trace))
    return len(trace)


class Slotted:
    __slots__ = ("__dict__", "mean")

    def __init__(self, mean, scale):
        self.mean, self.scale = mean, scale


class Slots(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 4)

    def forward(self, given):
        return Slotted(self.body(given.mean), self.body(given.scale).exp())


@step(net=Slots, local="mean")
def objects_with_slots(m, o, k):
    out = m.net(Slotted(*mine(randn(k, 7, 3), randn(k + 1, 7, 3))))
    update(o.net, out.mean.square().mean() + out.scale.mean())
    return out.mean.shape == out.scale.shape


class Counts(nn.Module):
    def __init__(self, drop=0.0, keeps=False):
        super().__init__()
        self.body, self.drop, self.keeps = nn.Linear(3, 2), nn.Dropout(drop), keeps

    def forward(self, x):
        if self.keeps:
            self.rows = len(x)
            return self.body(x)
        return self.drop(self.body(x)), len(x)


@step(net=Counts, refused="shard")
def a_number_of_rows_is_returned(m, o, k):
    out, rows = m.net(randn(k, 12, 3))
    update(o.net, out.sum() / rows)
    return rows


@step(net=lambda: Counts(0.5), refused="shard")
def a_number_of_rows_is_returned_beside_noise(m, o, k):
    return m.net(randn(k, 12, 3))[1]


@step(net=lambda: Counts(keeps=True), refused="shard")
def a_number_of_rows_is_kept(m, o, k):
    return m.net(randn(k, 12, 3)).sum() / m.net.rows


@dataclass
class Reading:
    value: object
    weight: object = None


@dataclass(slots=True)
class Tight:
    value: object
    result: object = None


class Pair(tuple):
    """A tuple that is made of two things, not of a list of them."""

    def __new__(cls, one, two):
        return super().__new__(cls, (one, two))


class Named(NamedTuple("Named", [("one", object), ("note", str)])):
    def __new__(cls, one):
        return super().__new__(cls, one, "note")


class Unusual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 4)

    def forward(self, pair, slotted):
        out = self.a(pair[0] * pair[1])
        slotted.result = out.tanh()
        reading = Reading(out)
        reading.aside = out * 2  # no field
        return reading, Pair(out, out + 1), Named(out)


@step(net=Unusual, local="mean")
def classes_with_constructors_and_attributes_of_their_own(m, o, k):
    pair, slotted = Pair(*mine(randn(k, 7, 3), randn(k + 1, 7, 1))), Tight(mine(randn(k, 7, 2)))
    reading, outs, named = m.net(pair, slotted)
    terms = reading.value, reading.aside, *outs, named.one, slotted.result
    update(o.net, sum(term.square().mean() for term in terms))
    return type(outs) is Pair, named.note, len(slotted.result) == len(reading.aside)
