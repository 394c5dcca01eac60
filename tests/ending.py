"""Trains until one of the processes fails, as the first argument says, or somebody ends them."""

import os
import sys
import time

import torch
from torch import nn

from wraploop import DistributedModel

RANK, LAST = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)) - 1


def main():
    what = sys.argv[1]
    model = DistributedModel(nn.Linear(3, 1))
    x = torch.randn(6, 3)
    model(x).sum().backward()
    sys.stdout.write(f"{os.getpid()}\n")
    sys.stdout.flush()
    for _ in range(5):
        model(x).sum().backward()
    if what == "all" or (what != "none" and RANK == LAST):
        raise KeyError("sample 17")
    if what == "busy":
        time.sleep(600)
    while True:
        model(x).sum().backward()


if __name__ == "__main__":
    main()
