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

import torch
from safetensors.torch import load_model, save_model

from wraploop import processes
from wraploop.callback import Callback

if TYPE_CHECKING:
    from wraploop.learner import Learner

_REST = "learner.pt"


def save(learner: Learner, path: str | os.PathLike[str]) -> None:
    """Writes a learner's models, optimizers and callbacks to the folder `path`, on rank 0.

    The folder appears when it is whole; one that was there is replaced.
    """
    path, rest = Path(path), state_of_the_rest(learner)
    if processes.is_main_process():
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        aside.mkdir(parents=True)
        try:
            for name, model in learner.models.items():
                save_model(model, str(aside / f"{name}.safetensors"))
            torch.save(rest, aside / _REST)
            _put(aside, path)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    processes.broadcast(None)  # nobody goes on before it is there


def load(learner: Learner, path: str | os.PathLike[str]) -> None:
    """Takes over what `save` has written, from the same folder on every process.

    Callbacks that are not in the checkpoint stay as they are.

    Raises:
        FileNotFoundError: there is no checkpoint of these models.
        ValueError: the optimizers do not fit.
        RuntimeError: weights do not fit.
    """
    path = Path(path)
    for name, model in learner.models.items():
        file = path / f"{name}.safetensors"
        if not file.is_file():
            there = sorted(each.name for each in path.iterdir()) if path.is_dir() else "no folder"
            raise FileNotFoundError(f"There is no {file}: the checkpoint has {there}.")
        load_model(model, str(file))
    rest = torch.load(path / _REST, map_location="cpu", weights_only=True)
    load_the_rest(learner, rest)


def state_of_the_rest(learner: Learner) -> dict[str, Any]:
    """All but the weights."""
    return {
        "optimizers": {name: each.state_dict() for name, each in learner.optimizers.items()},
        "callbacks": {name: each.state_dict() for name, each in _callbacks(learner).items()},
    }


def load_the_rest(learner: Learner, rest: Mapping[str, Any]) -> None:
    """Takes over what `state_of_the_rest` has returned."""
    if rest["optimizers"].keys() != learner.optimizers.keys():
        raise ValueError(
            f"The checkpoint is of optimizers {list(rest['optimizers'])}, "
            f"and the learner's are {list(learner.optimizers)}."
        )
    for name, optimizer in learner.optimizers.items():
        optimizer.load_state_dict(rest["optimizers"][name])
    for name, callback in _callbacks(learner).items():
        if name in rest["callbacks"]:
            callback.load_state_dict(rest["callbacks"][name])


def _callbacks(learner: Learner) -> dict[str, Callback]:
    """The callbacks by class, and numbered where there are several of one."""
    found: dict[str, Callback] = {}
    counts: Counter[str] = Counter()
    for callback in learner.callbacks.listed:
        kind = type(callback.unwrapped).__name__
        counts[kind] += 1
        found[f"{kind}-{counts[kind]}" if counts[kind] > 1 else kind] = callback
    return found


def _put(new: Path, path: Path) -> None:
    """Renames a folder, replacing what is there."""
    old = new.with_name(f"{new.name}.old")
    if path.exists():
        os.replace(path, old)
    os.replace(new, path)
    shutil.rmtree(old, ignore_errors=True)
