"""ThreadedCPUParallel: the shards of a batch in threads of this process."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from .batch import Nest, rows_of
from .call import Call
from .internals import is_transformed
from .lane_runner import LaneRunner
from .lanes import Lanes
from .tree import EXECUTION
from .tuning import Split
from .wrapper import ModelWrapper


class ThreadedCPUParallel(ModelWrapper):
    """Runs a module on the CPU with a thread for each shard of the batch, forward and backward.

    What it computes is what the module computes.

    Args:
        module: the module to run.
        threads: how many shards run at once; with "auto" the first calls are made with different
            numbers of them, and of threads inside operators, timed, and the fastest stays, plain
            torch included. As that depends on time, two runs may then differ in the order of
            summation: give a number to have the same bits on every run.
        methods: which of its methods besides forward take a batch, and run like forward.
        sync_batchnorm: whether its batch norms use the statistics of the whole batch.

    Examples:
        >>> model = ThreadedCPUParallel(nn.Linear(3, 1), threads=2)
        >>> model(torch.ones(8, 3)).shape
        torch.Size([8, 1])
    """

    threads: int | Literal["auto"]

    def __init__(
        self,
        module: nn.Module,
        threads: int | Literal["auto"] = "auto",
        *,
        methods: tuple[str, ...] = (),
        sync_batchnorm: bool = True,
    ) -> None:
        super().__init__(module, methods=methods, sync_batchnorm=sync_batchnorm)
        self._check_inside()
        if threads != "auto" and (not isinstance(threads, int) or threads < 1):
            raise ValueError(f'threads must be a positive integer or "auto"; got {threads!r}.')
        self.threads = threads

    def _is_plain(self, method: str) -> bool:
        if self.threads != "auto":
            return self.threads == 1
        runner = self.__dict__.get(EXECUTION)
        return runner is not None and runner.runs_plainly(self._modules["module"], method)

    def _run(self, call: Call) -> Nest:
        rows = rows_of(call.arguments)
        if is_transformed() or not rows:
            return call.on(self.module)
        runner = self._execution(LaneRunner)
        cores = torch.get_num_threads()
        tuner = runner.tuner(call, cores) if self.threads == "auto" else None
        split = tuner.next() if tuner else Split.even(int(self.threads), cores)
        if rows < split.lanes:
            split = Split.even(rows, cores)
        plain = tuner.plain if tuner else Split.even(1, cores)
        if split == plain and (tuner is None or tuner.chosen):
            return call.on(self.module)
        lanes = Lanes([None] * split.lanes, None, split.operator_threads)
        return runner.run(call, rows, lanes, tuner)
