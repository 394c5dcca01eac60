"""What a learner's step costs over the same step in a loop written by hand, in microseconds.

A small model, so that the loop shows. The ways take turns, an epoch each, and what is printed is
the median, over the rounds, of the difference to the loop by hand in the same round: the machine's
speed changes from minute to minute, and with it all of them. Then what importing wraploop takes
after torch, in processes of their own.
"""

from __future__ import annotations

import io
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial

import torch
from torch import nn

from wraploop import Learner
from wraploop.callbacks import ProgressBar

STEPS = 500  # in an epoch
IMPORTS = 10
SGD = partial(torch.optim.SGD, lr=1e-3)
IMPORTED = {  # names are imported when they are asked for
    "a wrapper": "from wraploop import DistributedModel",
    "the loop": "from wraploop import Learner",
    "everything": "from wraploop import *",
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(8, 1)


def by_hand(data: list[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], None]:
    net = model()
    optimizer = SGD(net.parameters())

    def epoch() -> None:
        net.train()
        for inputs, targets in data:
            outputs = net(inputs)
            loss = nn.functional.mse_loss(outputs, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return epoch


def by_learner(data: list[tuple[torch.Tensor, torch.Tensor]], default: bool) -> Callable[[], None]:
    bar = [ProgressBar(file=io.StringIO())] if default else []
    learner = Learner(
        model(),
        nn.functional.mse_loss,
        optimizer=SGD,
        data=data,
        callbacks=bar,
        default_callbacks=default,
    )
    return lambda: learner.fit(1)


def overhead(rounds: int) -> str:
    """Measures it; returns a table."""
    torch.set_num_threads(1)
    data = [(torch.randn(16, 8), torch.randn(16, 1)) for _ in range(STEPS)]
    ways = {
        "by hand": by_hand(data),
        "no callbacks": by_learner(data, default=False),
        "default callbacks": by_learner(data, default=True),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, epoch in ways.items():
            with redirect_stdout(io.StringIO()):
                begun_s = time.perf_counter()
                epoch()
                taken[name].append((time.perf_counter() - begun_s) / STEPS * 1e6)
    lines = [f"{'a step':<20}{'us':>8}{'more than by hand':>20}"]
    for name, each in taken.items():
        more = [us - hand for us, hand in zip(each, taken["by hand"], strict=True)]
        lines.append(f"{name:<20}{statistics.median(each):>8.1f}{statistics.median(more):>20.1f}")
    return "\n".join(lines)


def import_s(statement: str) -> float:
    """The median of what importing from wraploop takes after torch, files being in memory."""
    timed = f"begun_s = time.perf_counter(); {statement}; print(time.perf_counter() - begun_s)"
    command = [sys.executable, "-c", f"import time, torch; {timed}"]
    times = [
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for _ in range(IMPORTS + 1)
    ]
    return statistics.median(times[1:])
