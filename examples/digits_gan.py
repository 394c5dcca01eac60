"""A GAN on scikit-learn's digits: 1,797 scanned images of 8x8 pixels.

One word chooses where the models run:

    python examples/digits_gan.py
    python examples/digits_gan.py --wrapper ThreadedCPUParallel
    python examples/digits_gan.py --wrapper DataParallel
    torchrun --nproc-per-node 2 examples/digits_gan.py --wrapper DistributedModel

An epoch is ten passes over the images. Everything is in float64, so that runs can be compared.
"""

import hashlib
import time
from functools import partial
from pathlib import Path
from typing import Any

import gan_step
import torch
from command_line import parse, run, wrapped
from gan_step import GANStep
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

from wraploop import (
    AbstractTrainingPhase,
    Callback,
    Learner,
    StepBegin,
    StepEnd,
    on,
    processes,
)
from wraploop.callbacks import Checkpoints

LATENT_SIZE = 32
LEARNING_RATE = 5e-3
PASSES_PER_EPOCH = 10
COMPARED_STEPS = 50


def make_generator(width=192):
    """Latents, shape `(B, 32)`, to images between -1 and 1, shape `(B, 1, 8, 8)`."""
    return nn.Sequential(
        nn.Linear(LATENT_SIZE, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, width, bias=False),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, 64),
        nn.Tanh(),
        nn.Unflatten(1, (1, 8, 8)),
    )


def make_critic(width=192):
    """Images, shape `(B, 1, 8, 8)`, to scores, shape `(B, 1)`."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, width),
        nn.LeakyReLU(0.2),
        nn.Linear(width, width),
        nn.LeakyReLU(0.2),
        nn.Linear(width, 1),
    )


def load_images():
    """The digits, shape `(1797, 1, 8, 8)`, between -1 and 1."""
    digits: Any = load_digits()
    return torch.tensor(digits.images, dtype=torch.float64)[:, None] / 8 - 1


def make_batches(images, batch_size):
    """Batches for an epoch, in an order drawn anew each time; the last is smaller."""
    sampler = RandomSampler(images, num_samples=PASSES_PER_EPOCH * len(images))
    return DataLoader(images, batch_size=batch_size, sampler=sampler)  # type: ignore[arg-type]


class LinearDecay(Callback):
    """Lowers the learning rates to 0 over the second half of the steps."""

    reads = ("history",)

    def __init__(self, steps):
        self.steps = steps

    @on(StepBegin, AbstractTrainingPhase)
    def lower(self, learner):
        left = 1 - learner.history[learner.phase].steps / self.steps
        for optimizer in learner.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(1, 2 * left)


class Snapshot(Callback):
    """Keeps a copy of the models as they are after so many steps."""

    reads = ("history",)

    def __init__(self, steps):
        self.steps = steps
        self.states = {}

    @on(StepEnd, AbstractTrainingPhase)
    def take(self, learner):
        if learner.history[learner.phase].steps == self.steps:
            self.states = copy_states(learner)


def copy_states(learner):
    """All parameters and buffers by name, `critic.1.weight`; the names know no wrapper."""
    return {
        f"{name}.{key}": value.detach().clone().cpu()
        for name, model in learner.models.items()
        for key, value in model.state_dict().items()
    }


def main():
    options = parse(__doc__, epochs=6, batch_size=256)
    torch.manual_seed(options.seed)
    models = {"generator": make_generator().double(), "critic": make_critic().double()}
    models = wrapped(models, options.wrapper)  # the one line

    batches = make_batches(load_images(), options.batch_size)
    snapshot = Snapshot(COMPARED_STEPS)
    learner = Learner(
        models,
        optimizer=partial(torch.optim.Adam, lr=LEARNING_RATE, betas=(0.0, 0.99)),
        data=batches,
        callbacks=[LinearDecay(options.epochs * len(batches)), snapshot],
    )
    if options.checkpoints:
        learner.callbacks.add(Checkpoints(options.checkpoints, None, every_steps=10))
    phase = GANStep(LATENT_SIZE, r1_weight=0.2)
    begun_s = time.perf_counter()
    learner.fit(options.epochs, [phase], resume="auto" if options.checkpoints else None)
    seconds = time.perf_counter() - begun_s
    save(options, learner, snapshot, seconds / options.epochs)


def save(options, learner, snapshot, seconds_per_epoch):
    """Leaves on disk what `scripts/demo` compares."""
    learner.model.generator.eval()
    with torch.no_grad():  # on every process: the generator may be spread over them
        images = learner.model.generator(torch.randn(64, LATENT_SIZE, dtype=torch.float64))
    if options.out is None or not processes.is_main_process():
        return
    steps = learner.metrics[GANStep].steps
    result = {
        "processes": processes.world_size(),
        "threads": torch.get_num_threads(),
        "seconds_per_epoch": seconds_per_epoch,
        "steps_per_epoch": len(learner.data["training"]),
        "losses": {name: list(series.values) for name, series in steps.items()},
        "states": {"early": snapshot.states, "end": copy_states(learner)},
        "images": images.cpu(),
        "step_file_sha256": hashlib.sha256(Path(gan_step.__file__).read_bytes()).hexdigest(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(result, options.out)


if __name__ == "__main__":
    run(main)
