"""What a module tree is made of, and whether it still is."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .containers import CONTAINERS, Path, containers_in, contents, leaves
from .internals import is_compiled, own_attributes

EXECUTION = "_wraploop_execution"  # what a wrapper keeps for running, which is not the module's
TABLES = ("_parameters", "_buffers", "_modules")
_TORCHS_OWN = own_attributes()  # hooks and flags: no forward writes to these
_OPAQUE = (  # whose objects are left alone
    *("torch", "builtins", "functools", "logging", "threading", "_thread", "weakref", "numpy"),
    *("re", "enum", "abc", "typing", "pathlib", "wraploop"),
)


_MARK = "_wraploop_rows"


class Ref:
    """What stands for an object by which it is, and not by what it is equal to."""

    __slots__ = ("of",)

    def __init__(self, of: Any) -> None:
        self.of = of

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ref) and other.of is self.of

    def __hash__(self) -> int:
        return id(self.of)


Place = tuple[Ref, str]  # an attribute of one of the original's modules, or of an object's in one
Spot = tuple[Ref, str, Path]  # what stands there, or in a container there


class Tree:
    """The tree of `root` as it is now.

    Attributes:
        parameters: the distinct leaves that its forward may be differentiated by: parameters, and
            tensors in buffers and plain attributes that require grad.
        buffers: the other distinct tensors in it.
        carried: what forwards have left in attributes for later ones: tensors with a graph, and
            those in the spots `rows`, whose rows are put first.
        holders: what has attributes that a forward may set.
        is_compiled: whether `torch.compile` runs a part of it.

    Args:
        root: the module.
        rows: spots in which forwards leave tensors with a row for each row of the batch, and along
            which axis; added to where a tensor is marked so.

    Raises:
        ValueError: a parameter has no shape yet.
        TypeError: a part of it is TorchScript's.
    """

    def __init__(self, root: nn.Module, rows: dict[Spot, int]) -> None:
        parameters: dict[int, Tensor] = {}
        buffers: dict[int, Tensor] = {}
        for name, parameter in root.named_parameters():
            _check_shape(name, parameter)
            parameters[id(parameter)] = parameter
        self._contents: list[Collection[Any]] = []  # always as they are now
        self.carried: dict[Spot, Tensor] = {}
        self._plain: list[tuple[Tensor, bool]] = []
        self.holders = holders(root)
        for module in self.holders:
            if isinstance(module, torch.jit.ScriptModule):
                raise TypeError(_SCRIPTED)
            own = module.__dict__
            self._contents.append(own.values())
            if isinstance(module, nn.Module):
                hooks = (module._forward_hooks, module._forward_pre_hooks)
                self._contents += (table.values() for table in hooks)
            tables = [value for name, value in own.items() if name in TABLES]
            tables += chain.from_iterable(map(containers_in, own_values(module).values()))
            self._contents += (t.values() if isinstance(t, dict) else t for t in tables)
            for name, path, value in tensors_on(module):
                spot = Ref(module), name, path
                if name not in buffers_of(module):
                    self._plain.append((value, value.requires_grad))
                if id(value) in parameters:
                    continue
                if (marked := rows_axis(value)) is not None:
                    rows[spot] = marked
                axis = rows.get(spot, value.ndim)
                if value.grad_fn is not None or axis < value.ndim:
                    self.carried[spot] = value.movedim(axis, 0) if 0 < axis < value.ndim else value
                else:
                    (parameters if value.requires_grad else buffers)[id(value)] = value
        self._counts = [*map(len, self._contents)]
        self._kept = [*chain.from_iterable(self._contents)]
        self.is_compiled = is_compiled(root)
        self.parameters = list(parameters.values())
        self.buffers = list(buffers.values())
        self._places = self._where()

    def is_current(self) -> bool:
        """Whether everything is still what and where it was, but for values and `requires_grad`."""
        if [*map(len, self._contents)] != self._counts:
            return False
        if not all(map(operator.is_, chain.from_iterable(self._contents), self._kept)):
            return False
        if any(tensor.requires_grad != flag for tensor, flag in self._plain):
            return False
        return self._where() == self._places

    def _where(self) -> tuple[list[int], list[torch.Size]]:
        """Where parameters' values are: `.data` may be replaced, and is by casts and moves."""
        found = self.parameters
        return [parameter.data_ptr() for parameter in found], [p.shape for p in found]


def current_tree(tree: Tree | None, root: nn.Module, rows: dict[Spot, int]) -> Tree:
    """`tree` if it is still that of `root`, else a new one."""
    return tree if tree is not None and tree.is_current() else Tree(root, rows)


def mark_rows(tensor: Tensor, axis: int) -> None:
    """Marks `tensor`, in an attribute, as having a row for each row of the batch along an axis."""
    setattr(tensor, _MARK, axis)


def rows_axis(tensor: Tensor) -> int | None:
    """Along which axis `tensor` has been marked as having a row for each row of the batch."""
    return getattr(tensor, _MARK, None)


def own_values(holder: Any) -> dict[str, Any]:
    """What a module, or an object, has in attributes that are not torch's."""
    values = holder.__dict__.items()
    return {n: value for n, value in values if n not in _TORCHS_OWN and n != EXECUTION}


def tensors_on(holder: Any) -> Iterator[tuple[str, Path, Tensor]]:
    """The tensors in attributes of `holder` and in containers there, with their paths; buffers."""
    for name, value in own_values(holder).items():
        for path, leaf in leaves(value):
            if isinstance(leaf, Tensor):
                yield name, path, leaf
    for name, buffer in buffers_of(holder).items():
        if buffer is not None:
            yield name, (), buffer


def is_plain_object(value: Any) -> bool:
    """Whether `value` is an object of the user's, which has attributes and is no module."""
    return is_users(value) and not isinstance(value, CONTAINERS) and hasattr(value, "__dict__")


def is_users(value: Any) -> bool:
    """Whether `value` is of a class of the user's and neither a class itself nor a module."""
    if isinstance(value, (type, nn.Module, Tensor)):
        return False
    return type(value).__module__.partition(".")[0] not in _OPAQUE


def holders(root: nn.Module) -> list[Any]:
    """What has attributes that a forward may set: the modules, and objects in their attributes."""
    modules = list(root.modules())
    values = [value for module in modules for value in own_values(module).values()]
    inside = [leaf for value in values for _, leaf in leaves(value)]
    objects = {id(value): value for value in inside if is_plain_object(value)}
    return [*modules, *objects.values()]


def buffers_of(holder: Any) -> dict[str, Tensor | None]:
    """The buffers of `holder`, if it is a module."""
    return holder._buffers if isinstance(holder, nn.Module) else {}


def attributes(module: Any) -> dict[str, Iterable[Any]]:
    """What a forward may have set on `module`: each attribute's value and, of containers, items."""
    found: dict[str, Iterable[Any]] = {name: (b,) for name, b in buffers_of(module).items()}
    for name, value in own_values(module).items():
        found[name] = (value, *contents(value))
    return found


def is_quiet(module: Any) -> bool:
    """Whether `module` is one of torch's own, on which only others' forwards set something."""
    if not isinstance(module, nn.Module):
        return False
    hooks = module._forward_pre_hooks or module._forward_hooks
    return type(module).__module__.startswith("torch.nn.modules.") and not hooks


def _check_shape(name: str, parameter: Tensor) -> None:
    if is_lazy(parameter):
        raise ValueError(
            f"Parameter {name!r} has no shape yet: it is a lazy module's. Call the module once "
            "with an example batch before wrapping it."
        )


_SCRIPTED = (
    "A part of the model is a module of TorchScript (torch.jit.script or trace): no copies of it "
    "can be made, as shards need them. Wrap the model that it was made of; torch.compile is "
    "followed."
)
