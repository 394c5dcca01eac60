"""Looking whether a module's rows are independent, as far as it does not say otherwise.

Nothing in a module says that its forward takes a mean over the batch, or sums a loss over rows, and
shards would then give something else than the whole batch, in silence. So some calls, the 1st, 2nd,
4th, 8th and so on, are made on the whole batch as well, on a copy that is thrown away, without
gradients; and what the shards have given is compared with that. Where random numbers are drawn,
which are others in shards, such a call is made in evaluation mode instead, where most models draw
none, on the whole batch and on shards, all of them thrown away.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wraploop.processes.channel import PeerError

from .batch import is_shared, leaves_of
from .call import Call
from .commons import NotFollowed
from .expected import Distance, Expected, Key, distance, named_leaves
from .internals import global_hooks, same_values
from .noise import kept_random_state
from .observers import Keepsakes
from .replicas import MakeLeaves, Replicas, alias
from .shard import Shard, current, note, running, unsplit
from .tree import Place


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

    def expect(self, call: Call, parts: Sequence[slice]) -> Expected | None:
        """What `call` should give; None where that is not to be looked at, or cannot be.

        Args:
            call: what will be called.
            parts: the rows of each shard.

        Raises:
            ValueError: it draws random numbers, and gives something else in shards where it does
                not.
            NotImplementedError: it changes what shards have in common.
        """
        kind = (call.method, self._module.training)
        self._calls[kind] += 1
        count, outer = self._calls[kind], current()
        if count & (count - 1) or (outer is not None and outer.is_lane):
            return None
        if not _is_free_of_effects(self._module):
            return None
        with kept_random_state() as noise, torch.no_grad(), unsplit():
            try:
                output, changes, parameters = self._made(call, _clone(call.inputs))
            except NotFollowed:
                raise
            except Exception:  # the shards' run will say what is wrong, or it needs gradients
                return None
        if noise.drew and not outer:
            self._check_in_evaluation(call, parts)
        spread = cache(partial(self._spread, call))
        says_values = not (noise.drew or outer)  # another's rows are in means over the batch
        return Expected(output, parameters, changes, spread, _precision(output), says_values)

    def _check_in_evaluation(self, call: Call, parts: Sequence[slice]) -> None:
        with kept_random_state() as noise, torch.no_grad(), unsplit():
            try:
                whole, *_ = self._made(call, _clone(call.inputs), evaluates=True)
                shards = [
                    self._made(call, _clone(_own(call.inputs, part)), _Alone(), evaluates=True)[0]
                    for part in parts
                ]
            except Exception:  # another way of running than in training, or together with others
                return
        if not noise.drew:
            spread = cache(partial(self._spread, call, evaluates=True))
            together = _together(shards, [part.stop - part.start for part in parts])
            try:
                Expected(whole, {}, {}, spread, _precision(whole)).check_outputs(together)
            except ValueError as error:
                raise ValueError(f"{error} {_IN_EVALUATION}") from None

    def _spread(self, call: Call, evaluates: bool = False) -> dict[Key, Distance]:
        found: dict[Key, Distance] = {}
        with kept_random_state(), torch.no_grad(), unsplit():
            outputs, changes, _ = self._made(call, _clone(call.inputs), evaluates=evaluates)
            here: dict[Key, Any] = {**outputs, **_left(changes)}
            for number in range(_NEARBY):
                by = _Rounding(number)
                inputs = list(map(by.near, call.inputs))
                outputs, changes, _ = self._made(
                    call, inputs, make_leaves=by.leaves, evaluates=evaluates
                )
                for key, near in (*outputs.items(), *_left(changes).items()):
                    apart, before = distance(near, here.get(key)), found.get(key)
                    if apart:
                        found[key] = Distance(*map(max, apart, before)) if before else apart
        return found

    def _made(
        self,
        call: Call,
        inputs: list[Tensor],
        shard: Shard | None = None,
        make_leaves: MakeLeaves | None = None,
        evaluates: bool = False,
    ) -> tuple[dict[str, Any], dict[Place, Any], dict[str, tuple[Tensor, Tensor]]]:
        """What `call` returns, leaves, and writes to parameters, on a copy of the module."""
        sync, leaves = shard is not None, make_leaves or _clones
        replicas = Replicas(self._module, sync, leaves, alone=False, observes=True)
        tree, (replica,) = replicas.get([None])
        if evaluates:
            replica.module.eval()
        replica.carry({spot: kept.detach().clone() for spot, kept in tree.carried.items()})
        keepsakes, commons = Keepsakes(replica.hooks, replica.tables), replica.commons()
        try:
            with running(shard):
                output, edits = call.on_shard(replica.module, inputs)
        finally:
            keepsakes.restore()
        commons.check()
        left = {place: change.value for place, change in replica.changes().items()}
        pairs = zip(replica.leaves, tree.parameters, strict=True)
        names = {id(parameter): name for name, parameter in self._module.named_parameters()}
        written = {
            names[id(p)]: (leaf.detach(), p)
            for leaf, p in pairs
            if id(p) in names and not same_values(leaf, p)
        }
        return named_leaves(call, output, edits), left, written


class _Alone(Shard):
    """A shard without the others: what needs them is not made."""

    rows = 1

    def total(self, tensor: Tensor) -> Tensor:
        raise NotImplementedError

    def everyones(self, rows: np.ndarray) -> np.ndarray:
        raise NotImplementedError


def _own(inputs: list[Tensor], part: slice) -> list[Tensor]:
    return [tensor if is_shared(tensor) else tensor[part] for tensor in inputs]


def _together(shards: list[dict[str, Any]], sizes: list[int]) -> dict[str, Tensor]:
    """The tensors in shards' outputs that can be put together, whole."""
    found = {}
    for name in shards[0]:
        parts: list[Any] = [shard.get(name) for shard in shards]
        if not all(isinstance(part, Tensor) for part in parts):
            continue
        pairs = list(zip(parts, sizes, strict=True))
        if all(part.ndim and len(part) == size for part, size in pairs):
            found[name] = torch.cat(parts)
        elif all(part.ndim == 0 and part.is_floating_point() for part in parts):
            found[name] = sum(part * (size / sum(sizes)) for part, size in pairs)
    return found


def _left(changes: dict[Place, Any]) -> dict[Key, Any]:
    """What stands in attributes, one by one."""
    return {(p, path): leaf for p, value in changes.items() for path, leaf in leaves_of(value)}


def _clone(inputs: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in inputs]


class _Rounding:
    """Rounding errors, others for each `number`; for 0 all are upwards, as none make up for."""

    def __init__(self, number: int) -> None:
        self._lowest = 0 if number else 1
        self._generator = torch.Generator().manual_seed(number)

    def near(self, tensor: Tensor) -> Tensor:
        """`tensor`, off by them."""
        tensor = tensor.detach()
        if not tensor.is_floating_point() or tensor.layout is not torch.strided:
            return tensor.clone()
        up = torch.randint(self._lowest, 2, tensor.shape, generator=self._generator)
        return tensor * (1 + (4 * up - 2).to(tensor) * torch.finfo(tensor.dtype).eps)

    def leaves(
        self, parameters: list[Tensor], device: torch.device | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters that are."""
        leaves, _ = _clones(parameters, device)
        for leaf in leaves:
            leaf.data = self.near(leaf)
        return leaves, []


def _precision(output: dict[str, Any]) -> float:
    """The cube root of the coarsest rounding: deep networks make more of a rounding error."""
    tensors = [leaf for leaf in output.values() if isinstance(leaf, Tensor)]
    dtypes = {x.dtype for x in tensors if x.is_floating_point()}
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


_NEARBY = 3  # tries of rounding errors

_IN_EVALUATION = "(This was seen in evaluation mode, where it draws no random numbers.)"

_IN_SHARDS = (
    "The whole batch has run without it. The first axis of every tensor that goes in has to count "
    "the batch's rows: mark one that does not as `wraploop.shared(tensor)`, and put time behind "
    "rows (`batch_first=True`). What stands in attributes of the module goes whole to every shard, "
    "unless its forward has left it there."
)
