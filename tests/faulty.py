"""Run by `test_kills.py` under torchrun: trains a GAN, and meets with faults on the way.

    faulty.py FOLDER [local]

`FOLDER/faults.json` lists faults; each happens once, and leaves a file when it does.
"""

import json
import os
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from wraploop import Callback, Learner, StepEnd, on, processes, shard, wrap
from wraploop.callbacks import Checkpoints, ProgressBar
from wraploop.gan import R1, GANTraining, NonSaturating

EPOCHS, STEPS_PER_EPOCH = 4, 6


class Fault(Callback):
    """Does what it is told to, once."""

    reads = ("history", "step")

    def __init__(self, folder, number, kind, rank, step, within_s=0.0):
        self.mark = folder / f"fault_{number}"
        self.kind, self.rank, self.step, self.within_s = kind, rank, step, within_s

    @on(StepEnd, GANTraining)
    def strike(self, learner):
        if self.kind == "tell":  # processes ask each other once a second, so the fit takes longer
            time.sleep(0.2)
        steps = learner.history[learner.phase].steps
        if processes.rank() != self.rank or steps != self.step or self.mark.exists():
            return
        self.mark.write_text(str(time.time()))
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.kind == "kill soon":  # during a save, say
            soon = partial(os.kill, os.getpid(), signal.SIGKILL)
            threading.Timer(self.within_s, soon).start()
        elif self.kind == "raise":
            raise ValueError("which is the first error")
        elif self.kind == "hang":
            time.sleep(1000)
        elif self.kind == "nan":
            with torch.no_grad():
                next(learner.model.critic.parameters()).fill_(torch.nan)
        # told to end, it does nothing: whoever watches for the mark sends SIGTERM now


def main():
    folder, is_local = Path(sys.argv[1]), sys.argv[2:] == ["local"]
    processes.random_state.seed(0)
    models = {
        "generator": nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6)),
        "critic": nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.ReLU(), nn.Linear(8, 1)),
    }
    options = {"batch": "local" if is_local else "global", "timeout_s": 5.0}
    models = {name: each.double() for name, each in models.items()}
    models = wrap(models, {"name": "DistributedModel", **options})
    samples = torch.randn(16 * STEPS_PER_EPOCH - 3, 6, dtype=torch.float64)
    loader = DataLoader(samples, batch_size=16, shuffle=True)  # type: ignore[arg-type]
    faults = json.loads((folder / "faults.json").read_text())
    with open(os.devnull, "w") as nowhere:
        learner = Learner(
            models,
            optimizer=partial(torch.optim.Adam, lr=1e-3),
            data=shard(loader) if is_local else loader,
            callbacks=[
                ProgressBar(file=nowhere),
                Checkpoints(folder / "checkpoints", None, every_steps=2),
                *(Fault(folder, number, **fault) for number, fault in enumerate(faults)),
            ],
        )
        phase = GANTraining(4, loss=NonSaturating(), penalties=[R1(every_steps=3)])
        learner.fit(EPOCHS, [phase], resume="auto")
    if learner.stopped:
        print("stopped:", learner.stopped.reason, flush=True)
    else:
        learner.save(folder / "end")


if __name__ == "__main__":
    main()
