"""Run by `test_reducing.py` in two processes: steps with other ways to reduce, and with none."""

import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from wraploop import DistributedModel
from wraploop.processes import Channel

RANK = int(os.environ.get("RANK", 0))
STEPS = 4
Nets = dict[str, nn.Module]
Optimizers = dict[str, torch.optim.Optimizer]


def net() -> nn.Module:
    layers = nn.Linear(4, 80), nn.Tanh(), nn.Linear(80, 60), nn.Tanh(), nn.Linear(60, 4)
    return nn.Sequential(*layers).double()


def plain(nets: Nets, optimizers: Optimizers, x: Tensor) -> None:
    (nets["a"](x) ** 2).mean().backward()
    optimizers["a"].step()


def two_backwards(nets: Nets, optimizers: Optimizers, x: Tensor) -> None:
    (nets["a"](x) ** 2).mean().backward()
    nets["a"](x).sin().mean().backward()
    optimizers["a"].step()


def gan(nets: Nets, optimizers: Optimizers, x: Tensor) -> None:
    fake = nets["a"](x)
    F.softplus(-nets["b"](x)).mean().backward()
    F.softplus(nets["b"](fake.detach())).mean().backward()
    optimizers["b"].step()
    F.softplus(-nets["b"](fake)).mean().backward()
    optimizers["a"].step()
    nets["b"].zero_grad()


def closure(nets: Nets, optimizers: Optimizers, x: Tensor) -> None:
    def loss() -> Tensor:
        found = (nets["a"](x) ** 2).mean()
        found.backward()
        return found

    optimizers["a"].step(loss)  # pyright: ignore[reportCallIssue, reportArgumentType]


def derivatives_asked_for(nets: Nets, optimizers: Optimizers, x: Tensor) -> None:
    loss = (nets["a"](x) ** 2).mean()
    asked = torch.autograd.grad(loss, list(nets["a"].parameters()), create_graph=True)
    (loss + sum((one**2).sum() for one in asked)).backward()
    found = torch.autograd.grad(nets["b"](x).sin().mean(), list(nets["b"].parameters()))
    for parameter, one in zip(nets["b"].parameters(), found, strict=True):
        parameter.grad = one
    optimizers["a"].step()
    optimizers["b"].step()


def trained(step: Callable[..., None], local: bool, **options: Any) -> tuple[list[Tensor], int]:
    """The parameters after some steps, and how often gradients were brought together."""
    torch.manual_seed(0)
    nets: Nets = {"a": net(), "b": net()}
    if "plain" not in options:
        batch = "local" if local else "global"
        nets = {k: DistributedModel(n, batch=batch, **options) for k, n in nets.items()}
    optimizers: Optimizers = {k: torch.optim.Adam(n.parameters()) for k, n in nets.items()}
    data = [torch.linspace(i, i + 1, 28).view(7, 4).double().cos() for i in range(STEPS)]
    reductions.clear()
    for x in data:
        own = x.tensor_split(2)[RANK] if local and "plain" not in options else x
        step(nets, optimizers, own)
        for optimizer in optimizers.values():
            optimizer.zero_grad()
    return [p.detach().clone() for n in nets.values() for p in n.parameters()], len(reductions)


reductions: list[str] = []


def main(out: Path) -> None:
    speak = Channel.exchange

    def exchange(self: Channel, doing: str, *payload: Any) -> list[Tensor]:
        if doing.startswith(("the gradients of the parameters", "what backwards have left")):
            reductions.append(doing)
        return speak(self, doing, *payload)

    Channel.exchange = exchange
    lines = []
    for step in (plain, two_backwards, closure, gan, derivatives_asked_for):
        for local in (False, True):
            if local and step is derivatives_asked_for:
                continue
            expected, _ = trained(step, local, plain=True)
            _, often = trained(step, local)
            for options in ({"reduce_at": "step"}, {"reduce_dtype": "bfloat16"}):
                got, times = trained(step, local, **options)
                off = max(float((a - b).abs().max()) for a, b in zip(expected, got, strict=True))
                alike = all(same_on_all(parameter) for parameter in got)
                name = f"{step.__name__}, {'local' if local else 'global'}, {next(iter(options))}"
                lines.append(f"{name}|{off}|{times}|{often}|{alike}")
    copy.deepcopy(DistributedModel(net(), reduce_at="step", process_group=dist.new_group()))(
        torch.ones(2, 4).double()
    )
    (out / str(RANK)).write_text("\n".join(lines))


def same_on_all(parameter: Tensor) -> bool:
    everyone = [torch.empty_like(parameter) for _ in range(2)]
    dist.all_gather(everyone, parameter)
    return everyone[0].equal(everyone[1])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
