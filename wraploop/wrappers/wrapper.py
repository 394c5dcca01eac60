"""The contract of every wrapper, and the way of a batch through it.

A wrapper changes where a model runs, never what it computes: for any step written against `model`,
the same step against `Wrapper(model)` gives the same outputs, the same gradients and the same
parameters, up to the order of summation.

    wrapper(x) ── Call ── scatter ── run on each shard ── gather ── outputs, whole
"""

from __future__ import annotations

import functools
import threading
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn
from typing_extensions import Self

from .batch import Nest, tensors_of
from .call import Call
from .internals import is_traced, not_compiled, own_attributes
from .shard import is_unsplit
from .tree import EXECUTION


@functools.cache
def _own_names(cls: type[ModelWrapper]) -> frozenset[str]:
    """The attributes that wrappers of class `cls` have of their own, not the module's."""
    classes = [c for c in cls.__mro__ if issubclass(c, ModelWrapper)]
    declared = [name for c in classes for name in (*vars(c).get("__annotations__", ()), *vars(c))]
    return own_attributes() | frozenset(declared)


class Execution(Protocol):
    """What a wrapper keeps for running a module."""

    module: nn.Module


E = TypeVar("E", bound=Execution)
_one_at_a_time = threading.Lock()
_TRACED = (
    "torch.jit.trace has come to a {}, whose module's layers it looks for in the wrapper itself. "
    "Trace wrapper.module, the plain model, which computes the same."
)


class ModelWrapper(nn.Module):
    """A module that runs another one elsewhere.

    From outside it is the module: the same parameters, `state_dict` keys and attributes.

    Args:
        module: the module to run. It stays what it is; `wrapper.module` is it.
        methods: which of its methods besides forward take a batch, and run like forward.
        sync_batchnorm: whether its batch norms use the statistics of the whole batch.
    """

    module: nn.Module
    methods: tuple[str, ...]
    sync_batchnorm: bool
    speaks = False  # whether calls are exchanges with other processes, which lanes cannot make

    def __init__(
        self, module: nn.Module, *, methods: tuple[str, ...] = (), sync_batchnorm: bool = True
    ) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"{type(self).__name__} wraps a torch.nn.Module; got {module!r}.")
        if isinstance(methods, str):
            methods = (methods,)
        for name in methods:
            if not callable(getattr(module, name, None)):
                raise ValueError(
                    f"{type(module).__name__} has no method {name!r}, named in methods={methods}."
                )
        super().__init__()
        self.module = module
        self.methods = tuple(methods)
        self.sync_batchnorm = sync_batchnorm

    def _check_inside(self) -> None:
        """Checks that nothing in the module speaks with other processes: lanes cannot."""
        for name, part in self.module.named_modules():
            if getattr(part, "speaks", False) and isinstance(part, ModelWrapper):
                raise ValueError(
                    f"{type(self).__name__} cannot run the {type(part).__name__} in it ({name!r}) "
                    "in lanes. Put it inside: DistributedModel(ThreadedCPUParallel(model))."
                )

    @abstractmethod
    def _run(self, call: Call) -> Nest:
        """Makes `call` on the module, on shards of its batch."""

    def _is_plain(self, method: str) -> bool:
        """Whether for calls of `method` there is nothing to do but to make them on the module."""
        return False

    def _make(self, call: Call) -> Nest:
        """Makes `call`, on shards unless they are not wanted."""
        return call.on(self.module) if is_unsplit() else self._run(call)

    def _execution(self, make: Callable[[nn.Module, bool], E]) -> E:
        """What this wrapper keeps for running its module, made when there is none for it yet."""
        kept = self.__dict__.get(EXECUTION)
        if kept is None or kept.module is not self.module:
            made = make(self.module, self.sync_batchnorm)
            with _one_at_a_time:  # several threads may make their first call at once
                kept = self.__dict__.get(EXECUTION)
                if kept is None or kept.module is not self.module:
                    kept = self.__dict__[EXECUTION] = made
        return kept

    @not_compiled
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module's forward on shards of the batch.

        Args:
            args: nests of tensors, of which the first axis counts the batch's rows.
            kwargs: the same.

        Returns:
            What the module returns for the whole batch.

        Raises:
            ValueError: inputs disagree about the number of rows, or an output has other rows.
            RuntimeError: torch.jit.trace traces it, as ONNX's and TensorBoard's graphs may too.
        """
        if is_traced():
            raise RuntimeError(_TRACED.format(type(self).__name__))
        if self._is_plain("forward"):
            return self._modules["module"](*args, **kwargs)  # pyright: ignore[reportOptionalCall]
        return self._make(Call("forward", args, kwargs))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
        value = getattr(self.module, name)
        if name in self.methods:
            return lambda *args, **kwargs: self._make(Call(name, args, kwargs))
        if getattr(value, "__self__", None) is self.module:
            return self._guarded(name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        inner = self.__dict__.get("_modules", {}).get("module")
        if inner is None or name in _own_names(self.__class__):
            super().__setattr__(name, value)
        elif isinstance(value, Tensor) and name in inner._parameters:
            inner._parameters[name] = value  # as torch.func.functional_call does with a module's
        else:
            setattr(inner, name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__ or name in self._modules:
            super().__delattr__(name)
        else:
            delattr(self.module, name)

    def _guarded(self, name: str, method: Any) -> Any:
        """The module's `method`, which may not take tensors: it would run on the whole batch."""

        def guarded(*args: Any, **kwargs: Any) -> Any:
            if tensors_of((args, kwargs)):
                raise TypeError(
                    f"{name!r} was called with tensors, on a wrapped {type(self.module).__name__}. "
                    f"If it takes a batch, name it when wrapping: {type(self).__name__}(model, "
                    f"methods=({name!r},)), and it runs like forward. If not, call "
                    f"`wrapper.module.{name}(...)`."
                )
            return method(*args, **kwargs)

        return guarded

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """A block in which gradients need not be those of the whole batch, until one after it.

        Only with `DistributedModel(batch="local")` is there something to be put off.
        """
        yield

    # From outside, the module

    @property
    def training(self) -> bool:
        """Whether the module is in training mode."""
        return self.module.training

    @training.setter
    def training(self, mode: bool) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        module = self.__dict__.get("_modules", {}).get("module")
        if module is not None:  # torch's `Module.__init__` sets it too
            module.training = mode

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Puts the module into training mode, or evaluation mode: its own method `train`."""
        if "train" in self.methods:
            return self._make(Call("train", args, kwargs))
        found = self._guarded("train", self.module.train)(*args, **kwargs)
        return self if found is self.module else found

    def apply(self, fn: Callable[[nn.Module], Any]) -> Self:
        """Applies `fn` to each of the module's modules, itself last."""
        self.module.apply(fn)
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self.module._apply(*args, **kwargs)
        return self

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The module's children, under their own names."""
        yield from self.module.named_children()

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Generator[tuple[str, nn.Module], None, None]:
        """The wrapper, then the module's own modules under their own names."""
        memo = set() if memo is None else memo
        if self in memo:
            return
        if remove_duplicate:
            memo.add(self)
        yield prefix, self
        yield from self.module.named_modules(memo, prefix, remove_duplicate)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The module's state, under the module's own keys."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Loads a state that the module could load."""
        return self.module.load_state_dict(*args, **kwargs)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Called by a module that contains this one: `load_state_dict` goes by attribute names."""
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f"{prefix}module.{key[len(prefix) :]}"] = state_dict.pop(key)

    def __bool__(self) -> bool:
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != EXECUTION}


def _of_the_module(name: str) -> Callable[..., Any]:
    """A method that is the module's own of that name."""

    def method(self: ModelWrapper, *args: Any, **kwargs: Any) -> Any:
        return getattr(type(self.module), name)(self.module, *args, **kwargs)

    method.__name__, method.__doc__ = name, "As the module's own."
    return method


for _name in (
    *("get_submodule", "get_parameter", "get_buffer"),
    *("add_module", "register_module", "register_parameter", "register_buffer"),
    *("register_state_dict_pre_hook", "register_state_dict_post_hook"),
    *("register_load_state_dict_pre_hook", "register_load_state_dict_post_hook"),
    *("__len__", "__iter__", "__contains__", "__getitem__", "__setitem__", "__delitem__"),
):
    setattr(ModelWrapper, _name, _of_the_module(_name))
