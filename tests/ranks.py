"""Making all steps in several processes.

One spawn makes many steps, one after the other. Processes meet in files, between steps too, so that
they go on in step after a failure, with a new process group; and a process that hangs says where.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import nn

from tests import forked
from tests.promise import Wrap, differences, expected, snapshots
from tests.steps import STEPS, Step, registry
from wraploop import DistributedModel, ThreadedCPUParallel

WAIT_S = 10  # for another process
HANG_S = 40  # for a step


def _distributed(module: nn.Module, methods: tuple[str, ...]) -> nn.Module:
    return DistributedModel(module, methods=methods, timeout_s=WAIT_S)


def _local(reduction: str, threads: int = 1) -> Wrap:
    def wrap(module: nn.Module, methods: tuple[str, ...]) -> nn.Module:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        registry.OWN[:] = rank, world_size
        options = {"batch": "local", "reduction": reduction, "timeout_s": WAIT_S}
        if threads > 1:
            module = ThreadedCPUParallel(module, threads, methods=methods)
        return DistributedModel(module, methods=methods, **options)  # pyright: ignore

    return wrap


def _stacked(module: nn.Module, methods: tuple[str, ...]) -> nn.Module:
    return _distributed(ThreadedCPUParallel(module, threads=2, methods=methods), methods)


CONFIGURATIONS: dict[str, tuple[int, Wrap]] = {
    "DistributedModel-2": (2, _distributed),
    "DistributedModel-3": (3, _distributed),
    "DistributedModel-4": (4, _distributed),
    "DistributedModel-ThreadedCPUParallel-2x2": (2, _stacked),
}
LOCAL: dict[str, tuple[int, Wrap]] = {
    f"{reduction}-local-{n}": (n, _local(reduction))
    for reduction in ("mean", "sum")
    for n in (2, 3, 4)
} | {f"{reduction}-local-2x2": (2, _local(reduction, threads=2)) for reduction in ("mean", "sum")}


# In the process that starts them


def failures(configuration: str, folder: Path, names: Iterable[str] = STEPS) -> dict[str, str]:
    """What goes wrong with those of the steps `names` that are not right in processes."""
    world_size, _ = {**CONFIGURATIONS, **LOCAL}[configuration]
    left = list(names)
    found: dict[str, str] = {}
    while left:
        here = folder / str(len(left))
        here.mkdir(parents=True)
        ended = _run(configuration, world_size, here, left)
        if not all((here / f"started.{rank}").exists() for rank in range(world_size)):
            raise RuntimeError(ended)
        texts = {name: _reports(here, name, world_size) for name in left}
        done = [name for name in left if None not in texts[name]]
        found.update({name: _told_apart(texts[name]) for name in done if any(texts[name])})
        left = left[len(done) :]
        if left:  # the processes have ended within this one
            found[left[0]] = f"the processes ended or hung:\n{ended}"
            left = left[1:]
    return found


def _told_apart(texts: list[str | None]) -> str:
    """What the ranks say, each thing once."""
    ranks: dict[str, list[str]] = {}
    for rank, text in enumerate(texts):
        ranks.setdefault(text or "nothing is wrong", []).append(str(rank))
    return "\n".join(f"rank {', '.join(numbers)}: {text}" for text, numbers in ranks.items())


def _run(configuration: str, world_size: int, folder: Path, names: list[str]) -> str:
    """Runs the processes to their end, and returns what they wrote, if it was bad."""
    (folder / "names").write_text("\n".join(names))
    timeout_s = 2 * HANG_S + 5 * len(names)
    if forked.call(launch, [(configuration, folder)], folder, timeout_s).returncode == 0:
        return ""
    paths = [folder / "stderr", *(folder / f"stderr.{rank}" for rank in range(world_size))]
    said = ((path.name, path.read_text()[-3000:]) for path in paths if path.exists())
    return "\n".join(f"{name}: {text}" for name, text in said if text)


def _reports(folder: Path, name: str, world_size: int) -> list[str | None]:
    """What each rank has reported on a step: nothing yet (None), or what is wrong, or ""."""
    paths = [folder / f"{name}.{rank}" for rank in range(world_size)]
    return [json.loads(path.read_text())["wrong"] if path.exists() else None for path in paths]


# In a process that makes the plain steps, and then becomes several


def launch(configuration: str, folder: Path) -> NoReturn:
    """Forks a process for each rank; exits with 0 if all end well."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    names = (folder / "names").read_text().split()
    for name in names:
        expected(name)
    world_size, wrap = {**CONFIGURATIONS, **LOCAL}[configuration]
    children = []
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            _become(rank, world_size, wrap, names, folder)
        children.append(child)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children))


def _become(rank: int, world_size: int, wrap: Wrap, names: list[str], folder: Path) -> NoReturn:
    code = 1
    try:
        stderr = os.open(folder / f"stderr.{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(stderr, 2)
        (folder / f"started.{rank}").touch()
        main(rank, world_size, wrap, names, folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def main(rank: int, world_size: int, wrap: Wrap, names: list[str], folder: Path) -> None:
    """Makes the steps `names`, and reports on each in a file."""
    for number, name in enumerate(names):
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        if not dist.is_initialized():
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/group{number}",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=WAIT_S),
            )
        wrong, raised = _check(STEPS[name], wrap, wrap in [local for _, local in LOCAL.values()])
        _report(folder, name, rank, wrong, raised)
        if _has_raised(folder, name, world_size):
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()
    if dist.is_initialized():
        dist.destroy_process_group()


def _check(step: Step, wrap: Wrap, is_local: bool) -> tuple[str, bool]:
    """What is wrong with `step`, and whether it raised."""
    try:
        found = snapshots(step, wrap)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if step.refused and re.search(step.refused, text):
            return "", True
        return f"{text}\n{_where(error)}", True
    if step.refused:
        return f"was not refused ({step.refused})\n{differences(step, found)}", False
    return differences(step, found, but=("output", "random state") if is_local else ()), False


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    notes = getattr(error, "__notes__", [])
    return "\n".join([*notes, *(f"  {Path(f.filename).name}:{f.lineno} {f.line}" for f in frames)])


def _report(folder: Path, name: str, rank: int, wrong: str, raised: bool) -> None:
    part = folder / f"{name}.{rank}.part"
    part.write_text(json.dumps({"wrong": wrong, "raised": raised}))
    part.rename(folder / f"{name}.{rank}")


def _has_raised(folder: Path, name: str, world_size: int) -> bool:
    """Waits for everyone's report on a step; whether somebody's is that it raised."""
    missing = [folder / f"{name}.{rank}" for rank in range(world_size)]
    raised, pause_s = False, 0.0005
    while missing:
        if missing[-1].exists():
            raised |= json.loads(missing.pop().read_text())["raised"]
        else:
            time.sleep(pause_s)
            pause_s = min(0.05, 1.5 * pause_s)
    return raised
