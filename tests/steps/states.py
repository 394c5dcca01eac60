# type: ignore  # torch's types are wider than what a step knows
"""States that a model keeps from call to call, in attributes and in containers there."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
from torch import nn

from .registry import mine, randn, step, update


class Recurrent(nn.Module):
    """A cell, and its state wherever `state` keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(3, 4), nn.Linear(4, 2)
        self.reset()

    def forward(self, x):
        self.write(self.cell(x, self.read()))
        return self.head(self.read())


class InATuple(Recurrent):
    def reset(self):
        self.state = None

    def read(self):
        return None if self.state is None else self.state[1]

    def write(self, h):
        self.state = (h.detach().square(), h)


class InAList(Recurrent):
    """All states so far."""

    def reset(self):
        self.states = []

    def read(self):
        return self.states[-1] if self.states else None

    def write(self, h):
        self.states.append(h)


class InADict(Recurrent):
    def reset(self):
        self.state = {}

    def read(self):
        return self.state.get("h")

    def write(self, h):
        self.state["h"] = h


class Nested(Recurrent):
    def reset(self):
        self.state = {"layers": [OrderedDict(h=None)], "calls": [0]}

    def read(self):
        return self.state["layers"][0]["h"]

    def write(self, h):
        self.state["layers"][0]["h"] = h
        self.state["calls"][0] += 1


class InADefaultDict(Recurrent):
    def reset(self):
        self.states = defaultdict(lambda: deque(maxlen=2))

    def read(self):
        return self.states["h"][-1] if self.states["h"] else None

    def write(self, h):
        self.states["h"].append(h)


class InAnObjectInADict(Recurrent):
    def reset(self):
        self.state = {"layer": SimpleNamespace(h=None, calls=0)}

    def read(self):
        return self.state["layer"].h

    def write(self, h):
        self.state["layer"].h = h
        self.state["layer"].calls += 1


def _unrolled(net, kept_in):
    def run(m, o, k):
        m.net.reset()
        outs = [m.net(randn(10 * k + t, 7, 3)) for t in range(3)]
        update(o.net, sum(out.square().mean() for out in outs))
        return outs, m.net.read()

    run.__name__ = f"state_kept_in_{kept_in}"
    step(net=net)(run)


_unrolled(InATuple, "a_tuple")
_unrolled(InAList, "a_list")
_unrolled(InADict, "a_dict")
_unrolled(Nested, "containers_in_containers")
_unrolled(InADefaultDict, "a_deque_in_a_defaultdict")
_unrolled(InAnObjectInADict, "an_object_in_a_dict")


class Torchs(nn.Module):
    """Keeps the state of torch's LSTM, whose rows are along the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.state = nn.LSTM(3, 4, num_layers=2, batch_first=True), None

    def forward(self, x):
        out, self.state = self.lstm(x, self.state)
        return out


@step(net=Torchs)
def state_of_torchs_lstm_kept_and_detached(m, o, k):
    if k:
        m.net.state = tuple(s.detach() for s in m.net.state)
    out = m.net(randn(k, 7, 5, 3))
    update(o.net, out.square().mean())
    return out, *m.net.state


@step(net=Torchs)
def state_of_torchs_lstm_through_one_backward(m, o, k):
    m.net.state = None
    outs = [m.net(randn(10 * k + t, 8, 5, 3)) for t in range(3)]  # shards of as many rows as units
    update(o.net, outs[-1].square().mean())
    return outs, m.net.state


class Remembered(nn.Module):
    """Runs torch's LSTM from zeros that it makes itself, and keeps what came out."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.hidden = nn.LSTM(3, 4, batch_first=True), None

    def forward(self, x):
        self.hidden = torch.zeros(1, len(x), 4), torch.zeros(1, len(x), 4)
        out, self.hidden = self.lstm(x, self.hidden)
        return out[:, -1]


@step(net=Remembered)
def state_that_every_forward_begins_anew(m, o, k):
    out = m.net(randn(k, 7, 5, 3))
    update(o.net, out.square().mean())
    return out, *m.net.hidden


class Statistics(nn.Module):
    """Running statistics in containers, written to in place; weights in a list and in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.running = {"mean": torch.zeros(4), "calls": [torch.zeros(())]}
        self.scales = [nn.Parameter(torch.ones(4))]
        self.shifts = (torch.zeros(4, requires_grad=True),)
        self.halved = [self.a.weight.detach() / 2]

    def forward(self, x):
        h = self.a(x) * self.scales[0] + self.shifts[0]
        out = (h - self.running["mean"]) @ self.halved[0]
        if self.training:
            self.running["mean"].mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
            self.running["calls"][0] += 1
        return out


@step(net=Statistics, steps=4, local="mean")
def statistics_and_weights_in_containers(m, o, k):
    mean = m.net.running["mean"]
    out = m.net(mine(randn(k, 7, 3)))
    m.net.scales[0].grad = m.net.shifts[0].grad = None
    update(o.net, out.square().mean())
    with torch.no_grad():
        for weight in (m.net.scales[0], m.net.shifts[0]):
            weight -= 0.1 * weight.grad
    is_same = mean is m.net.running["mean"]
    return out, mean, m.net.running["calls"][0], m.net.scales[0], m.net.shifts[0], is_same


class Modules(nn.Module):
    """A list of modules and what they made, in one container that the forward adds to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.stages = [[self.a, None], [self.b, None]]

    def forward(self, x):
        for stage in self.stages:
            x = stage[0](x).tanh()
            stage[1] = x
        return x


@step(net=Modules)
def activations_beside_modules_in_a_list(m, o, k):
    out = m.net(randn(k, 7, 3))
    update(o.net, out.square().mean())
    is_own = [
        stage[0] is layer for stage, layer in zip(m.net.stages, (m.net.a, m.net.b), strict=True)
    ]
    return out, [stage[1] for stage in m.net.stages], is_own


class Alternating(nn.Module):
    """Makes what the next forward uses up."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.register_buffer("start", torch.ones(3))

    def forward(self, x):
        if hasattr(self, "start"):
            x = x + self.start
            del self.start
        h = self.a(x)
        if hasattr(self, "kept"):
            h = h + self.kept
            del self.kept
        else:
            self.kept = h
        return h


@step(net=Alternating)
def attributes_that_a_forward_deletes(m, o, k):
    outs = [m.net(randn(10 * k + t, 7, 3)) for t in range(3 if k else 2)]
    update(o.net, sum(out.square().mean() for out in outs))
    if k == 1:
        m.net.kept = m.net.kept.detach()
    return outs, sorted(name for name in ("start", "kept") if hasattr(m.net, name))


class Swapping(nn.Module):
    """Fills one of two lists in turns; and one in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.lists, self.fixed = {"new": [], "old": []}, ([], {"means": [0.0]})

    def forward(self, x):
        h = self.a(x)
        self.lists["new"], self.lists["old"] = self.lists["old"], self.lists["new"]
        self.lists["new"].append(h)
        self.fixed[0].append(h)
        self.fixed[1]["means"][0] = h.mean()
        return h


@step(net=Swapping)
def containers_that_change_places_are_those_that_the_user_holds(m, o, k):
    lists, (flat, deep) = list(m.net.lists.values()), m.net.fixed
    means = deep["means"]
    outs = [m.net(randn(10 * k + t, 7, 3)) for t in range(3)]
    update(o.net, sum(h.square().mean() for h in (*lists[0], *lists[1], *flat, *means)))
    seen = [[*lists[0]], [*lists[1]], [*flat], [*means]]
    for container in (*lists, flat):
        container.clear()
    return outs, seen, [each is m.net.lists["new"] for each in lists]


class BegunAnew(nn.Module):
    """Begins anew where the batch has another number of rows; or takes the first rows."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.h, self.long = nn.GRUCell(3, 4), None, []

    def forward(self, x):
        if self.h is None or len(self.h) != len(x):
            self.h = torch.zeros(len(x), 4)
        self.h = self.cell(x, self.h.detach())
        self.long = [self.cell(x, *(h[: len(x)].detach() for h in self.long))]
        return self.h + self.long[0]


@step(net=BegunAnew, steps=12)
def state_of_another_number_of_rows(m, o, k):
    rows = [9, 7, 7, 4, 3, 8, 4, 4, 2][k % 9]
    if rows in (9, 8):
        m.net.long = []
    out = m.net(randn(k, rows, 3))
    update(o.net, out.square().mean())
    return out, m.net.h, m.net.long


class Keyed(nn.Module):
    """Keeps states by layer and by weight; counts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.states, self.seen = {self.a: None}, {self.a.weight: [0]}
        self.counts, self.deep = Counter(), [Counter(a=1)]

    def forward(self, x):
        for layer in (self.a, self.b):
            h, before = layer(x), self.states.get(layer)
            self.states[layer] = x = (h if before is None else h + before).tanh()
            self.seen.setdefault(layer.weight, [0])[0] += 1
        self.counts["calls"] += 1
        self.deep[0]["a"] += 2
        return x


@step(net=Keyed)
def states_by_layer_and_counters(m, o, k):
    m.net.states.clear()
    outs = [m.net(randn(10 * k + t, 7, 3)) for t in range(3)]
    update(o.net, sum(out.square().mean() for out in outs))
    layers = (m.net.a, m.net.b)
    states = [m.net.states[layer] for layer in layers]
    seen = [m.net.seen[layer.weight] for layer in layers]
    return outs, states, seen, len(m.net.seen), dict(m.net.counts), dict(m.net.deep[0])


class InABuffer(nn.Module):
    """A membrane and a mean of it, both in buffers that are set anew, as snntorch has it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.register_buffer("membrane", torch.zeros(1))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        if self.membrane.shape[:1] != x.shape[:1]:
            self.membrane = torch.zeros(len(x), 4)
        self.membrane = 0.5 * self.membrane + self.layer(x)
        self.mean = 0.9 * self.mean + 0.1 * self.membrane.detach().mean(0)
        return self.membrane.tanh()


@step(net=InABuffer, steps=5)
def state_kept_in_a_buffer(m, o, k):
    m.net.membrane = m.net.membrane.detach()
    outs = [m.net(randn(10 * k + t, [7, 6, 4, 4, 9][k], 3)) for t in range(3)]
    update(o.net, sum(out.square().mean() for out in outs))
    return outs, m.net.membrane, m.net.mean


class RowsOfTheShapeBefore(nn.Module):
    """A value for each row in a buffer, which had as many as a shard has."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x):
        self.last = x.detach().mean(1)
        return self.layer(x)


@step(net=RowsOfTheShapeBefore)
def rows_in_a_buffer_of_a_shards_size(m, o, k):
    out = m.net(randn(k, 7 + k, 4))
    update(o.net, out.square().mean())
    return out, m.net.last


class MeanOfItsOwnShape(nn.Module):
    """A mean that gets its shape in the first call, of as many features as a rank has rows."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        self.mean = x.detach().mean(0)
        return self.layer(x)


@step(net=MeanOfItsOwnShape, local="mean")
def statistic_that_gets_its_shape(m, o, k):
    out = m.net(mine(randn(k, 7, 4)))
    update(o.net, out.square().mean())
    return out, m.net.mean


@step(net=InABuffer, local="mean")
def state_kept_in_a_buffer_during_a_step(m, o, k):
    outs = [m.net(mine(randn(10 * k + t, 7, 3))) for t in range(3)]
    update(o.net, sum(out.square().mean() for out in outs))
    m.net.membrane = torch.zeros(1)
    return outs, m.net.mean


class Memory(dict):
    """A dict of the user's own."""


@dataclass(slots=True)
class Cell:
    h: torch.Tensor | None = None


class Deep(Recurrent):
    """A state where copies are not followed: `where` says in what."""

    def __init__(self, where):
        self.where = where
        super().__init__()

    def reset(self):
        self.memory = Memory(h=None)
        self.cells = Cell()
        self.holder = SimpleNamespace(
            inside=SimpleNamespace(h=None), layers=[SimpleNamespace(h=None)], sums=Memory()
        )
        self.holder.sums["count"] = torch.zeros(4)

    def read(self):
        return None

    def write(self, h):
        if self.where == "in_a_sum":
            self.holder.sums["count"] += h.detach().sum(0)
        elif self.where == "in_a_dict_of_a_class":
            self.memory["h"] = h.detach()
        else:
            places = {"in_slots": self.cells, "in_an_object": self.holder.inside}
            places.get(self.where, self.holder.layers[0]).h = h.detach()
        self.last = h

    def forward(self, x):
        self.write(self.cell(x))
        return self.head(self.last)


def _too_deep(where):
    def run(m, o, k):
        update(o.net, m.net(randn(k, 7, 3)).square().mean())

    run.__name__ = f"state_too_deep_{where}"
    step(net=partial(Deep, where), refused="are not followed")(run)


for _where in ("in_a_sum", "in_a_dict_of_a_class", "in_slots", "in_an_object", "in_layers"):
    _too_deep(_where)
