"""Other data parallel wrappers, and the training steps of tests/steps as their users write them.

Peers have no whole batch: each process makes the step with its own rows, and the gradients of the
parameters are averaged. So a step is cut for them, with its code unchanged: each number of rows is
made even, and each process draws its half. What is compared is what is left at the end, parameters
and their gradients, with those of one process on all rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from lightning_fabric import Fabric  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from tests.promise import FLOOR, Snapshot, Wrap, snapshots
from tests.steps import STEPS, Step
from wraploop.wrappers.batch import is_shared, tensors_of

PROCESSES = 2


class Rows(TorchFunctionMode):
    """Gives a step that is written for a whole batch the rows of one process.

    What the step draws or fills outside its models, with as many rows as one of its batches has,
    is made for the whole batch and cut; indices of rows are made for the process's own rows.

    Args:
        of: the numbers of rows in the step's code; None leaves all as it is, and notes them.
        rank: which of the processes.
        processes: how many; one gets all rows.
    """

    filled = (torch.randn, torch.rand, torch.randint, torch.zeros, torch.ones, torch.full)
    indices = (torch.arange, torch.randperm)
    like = MappingProxyType({torch.randn_like: torch.randn, torch.rand_like: torch.rand})
    shaped = (Tensor.view, Tensor.reshape, Tensor.expand, Tensor.new_zeros, Tensor.new_ones)

    def __init__(self, of: set[int] | None, rank: int = 0, processes: int = 1) -> None:
        super().__init__()
        self.noted: set[int] = set()
        self.rank, self.processes = rank, processes
        self.whole = {rows: -(-rows // PROCESSES) * PROCESSES for rows in of or ()}
        self.own = {rows: whole // processes for rows, whole in self.whole.items()}
        self.depth = 0  # of calls of models, in which nothing is cut

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.depth:
            return func(*args, **kwargs)
        if func in self.filled:
            at = next((i for i, arg in enumerate(args) if isinstance(arg, (tuple, list))), None)
            shape = args if at is None else args[at]
            if shape and kwargs.get("generator"):  # a batch that the registry draws
                self.noted.add(shape[0])
            if shape and shape[0] in self.whole:
                shape = (self.whole[shape[0]], *shape[1:])
                args = shape if at is None else (*args[:at], shape, *args[at + 1 :])
                return self._cut(func(*args, **kwargs))
        elif func in self.indices and len(args) == 1:
            args = (self.own.get(args[0], args[0]),)
        elif func in self.like and not isinstance(args[0], nn.Parameter):
            shape = args[0].shape
            if shape and shape[0] in self.own.values():
                whole = (shape[0] * self.processes, *shape[1:])
                return self._cut(self.like[func](whole, dtype=args[0].dtype))
        elif func in self.shaped and len(args) > 1 and isinstance(args[1], int):
            args = (args[0], self.own.get(args[1], args[1]), *args[2:])
        return func(*args, **kwargs)

    def _cut(self, whole: Tensor) -> Tensor:
        own = whole.detach().chunk(self.processes)[self.rank].clone()
        return own.requires_grad_(whole.requires_grad)

    @contextmanager
    def in_a_model(self, inputs: Any) -> Iterator[None]:
        if not self.depth:
            self.noted |= {len(tensor) for tensor in tensors_of(inputs) if not is_shared(tensor)}
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1


def left_by(step: Step, rows: Rows, peer: Wrap | None = None) -> Snapshot:
    """The parameters and their gradients, after the last step."""

    def run(*args: Any) -> Any:
        with rows:
            return step.run(*args)

    wrap = functools.partial(through, rows=rows, peer=peer)
    found = snapshots(dataclasses.replace(step, run=run), wrap)[-1]
    names = [key.removesuffix(".grad") for key in found if key.endswith(".grad")]
    return {key: found[key] for name in names for key in (name, f"{name}.grad")}


def through(
    module: nn.Module, methods: tuple[str, ...], *, rows: Rows, peer: Wrap | None
) -> nn.Module:
    """`module` itself, except that calls of it go through the peer that wraps it.

    So its attributes and layers are what they are without the peer, and copies have no peer.
    """
    plain: Any = type(module)
    trained = any(parameter.requires_grad for parameter in module.parameters())
    wrapped = peer(module, methods) if peer and trained else None

    def rerouted(name: str) -> Callable[..., Any]:
        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            goes_through = wrapped is not None and not rows.depth
            with rows.in_a_model((args, kwargs)):
                if goes_through:
                    return getattr(wrapped, name)(*args, **kwargs)
                return getattr(plain, name)(self, *args, **kwargs)

        return call

    layers = {name for name in methods if isinstance(getattr(module, name), nn.Module)}
    for name in layers:
        marked = (lambda *_, name=name: getattr(wrapped, name)) if wrapped is not None else None
        through(getattr(module, name), (), rows=rows, peer=marked)
    calls: dict[str, Any] = {name: rerouted(name) for name in {"__call__", *methods} - layers}
    calls["__reduce_ex__"] = lambda self, _: (object.__new__, (plain,), vars(self))
    module.__class__ = type(plain.__name__, (plain,), calls)
    return module


@functools.cache
def whole(name: str) -> tuple[Snapshot | None, set[int]]:
    """What one process leaves behind with all rows, None if it fails; and the numbers of rows."""
    noting = Rows(of=None)
    left_by(STEPS[name], noting)
    try:
        return left_by(STEPS[name], Rows(noting.noted)), noting.noted
    except Exception:  # it has numbers of rows where they cannot be told
        return None, noting.noted


def distance(mine: Snapshot, plains: Snapshot) -> float:
    """The largest difference, relative to the tensor's largest number as in tests/promise.py."""

    def largest(tensor: Tensor | None) -> float:
        if tensor is None or not tensor.numel():
            return 0.0
        return float(tensor.to_dense().abs().nan_to_num(nan=torch.inf).max())

    if mine.keys() != plains.keys():
        return torch.inf
    floor = FLOOR * max(map(largest, plains.values()), default=0.0)
    worst = 0.0
    for key, plain in plains.items():
        a, b = (torch.zeros(()) if t is None else t.to_dense() for t in (mine[key], plain))
        if not torch.equal(a, b):
            worst = max(worst, largest(a - b) / (max(largest(b), floor) or 1.0))
    return worst


# The peers


def ddp(module: nn.Module, _: tuple[str, ...], **options: Any) -> nn.Module:
    """Wraps as torch does."""
    return DistributedDataParallel(module, **options)


def accelerate(module: nn.Module, _: tuple[str, ...]) -> nn.Module:
    """Wraps as Hugging Face's accelerate does."""
    return Accelerator(cpu=True).prepare(module)


def fabric(module: nn.Module, methods: tuple[str, ...]) -> nn.Module:
    """Wraps as Lightning Fabric does."""
    wrapped = _launched_fabric().setup_module(module)
    for method in methods:
        wrapped.mark_forward_method(method)
    return wrapped


@functools.cache
def _launched_fabric() -> Any:
    launched = Fabric(accelerator="cpu", devices=PROCESSES, strategy="ddp")
    launched.launch()
    return launched


def by_hand(module: nn.Module, _: tuple[str, ...]) -> nn.Module:
    """Wraps nothing, but averages its parameters' gradients wherever torch hands them out."""
    backward, grad = torch.autograd.backward, torch.autograd.grad

    def averaging_backward(*args: Any, **kwargs: Any) -> None:
        backward(*args, **kwargs)
        parameters = list(module.parameters())
        used = torch.tensor([parameter.grad is not None for parameter in parameters]).float()
        dist.all_reduce(used)
        for parameter, anywhere in zip(parameters, used, strict=True):
            if anywhere:
                here = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = _Average.apply(here)

    def averaging_grad(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        mine = [any(each is parameter for parameter in module.parameters()) for each in inputs]
        found = zip(mine, grad(outputs, inputs, *args, **kwargs), strict=True)
        return tuple(_Average.apply(g) if own and g is not None else g for own, g in found)

    torch.autograd.backward, torch.autograd.grad = averaging_backward, averaging_grad
    return module


class _Average(torch.autograd.Function):
    """The mean over the processes, which is its own derivative."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        mean = tensor.detach().to_dense().clone() / dist.get_world_size()
        dist.all_reduce(mean)
        return mean.to_sparse(tensor.sparse_dim()) if tensor.is_sparse else mean

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Average.apply(*grads)


PEERS: dict[str, Wrap] = {
    "DDP": ddp,
    "DDP-find-unused": functools.partial(ddp, find_unused_parameters=True),
    "accelerate": accelerate,
    "Fabric": fabric,
}
