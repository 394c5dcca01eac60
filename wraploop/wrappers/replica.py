"""Replicas: a module tree of each lane's own, over the same parameters.

Lanes run one module at the same time, so each needs modules of its own: with its own leaf for
every parameter (an alias: same storage, its own place in autograd), its own buffers and its own
attributes.

    original             replica of lane 0         replica of lane 1
    Linear.weight ─────► alias (a leaf)            alias (a leaf)
    BatchNorm.mean ────► a copy                    a copy
    self.losses = [] ──► a copy                    a copy
    self.loss_fn ──────► the same object           the same object

Replicas are kept between calls, and made anew when the original is no longer what it was: the user
may set an attribute, add a submodule, replace or cast a parameter, call `train()`. What the forward
changes on its modules is found by `changes` and handed back to the original by `hand_back`.
"""

from __future__ import annotations

import functools
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .batchnorm import GlobalBatchNorm, global_class

_TABLES = ("_parameters", "_buffers", "_modules")
_TORCHS_OWN = frozenset(nn.Module().__dict__)  # hooks and flags: no forward writes to these
_CONTAINERS = (list, dict, OrderedDict, set)

EXECUTION = "_wraploop_execution"  # what a wrapper keeps for running, which no copy takes over

Place = tuple[int, str]  # which module of the tree, and which of its attributes


@dataclass(frozen=True)
class Change:
    """What a forward has set an attribute to."""

    value: Any
    is_buffer: bool = False
    is_agreed: bool = False  # the same in every shard


class Replica:
    """A copy of the tree of `original`, with `leaves` in the places of its `parameters`.

    Args:
        original: the module to copy.
        parameters: what it is a function of, see `parameters_of`.
        leaves: what the copy has instead of each.
        sync: whether batch norms in the copy use the statistics of the whole batch.
        buffers: what the copy has instead of each of the original's buffers.

    Attributes:
        module: the copy.
        leaves: as given.
        tokens: what the outputs must depend on.
    """

    tokens: Sequence[Tensor] = ()

    def __init__(
        self,
        original: nn.Module,
        parameters: list[Tensor],
        leaves: list[Tensor],
        buffers: list[Tensor],
        sync: bool,
    ) -> None:
        self._sync = sync
        self._modules: list[tuple[nn.Module, nn.Module]] = []
        self._memo: dict[int, Any] = {}
        self.leaves = leaves
        self._parameters = parameters
        self._buffers, self._originals = buffers, list(original.buffers())
        olds, news = [*parameters, *self._originals], [*leaves, *buffers]
        self._memo.update((id(old), new) for old, new in zip(olds, news, strict=True))
        self.module: nn.Module = self._copy(original)
        self._made = [_attributes(copy) for _, copy in self._modules]
        self._taken_over = [_version(buffer) for buffer in self._originals]
        self._before = [_version(copy) for copy in buffers]

    def refresh(self) -> None:
        """Takes over what changes from step to step: buffers, and values on another device.

        Raises:
            RuntimeError: a backward of the user's has run into the replica.
        """
        for parameter, leaf in zip(self._parameters, self.leaves, strict=True):
            if leaf.device != parameter.device:
                leaf.data.copy_(parameter)
            if leaf.is_leaf and leaf.grad is not None:
                leaf.grad = None
                raise RuntimeError(_LEAKED)
        for i, (buffer, copy) in enumerate(zip(self._originals, self._buffers, strict=True)):
            changed = _version(buffer) != self._taken_over[i] or _version(copy) != self._before[i]
            if changed and copy is not buffer:
                copy.copy_(buffer)
            self._taken_over[i], self._before[i] = _version(buffer), _version(copy)

    def _copy(self, value: Any) -> Any:
        """A copy of `value` where it holds modules, parameters or buffers, else `value` itself."""
        if id(value) in self._memo:
            return self._memo[id(value)]
        if isinstance(value, nn.Module):
            return self._copy_module(value)
        if type(value) in (list, tuple, set, frozenset):
            return self._same_or(value, lambda: type(value)([self._copy(v) for v in value]))
        if type(value) in (dict, OrderedDict):
            return self._same_or(
                value, lambda: type(value)((k, self._copy(v)) for k, v in value.items())
            )
        if isinstance(value, MethodType):
            bound = self._copy(value.__self__)
            return value if bound is value.__self__ else MethodType(value.__func__, bound)
        if type(value) is functools.partial:
            parts = [self._copy(part) for part in (value.func, *value.args)]
            return functools.partial(*parts, **self._copy(value.keywords))
        return value

    def _same_or(self, value: Any, copied: Callable[[], Any]) -> Any:
        self._memo[id(value)] = value  # a container may hold itself
        copy = copied()
        if _same(_items(value), _items(copy)):
            return value
        self._memo[id(value)] = copy
        return copy

    def _copy_module(self, module: nn.Module) -> nn.Module:
        copy = object.__new__((self._sync and global_class(type(module))) or type(module))
        self._memo[id(module)] = copy
        self._modules.append((module, copy))
        for name, value in module.__dict__.items():
            if name == EXECUTION:
                continue
            copied = self._copy(value)
            if copied is value and _is_own_container(name, value):
                copied = value.copy()
            copy.__dict__[name] = copied
        return copy

    def changes(self) -> dict[Place, Change]:
        """What the last forward has set on its modules, or written to their buffers."""
        found: dict[Place, Change] = {}
        written = self._written_buffers()
        for index, ((_, copy), made) in enumerate(zip(self._modules, self._made, strict=True)):
            for name, buffer in copy._buffers.items():
                if id(buffer) in written:
                    is_agreed = isinstance(copy, GlobalBatchNorm)
                    found[index, name] = Change(buffer, is_buffer=True, is_agreed=is_agreed)
            if _is_plain(copy):
                continue
            now = _attributes(copy)
            for name in now:
                if name not in made or not _same(now[name], made[name]):
                    found[index, name] = Change(*_value(copy, name))
        return found

    def hand_back(self, changes: dict[Place, Change]) -> None:
        """Sets `changes` on the original's modules."""
        for (index, name), change in changes.items():
            module, value = self._modules[index][0], change.value
            old = module.__dict__.get(name)
            if change.is_buffer:
                _hand_back_buffer(module, name, value)
            elif isinstance(old, list) and isinstance(value, list):
                old[:] = value
            elif isinstance(old, (dict, set)) and type(old) is type(value):
                old.clear()
                old.update(value)
            else:
                object.__setattr__(module, name, value)

    def _written_buffers(self) -> set[int]:
        now = map(_version, self._buffers)
        pairs = zip(self._buffers, now, self._before, strict=True)
        return {id(buffer) for buffer, version, before in pairs if version != before}


class Replicas:
    """The replicas of `original`, up to date at each call.

    There is a set of them for each combination of frozen parameters that has lately been used, so
    that freezing and thawing a network every step costs nothing.

    Args:
        original: the module.
        sync: whether batch norms in replicas use the statistics of the whole batch.
        make_leaves: makes, of the parameters and a device, what a replica there has instead, and
            tokens that its outputs must depend on.
        own_buffers: whether a replica has buffers of its own.
    """

    def __init__(
        self,
        original: nn.Module,
        sync: bool,
        make_leaves: Callable[[list[Tensor], torch.device | None], tuple[list[Tensor], list[Tensor]]],
        *,
        own_buffers: bool,
    ) -> None:
        self._original = original
        self._sync = sync
        self._make_leaves = make_leaves
        self._own_buffers = own_buffers
        self._state: list[Any] = []
        self._places: list[Any] = []
        self._sets: dict[tuple[bool, ...], list[Replica]] = {}

    def get(
        self, parameters: list[Tensor], devices: Sequence[torch.device | None]
    ) -> list[Replica]:
        """One replica for each device, as the original is now; `parameters` are its."""
        state = _tree_state(self._original)
        places = [(p.data_ptr(), p.shape) for p in parameters]
        if not _same(state, self._state) or places != self._places:
            self._sets.clear()
            self._state, self._places = state, places
        frozen = tuple(not parameter.requires_grad for parameter in parameters)
        replicas = self._sets.pop(frozen, [])
        self._sets[frozen] = replicas  # now the last
        if len(self._sets) > _MOST_SETS:
            del self._sets[next(iter(self._sets))]
        with torch.inference_mode(False):
            for device in devices[len(replicas) :]:
                replicas.append(self._made_for(parameters, device))
            with torch.no_grad():
                for replica in replicas:
                    replica.refresh()
        return replicas[: len(devices)]

    def _made_for(self, parameters: list[Tensor], device: torch.device | None) -> Replica:
        with torch.enable_grad():
            leaves, tokens = self._make_leaves(parameters, device)
        buffers = list(self._original.buffers())
        if self._own_buffers:
            buffers = [buffer.detach().to(device, copy=True) for buffer in buffers]
        replica = Replica(self._original, parameters, leaves, buffers, self._sync)
        replica.tokens = tokens
        return replica


_MOST_SETS = 4

_LEAKED = (
    "A backward has run into the inside of a wrapped module: a tensor made by its forward was used "
    "in the loss without having been returned (through a hook or a global, say). Gradients would "
    "have been lost. Return it from forward, or keep it in an attribute of the module."
)


def parameters_of(module: nn.Module) -> list[Tensor]:
    """The distinct tensors that `module` is a function of, besides its inputs.

    Its parameters, and what requires grad among the tensors in its plain attributes.

    Raises:
        ValueError: one of them has no shape yet.
    """
    found: dict[int, Tensor] = {}
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"Parameter {name!r} has no shape yet: it is a lazy module's. Call the module once "
                "with an example batch before wrapping it."
            )
        found[id(parameter)] = parameter
    for part in module.modules():
        for value in part.__dict__.values():
            if isinstance(value, Tensor) and value.requires_grad:
                found[id(value)] = value
    return list(found.values())


def alias(parameter: Tensor, device: torch.device | None) -> nn.Parameter:
    """A leaf with the storage of `parameter`, or with its values on another device."""
    leaf = nn.Parameter(parameter.detach().to(device), parameter.requires_grad)
    leaf.__dict__.update(parameter.__dict__)
    return leaf


def _tree_state(module: nn.Module) -> list[Any]:
    """Everything whose change makes replicas out of date, to be compared by identity."""
    state: list[Any] = []
    for part in module.modules():
        state += (type(part), *part.__dict__.values(), *part._modules.values())
        state += part._buffers.values()
        state += part._parameters.values()
        for name, value in part.__dict__.items():
            if _is_own_container(name, value):
                state += _items(value)
    return state


def _is_own_container(name: str, value: Any) -> bool:
    """Whether a module keeps things of its own in `value`, which each replica needs for itself."""
    return type(value) in _CONTAINERS and (name in _TABLES or name not in _TORCHS_OWN)


def _attributes(module: nn.Module) -> dict[str, Iterable[Any]]:
    """What a forward may have set on `module`: each attribute's value and, of containers, items."""
    found: dict[str, Iterable[Any]] = {name: (b,) for name, b in module._buffers.items()}
    for name, value in module.__dict__.items():
        if name not in _TORCHS_OWN and name != EXECUTION:
            found[name] = (value, *_items(value)) if type(value) in _CONTAINERS else (value,)
    return found


def _value(module: nn.Module, name: str) -> tuple[Any, bool]:
    """The value of an attribute, and whether it is a buffer."""
    if name in module._buffers:
        return module._buffers[name], True
    return module.__dict__[name], False


def _hand_back_buffer(module: nn.Module, name: str, value: Tensor | None) -> None:
    old = module._buffers[name]
    if old is None or value is None or value.requires_grad or old.shape != value.shape:
        module._buffers[name] = value
    else:
        with torch.no_grad():
            old.copy_(value)


def _is_plain(module: nn.Module) -> bool:
    """Whether `module` is one of torch's own, which set nothing in forward unless hooks do."""
    hooks = module._forward_pre_hooks or module._forward_hooks
    return type(module).__module__.startswith("torch.nn.modules.") and not hooks


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _items(container: Any) -> list[Any]:
    return list(container.values()) if isinstance(container, dict) else list(container)


def _same(a: Iterable[Any], b: Iterable[Any]) -> bool:
    a, b = list(a), list(b)
    return len(a) == len(b) and all(map(operator.is_, a, b))
