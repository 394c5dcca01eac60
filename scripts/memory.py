"""Whether a GAN's training takes more and more memory, under each wrapper.

Each wrapper trains in a process of its own, or two under torchrun. Resident memory is read every
100 steps, and a line is fitted through the last two fifths of the readings. Its noise is twice the
standard error of the mean change from reading to reading, since memory moves in jumps.

Fails where growth with its noise is above 300 bytes a step. The smallest thing of a graph that a
step can leak is a tensor of one number, some 550 bytes, and what it keeps the allocator from giving
back. The last row keeps one a step: where its growth less its noise is not above that bound, a leak
could not have been seen, and this fails too.
A learner's record of two losses takes 32 bytes a step, and is in every row.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch.utils.data import DataLoader

from wraploop import Callback, Learner, StepEnd, on, processes, shard, wrap
from wraploop.callbacks import ProgressBar
from wraploop.gan import R1, GANTraining, GradientPenalty, Wasserstein

EVERY_STEPS = 100
PARTS = 5  # of the steps; the line goes through the last two
BOUND_BYTES = 300  # a step
KIB, MIB = 1024, 1024**2
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
CONTROL = "keeps-a-tensor"


@dataclass
class Run:
    """What the models are wrapped in, and how that is started."""

    spec: Any
    launcher: list[str] = field(default_factory=list)
    is_local: bool = False


RUNS = {
    "none": Run(None),
    "ThreadedCPUParallel": Run({"name": "ThreadedCPUParallel", "threads": 2}),
    "DataParallel": Run({"name": "DataParallel", "device_ids": ["cpu", "cpu"]}),
    "DistributedModel": Run("DistributedModel", TORCHRUN),
    "DistributedModel-local": Run(
        {"name": "DistributedModel", "batch": "local"}, TORCHRUN, is_local=True
    ),
    CONTROL: Run(None),
}


# One training, in a process of its own


class ResidentMemory(Callback):
    """Reads this process's resident memory every so many steps."""

    reads = ("history",)

    def __init__(self):
        self.process = psutil.Process()
        self.bytes = []

    @on(StepEnd, GANTraining)
    def read(self, learner):
        if learner.history[learner.phase].steps % EVERY_STEPS == 0:
            self.bytes.append(self.process.memory_info().rss)


class KeepsATensor(Callback):
    """Leaks a tensor of one number at every step."""

    reads = ("step.critic_loss",)

    def __init__(self):
        self.kept = []

    @on(StepEnd, GANTraining)
    def keep(self, learner):
        self.kept.append(learner.step.critic_loss.detach().clone())


def make_models():
    """Latents, shape `(B, 8)`, to samples, shape `(B, 32)`, to scores, shape `(B, 1)`."""
    return {
        "generator": nn.Sequential(
            nn.Linear(8, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32)
        ),
        "critic": nn.Sequential(nn.Linear(32, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1)),
    }


def train(name, steps, out):
    """Leaves this process's readings in a file in `out`."""
    torch.manual_seed(0)
    models = wrap(make_models(), RUNS[name].spec)
    samples: Any = torch.randn(EVERY_STEPS * 64 - 9, 32)  # the last batch of an epoch is uneven
    loader = DataLoader(samples, batch_size=64, shuffle=True)
    memory = ResidentMemory()
    with open(os.devnull, "w") as nowhere:
        learner = Learner(
            models,
            optimizer=partial(torch.optim.Adam, lr=1e-4, betas=(0.0, 0.9)),
            data=shard(loader) if RUNS[name].is_local else loader,
            callbacks=[ProgressBar(file=nowhere), memory],
        )
        if name == CONTROL:
            learner.callbacks.add(KeepsATensor())
        penalties = [GradientPenalty(weight=10.0), R1(weight=0.1, every_steps=16)]
        phase = GANTraining(latent_size=8, loss=Wasserstein(), penalties=penalties)
        learner.fit(steps // EVERY_STEPS, [phase])
    (out / f"{processes.rank()}.json").write_text(json.dumps(memory.bytes))


# The table


@dataclass
class Growth:
    """What a line through readings says, in bytes a step."""

    slope: float
    noise: float

    @classmethod
    def of(cls, readings):
        at = range(0, len(readings) * EVERY_STEPS, EVERY_STEPS)
        slope, _ = statistics.linear_regression(at, readings)
        changes = [after - before for before, after in pairwise(readings)]
        error = statistics.stdev(changes) / math.sqrt(len(changes)) / EVERY_STEPS
        return cls(slope, 2 * error)

    @property
    def is_bounded(self):
        return self.slope + self.noise <= BOUND_BYTES

    @property
    def is_seen(self):
        return self.slope - self.noise > BOUND_BYTES


def measure(name, steps):
    """The readings of each process of a training."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *RUNS[name].launcher, __file__]
        subprocess.run(
            [*command, f"--wrapper={name}", f"--steps={steps}", f"--train-into={folder}"],
            check=True,
            stdout=subprocess.DEVNULL,
            env={"OMP_NUM_THREADS": "1", **os.environ},
        )
        return [json.loads(path.read_text()) for path in sorted(Path(folder).iterdir())]


def print_row(name, process, *numbers):
    print(f"{name:<24}{process:>8}", *(f"{number:>19}" for number in numbers), flush=True)


def compare(names, steps):
    """Prints a row for each process; whether all are as they should be."""
    part = steps // PARTS // EVERY_STEPS
    shown = [part, 3 * part, PARTS * part]
    print_row(
        *("wrapper", "process"),
        *(f"MiB after {index * EVERY_STEPS:,}" for index in shown),
        *("KiB per 1,000 steps", "noise"),
    )
    is_fine = True
    for name in names:
        for process, readings in enumerate(measure(name, steps)):
            growth = Growth.of(readings[3 * part - 1 :])
            mib = [f"{readings[index - 1] / MIB:.2f}" for index in shown]
            kib = [f"{each * 1000 / KIB:.1f}" for each in (growth.slope, growth.noise)]
            print_row(name, process, *mib, *kib)
            is_fine &= growth.is_seen if name == CONTROL else growth.is_bounded
    return is_fine


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=5000, help="a multiple of 500")
    parser.add_argument("--wrapper", choices=RUNS, help="that one alone")
    parser.add_argument("--train-into", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps < 1 or options.steps % (PARTS * EVERY_STEPS):
        parser.error(f"--steps is a multiple of {PARTS * EVERY_STEPS}, and got {options.steps}.")
    if options.train_into:
        return train(options.wrapper, options.steps, options.train_into)
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, batches of 64 rows")
    names = [options.wrapper] if options.wrapper else list(RUNS)
    if not compare(names, options.steps):
        raise SystemExit(f"Memory grows by over {BOUND_BYTES} bytes a step, or nobody could tell.")


if __name__ == "__main__":
    main()
