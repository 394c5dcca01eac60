"""What a module tree is made of, and whether it still is."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .internals import is_compiled, own_attributes

EXECUTION = "_wraploop_execution"  # what a wrapper keeps for running, which is not the module's
_TABLES = ("_parameters", "_buffers", "_modules")
_TORCHS_OWN = own_attributes()  # hooks and flags: no forward writes to these
_CONTAINERS = (list, dict, OrderedDict, set)


_MARK = "_wraploop_rows"

Place = tuple[nn.Module, str]  # an attribute of one of the original's modules


class Tree:
    """The tree of `root` as it is now.

    Attributes:
        parameters: the distinct leaves that its forward may be differentiated by: parameters, and
            tensors in buffers and plain attributes that require grad.
        buffers: the other distinct tensors in it.
        carried: what forwards have left in attributes for later ones: tensors with a graph, and
            those in the places `rows`.
        is_compiled: whether `torch.compile` runs a part of it.

    Args:
        root: the module.
        rows: places in which forwards leave tensors with a row for each row of the batch; added to
            where an outer wrapper knows of one.

    Raises:
        ValueError: a parameter has no shape yet.
    """

    def __init__(self, root: nn.Module, rows: set[Place]) -> None:
        parameters: dict[int, Tensor] = {}
        buffers: dict[int, Tensor] = {}
        for name, parameter in root.named_parameters():
            _check_shape(name, parameter)
            parameters[id(parameter)] = parameter
        self._contents: list[tuple[Any, list[Any]]] = []
        self.carried: dict[Place, Tensor] = {}
        self._plain: list[tuple[Tensor, bool]] = []
        for module in root.modules():
            own = module.__dict__
            self._contents.append((own, items(own)))
            self._contents.append((module._forward_hooks, items(module._forward_hooks)))
            tables = [value for name, value in own.items() if is_own_container(name, value)]
            self._contents += [(table, items(table)) for table in tables]
            held = [(name, value) for name, value in own.items() if isinstance(value, Tensor)]
            self._plain += [(value, value.requires_grad) for _, value in held]
            for name, value in (*held, *module._buffers.items()):
                if value is None or id(value) in parameters:
                    continue
                if hasattr(value, _MARK):
                    rows.add((module, name))
                if value.grad_fn is not None or (module, name) in rows:
                    self.carried[module, name] = value
                else:
                    (parameters if value.requires_grad else buffers)[id(value)] = value
        self.is_compiled = is_compiled(root)
        self.parameters = list(parameters.values())
        self.buffers = list(buffers.values())
        self._places = self._where()

    def is_current(self) -> bool:
        """Whether everything is still what and where it was, but for values and `requires_grad`."""
        for container, contents in self._contents:
            values = container.values() if isinstance(container, dict) else container
            if len(values) != len(contents) or not all(map(operator.is_, values, contents)):
                return False
        if any(tensor.requires_grad != flag for tensor, flag in self._plain):
            return False
        return self._where() == self._places

    def _where(self) -> list[tuple[int, torch.Size]]:
        """Where parameters' values are: `.data` may be replaced, and is by casts and moves."""
        return [(parameter.data_ptr(), parameter.shape) for parameter in self.parameters]


def mark_rows(tensor: Tensor) -> None:
    """Marks `tensor`, in an attribute of a module, as having a row for each row of the batch."""
    setattr(tensor, _MARK, True)


def is_own_container(name: str, value: Any) -> bool:
    """Whether a module keeps things of its own in `value`, its attribute `name`."""
    return type(value) in _CONTAINERS and (name in _TABLES or name not in _TORCHS_OWN)


def attributes(module: nn.Module) -> dict[str, Iterable[Any]]:
    """What a forward may have set on `module`: each attribute's value and, of containers, items."""
    found: dict[str, Iterable[Any]] = {name: (b,) for name, b in module._buffers.items()}
    for name, value in module.__dict__.items():
        if name not in _TORCHS_OWN and name != EXECUTION:
            found[name] = (value, *items(value)) if type(value) in _CONTAINERS else (value,)
    return found


def is_quiet(module: nn.Module) -> bool:
    """Whether `module` is one of torch's own, which set nothing in forward unless hooks do."""
    hooks = module._forward_pre_hooks or module._forward_hooks
    return type(module).__module__.startswith("torch.nn.modules.") and not hooks


def items(container: Any) -> list[Any]:
    """What `container` contains."""
    return list(container.values()) if isinstance(container, dict) else list(container)


def same(a: Iterable[Any], b: Iterable[Any]) -> bool:
    """Whether `a` and `b` are made of the same objects."""
    a, b = list(a), list(b)
    return len(a) == len(b) and all(map(operator.is_, a, b))


def _check_shape(name: str, parameter: Tensor) -> None:
    if is_lazy(parameter):
        raise ValueError(
            f"Parameter {name!r} has no shape yet: it is a lazy module's. Call the module once "
            "with an example batch before wrapping it."
        )
