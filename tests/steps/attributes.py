# type: ignore  # torch's types are wider than what a step knows
"""What models keep on themselves, and what the step sets on them."""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn import functional as F

from wraploop import batch_mean

from .registry import SGD, mine, mlp, randint, randn, step, update


class Auxiliary(nn.Module):
    """Layers append their losses to a list that the step clears."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.losses: list[torch.Tensor] = []
        self.features: dict[str, torch.Tensor] = {}
        self.stats = {"calls": 0}

    def forward(self, x):
        h = self.a(x).tanh()
        self.losses.append(h.square().mean())
        self.features["h"] = h
        self.stats["calls"] += 1
        return self.b(h)


@step(net=Auxiliary)
def losses_appended_to_a_list_and_cleared_by_the_step(m, o, k):
    m.net.losses.clear()
    a, b = m.net(randn(k, 7, 3)), m.net(randn(k + 1, 4, 3))
    assert len(m.net.losses) == 2
    update(o.net, (a.mean() - b.mean()).square() + sum(m.net.losses))
    return m.net.losses, m.net.features["h"], m.net.stats


@step(net=Auxiliary)
def list_attribute_replaced_by_the_step(m, o, k):
    m.net.losses = []
    out = m.net(randn(k, 7, 3))
    update(o.net, out.mean() + torch.stack(m.net.losses).sum() + m.net.features["h"].var(0).sum())
    return m.net.losses


class Gate(nn.Module):
    """A mixture of experts: routing by top-k, and a loss that balances the load of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(3, 4), nn.ModuleList(mlp(3, 4, 2) for _ in range(4))
        self.aux_loss: torch.Tensor | None = None

    def forward(self, x):
        gates = self.gate(x).softmax(1)
        top, index = gates.topk(2, 1)
        top = top / top.sum(1, keepdim=True)
        out = x.new_zeros(len(x), 2)
        for i, expert in enumerate(self.experts):
            row, slot = (index == i).nonzero(as_tuple=True)
            if len(row):
                out = out.index_add(0, row, top[row, slot, None] * expert(x[row]))
        load = batch_mean(F.one_hot(index[:, 0], 4).to(x.dtype))
        self.aux_loss = 4 * (load * batch_mean(gates)).sum()
        return out


@step(net=Gate)
def mixture_of_experts_with_a_balance_loss(m, o, k):
    out = m.net(randn(k, 7, 3))
    update(o.net, out.square().mean() + 0.1 * m.net.aux_loss)
    return out, m.net.aux_loss


class Settings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(3, 4)
        self.alpha, self.act, self.frozen = 0.0, "tanh", False
        self.mask = torch.ones(4)

    def forward(self, x):
        h = self.a(x) * (1 - self.alpha) + self.b(x) * self.alpha
        if getattr(self, "doubled", False):
            h = h * 2
        return getattr(torch, self.act)(h) * self.mask


@step(net=Settings)
def attributes_changed_between_steps(m, o, k):
    m.net.alpha = k / 3
    m.net.act = ("tanh", "sigmoid", "sin")[k]
    m.net.mask[k] = 0.0
    out = m.net(randn(k, 7, 3))
    m.net.mask = m.net.mask * 0.5
    update(o.net, out.square().mean())
    return out, m.net.alpha


@step(net=Settings)
def attribute_that_was_not_there_before(m, o, k):
    if k == 1:
        m.net.doubled = True
    out = m.net(randn(k, 7, 3))
    update(o.net, out.square().mean())
    return out


class Hidden(nn.Module):
    """Modules where torch does not look: lists, dicts, bound methods, partials, closures."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(3, 3) for _ in range(4))
        self.plain = [self.a, (self.b,)]
        self.by_name = {"c": self.c}
        self.bound = self.d.forward
        self.partial = functools.partial(F.linear, weight=self.a.weight)
        self.call = functools.partial(self.b.__call__)
        self.closure = lambda x: self.c(x)
        self.own = self.double

    def double(self, x):
        return self.d(x) * 2

    def forward(self, x):
        for layer in (self.plain[0], self.plain[1][0], self.by_name["c"], self.bound):
            x = layer(x).tanh()
        return self.own(self.closure(self.call(self.partial(x))))


@step(net=Hidden)
def modules_held_in_lists_partials_and_closures(m, o, k):
    x = randn(k, 7, 3).requires_grad_()
    out = m.net(x)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    update(o.net, out.square().mean() + grad.square().mean())
    return out, grad


class Caches(nn.Module):
    """Tables that are made when they are first needed, or are too short."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.register_buffer("table", None, persistent=False)
        self.mask: torch.Tensor | None = None

    def forward(self, x):
        n = x.shape[1]
        if self.table is None or len(self.table) < n:
            self.table = torch.outer(torch.arange(n), torch.tensor([1.0, 0.1])).sin()
        if self.mask is None or self.mask.shape[0] != n:
            self.mask = torch.full((n, n), -torch.inf).triu(1)
        q = self.a(x) * self.table[:n].repeat(1, 2)
        return (q @ q.mT + self.mask).softmax(-1) @ x


@step(net=Caches, steps=4)
def tables_made_when_first_needed(m, o, k):
    out = m.net(randn(k, (7, 2, 4, 7)[k], (3, 2, 4, 2)[k], 4))
    update(o.net, out.square().mean())
    return out


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.steps, self.history, self.names = 0, [], set()
        self.register_buffer("warmup", torch.tensor(0.0))

    def forward(self, x):
        if self.training:
            self.steps += 1
            self.warmup.fill_(min(1.0, self.steps / 4))
            self.history.append(self.steps)
            self.names.add(f"step{self.steps % 2}")
        return self.a(x) * self.warmup


@step(net=Counter)
def counters_and_schedules_on_the_model(m, o, k):
    out = m.net(randn(k, 7, 3))
    update(o.net, out.square().mean())
    return out, m.net.steps, m.net.history, sorted(m.net.names)


class Deep(nn.Module):
    """An attribute of a submodule of a submodule, and one that refers to its parent's."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.attention = nn.Linear(3, 3), None

        def forward(self, x):
            self.attention = self.a(x).softmax(1)
            return x + self.attention

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(Deep.Block(), nn.Tanh()) for _ in range(2)))

    def forward(self, x):
        out = self.blocks(x)
        self.maps = [block[0].attention for block in self.blocks]
        return out


@step(net=Deep)
def attention_maps_kept_by_submodules(m, o, k):
    out = m.net(randn(k, 7, 3))
    entropy = sum(-(a * a.log()).sum(1).mean() for a in m.net.maps)
    inner = m.net.blocks[1][0].attention
    update(o.net, out.square().mean() + 0.1 * entropy + inner.var())
    return m.net.maps, inner


class Norms(nn.Module):
    """Statistics kept as plain numbers and detached tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 2)
        self.last, self.moving = None, 0.0

    def forward(self, x):
        out = self.a(x)
        self.last = out.detach().square().mean()
        self.moving = 0.9 * self.moving + 0.1 * self.last
        return out


@step(net=Norms)
def detached_statistics_kept_by_the_model(m, o, k):
    out = m.net(randn(k, 7, 3))
    update(o.net, out.square().mean() / (1 + m.net.moving))
    return m.net.last, m.net.moving


class Item(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.scale = nn.Linear(3, 2), 1.0

    def forward(self, x):
        out = self.a(x)
        self.scale = 0.5 * self.scale + 0.5 * out.abs().mean().item()
        return out / self.scale


@step(net=Item, refused="scale|shards")
def number_taken_from_the_batch_by_item(m, o, k):
    update(o.net, m.net(randn(k, 7, 3)).square().mean())
    return m.net.scale


class LossNet(nn.Module):
    """A loss in the model that couples rows: no mean over the shards gives it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(3, 4, 4)

    def forward(self, x, labels):
        logits = self.body(x)
        return F.cross_entropy(logits, labels, ignore_index=-100), logits


@step(net=LossNet, refused="couples rows")
def loss_in_the_model_that_ignores_some_labels(m, o, k):
    labels = randint(k, 4, 7)
    labels[:3] = -100
    loss, logits = m.net(randn(k, 7, 3), labels)
    update(o.net, loss)
    return loss, logits


@step(net=lambda: mlp(3, 4, 2))
def modes_and_attributes_asked_of_the_model(m, o, k):
    m.net.train(k != 1)
    parameter = next(iter(m.net.parameters()))
    facts = [m.net.training, parameter.device.type, str(parameter.dtype), parameter.is_leaf]
    facts += [sum(p.numel() for p in m.net.parameters()), len(list(m.net.buffers()))]
    facts += [[n for n, _ in m.net.named_parameters()], list(m.net.state_dict())]
    m.net.to(torch.float64)
    update(o.net, m.net(randn(k, 7, 3)).square().mean())
    return facts


class Remembering(nn.Module):
    """Leaves traces of a forward in every kind of attribute, and uses those that it finds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.losses: list[torch.Tensor] = []
        self.kept: dict[str, torch.Tensor] = {}
        self.state: torch.Tensor | None = None
        self.is_later = False

    def forward(self, x):
        h = self.layer(x)
        if self.state is not None:
            h = h + self.state
        h = h * 2 if self.is_later else h
        self.state, self.is_later = h, True
        self.kept["mean"] = self.kept.get("mean", 0) + h.detach()
        self.losses.append(h.square().mean())
        return h + self.kept["mean"]


@step(net=Remembering, steps=5, local="mean")
def attributes_reset_after_each_forward(m, o, k):
    out = m.net(mine(randn(k, 7, 3)))
    update(o.net, out.square().mean() + sum(m.net.losses))
    m.net.losses.clear()
    m.net.kept.clear()
    m.net.state, m.net.is_later = None, False


class WrittenThroughData(nn.Module):
    """Writes to its buffers by ways that count no version."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("square", torch.zeros(4))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("has_begun", torch.zeros(1, dtype=torch.bool))

    def forward(self, x):
        h = self.layer(x)
        average = batch_mean(h.detach())
        self.mean.data.lerp_(average, 0.1)
        self.square.numpy()[:] = average.square().numpy()
        self.calls.data.add_(1)
        self.has_begun.data.fill_(True)
        return h * self.calls - self.mean - self.square


@step(net=WrittenThroughData, local="mean")
def buffers_written_through_data(m, o, k):
    update(o.net, m.net(mine(randn(k, 7, 3))).square().mean())


class KeysFollowing(nn.Module):
    """A key encoder that follows by moving averages in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys = nn.Linear(3, 4), nn.Linear(3, 4).requires_grad_(False)

    def forward(self, x):
        for key, query in zip(self.keys.parameters(), self.queries.parameters(), strict=True):
            key.data = 0.9 * key.data + 0.1 * query.data
        return self.queries(x) * self.keys(x)


@step(
    net=KeysFollowing, optimizers=lambda m: {"net": SGD(m.net.queries.parameters())}, local="mean"
)
def layers_given_other_data_in_forward(m, o, k):
    update(o.net, m.net(mine(randn(k, 7, 3))).square().mean())


class OnAGraph(nn.Module):
    """A graph's links in a sparse buffer, as graph networks keep them."""

    def __init__(self) -> None:
        super().__init__()
        links = torch.eye(3) + torch.eye(3).roll(1, 0)
        self.register_buffer("links", links.to_sparse())
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer((self.links @ x.T).T)


@step(net=OnAGraph, local="mean")
def sparse_buffer(m, o, k):
    out = m.net(mine(randn(k, 7, 3)))
    update(o.net, out.square().mean())


class Moody(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x) * (2 if self.training else 3)


@step(net=Moody, local="mean")
def training_flag_set_by_hand(m, o, k):
    m.net.training = k == 1
    update(o.net, m.net(mine(randn(k, 7, 3))).square().mean())
    return m.net.training, next(m.net.modules()).training


class Tables(nn.Module):
    """Keeps tables, as long as some shard by chance, beside activations."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.kept = nn.Linear(3, 4), {}

    def forward(self, x):
        for n in (2, 3, 4):
            if n not in self.kept:
                self.kept[n] = torch.arange(1.0, n + 1)
        self.kept["last"] = out = self.a(x) * self.kept[4] * self.kept[3].sum() * self.kept[2].sum()
        return out


@step(net=Tables)
def tables_and_activations_in_a_dict(m, o, k):
    out = m.net(randn(k, 7 - k, 3))
    update(o.net, out.square().mean() + m.net.kept["last"].abs().mean())
    return m.net.kept
