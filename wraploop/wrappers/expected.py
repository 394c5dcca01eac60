"""What a call should give, as it has on the whole batch, and whether shards have given it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batch import Nest, leaves_of
from .call import Call, Edit
from .forms import ATOMS
from .outputs import PUT, Ran
from .tree import Place, Ref, buffers_of


class Distance(NamedTuple):
    """How far two tensors are apart.

    Attributes:
        most: the largest difference of two elements.
        half: what half of the differences are below.
        scale: the largest element.
    """

    most: float
    half: float
    scale: float


Key = str | tuple[Place, str]  # a part of the output, or of what is left in an attribute


class Expected(NamedTuple):
    """What a call gives on the whole batch.

    Attributes:
        outputs: what is in its output and what it puts into its arguments, by what to call it.
        parameters: by name, what the forward has written to parameters, and the parameters.
        changes: what it leaves in buffers and attributes.
        spread: how far `outputs` and `changes` are apart if inputs and parameters are by rounding
            errors.
        precision: of the numbers that it has been computed with.
        says_values: whether values of tensors say something: it drew no random numbers, say.
    """

    outputs: dict[str, Any]
    parameters: dict[str, tuple[Tensor, Tensor]]
    changes: dict[Place, Any]
    spread: Callable[[], dict[Key, Distance]]
    precision: float
    says_values: bool = True

    def check(self, call: Call, output: Nest, edits: dict[int, Edit], ran: Ran) -> None:
        """Compares what the shards have given.

        Args:
            call: what was called.
            output: what it has returned, whole.
            edits: what it has done to the containers in its arguments.
            ran: what one shard has left; what it has changed has been handed back.

        Raises:
            ValueError: it is something else.
        """
        for name, (whole, mine) in self.parameters.items():
            if not self._is_close(distance(mine, whole)):
                raise NotImplementedError(_WRITTEN.format(name))
        self.check_outputs(named_leaves(call, output, edits))
        for place in self.changes.keys() & ran.changes.keys():
            name = f"{place[1]!r} of {type(place[0].of).__name__}"
            mine, whole = _kept(*place), self.changes[place]
            self._check_plain(name, mine, whole)
            expected = dict(leaves_of(whole))
            for path, leaf in leaves_of(mine):
                self._check_left(name, (place, path), leaf, expected.get(path))

    def _check_left(self, name: str, key: tuple[Place, str], mine: Any, whole: Any) -> None:
        """Checks what stands in an attribute now, where both are tensors."""
        if not (isinstance(mine, Tensor) and isinstance(whole, Tensor)):
            return
        name += key[1]
        if mine.shape != whole.shape:
            raise ValueError(_LEFT.format(name, tuple(whole.shape), tuple(mine.shape)))
        apart = distance(mine, whole)
        if not (self._is_close(apart) or self._is_close(apart, self.spread().get(key))):
            raise ValueError(_COUPLED.format(name))

    def check_outputs(self, outputs: dict[str, Any]) -> None:
        """Compares `outputs` alone."""
        for name, mine in outputs.items():
            whole = self.outputs.get(name)
            self._check_plain(name, mine, whole)
            self._check_shape(name, mine, whole)
            apart = distance(mine, whole)
            if self._is_close(apart) and self._is_fine(apart):
                continue
            # A network that makes much of a rounding error makes much of the order of sums.
            noise = self.spread().get(name)
            if not (self._is_close(apart, noise) and self._is_fine(apart, noise)):
                raise ValueError(_COUPLED.format(name))

    def _check_plain(self, name: str, mine: Nest, whole: Nest) -> None:
        """Checks numbers, strings and the like, where both have one."""
        expected = dict(leaves_of(whole))
        for path, value in leaves_of(mine):
            other = expected.get(path)
            both = isinstance(value, ATOMS) and isinstance(other, ATOMS) and other is not None
            if both and value is not None and not self._is_same(value, other):
                raise ValueError(_COUNTED.format(name + path, repr(value), repr(other)))

    def _check_shape(self, name: str, mine: Any, whole: Any) -> None:
        shapes = [tuple(x.shape) for x in (mine, whole) if isinstance(x, Tensor) and x.ndim]
        if len(shapes) == 2 and shapes[0][:1] != shapes[1][:1]:
            raise ValueError(_NO_ROWS.format(name, shapes[1], shapes[0]))
        if len(shapes) == 2 and shapes[0] != shapes[1]:
            raise ValueError(_COUPLED.format(name))

    def _is_same(self, mine: Any, whole: Any) -> bool:
        """Whether two plain values are the same, floats but for rounding."""
        numbers = isinstance(mine, float) and isinstance(whole, float)
        return mine == whole or (numbers and math.isclose(mine, whole, rel_tol=self.precision))

    def _is_close(self, apart: Distance | None, noise: Distance | None = None) -> bool:
        """Whether no element is off by more than the precision, and many times the `noise`."""
        if not self.says_values or apart is None:
            return True
        allowed = self.precision * (apart.scale + self.precision)
        return apart.most <= allowed + (_MANY * noise.most if noise else 0.0)

    def _is_fine(self, apart: Distance | None, noise: Distance | None = None) -> bool:
        """Whether most are off by less than that: some may be, where a forward rounds or picks."""
        rounds = torch.get_float32_matmul_precision() != "highest"
        if not self.says_values or apart is None or rounds:
            return True
        precision = min(self.precision, _FINE)
        allowed = precision * (apart.scale + precision)
        return apart.half <= allowed + (_MANY * noise.half if noise else 0.0)


def _kept(holder: Ref, name: str) -> object:
    return buffers_of(holder.of).get(name, holder.of.__dict__.get(name))


def named_leaves(call: Call, output: Nest, edits: dict[int, Edit]) -> dict[str, Any]:
    """What is in `output` and `edits`, by what to call it."""
    returned = {f"the output{path} of {call.method!r}": leaf for path, leaf in leaves_of(output)}
    return returned | {f"{PUT}{path}": leaf for path, leaf in leaves_of(edits)}


def distance(mine: Any, whole: Any) -> Distance | None:
    """How far floating tensors are apart; None where that says nothing, or another check does."""
    if not (isinstance(mine, Tensor) and isinstance(whole, Tensor)) or mine.shape != whole.shape:
        return None
    mine, whole = mine.detach().to(whole.device), whole.detach()
    is_number = whole.is_floating_point() or whole.is_complex()  # others round: neighbours are far
    if not is_number or mine.is_sparse or whole.is_sparse or not whole.numel():
        return None
    finite = whole.isfinite()
    if not torch.equal(finite, mine.isfinite()):
        return Distance(math.inf, math.inf, 1.0)
    off = (mine - whole).abs().where(finite, 0.0).double()
    scale = whole.abs().where(finite, 0.0).max()
    return Distance(off.max().item(), off.median().item(), scale.item())


_MANY = 100.0  # times what rounding errors do
_FINE = 256 * torch.finfo(torch.float32).eps  # in float64 too: many a forward casts inside

_WRITTEN = (
    "The forward writes to the parameter {!r}, and in shards it has become something else than on "
    "the whole batch: every shard writes to it, and by what it has of the batch. Write to it in "
    "the step, outside of the forward, or keep it as a buffer; if the forward does it once, when "
    "first called, call the model once before wrapping it."
)

_COUNTED = (
    "In shards, {} is {}, and {} on the whole batch: it depends on how many rows there are. Return "
    "or keep it as a tensor with one row for each row of the batch, or have the caller count them."
)

_NO_ROWS = (
    "{} has shape {} on the whole batch and {} put together from the shards, where its first axis "
    "is as long as theirs by chance: it does not count the batch's rows. Return it with one row "
    "for each row of the batch."
)

_LEFT = (
    "The forward leaves {} with the shape {} on the whole batch, and {} put together from the "
    "shards. Keep a tensor of which one axis is as long as the batch has rows, or whose shape does "
    "not depend on how many there are."
)

_COUPLED = (
    "In shards, {} is not what the whole batch gives: the forward couples rows. If it takes a "
    "mean over the batch, let it use `wraploop.batch_mean`; if it computes a loss, compute that "
    "outside, or let it return a value for each row, to be summed or averaged outside."
)
