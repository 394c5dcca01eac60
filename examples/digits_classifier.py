"""A classifier of scikit-learn's digits, at least 97 % right on digits it has not seen.

One word chooses where the model runs:

    python examples/digits_classifier.py
    python examples/digits_classifier.py --wrapper ThreadedCPUParallel
    python examples/digits_classifier.py --wrapper DataParallel
    torchrun --nproc-per-node 2 examples/digits_classifier.py --wrapper DistributedModel

Killed and started again with `--checkpoints FOLDER`, it goes on where it was.
"""

from functools import partial
from typing import Any

import torch
from command_line import parse, run, wrapped
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from wraploop import Learner, ValidationPhase, processes
from wraploop.callbacks import Checkpoints, Metrics, accuracy


def make_classifier(width=32):
    """Images, shape `(B, 1, 8, 8)`, to scores of the ten digits, shape `(B, 10)`."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * 16, 10),
    )


def load_batches(batch_size):
    """Batches of images and digits: three quarters to train on, the rest held out."""
    digits: Any = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    rows = train_test_split(range(len(images)), stratify=digits.target, random_state=0)
    training, held_out = (TensorDataset(images[r], torch.tensor(digits.target)[r]) for r in rows)
    return (
        DataLoader(training, batch_size, shuffle=True),
        DataLoader(held_out, batch_size),
    )


def main():
    options = parse(__doc__, epochs=10, batch_size=64)
    torch.manual_seed(options.seed)
    model = wrapped(make_classifier(), options.wrapper)  # the one line

    learner = Learner(
        model,
        nn.functional.cross_entropy,
        optimizer=partial(torch.optim.Adam, lr=2e-3),
        data=load_batches(options.batch_size),
        callbacks=[Metrics(accuracy)],
    )
    if options.checkpoints:
        learner.callbacks.add(Checkpoints(options.checkpoints, every_steps=10, keep_top_k=1))
    learner.fit(options.epochs, resume="auto" if options.checkpoints else None)

    right = learner.metrics[ValidationPhase].epochs["accuracy"].last
    if processes.is_main_process():
        print(f"right on {right:.2%} of the held-out digits")
        if options.out:
            torch.save({"accuracy": right, "state": model.state_dict()}, options.out)


if __name__ == "__main__":
    run(main)
