"""The digit classifier with Hydra: the config says what is made, the wrapper included.

    python examples/hydra_digits.py
    python examples/hydra_digits.py wrapper=threads wrapper.threads=3
    torchrun --nproc-per-node 2 examples/hydra_digits.py wrapper=distributed
    torchrun --nproc-per-node 2 examples/hydra_digits.py wrapper=stack

`_target_` makes whatever it names: run no config that you would not run as a script. What stands in
`spec` goes to `wraploop.wrap`, which makes nothing but wrappers.
"""

import os

import hydra
import torch
from digits_classifier import load_batches
from hydra.utils import instantiate
from torch import nn

from wraploop import Learner, ValidationPhase, processes
from wraploop.callbacks import Metrics, accuracy

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Python prints what fails, not Hydra


@hydra.main(version_base="1.3", config_path="configs", config_name="digits")
def main(config):
    torch.manual_seed(config.seed)
    model = instantiate(config.wrapper)(instantiate(config.model))  # the one line

    learner = Learner(
        model,
        nn.functional.cross_entropy,
        optimizer=instantiate(config.optimizer),
        data=load_batches(config.batch_size),
        callbacks=[Metrics(accuracy)],
    )
    learner.fit(config.epochs)

    right = learner.metrics[ValidationPhase].epochs["accuracy"].last
    if processes.is_main_process():
        print(f"right on {right:.2%} of the held-out digits")


if __name__ == "__main__":
    main()
