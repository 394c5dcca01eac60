"""Statistics of the whole batch, inside a module that sees one shard of it.

Of N_i values per channel in each shard, with the mean m_i and the squared distances from it in all
q_i, the whole batch's mean and variance are

    m = sum(N_i m_i) / N        v = sum(q_i + N_i (m_i - m)^2) / N

so one move does for both, and loses no digits where a mean is large against the spread (Chan,
Golub, LeVeque, 1979). With n = (x - m) / sqrt(v + eps), and g what the derivative with respect to n
is, that with respect to x is

    (g - sum(g) / N - n sum(g n) / N) / sqrt(v + eps)

with sums over all shards: one more move for both. It is a line in x for each channel, and what
torch has for batch norms of fixed statistics does the work, in few passes. Derivatives of higher
order are those of the formulas, written out.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from .internals import batch_norm_sums, is_transformed, not_compiled
from .shard import Shard, current, sum_over_shards

_LAST = "_wraploop_last"
_TRANSFORMED = (
    "A transform of torch.func, or forward-mode differentiation, goes over a batch norm inside a "
    "wrapped module, where what the other shards have cannot be transformed. Transform a call of "
    "the wrapped model as a whole, or wrap it with sync_batchnorm=False."
)


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


class _Last:
    """The shard that a batch norm has last seen: checkpointing repeats a forward in backward."""

    shard: Shard | None = None


class GlobalBatchNorm(_BatchNorm):
    """A batch norm that normalises with the statistics of the whole batch."""

    def begin(self) -> None:
        """Makes one ready that was not made by its class."""
        self.__dict__[_LAST] = _Last()

    def forward(self, input: Tensor) -> Tensor:
        """As `torch.nn.BatchNorm2d` and its like, for the whole batch.

        Raises:
            ValueError: the batch has one value per channel.
            NotImplementedError: a transform of torch.func goes over it.
        """
        of_this_batch = self.training or self.running_mean is None
        last: _Last = self.__dict__[_LAST]
        shard = current() or last.shard
        if shard is None or not of_this_batch:
            return super().forward(input)
        last.shard = shard
        transformed = is_transformed()
        if transformed and not torch.compiler.is_compiling():
            raise NotImplementedError(_TRANSFORMED)
        self._check_input_dim(input)
        half = input.dtype in (torch.float16, torch.bfloat16)
        given = input, self.weight, self.bias
        x, weight, bias = (t.float() if half and t is not None else t for t in given)
        whole = _statistics(x, shard)
        if whole.number == 1:
            raise ValueError(
                "Expected more than 1 value per channel when training, got input of shape "
                f"{tuple(input.shape)} in a batch of one row."
            )
        if self.training and self.track_running_stats:
            self._track(whole)
        if shard.is_whole:  # not with its buffers: torch's kernel writes to them unseen
            out = batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        elif transformed:
            out = _normalised(x, weight, bias, shard, self.eps)
        else:
            out = _Normalise.apply(x, weight, bias, shard, self.eps, whole)
        return out.to(input.dtype) if half else out

    def _track(self, whole: _Statistics) -> None:
        if self.num_batches_tracked is None or self.running_mean is None:
            return
        self.num_batches_tracked.add_(1)
        if not whole.number:
            return
        step = self.momentum
        if step is None:
            step = 1.0 / float(self.num_batches_tracked)
        unbiased = whole.variance * (whole.number / (whole.number - 1))
        for running, now in ((self.running_mean, whole.mean), (self.running_var, unbiased)):
            assert running is not None
            running.mul_(1 - step).add_(now.to(running.dtype), alpha=step)  # as torch, with inf too


def _axes(x: Tensor) -> list[int]:
    """All but the channels'."""
    return [axis for axis in range(x.ndim) if axis != 1]


def _channels(x: Tensor) -> list[int]:
    """The shape of a number for each channel, beside `x`."""
    return [1, -1] + [1] * (x.ndim - 2)


class _Statistics(NamedTuple):
    """Of the whole batch, for each channel.

    Attributes:
        mean: shape `(C,)`.
        variance: the biased one, shape `(C,)`.
        number: of how many values.
    """

    mean: Tensor
    variance: Tensor
    number: float


@not_compiled
@torch.no_grad()
def _statistics(x: Tensor, shard: Shard) -> _Statistics:
    own = x if shard.rows else x[:0]
    channels, number = x.shape[1], own.numel() // x.shape[1]
    mean = own.sum(_axes(x)) / max(1, number)
    around = (own - mean.view(_channels(x))).square_().sum(_axes(x))
    each = shard.everyones(_joined(mean, around, [number])[None])
    means, arounds, numbers = each[:, :channels], each[:, channels:-1], each[:, -1:]
    with np.errstate(all="ignore"):  # what is NaN shows in what becomes of it, as in torch
        count = numbers.sum()
        m = (numbers * means).sum(0) / count
        v = (arounds + numbers * (means - m) ** 2).sum(0) / count
    mean, variance = _tensors([m, v], x)
    return _Statistics(mean, variance, float(count))


def _joined(*vectors: Tensor | list[int]) -> np.ndarray:
    """One row of numbers, whose operators are quicker on so few."""
    arrays = [v.cpu().numpy() if isinstance(v, Tensor) else v for v in vectors]
    return np.concatenate(arrays, dtype=np.float64)


def _tensors(vectors: list[np.ndarray] | np.ndarray, like: Tensor) -> Iterable[Tensor]:
    return torch.from_numpy(np.asarray(vectors)).to(like).unbind()


def _normalised(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shard: Shard, eps: float
) -> Tensor:
    """The batch norm of all shards, differentiable to every order."""
    total, count = _batch_sum(x, _axes(x), shard)
    centred = x - (total / count).view(_channels(x))
    variance = _batch_sum(centred.square(), _axes(x), shard)[0] / count
    out = centred * torch.rsqrt(variance + eps).view(_channels(x))
    out = out if weight is None else out * weight.view(_channels(x))
    return out if bias is None else out + bias.view(_channels(x))


class _Normalise(Function):
    """As `_normalised`, in fewer passes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        shard: Shard,
        eps: float,
        whole: _Statistics,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.shard, ctx.eps, ctx.whole = shard, eps, whole
        return batch_norm(x, whole.mean, whole.variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = _written_out(ctx, *grads) if torch.is_grad_enabled() else _at_once(ctx, *grads)
        pairs = zip(found, ctx.needs_input_grad, strict=False)
        return *(grad if needed else None for grad, needed in pairs), *[None] * 3


def _written_out(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """The derivatives, differentiable themselves."""
    given = ctx.saved_tensors
    asked = [i for i, needed in enumerate(ctx.needs_input_grad[:3]) if needed]
    x, weight, bias = given
    out = _normalised(x, weight, bias, ctx.shard, ctx.eps)
    derivatives = torch.autograd.grad(out, [given[i] for i in asked], grad, create_graph=True)
    found: list[Tensor | None] = [None] * 3
    for i, derivative in zip(asked, derivatives, strict=True):
        found[i] = derivative
    return found


def _at_once(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The derivatives."""
    x, weight, _ = ctx.saved_tensors
    mean, variance, number = ctx.whole
    with_n, alone = batch_norm_sums(grad, x, mean, variance, ctx.eps)
    sums = _sum_of_derivatives(ctx.shard, _joined(with_n, alone)).reshape(2, -1)
    scale = torch.rsqrt(variance + ctx.eps)
    scale = scale if weight is None else scale * weight
    if ctx.shard.rows == 0:  # a borrowed row, which is in no sum
        return grad * scale.view(_channels(x)), with_n, alone
    slope, height = (scale * part for part in _tensors(sums * (-1 / max(1.0, number)), x))
    found = batch_norm(x, mean, variance, slope, height, False, 0.0, ctx.eps)
    return found.addcmul_(grad, scale.view(_channels(x))), with_n, alone


def _sum_of_derivatives(shard: Shard, grad: np.ndarray) -> np.ndarray:
    """As `sum_over_shards` differentiates, of numbers."""
    weight = shard.loss_weight
    own = weight * (grad if weight else np.nan_to_num(grad))
    return shard.everyones(own[None]).sum(0) / (weight or 1.0)


@functools.cache
def global_class(cls: type[Any]) -> type[Any] | None:
    """`cls` with statistics of the whole batch, if it is a batch norm; else None."""
    if not issubclass(cls, _BatchNorm) or issubclass(cls, (SyncBatchNorm, GlobalBatchNorm)):
        return None
    # Before what `cls` inherits from torch, behind what it defines itself
    bases: Any = (cls, GlobalBatchNorm)
    return type(cls.__name__, bases, {"__module__": cls.__module__})
