"""Run by `test_faults.py` in two processes: each fault in turn, and what each rank gets.

In three processes: what is wrong on two of them.
"""

import os
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from wraploop import DistributedModel, processes

RANK = int(os.environ.get("RANK", 0))


class Flagged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor, is_bent: bool = False) -> torch.Tensor:
        return self.layer(x).relu() if is_bent else self.layer(x)


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.register_buffer("last", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = self.layer(x)
        return self.last


class Refusing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if RANK == 1:
            raise KeyError("refused")
        return self.layer(x)


class Returning(nn.Module):
    def __init__(self, returns: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.returns = returns

    def forward(self, x: torch.Tensor) -> Any:
        return self.returns(self.layer(x))


class Keeping(nn.Module):
    """Keeps its outputs under a name that is another on each rank."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.kept: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.rand(1)  # so that nothing is compared with the whole batch
        out = self.layer(x)
        self.kept[f"of rank {RANK}"] = 2 * out
        return out


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor, of: str | dict[str, torch.Tensor]) -> torch.Tensor:
        weights = {of: torch.ones(1)} if isinstance(of, str) else of
        out = self.layer(x)
        return torch.stack([getattr(out, n)() * weights[n] for n in sorted(weights)]).sum(0)


def in_another_order(out: torch.Tensor) -> dict[str, torch.Tensor]:
    """As of names that stand in a set, which has another order in each process."""
    torch.rand(1)  # so that nothing is compared with the whole batch
    return {name: out if name == "a" else -out for name in sorted("ab", reverse=RANK == 1)}


def attempt(name: str, run: Callable[[], Any]) -> None:
    begun = time.monotonic()
    try:
        run()
        got = "nothing"
    except Exception as error:
        got = f"{type(error).__name__} {' '.join(str(error).split())}"
    line = f"{RANK}|{name}|{time.monotonic() - begun:.1f}|{got}\n"
    os.write(1, line.encode())  # at once, so that ranks' lines do not mix


def main() -> None:
    norm = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    model = DistributedModel(norm, timeout_s=3)
    x = torch.randn(6, 3)

    def change_a_whole_one() -> None:
        for _ in range(2):  # of the values before the first call rank 0's are meant
            whole(x)
        with torch.no_grad():
            next(whole.parameters()).add_(RANK)
        whole(x)

    def flag_one() -> None:
        for k in range(3):  # the third call is not looked at
            flagged(x, k == 2 and RANK == 1)

    def change_between_looks() -> None:
        for k in range(8 + 2):  # the 8th call is looked at, and of two parameters each is compared
            late(x)
            with torch.no_grad():
                late.weight.add_(RANK if k == 7 else 1)

    def train_and_evaluate(model: DistributedModel) -> None:
        model.train(RANK == 0)
        try:
            model(x + RANK if model is local else x)
        finally:
            model.train()

    def go_on_without_backward() -> None:
        out = model(x).sum()
        out.backward() if RANK == 0 else model(x)

    def name_one() -> None:
        for k in range(3):  # the third call is not looked at
            named(x, "relu" if k == 2 and RANK == 1 else "tanh")

    def pass_in_another_order() -> None:
        weights = {name: torch.ones(6, 1) for name in ("abs", "tanh")}
        keys = sorted(weights, reverse=RANK == 1)  # as sets of strings have another in each process
        named_all(x, {key: weights[key] for key in keys})

    refusing = DistributedModel(Refusing())
    whole = DistributedModel(nn.Linear(3, 1), timeout_s=3)
    flagged = DistributedModel(Flagged(), timeout_s=3)
    counting = DistributedModel(Returning(lambda x: (x, len(x))), timeout_s=3)
    listing = DistributedModel(Returning(lambda x: (x, [0] * 900 + [len(x)])), timeout_s=3)
    keyed = DistributedModel(Returning(in_another_order), timeout_s=3)
    keeping = DistributedModel(Keeping(), timeout_s=3)
    named = DistributedModel(Named(), timeout_s=3)
    named_all = DistributedModel(Named(), timeout_s=3)
    sparse = DistributedModel(Returning(torch.Tensor.to_sparse), timeout_s=3)
    late = DistributedModel(nn.Linear(3, 1), timeout_s=3)
    coarse = DistributedModel(nn.Linear(3, 1), timeout_s=3)
    large = DistributedModel(nn.Linear(2000, 3), timeout_s=3)
    local = DistributedModel(nn.Linear(3, 1), batch="local", timeout_s=3)

    def draw_the_same() -> None:
        before = torch.get_rng_state()
        torch.manual_seed(0)
        try:
            local(x + RANK + torch.rand(1))
        finally:
            torch.set_rng_state(before)

    def change_on_one() -> None:
        with torch.no_grad():
            for parameter in local.parameters():
                parameter.add_(RANK)
        try:
            local(x + RANK)
        finally:
            with torch.no_grad():
                for parameter in local.parameters():
                    parameter.sub_(RANK)

    def leave_a_step_out() -> None:
        model = DistributedModel(nn.Linear(3, 1), batch="local", timeout_s=3)
        sgd = torch.optim.SGD(model.parameters(), lr=1e-5)  # changes the fifth digit
        for k in range(3):
            sgd.zero_grad()
            model(x + RANK).mean().backward()
            if k + RANK != 1:
                sgd.step()

    def change_one_row() -> None:
        for k in range(40):  # six thousand numbers, of which each turn looks at others
            large(torch.ones(6, 2000))
            if k == 1:
                with torch.no_grad():
                    large.weight[1].mul_(1 + 1e-4 * RANK)

    def make_coarser_on_one() -> None:
        for k in range(4):
            if k == 1 and RANK:
                coarse.half()
            coarse(x.to(coarse.weight.dtype))

    def round_otherwise() -> None:
        """On rank 1, as another processor may: the last digits go up or down in each step."""
        draw = torch.Generator().manual_seed(0)
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            net = nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 1)).to(dtype)
            model = DistributedModel(net, timeout_s=3)
            adam = torch.optim.Adam(model.parameters(), lr=1e-2)
            for k in range(200):
                adam.zero_grad()
                model((x + k % 7).to(dtype)).square().mean().backward()
                adam.step()
                with torch.no_grad():
                    for p in net.parameters() if RANK else ():
                        to = torch.rand(p.shape, generator=draw).sub(0.5).sign() * torch.inf
                        p.copy_(torch.nextafter(p, to.to(dtype)))
            sums = processes.gather(sum(float(p.double().sum()) for p in net.parameters()))
            assert len(set(sums)) == 2, sums

    def freeze_on_one(model: nn.Module, layer: nn.Module, rows: torch.Tensor) -> None:
        layer.requires_grad_(RANK == 0)
        try:
            model(rows).sum().backward()
        finally:
            layer.requires_grad_()

    def create_graph_on_one(model: nn.Module, rows: torch.Tensor) -> None:
        loss = model(rows).square().sum()
        torch.autograd.grad(loss, [*model.parameters()], create_graph=RANK == 1)

    def evaluate_alone() -> None:
        """A model that sets a buffer anew."""
        model = DistributedModel(Remembering(), batch="local", timeout_s=3)
        if RANK:
            model.eval()
            with torch.no_grad():
                model(x)
            model.train()
            model.module.last = torch.zeros(1)
        for k in range(4):
            model(x + RANK + k).mean().backward()

    def average_statistics() -> None:
        """Of batch norms that normalise apart, with two forwards before a backward."""
        norm = nn.BatchNorm1d(3)
        batches: list[Literal["local", "global"]] = ["local", "global"]
        for batch in batches:
            apart = DistributedModel(norm, batch=batch, sync_batchnorm=False, timeout_s=3)
            for _ in range(2):
                rows = torch.randn(6, 3) + (RANK if batch == "local" else 0)
                (apart(rows) * apart(2 * rows)).sum().backward()
                assert norm.running_mean is not None
                every = processes.sum(norm.running_mean.double().sum().item())
                assert abs(every / 2 - norm.running_mean.double().sum().item()) < 1e-6

    def load_on_one(norm: nn.Module, rows: torch.Tensor) -> None:
        for k in range(4):  # of four parameters and buffers each is compared
            norm(rows + k)
            if k == 0:
                norm.get_buffer("running_mean").add_(RANK)

    norms = {
        batch: DistributedModel(nn.BatchNorm1d(3), batch=batch, timeout_s=3)
        for batch in ("global", "local")
    }
    deep = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    deep_local = DistributedModel(deep, batch="local", timeout_s=3)

    layers = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    late_sum = DistributedModel(layers, batch="local", reduce_at="step", timeout_s=3)
    optimizers = [torch.optim.SGD(layer.parameters(), lr=1e-3) for layer in layers]

    def step_in_another_order() -> None:
        late_sum(x + RANK).mean().backward()
        for optimizer in optimizers if RANK else optimizers[::-1]:
            optimizer.step()

    def change_a_layer(model: DistributedModel, to: nn.Module, rows: torch.Tensor) -> None:
        net = model.module
        assert isinstance(net, nn.Sequential)
        for k in range(6):  # the fifth call is not looked at
            if k == 4 and RANK:
                net[1] = to
            model(rows).square().sum().backward()

    shapes = {
        batch: DistributedModel(
            nn.Sequential(nn.Linear(3, 3), nn.LeakyReLU()), batch=batch, timeout_s=3
        )
        for batch in ("global", "local")
    }

    twins = [DistributedModel(nn.Linear(3, 1), batch="local", timeout_s=3) for _ in range(2)]

    def call_in_a_fork() -> None:
        out, end = os.pipe()
        if child := os.fork():
            os.waitpid(child, 0)
            raise ChildProcessError(os.read(out, 10_000).decode())
        try:
            local(x)
        except Exception as error:
            os.write(end, str(error).encode())
        finally:
            os._exit(0)

    faults: dict[str, Callable[[], Any]] = {
        "another batch": lambda: model(x + RANK),
        "another flag": flag_one,
        "another shape": lambda: model(torch.randn(6, 3 + 2 * RANK)),
        "another mode": lambda: train_and_evaluate(model),
        "another mode, own rows": lambda: train_and_evaluate(local),
        "another loss": lambda: (model(x) * (RANK + 1)).sum().backward(),
        "no backward": go_on_without_backward,
        "an error in forward": lambda: refusing(x),
        "another exchange": lambda: model(x) if RANK else processes.sum(1.0),
        "another exchange, own rows": lambda: local(x + RANK) if RANK else processes.sum(1.0),
        "another sum": lambda: processes.any(True, f"whether {RANK} has ended"),
        "another value returned": lambda: counting(x[:5]),
        "another of many values": lambda: listing(x[:5]),
        "another order of outputs": lambda: keyed(x),
        "another attribute": lambda: keeping(x),
        "another name": name_one,
        "another order of inputs": pass_in_another_order,
        "a fork": call_in_a_fork,
        "a sparse output": lambda: sparse(x),
        "the same rows": lambda: local(x),
        "the same noise": draw_the_same,
        "another parameter": change_on_one,
        "another parameter, whole batch": change_a_whole_one,
        "another parameter, between looks": change_between_looks,
        "a step left out": leave_a_step_out,
        "another row": change_one_row,
        "another buffer": lambda: load_on_one(norms["global"], x),
        "another buffer, own rows": lambda: load_on_one(norms["local"], x + RANK),
        "another frozen": lambda: freeze_on_one(model, norm[0], x),
        "another frozen, own rows": lambda: freeze_on_one(deep_local, deep[0], x + RANK),
        "another layer": lambda: change_a_layer(shapes["global"], nn.GELU(), x),
        "another layer, own rows": lambda: change_a_layer(
            shapes["local"], nn.LeakyReLU(0.2), x + RANK
        ),
        "another order of steps": step_in_another_order,
        "another of two models": lambda: twins[RANK](x + RANK),
        "another graph": lambda: create_graph_on_one(model, x),
        "another graph, own rows": lambda: create_graph_on_one(deep_local, x + RANK),
        "wrapped twice": lambda: DistributedModel(model),
        "another dtype": make_coarser_on_one,
        "another option": lambda: DistributedModel(
            nn.Linear(3, 1), batch="local", reduction=("mean", "sum")[RANK]
        ),
        "another model": lambda: DistributedModel(nn.Linear(3 + RANK, 1)),
        "another dropout": lambda: DistributedModel(nn.Dropout(0.1 * RANK)),
    }
    for name, fault in faults.items():
        attempt(name, fault)
        attempt(f"after {name}", lambda: model(x).sum().backward())
        attempt(f"after {name}, own rows", lambda: local(x + RANK).sum().backward())
    attempt("statistics apart", average_statistics)
    attempt("other rounding", round_otherwise)
    attempt("an evaluation alone", evaluate_alone)
    attempt("a device of its own", lambda: flagged(x, f"cuda:{RANK}"))
    apart = DistributedModel(nn.Linear(3, 1), process_group=dist.new_group(), timeout_s=3)
    attempt("no coming", lambda: apart(x) if RANK == 0 else time.sleep(5))
    attempt("no adding up", lambda: (time.sleep(3 * RANK), processes.sum(1.0)))
    if RANK:
        raise ValueError("which ends the script")
    attempt("an end", lambda: model(x))


def of_three() -> None:
    local = DistributedModel(nn.Linear(3, 1), batch="local", timeout_s=3)
    x = torch.randn(4, 3)
    same = torch.arange(12.0).view(4, 3)
    attempt("no rows, and the same", lambda: local(same[: 4 * (RANK > 0)]))
    attempt("after no rows", lambda: local(x + RANK).sum().backward())
    DistributedModel(nn.Linear(3, 1), timeout_s=3)
    attempt("in step again", lambda: local(torch.randn(4, 3)))
    attempt("and drew", lambda: (torch.rand(1), local(x + RANK)))


if __name__ == "__main__":
    main() if int(os.environ["WORLD_SIZE"]) == 2 else of_three()
