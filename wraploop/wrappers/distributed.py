"""DistributedModel: the shards of a batch in processes, one shard each."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from wraploop import processes
from wraploop.processes.channel import Channel, numbered

from .at_step import ReduceAt, register_once
from .batch import Nest, rows_of
from .call import Call
from .internals import is_transformed
from .local_runner import LocalRunner, Reduction
from .rank_runner import RankRunner
from .same_model import broadcast, check_same_model
from .shard import current
from .tree import EXECUTION
from .wrapper import ModelWrapper


class DistributedModel(ModelWrapper):
    """Runs a module in several processes, launched with torchrun, each on its shard of the batch.

    What it computes is what the module computes: every process passes the same, whole batch and
    gets the same, whole outputs. Started with plain `python` there is one process, and it works.

    Making it joins the process group that torchrun describes (nccl for CUDA, gloo for the CPU),
    moves the module to this process's device, gives all processes rank 0's parameters and buffers,
    and puts their random states in step, so that what the step draws is the same in all.
    Values set before the first call, by an initialization or a checkpoint, are rank 0's too.

    With `batch="local"` the batch is not gathered: every process passes rows of its own (see
    `shard`), gets their outputs, and makes a loss of them; gradients are those of the mean of the
    losses, weighted by rows, which is exact for a loss that is a mean over rows. A loss that
    couples rows needs `batch="global"`. Every process then draws numbers of its own.

    Args:
        module: the module to run.
        device_ids: this process's device, in a list of one; None is `cuda:LOCAL_RANK` where there
            is CUDA, else where the module is.
        batch: whether every process passes the "global" batch, or "local" rows of its own.
        reduction: with local rows, whether the loss is a "mean" over them, or a "sum".
        process_group: the processes that share the batch; None is all of them.
        methods: which of its methods besides forward take a batch, and run like forward.
        sync_batchnorm: whether its batch norms use the statistics of the whole batch.
        timeout_s: how long to wait for another process, in seconds, before it is an error.
        reduce_dtype: what gradients are sent and added up as, `torch.bfloat16` say, or its name:
            half the bytes, and three digits instead of seven. None sends them as they are.
        reduce_at: "step" brings gradients together once, when an optimizer steps, and not in every
            "backward": for steps that only call `backward` and read no `.grad` in between, as
            clipping does.

    Raises:
        ValueError: the processes' modules differ; the message names the first difference. Or the
            module is a DistributedModel itself.

    Examples:
        >>> model = DistributedModel(nn.Linear(3, 1))
        >>> model(torch.ones(8, 3)).shape
        torch.Size([8, 1])
    """

    speaks = True
    batch: Literal["global", "local"]
    reduction: Reduction
    timeout_s: float
    reduce_dtype: torch.dtype | None
    reduce_at: ReduceAt
    _process_group: Any
    _number: int = 0

    def __init__(
        self,
        module: nn.Module,
        device_ids: Sequence[int | str | torch.device] | None = None,
        *,
        batch: Literal["global", "local"] = "global",
        reduction: Reduction = "mean",
        process_group: Any = None,
        methods: tuple[str, ...] = (),
        sync_batchnorm: bool = True,
        timeout_s: float = 300.0,
        reduce_dtype: torch.dtype | str | None = None,
        reduce_at: ReduceAt = "backward",
    ) -> None:
        super().__init__(module, methods=methods, sync_batchnorm=sync_batchnorm)
        if isinstance(module, DistributedModel):
            raise ValueError(
                "The model is a DistributedModel already: wrap it once, or its `model.module`."
            )
        if device_ids is not None and len(device_ids) != 1:
            raise ValueError(
                f"device_ids takes this process's one device, such as ['cuda:0']; got {device_ids}."
            )
        _check_choice("batch", batch, ("global", "local"))
        _check_choice("reduction", reduction, ("mean", "sum"))
        _check_choice("reduce_at", reduce_at, ("backward", "step"))
        if batch == "global" and reduction != "mean":
            raise ValueError(
                'reduction says how local losses make up the whole one: it needs batch="local".'
            )
        self.batch = batch
        self.reduction = reduction
        self.timeout_s = timeout_s
        self.reduce_dtype = _floating(reduce_dtype)
        self.reduce_at = reduce_at
        if reduce_at == "step":
            register_once()  # its first call may be made within a step, by a closure
        self._process_group = process_group
        processes.start(timeout_s)
        device = device_ids[0] if device_ids else processes.device()
        if device is not None:
            module.to(device)
        if processes.is_started() and dist.get_world_size(process_group) > 1:
            self._number = numbered(process_group)
        channel = self._channel()
        if channel is not None:
            names = "batch", "reduction", "sync_batchnorm", "reduce_dtype", "reduce_at"
            options = [f"the option {name}={getattr(self, name)!r}" for name in names]
            check_same_model(module, channel, options)
            broadcast(module, channel)
            if batch == "global":
                processes.align_random_state(channel)
            else:
                processes.part_random_states(channel)

    def _channel(self) -> Channel | None:
        """The way to the other processes; None if there are none."""
        if not processes.is_started():
            return None
        channel = Channel(self._process_group, self.timeout_s, self._number)
        return channel if channel.world_size > 1 else None

    def _make_runner(self, module: nn.Module, sync_batchnorm: bool) -> RankRunner | LocalRunner:
        channel = self._channel()
        if channel is None:
            raise RuntimeError(_OUTSIDE.format(processes.rank()))
        if self.batch == "global":
            return RankRunner(module, sync_batchnorm, channel, self.reduce_dtype, self.reduce_at)
        return LocalRunner(
            *(module, sync_batchnorm, channel, self.reduction),
            *(self.reduce_dtype, self.reduce_at),
        )

    def _run(self, call: Call) -> Nest:
        shard = current()
        if shard is not None and shard.is_of_rank:  # of another, which this one is inside
            return call.on(self.module)
        runner = self._runner()
        rows = rows_of(call.arguments)
        if runner is None and self.batch == "local" and self.module.training:
            _check_not_left_alone()
        if isinstance(runner, LocalRunner):
            if is_transformed():
                raise NotImplementedError(_TRANSFORMED)
            return runner.run(call, rows)
        if is_transformed() or not rows or runner is None:
            return call.on(self.module)  # in every process the same, and the whole
        return runner.run(call, rows)

    def _runner(self) -> RankRunner | LocalRunner | None:
        """What runs the module; None where there are no other processes."""
        if not processes.is_started() or dist.get_world_size(self._process_group) == 1:
            return None
        runner = self._execution(self._make_runner)
        if not runner.channel.is_open():  # another process group has been started since
            del self.__dict__[EXECUTION]
            runner = self._execution(self._make_runner)
        return runner

    def __deepcopy__(self, memo: dict[int, Any]) -> DistributedModel:
        """A copy that speaks with the same processes: a process group cannot be copied."""
        memo[id(self._process_group)] = self._process_group
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """A block in which gradients stay each process's own, with `batch="local"`.

        The first backward after it sends what has been accumulated. Forward and backward belong in
        the block, as with torch's DistributedDataParallel.
        """
        runner = self._runner()
        with runner.no_sync() if isinstance(runner, LocalRunner) else nullcontext():
            yield


_TRANSFORMED = (
    "A model with batch='local' was traced or transformed (torch.compile, torch.func, forward AD), "
    "where gradients cannot be brought together. Compile the module inside the wrapper, or use "
    "batch='global'."
)


def _check_not_left_alone() -> None:
    """Checks that this process trains with the others that the launcher has started, if any.

    Raises:
        RuntimeError: it would train alone, on rows that are a part of the batch.
    """
    launched = processes.launched()
    if launched > 1 and not processes.is_started() and torch.is_grad_enabled():
        raise RuntimeError(_ALONE.format(processes.rank(), launched))


_OUTSIDE = (
    "A model was called in process {}, which is not in the model's process_group. Call it in the "
    "group's processes alone, or `model.module` here."
)

_ALONE = (
    "A model with batch='local' was called in training in process {} of {}, which is in no process "
    "group: it would learn from its own rows alone. Making a DistributedModel joins the group, "
    "loading one does not: call `wraploop.processes.start()` before, or `eval()` the model."
)


def _check_choice(name: str, given: str, choices: Sequence[str]) -> None:
    if given not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {given!r}.")


def _floating(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if found is None or (isinstance(found, torch.dtype) and found.is_floating_point):
        return found
    raise ValueError(f'reduce_dtype must be a floating dtype, such as "bfloat16"; got {dtype!r}.')
