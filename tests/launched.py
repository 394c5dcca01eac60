"""A script without a rank in it: trains a model, and prints its weights from every process."""

import json
import sys
from functools import partial

import torch
from torch import nn

from wraploop import Learner, processes, wrap
from wraploop.callbacks import ProgressBar


def main():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).double()
    model = wrap(net, "DistributedModel")
    x, y = torch.randn(14, 3).double(), torch.randn(14, 1).double()
    learner = Learner(
        model,
        nn.functional.mse_loss,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        data=[(x[:7], y[:7]), (x, y)],
    )
    learner.callbacks.remove(ProgressBar)
    learner.fit(3)
    weights = torch.cat([w.flatten() for w in model.state_dict().values()]).tolist()
    drawn = torch.rand(()).item()
    found = [processes.rank(), processes.world_size(), [*weights, drawn]]
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
