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
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.overrides import TorchFunctionMode

from .internals import batch_norm_sums, is_transformed, not_compiled
from .shard import Shard, current, sum_over_shards

_LAST = "_wraploop_last"
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_TRANSFORMED = (
    "A transform of torch.func, or forward-mode differentiation, goes over a batch norm inside a "
    "wrapped module, where what the other shards have cannot be transformed. Transform a call of "
    "the wrapped model as a whole, or wrap it with sync_batchnorm=False."
)
_NO_ROWS = (
    "batch_norm gets a tensor of shape {} in a forward of {} rows: as in an instance norm, rows "
    "seem to be among its channels, and not what it takes the mean of. Wrap the model with "
    "sync_batchnorm=False, which leaves batch norms as torch has them."
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


class Global:
    """A module in which batch norms use the statistics of the whole batch."""

    def begin(self) -> None:
        """Makes one ready that was not made by its class."""
        self.__dict__[_LAST] = _Last()

    def shard(self) -> Shard | None:
        """The shard that this thread runs, or has run when checkpointing repeats a forward."""
        last: _Last = self.__dict__[_LAST]
        last.shard = current() or last.shard
        return last.shard


class GlobalBatchNorm(_BatchNorm, Global):
    """A batch norm that normalises with the statistics of the whole batch."""

    def forward(self, input: Tensor) -> Tensor:
        """As `torch.nn.BatchNorm2d` and its like, for the whole batch.

        Raises:
            ValueError: the batch has one value per channel.
            NotImplementedError: a transform of torch.func goes over it.
        """
        of_this_batch = self.training or self.running_mean is None
        shard = self.shard()
        if shard is None or not of_this_batch:
            return super().forward(input)
        self._check_input_dim(input)
        tracked = self.training and self.track_running_stats
        if not tracked or self.num_batches_tracked is None or self.running_mean is None:
            return _of_the_whole(shard, input, None, None, self.weight, self.bias, 0.0, self.eps)
        self.num_batches_tracked.add_(1)
        step = self.momentum
        if step is None:
            step = 1.0 / float(self.num_batches_tracked)
        running = self.running_mean, self.running_var
        return _of_the_whole(shard, input, *running, self.weight, self.bias, step, self.eps)


class _Calls(TorchFunctionMode):
    """Has calls of torch's function for batch norms use the statistics of the whole batch."""

    def __init__(self, shard: Shard) -> None:
        super().__init__()
        self._shard = shard

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = None
        if func is batch_norm:
            given = _as_functional(*args, **kwargs or {})
        elif func is torch.batch_norm:
            given = _as_operator(*args, **kwargs or {})
        if given is None:
            return func(*args, **kwargs or {})
        if len(given[0]) == 1 < self._shard.rows and given[0].ndim > 2:
            raise NotImplementedError(_NO_ROWS.format(tuple(given[0].shape), self._shard.rows))
        return _of_the_whole(self._shard, *given)


def _as_functional(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Any, ...] | None:
    """What `torch.nn.functional.batch_norm` is called with; None if statistics are given."""
    given = input, running_mean, running_var, weight, bias, momentum, eps
    return given if training else None


def _as_operator(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> tuple[Any, ...] | None:
    """The same for `torch.batch_norm`."""
    given = input, running_mean, running_var, weight, bias, momentum, eps
    return given if training else None


def _of_the_whole(
    shard: Shard,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """The batch norm of a shard, with statistics of the whole batch.

    Raises:
        ValueError: the batch has one value per channel.
        NotImplementedError: a transform of torch.func goes over it.
    """
    transformed = is_transformed()
    if transformed and not torch.compiler.is_compiling():
        raise NotImplementedError(_TRANSFORMED)
    half = input.dtype in (torch.float16, torch.bfloat16)
    x = input.float() if half else input
    weight, bias = (t.float() if half and t is not None else t for t in (weight, bias))
    whole = _statistics(x, shard)
    if whole.number == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, got input of shape "
            f"{tuple(input.shape)} in a batch of one row."
        )
    if whole.number:
        unbiased = whole.variance * (whole.number / (whole.number - 1))
        for running, now in ((running_mean, whole.mean), (running_var, unbiased)):
            if running is not None:  # as torch, with inf too
                running.mul_(1 - momentum).add_(now.to(running.dtype), alpha=momentum)
    if shard.is_whole:  # not with its buffers: torch's kernel writes to them unseen
        out = batch_norm(x, None, None, weight, bias, True, 0.0, eps)
    elif transformed:
        out = _normalised(x, weight, bias, shard, eps)
    else:
        out = _Normalise.apply(x, weight, bias, shard, eps, whole)
    return out.to(input.dtype) if half else out


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


def statistics_of(module: nn.Module) -> dict[str, Tensor]:
    """The running statistics of `module`, by name, if it is a batch norm."""
    if not isinstance(module, _BatchNorm):
        return {}
    found = {name: module._buffers.get(name) for name in _STATISTICS}
    return {name: buffer for name, buffer in found.items() if buffer is not None}


@functools.cache
def global_class(cls: type[Any]) -> type[Any] | None:
    """`cls` with statistics of the whole batch, if it is or calls a batch norm; else None."""
    if issubclass(cls, (SyncBatchNorm, Global)):
        return None
    is_one = issubclass(cls, _BatchNorm)
    calling = {name: _global_calls(getattr(cls, name)) for name in _methods_calling(cls)}
    if not (is_one or calling):
        return None
    # Before what `cls` inherits from torch, behind what it defines itself
    bases: Any = (cls, GlobalBatchNorm if is_one else Global)
    return type(cls.__name__, bases, {"__module__": cls.__module__, **calling})


def _methods_calling(cls: type[Any]) -> set[str]:
    """Which methods of `cls`, but for torch's own, call a function `batch_norm`."""
    own = [base for base in cls.__mro__ if not base.__module__.startswith("torch.")]
    members = [member for base in own for member in vars(base).items()]
    return {name for name, f in members if isinstance(f, FunctionType) and _calls(f.__code__)}


def _calls(code: CodeType) -> bool:
    inner = [part for part in code.co_consts if isinstance(part, CodeType)]
    return batch_norm.__name__ in code.co_names or any(map(_calls, inner))


def _global_calls(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method` of a `Global`, in which those functions use the statistics of the whole batch."""

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        shard = self.shard()
        with nullcontext() if shard is None else _Calls(shard):
            return method(self, *args, **kwargs)

    return run
