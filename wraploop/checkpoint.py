"""Reading and writing checkpoints: folders that are whole or not there.

    model.safetensors   a model's weights, for each model by its name, under the plain model's keys
    learner.pt          everything else that is in `state`; loading executes nothing of it
    checkpoint.json     when it was made, how far training was, and the other files' SHA-256

A checkpoint is written beside its place, flushed to the disk, and renamed when it is whole. What
was in its place is renamed too, and is found if the process is killed between the two.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from wraploop import processes
from wraploop.state import State

if TYPE_CHECKING:
    from wraploop.learner import Learner

_LIST, _REST, _WEIGHTS = "checkpoint.json", "learner.pt", ".safetensors"
_FORMAT = 1
_BLOCK = 2**20  # bytes read at once


class NotWhole(ValueError):
    """A checkpoint that is truncated, damaged, or none."""


def save(learner: Learner, path: str | os.PathLike[str]) -> None:
    """Writes the learner's state to the folder `path`, on rank 0; every process has to call it.

    Raises:
        FileExistsError, OSError, TypeError: as `copied` and `write`.
        PeerError: rank 0 has got such an error.
    """
    state = learner.state_dict()

    def write_on_main() -> None:
        if processes.is_main_process():
            write(copied(state), path, steps_of(learner))

    processes.on_main(write_on_main)


def steps_of(learner: Learner) -> int:
    """How many training steps the learner has counted."""
    return getattr(vars(learner).get("history"), "training_steps", 0)


def read_alike(path: str | os.PathLike[str]) -> State:
    """What is in a checkpoint, read by every process from the same folder.

    Raises:
        OSError, NotWhole: one of them cannot.
        ValueError: they have found different ones, in folders of that name of their own.
    """
    state, error, checksums = None, None, b""
    try:
        state, checksums = read(path), (_replaced(Path(path)) / _LIST).read_bytes()
    except Exception as failed:
        error = failed
    own = error and f"{type(error).__name__}: {error}", checksums
    said = processes.gather(own, "whether a checkpoint can be read")
    if error:
        raise error
    failed = {rank: each for rank, (each, _) in enumerate(said) if each}
    if failed:
        rank, message = next(iter(failed.items()))
        raise OSError(
            f"Rank {rank} cannot read the checkpoint, which rank {processes.rank()} can: {message} "
            "Every process reads it: put it where all of them see it."
        )
    differing = [rank for rank, each in enumerate(said) if each != said[0]]
    if differing:
        raise ValueError(
            f"Rank {differing[0]} has another checkpoint in {path} than rank 0. Every process "
            "reads the same: put it where all of them see it."
        )
    assert state is not None
    return state


def copied(state: State) -> State:
    """The state as it is now, in memory: training may go on while it is written.

    Raises:
        TypeError: there is something in it that loading would have to execute; names its place.
    """
    return {key: _copied(value, key) for key, value in state.items()}


def write(state: State, path: str | os.PathLike[str], steps: int = 0) -> None:
    """Writes a `copied` state to the folder `path`; a checkpoint that was there is replaced.

    Args:
        state: of a learner.
        path: the folder; it appears when it is whole.
        steps: how many training steps had been made, for whoever looks into the folder.

    Raises:
        FileExistsError: there is something that is no checkpoint.
        OSError: it cannot be written; what was there is as it was.
    """
    path = Path(path).absolute()
    check_replaced(path)
    new = path.with_name(f".{path.name}.new")
    shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
    new.mkdir(parents=True)
    try:
        _write_files(state, new)
        files = {file.name: _fingerprint(file) for file in sorted(new.iterdir())}
        about = {"format": _FORMAT, "steps": steps, "made_ns": time.time_ns(), "files": files}
        (new / _LIST).write_text(json.dumps(about, indent=1))
        for file in [*new.iterdir(), new]:
            _flush(file)
        _put(new, path)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def read(path: str | os.PathLike[str]) -> State:
    """The state in a checkpoint, once it has been checked that it is whole.

    Raises:
        FileNotFoundError: there is no checkpoint.
        NotWhole: it is truncated or damaged.
        pickle.UnpicklingError: it would execute something.
    """
    from safetensors.torch import load_file  # slow to import, and seldom used

    path = _replaced(Path(path))
    check_whole(path)
    rest: State = torch.load(path / _REST, map_location="cpu", weights_only=True)
    for name in rest["models"]:
        rest["models"][name].update(load_file(path / f"{name}{_WEIGHTS}"))
    return rest


def newest(folder: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint in a folder that is whole; warns of newer ones that are not."""
    candidates = sorted(_found(Path(folder)), reverse=True)
    for _, path in candidates:
        try:
            check_whole(path)
        except NotWhole as error:
            warnings.warn(f"{error} It is passed over.", stacklevel=2)
        else:
            return path
    if candidates:
        warnings.warn(f"No checkpoint in {folder} is whole: there is none to use.", stacklevel=2)
    return None


def check_whole(path: Path) -> None:
    """Checks that the files of a checkpoint are as they were written.

    Raises:
        FileNotFoundError: there is no checkpoint.
        NotWhole: they are not.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"There is no checkpoint {path}: it is no folder.")
    if not (path / _LIST).is_file():
        raise FileNotFoundError(f"There is no {_LIST} in {path}, which has {_inside(path)}.")
    try:
        files = json.loads((path / _LIST).read_bytes())["files"]
        wrong = [name for name, each in files.items() if _fingerprint(path / name) != each]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotWhole(f"The checkpoint {path} is not whole: {error!r}.") from error
    if wrong:
        raise NotWhole(f"The checkpoint {path} is not whole: {', '.join(wrong)} is damaged.")


def check_replaced(path: Path) -> None:
    """Checks that nothing but a checkpoint, or an empty folder, is replaced.

    Raises:
        FileExistsError: it is something else.
    """
    is_checkpoint = path.is_dir() and all(map(_is_of_one, path.iterdir()))
    if path.exists() and not is_checkpoint:
        raise FileExistsError(
            f"{path} is no checkpoint, and would be replaced by one. Give another path."
        )


class Writer:
    """Writes checkpoints while training goes on, one after the other."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._running: Future[None] | None = None

    def write(self, state: State, path: Path, steps: int, removed: list[Path]) -> None:
        """Begins to write, and removes `removed` once that is done. Waits for the one before.

        Raises:
            OSError: the one before could not be written.
        """
        self.wait()
        self._pool = self._pool or ThreadPoolExecutor(1, "wraploop-checkpoint")
        self._running = self._pool.submit(_write_and_remove, state, path, steps, removed)

    def is_writing(self) -> bool:
        """Whether something is being written."""
        return self._running is not None and not self._running.done()

    def wait(self) -> None:
        """Waits until nothing is being written.

        Raises:
            OSError: it could not be.
        """
        running = self._running
        try:
            if running:
                running.result()
        finally:
            self._running = None


def _write_and_remove(state: State, path: Path, steps: int, removed: list[Path]) -> None:
    write(state, path, steps)
    for each in removed:
        _remove(each)


def _write_files(state: State, folder: Path) -> None:
    from safetensors import SafetensorError  # slow to import, and seldom used
    from safetensors.torch import save_file

    tensors, rest = _parted(state)
    try:
        for name, each in tensors.items():
            save_file(each, folder / f"{name}{_WEIGHTS}")
        torch.save(rest, folder / _REST)
    except (RuntimeError, SafetensorError) as error:  # as both say that the disk is full
        raise OSError(f"The checkpoint {folder} could not be written: {error}") from error


def _parted(state: State) -> tuple[dict[str, dict[str, Tensor]], State]:
    """Weights by model, as `safetensors` takes them, and all the rest."""
    tensors = {
        name: {key: value for key, value in each.items() if _fits(value)}
        for name, each in state["models"].items()
    }
    others = {
        name: {key: value for key, value in each.items() if not _fits(value)}
        for name, each in state["models"].items()
    }
    return tensors, {**state, "models": others}


def _fits(value: Any) -> bool:
    """Whether `safetensors` can hold it."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
        return False
    return value.dtype not in (torch.complex128, torch.complex32)


_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes})


def _copied(value: Any, where: str) -> Any:
    if isinstance(value, Tensor):
        own = value.detach().to("cpu", copy=True)
        return own if own.layout != torch.strided else own.contiguous()
    if isinstance(value, Mapping):
        return {
            _copied(key, f"a key of {where}"): _copied(each, f"{where}[{key!r}]")
            for key, each in value.items()
        }
    if isinstance(value, (list, tuple)):
        if _PLAIN.issuperset(map(type, value)):  # a random state's hundreds of numbers
            return tuple(value) if isinstance(value, tuple) else list(value)
        copies = [_copied(each, f"{where}[{index}]") for index, each in enumerate(value)]
        return tuple(copies) if isinstance(value, tuple) else copies
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, torch.dtype)):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # of an Enum too: loading knows no class but Python's own
    kinds: tuple[Any, ...] = (int, float, complex, bytes)
    for kind in kinds:
        if isinstance(value, kind):
            return kind(value)
    raise _not_plain(value, where)


def _not_plain(value: Any, where: str) -> TypeError:
    return TypeError(
        f"A checkpoint holds tensors, numbers, text, and lists and dicts of these, as loading it "
        f"must execute nothing; and {where} is a {type(value).__module__}."
        f"{type(value).__qualname__}. Have its `state_dict` return something plain."
    )


def _fingerprint(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK):
            digest.update(block)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


def _flush(path: Path) -> None:
    """Has the disk keep a file, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put(new: Path, path: Path) -> None:
    """Renames a folder, replacing what is there."""
    old = _old(path)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
    os.replace(new, path)
    _flush(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _remove(path: Path) -> None:
    """Removes a folder; a kill leaves none that looks like a checkpoint."""
    old = _old(path)
    try:
        os.replace(path, old)
    except FileNotFoundError:
        return
    shutil.rmtree(old, ignore_errors=True)


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _replaced(path: Path) -> Path:
    """`path`, or what was there if its writer was killed in the moment of replacing it."""
    return path if path.exists() or not _old(path).exists() else _old(path)


def _found(folder: Path) -> list[tuple[float, Path]]:
    """The checkpoints in a folder, with when they were made; those that do not say, as newest."""
    found: list[tuple[float, Path]] = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith(".") or not (path / _LIST).is_file():
            continue
        try:
            about = json.loads((path / _LIST).read_bytes())
            found.append((about["made_ns"], path))
        except (OSError, ValueError, KeyError, TypeError):
            found.append((float("inf"), path))
    return found


def _is_of_one(file: Path) -> bool:
    """Whether the file's name is that of one in a checkpoint."""
    return file.name in (_LIST, _REST) or file.suffix == _WEIGHTS


def _inside(path: Path) -> list[str]:
    return sorted(os.listdir(path))
