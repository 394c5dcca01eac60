"""Statistics of the whole batch, inside a module that sees one shard of it.

A mean over the batch is a sum over the shards of sums over rows, divided by the number of rows.
The variance is taken around that mean in a second sum, which loses no digits where the mean is
large against the spread.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from .shard import Shard, current, sum_over_shards

_LAST_SHARD = "_wraploop_shard"


def batch_mean(tensor: Tensor) -> Tensor:
    """The mean over the rows of the whole batch, under any wrapper and under none.

    For layers of one's own that couple rows. Differentiable to every order; equal on all shards.

    Args:
        tensor: shape `(rows, ...)`, floating or complex; inside a wrapped module, one shard's rows.

    Returns:
        Shape `(...)`.

    Examples:
        >>> batch_mean(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
        tensor([2., 4.])
    """
    total, rows = _batch_sum(tensor, [0], current())
    return total / rows


def _batch_sum(tensor: Tensor, axes: list[int], shard: Shard | None) -> tuple[Tensor, Tensor]:
    """The sum of `tensor` over `axes` and all shards, and over how many elements that was."""
    own = tensor[:0] if shard is not None and shard.rows == 0 else tensor
    total = own.sum(axes)
    count = total.new_tensor([own.numel() // max(1, total.numel())])
    if shard is None:
        return total, count[0]
    both = sum_over_shards(shard, torch.cat([total.reshape(-1), count]))
    return both[:-1].view_as(total), both[-1].detach()


class GlobalBatchNorm(_BatchNorm):
    """A batch norm that normalises with the statistics of the whole batch."""

    def forward(self, input: Tensor) -> Tensor:
        """As `torch.nn.BatchNorm2d` and its like, for the whole batch.

        Raises:
            ValueError: the batch has one value per channel.
        """
        of_this_batch = self.training or self.running_mean is None
        shard = current() or self.__dict__.get(_LAST_SHARD)  # checkpointing repeats it in backward
        if shard is None or not of_this_batch:
            return super().forward(input)
        self.__dict__[_LAST_SHARD] = shard
        self._check_input_dim(input)
        half = input.dtype in (torch.float16, torch.bfloat16)
        x = input.float() if half else input
        axes = [axis for axis in range(x.ndim) if axis != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)

        total, count = _batch_sum(x, axes, shard)
        if count <= 1:
            raise ValueError(
                "Expected more than 1 value per channel when training, got input of shape "
                f"{tuple(input.shape)} in a batch of one row."
            )
        mean = total / count
        centred = x - mean.view(shape)
        variance = _batch_sum(centred.square(), axes, shard)[0] / count
        if self.training and self.track_running_stats:
            self._track(mean.detach(), (variance * (count / (count - 1))).detach())

        out = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.weight is not None:
            out = out * self.weight.view(shape)
        if self.bias is not None:
            out = out + self.bias.view(shape)
        return out.to(input.dtype) if half else out

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.num_batches_tracked is None or self.running_mean is None:
            return
        self.num_batches_tracked.add_(1)
        step = self.momentum
        if step is None:
            step = 1.0 / float(self.num_batches_tracked)
        for running, now in ((self.running_mean, mean), (self.running_var, variance)):
            assert running is not None
            running.mul_(1 - step).add_(now.to(running.dtype), alpha=step)


@functools.cache
def global_class(cls: type[Any]) -> type[Any] | None:
    """`cls` with statistics of the whole batch, if it is a batch norm; else None."""
    if not issubclass(cls, _BatchNorm) or issubclass(cls, (SyncBatchNorm, GlobalBatchNorm)):
        return None
    # Before what `cls` inherits from torch, behind what it defines itself
    bases: Any = (cls, GlobalBatchNorm)
    return type(cls.__name__, bases, {"__module__": cls.__module__})
