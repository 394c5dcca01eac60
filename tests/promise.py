"""Making a step against plain and wrapped models, and comparing what comes of it."""

from __future__ import annotations

import dataclasses
import functools
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.steps import STEPS, Step

Wrap = Callable[[nn.Module, tuple[str, ...]], nn.Module]
Snapshot = dict[str, Any]

FLOOR = 1e-3  # of rtol, of the largest number of the snapshot


def plain(module: nn.Module, _: tuple[str, ...]) -> nn.Module:
    """No wrapper."""
    return module


def snapshots(step: Step, wrap: Wrap) -> list[Snapshot]:
    """What `step` returns and leaves behind, each time that it is made."""
    with _float64():
        torch.manual_seed(0)
        built = step.build()
        for name, module in built.items():
            if wrap is not plain and name not in step.plain:
                methods = tuple(m for m in step.methods if hasattr(module, m))
                built = {**built, name: wrap(module, methods)}
        models = SimpleNamespace(**built)
        optimizers = SimpleNamespace(**step.optimizers(models))
        torch.manual_seed(1)
        found = []
        for k in range(step.steps):
            output = step.run(models, optimizers, k)
            found.append({**_flat("output", output), **_state(models)})
        if not step.draws:
            found[-1]["random state"] = torch.get_rng_state()
        return found


@functools.cache
def expected(name: str) -> list[Snapshot]:
    """What the step of that name gives with plain models."""
    return snapshots(STEPS[name], plain)


def differences(step: Step, found: list[Snapshot], but: tuple[str, ...] = ()) -> str:
    """Where `found` is not what the plain step gives, `but` for some names; empty if it is."""
    lines = []
    for k, pair in enumerate(zip(found, expected(step.name), strict=True)):
        mine, plains = ({n: v for n, v in s.items() if not n.startswith(but)} for s in pair)
        if mine.keys() != plains.keys():
            lines.append(f"step {k}: other names: {sorted(mine.keys() ^ plains.keys())}")
        for key in mine.keys() & plains.keys():
            difference = _difference(mine[key], plains, key, step.rtol)
            if difference:
                lines.append(f"step {k}: {key}: {difference}")
        if lines:  # later ones follow from it
            break
    return "\n".join([*sorted(lines)[:6], *([f"({len(lines)} in all)"] if len(lines) > 6 else [])])


@contextmanager
def at_most(seconds: int, doing: str) -> Iterator[None]:
    """Raises TimeoutError in the main thread when the block takes longer."""

    def raise_(*_: Any) -> None:
        raise TimeoutError(f"{doing} took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, raise_)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _float64() -> Iterator[None]:
    before = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_default_dtype(before[0])
        torch.set_num_threads(before[1])


def _state(models: SimpleNamespace) -> Snapshot:
    found: Snapshot = {}
    for model_name, model in vars(models).items():
        if not isinstance(model, nn.Module):
            continue
        for name, parameter in model.named_parameters():
            path = f"{model_name}.{name}"
            found[path] = _kept(parameter)
            found[f"{path}.grad"] = None if parameter.grad is None else _kept(parameter.grad)
            found[f"{path}.requires_grad"] = parameter.requires_grad
        for name, buffer in model.named_buffers():
            found[f"{model_name}.{name}"] = _kept(buffer)
        found[f"{model_name} keys"] = list(model.state_dict())
    return found


def _flat(path: str, nest: Any) -> Snapshot:
    if isinstance(nest, Tensor):
        return {path: _kept(nest), f"{path}.requires_grad": nest.requires_grad}
    if dataclasses.is_dataclass(nest) and not isinstance(nest, type):
        children: Any = [(f.name, getattr(nest, f.name)) for f in dataclasses.fields(nest)]
    elif isinstance(nest, Mapping):
        children = nest.items()
    elif isinstance(nest, (list, tuple)):
        children = enumerate(nest)
    else:
        return {path: nest}
    found: Snapshot = {f"{path} type": type(nest).__name__}
    for key, child in children:
        found.update(_flat(f"{path}[{key!r}]", child))
    return found


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _largest(tensor: Tensor) -> float:
    dense = tensor.to_dense()
    finite = dense[dense.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _difference(mine: Any, everything: Snapshot, key: str, rtol: float) -> str:
    plains = everything[key]
    if not (isinstance(mine, Tensor) and isinstance(plains, Tensor)):
        same = type(mine) is type(plains) and mine == plains
        return "" if same else f"{_short(mine)} instead of {_short(plains)}"
    for what in ("shape", "dtype", "layout"):
        a, b = getattr(mine, what), getattr(plains, what)
        if a != b:
            return f"{what} {a} instead of {b}"
    mine, plains = mine.to_dense(), plains.to_dense()
    if torch.equal(mine, plains):
        return ""
    if not _is_number(plains):
        return "differs"
    same = (mine == plains) | (mine.isnan() & plains.isnan())
    error = float((mine - plains).abs().double().masked_fill(same, 0.0).max())
    largest = _largest(plains)
    if error <= rtol * largest:
        return ""
    scale = max(_largest(value) for value in everything.values() if _is_number(value))
    if error <= rtol * FLOOR * scale:
        return ""
    return f"off by {error:.1e} where the largest is {largest:.1e}"


def _short(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
