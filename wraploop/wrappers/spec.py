"""Choosing a wrapper by a word, or by a line of a config file."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, overload

from torch import nn

from .data_parallel import DataParallel
from .distributed import DistributedModel
from .threaded import ThreadedCPUParallel
from .wrapper import ModelWrapper

Spec = str | Mapping[str, Any] | Sequence[Any] | None
WRAPPERS: dict[str, type[ModelWrapper]] = {
    cls.__name__: cls for cls in (ThreadedCPUParallel, DataParallel, DistributedModel)
}


@overload
def wrap(model: nn.Module, spec: Spec) -> nn.Module: ...
@overload
def wrap(model: Mapping[str, nn.Module], spec: Spec) -> dict[str, nn.Module]: ...
def wrap(model: Any, spec: Spec) -> Any:
    """`model` under the wrapper that `spec` names.

    Args:
        model: a module, or a mapping of modules, each of which is wrapped.
        spec: a name; a mapping of `name` and the wrapper's options; a list of those, from the
            outside in; or None for no wrapper. OmegaConf's mappings and lists are ones too.

    Raises:
        ValueError: there is no such wrapper or option; the message lists what there is.
        TypeError: `spec` or `model` is something else.

    Examples:
        >>> type(wrap(nn.Linear(3, 1), "ThreadedCPUParallel")).__name__
        'ThreadedCPUParallel'
        >>> wrap(nn.Linear(3, 1), {"name": "ThreadedCPUParallel", "threads": 2}).threads
        2
        >>> wrap(nn.Linear(3, 1), None)
        Linear(in_features=3, out_features=1, bias=True)
    """
    if isinstance(model, Mapping):
        return {name: wrap(part, spec) for name, part in model.items()}
    if not isinstance(model, nn.Module):
        raise TypeError(f"wrap takes a torch.nn.Module or a mapping of them; got {model!r}.")
    if spec is None:
        return model
    if isinstance(spec, str):
        return _made(spec, model, {})
    if isinstance(spec, Mapping):
        options = dict(spec)
        if "name" not in options:
            raise ValueError(
                f'A wrapper\'s options need a "name", one of {_names()}; got {spec!r}.'
            )
        return _made(options.pop("name"), model, options)
    if isinstance(spec, Sequence):
        for layer in reversed(spec):
            model = wrap(model, layer)
        return model
    raise TypeError(
        f"A wrapper is named by a string, a mapping with a name, a list of those or None; got "
        f"{spec!r}."
    )


def _made(name: Any, model: nn.Module, options: dict[str, Any]) -> ModelWrapper:
    if not isinstance(name, str) or name not in WRAPPERS:
        raise ValueError(f"There is no wrapper {name!r}. There are {_names()}, or None for none.")
    cls = WRAPPERS[name]
    known = [parameter for parameter in inspect.signature(cls).parameters if parameter != "module"]
    for option in options:
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}. It has {', '.join(known)}.")
    return cls(model, **options)


def _names() -> str:
    return ", ".join(WRAPPERS)
