"""Reading and writing checkpoints.

A checkpoint is a folder: for each model `<name>.safetensors`, weights under the plain model's keys,
and `learner.pt` with what optimizers and callbacks know. Loading executes nothing of it.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_model, save_model

from wraploop import processes
from wraploop.callback import Callback

if TYPE_CHECKING:
    from wraploop.learner import Learner

_REST = "learner.pt"


def save(learner: Learner, path: str | os.PathLike[str]) -> None:
    """Writes a learner's models, optimizers and callbacks to the folder `path`, on rank 0.

    The folder appears when it is whole; a checkpoint that was there is replaced. Random states and
    the position in the data are not in it.

    Raises:
        FileExistsError: there is something that is no checkpoint.
        OSError: it cannot be written.
        PeerError: rank 0 has not written it.
    """
    path, rest = Path(path), _plain(_state_of_the_rest(learner))
    if processes.is_main_process():
        try:
            _write(learner, path, rest)
        except Exception as error:
            if processes.world_size() > 1:
                processes.Channel().fail(error)
            raise
    processes.broadcast(None)  # nobody goes on before it is there


def load(learner: Learner, path: str | os.PathLike[str]) -> None:
    """Takes over what `save` has written, from the same folder on every process.

    Callbacks that are not in the checkpoint start afresh.

    Raises:
        FileNotFoundError: there is no checkpoint of these models.
        ValueError: the optimizers do not fit; nothing has been changed then.
        RuntimeError: weights do not fit.
    """
    path = Path(path)
    for name in learner.models:
        file = path / f"{name}.safetensors"
        if not file.is_file():
            there = f"it has {sorted(os.listdir(path))}" if path.is_dir() else "it is no folder"
            raise FileNotFoundError(f"There is no {file.name} in the checkpoint {path}: {there}.")
    rest = torch.load(path / _REST, map_location="cpu", weights_only=True)
    _check_optimizers(learner, rest["optimizers"])
    for name, model in learner.models.items():
        load_model(_uncompiled(model), str(path / f"{name}.safetensors"))
    for name, optimizer in learner.optimizers.items():
        optimizer.load_state_dict(rest["optimizers"][name]["state"])
    for name, callback in _callbacks(learner).items():
        if name in rest["callbacks"]:
            callback.load_state_dict(rest["callbacks"][name])
        else:
            callback.attach(learner)


def _write(learner: Learner, path: Path, rest: dict[str, Any]) -> None:
    _check_replaced(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    for left in (aside, _old(aside)):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        for name, model in learner.models.items():
            save_model(_uncompiled(model), str(aside / f"{name}.safetensors"))
        torch.save(rest, aside / _REST)
        _put(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _state_of_the_rest(learner: Learner) -> dict[str, Any]:
    """All but the weights."""
    return {
        "optimizers": {
            name: {"kind": type(each).__name__, "state": each.state_dict()}
            for name, each in learner.optimizers.items()
        },
        "callbacks": {name: each.state_dict() for name, each in _callbacks(learner).items()},
    }


def _check_optimizers(learner: Learner, saved: Mapping[str, Any]) -> None:
    mine = {
        name: _shape(type(o).__name__, o.state_dict()) for name, o in learner.optimizers.items()
    }
    theirs = {name: _shape(each["kind"], each["state"]) for name, each in saved.items()}
    if mine != theirs:
        raise ValueError(f"The checkpoint is of optimizers {theirs}, and the learner's are {mine}.")


def _shape(kind: str, state: Mapping[str, Any]) -> str:
    groups = [str(len(group["params"])) for group in state["param_groups"]]
    return f"{kind} of {' + '.join(groups)} parameters"


def _uncompiled(model: torch.nn.Module) -> torch.nn.Module:
    """The model without `torch.compile` around it, which puts a prefix before its keys."""
    return getattr(model, "_orig_mod", model)


def _callbacks(learner: Learner) -> dict[str, Callback]:
    """The callbacks by class, and numbered where there are several of one."""
    found: dict[str, Callback] = {}
    counts: Counter[str] = Counter()
    for callback in learner.callbacks.listed:
        kind = type(callback.unwrapped).__name__
        counts[kind] += 1
        found[f"{kind}-{counts[kind]}" if counts[kind] > 1 else kind] = callback
    return found


def _old(aside: Path) -> Path:
    return aside.with_name(f"{aside.name}.old")


def _check_replaced(path: Path) -> None:
    """Checks that nothing but a checkpoint, or an empty folder, is replaced."""
    is_checkpoint = path.is_dir() and ((path / _REST).exists() or not os.listdir(path))
    if path.exists() and not is_checkpoint:
        raise FileExistsError(
            f"{path} is no checkpoint, and would be replaced by one. Give another path."
        )


def _plain(value: Any) -> Any:
    """With NumPy's numbers as Python's, as loading executes nothing and knows none of NumPy's."""
    if isinstance(value, dict):
        return {_plain(key): _plain(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value


def _put(new: Path, path: Path) -> None:
    """Renames a folder, replacing what is there."""
    old = _old(new)
    if path.exists():
        os.replace(path, old)
    os.replace(new, path)
    shutil.rmtree(old, ignore_errors=True)
