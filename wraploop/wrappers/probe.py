"""Looking whether a module's rows are independent, as far as it does not say otherwise.

Nothing in a module says that its forward takes a mean over the batch, or sums a loss over rows, and
shards would then give something else than the whole batch, in silence. So some calls, the 1st, 2nd,
4th, 8th and so on, are made on the whole batch as well, on a copy that is thrown away, without
gradients; and what the shards have given is compared with that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wraploop.processes.channel import PeerError

from .batch import leaves_of
from .call import Call
from .internals import global_hooks, same_values
from .noise import kept_random_state
from .observers import Keepsakes
from .outputs import Ran
from .replicas import Replicas, alias
from .shard import current, note, unsplit
from .tree import Place, buffers_of


class Expected(NamedTuple):
    """What a call gives on the whole batch.

    Attributes:
        outputs: its tensors, by path.
        parameters: by name, what the forward has written to parameters, and the parameters.
        changes: what it leaves in buffers and attributes, if that is a tensor.
        spread: how far outputs are apart, by path, if inputs are by a rounding error.
        precision: of the numbers that it has been computed with.
    """

    outputs: dict[str, Tensor]
    parameters: dict[str, tuple[Tensor, Tensor]]
    changes: dict[Place, Tensor]
    spread: Callable[[], dict[str, Tensor]]
    precision: float

    def check(self, call: Call, output: object, ran: Ran) -> None:
        """Compares what the shards have given.

        Args:
            call: what was called.
            output: what it has returned, whole.
            ran: what one shard has left; what it has changed has been handed back.

        Raises:
            ValueError: it is something else.
        """
        for name, (whole, mine) in self.parameters.items():
            if not self._is_close(mine, whole, 0.0):
                raise NotImplementedError(_WRITTEN.format(name))
        for path, mine in _tensors(output).items():
            whole = self.outputs.get(path)
            if whole is None or self._is_close(mine, whole, 0.0):
                continue
            # A network that makes much of a rounding error makes much of the order of sums.
            if not self._is_close(mine, whole, _MANY * self.spread().get(path, 0.0)):
                raise ValueError(_COUPLED.format(f"the output{path} of {call.method!r}"))
        for holder, name in self.changes.keys() & ran.changes.keys():
            mine, whole = _kept(holder.of, name), self.changes[holder, name]
            if isinstance(mine, Tensor) and not self._is_close(mine, whole, 0.0):
                raise ValueError(_COUPLED.format(f"{name!r} of {type(holder.of).__name__}"))

    def _is_close(self, mine: Tensor, whole: Tensor, more: Tensor | float) -> bool:
        """Whether they are, to the precision and, absolutely, to `more`."""
        if mine.shape != whole.shape or not (whole.is_floating_point() or whole.is_complex()):
            return True  # told apart elsewhere; or rounded, whose neighbours are far
        mine, whole = mine.detach().to(whole.device), whole.detach()
        if mine.is_sparse or whole.is_sparse or not whole.numel():
            return True
        finite = whole.isfinite()
        if not torch.equal(finite, mine.isfinite()):
            return False
        off = (mine - whole).abs().where(finite, 0.0).max()
        scale = whole.abs().where(finite, 0.0).max()
        return bool(off <= self.precision * (scale + self.precision) + more)


@contextmanager
def explained(expected: Expected | None) -> Iterator[None]:
    """Has an error that shards raise in the block, and the whole batch has not, say so."""
    try:
        yield
    except Exception as error:
        if expected and not isinstance(error, (PeerError, NotImplementedError)):
            note(error, _IN_SHARDS)
        raise


class Probe:
    """Makes some of the calls of `module` on the whole batch too.

    Args:
        module: the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._calls: Counter[tuple[str, bool]] = Counter()

    def expect(self, call: Call) -> Expected | None:
        """What `call` should give; None where that is not to be looked at, or cannot be."""
        kind = (call.method, self._module.training)
        self._calls[kind] += 1
        count = self._calls[kind]
        if count & (count - 1) or current() is not None or not _is_free_of_effects(self._module):
            return None
        with kept_random_state() as noise, torch.no_grad(), unsplit():
            try:
                output, changes, parameters = self._made(call, _clone(call.inputs))
            except Exception:  # the shards' run will say what is wrong, or it needs gradients
                return None
        if noise.drew:
            return None
        spread = partial(self._spread, call)
        return Expected(output, parameters, changes, spread, _precision(output))

    def _spread(self, call: Call) -> dict[str, Tensor]:
        with kept_random_state(), torch.no_grad(), unsplit():
            here, *_ = self._made(call, _clone(call.inputs))
            near, *_ = self._made(call, list(map(_nearby, call.inputs)))
        off = {
            path: (here[path] - near[path]).abs().reshape(-1)
            for path in here.keys() & near.keys()
            if here[path].shape == near[path].shape and here[path].numel()
        }
        return {path: o.where(o.isfinite(), 0.0).max() for path, o in off.items()}

    def _made(
        self, call: Call, inputs: list[Tensor]
    ) -> tuple[dict[str, Tensor], dict[Place, Tensor], dict[str, tuple[Tensor, Tensor]]]:
        """What `call` returns, leaves, and writes to parameters, on a copy of the module."""
        replicas = Replicas(self._module, False, _clones, alone=False, observes=True)
        tree, (replica,) = replicas.get([None])
        keepsakes = Keepsakes(replica.hooks)
        try:
            output = _tensors(call.on(replica.module, inputs))
        finally:
            keepsakes.restore()
        changes = replica.changes().items()
        left = {p: c.value for p, c in changes if isinstance(c.value, Tensor)}
        pairs = zip(replica.leaves, tree.parameters, strict=True)
        names = {id(parameter): name for name, parameter in self._module.named_parameters()}
        written = {
            names[id(p)]: (leaf.detach(), p)
            for leaf, p in pairs
            if id(p) in names and not same_values(leaf, p)
        }
        return output, left, written


def _kept(holder: Any, name: str) -> object:
    return buffers_of(holder).get(name, holder.__dict__.get(name))


def _tensors(output: object) -> dict[str, Tensor]:
    return {path: leaf for path, leaf in leaves_of(output) if isinstance(leaf, Tensor)}


def _clone(inputs: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in inputs]


def _nearby(tensor: Tensor) -> Tensor:
    """`tensor`, off by a rounding error."""
    if not tensor.is_floating_point():
        return tensor.detach().clone()
    eps = torch.finfo(tensor.dtype).eps
    signs = torch.ones_like(tensor)
    signs.view(-1)[::2] = -1
    return torch.where(signs > 0, tensor * (1 + 2 * eps), tensor * (1 - 2 * eps)).detach()


def _precision(output: dict[str, Tensor]) -> float:
    """The cube root of the coarsest rounding: deep networks make more of a rounding error."""
    dtypes = {x.dtype for x in output.values() if x.is_floating_point()}
    if torch.is_autocast_enabled("cpu"):
        dtypes.add(torch.get_autocast_dtype("cpu"))
    if torch.cuda.is_available() and torch.is_autocast_enabled("cuda"):
        dtypes.add(torch.get_autocast_dtype("cuda"))
    return max((torch.finfo(dtype).eps for dtype in dtypes), default=1e-7) ** (1 / 3)


def _is_free_of_effects(module: nn.Module) -> bool:
    """Whether a forward too many is noticed by nobody: generators, and hooks on all modules, do."""
    values = (value for part in module.modules() for value in part.__dict__.values())
    return not global_hooks() and not any(isinstance(value, torch.Generator) for value in values)


def _clones(
    parameters: list[Tensor], device: torch.device | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters that a forward may write to without effect."""
    leaves: list[Tensor] = [alias(parameter, device) for parameter in parameters]
    for leaf in leaves:
        leaf.data = leaf.data.clone()
    return leaves, []


_MANY = 100.0

_WRITTEN = (
    "The forward writes to the parameter {!r}, and in shards it has become something else than on "
    "the whole batch: every shard writes to it, and by what it has of the batch. Write to it in "
    "the step, outside of the forward, or keep it as a buffer."
)

_IN_SHARDS = (
    "The whole batch has run without it. The first axis of every tensor that goes in has to count "
    "the batch's rows: mark one that does not as `wraploop.shared(tensor)`, and put time behind "
    "rows (`batch_first=True`)."
)

_COUPLED = (
    "In shards, {} is not what the whole batch gives: the forward couples rows. If it takes a "
    "mean over the batch, let it use `wraploop.batch_mean`; if it computes a loss, let it return "
    "a value for each row, to be summed or averaged outside."
)
