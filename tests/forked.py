"""Processes that start at once: forked from one that has imported torch and computed nothing.

Imports take a process 3 to 6 s. What python and torchrun do, `test_launch.py` and `test_readme.py`
see without this.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch._dynamo", "sklearn.datasets", "matplotlib.pyplot", "torchmetrics", "tests.ranks"]
)
_OUTPUTS = ("stdout", "stderr")


def start_server() -> None:
    """Starts what processes are forked from, if it does not run; it ends with this process."""
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        forkserver.ensure_running()


def run(script: Path, *arguments: Any, processes: int = 0) -> subprocess.CompletedProcess[str]:
    """What `python SCRIPT ARGUMENTS` comes to, or the same by torchrun with so many `processes`."""
    command = [str(script), *map(str, arguments)]
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [_environment(rank, processes, store.port) for rank in range(processes)]
    with tempfile.TemporaryDirectory() as folder:
        found = call(_be_python, [(command, rank) for rank in ranks or [{}]], Path(folder))
    return subprocess.CompletedProcess(command, found.returncode, found.stdout, found.stderr)


def call(
    function: Callable[..., Any],
    calls: list[tuple[Any, ...]],
    folder: Path,
    timeout_s: float = 120.0,
) -> subprocess.CompletedProcess[str]:
    """Makes each of `calls` in a process of its own, which write `folder`/stdout and /stderr.

    Those that take longer than `timeout_s` are killed, with all that they have started. The return
    code is one that is not 0, if there is one.
    """
    start_server()
    started = [_CONTEXT.Process(target=_lead, args=(folder, function, each)) for each in calls]
    for process in started:
        process.start()
    until_s = time.monotonic() + timeout_s
    try:
        for process in started:
            process.join(max(0.0, until_s - time.monotonic()))
    finally:
        for process in started:
            assert process.pid
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
    code = next((process.exitcode for process in started if process.exitcode), 0)
    out, err = ((folder / name).read_text() for name in _OUTPUTS)
    return subprocess.CompletedProcess(function.__name__, code, out, err)


def _lead(folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # of a loader's workers: not this server
    for number, name in enumerate(_OUTPUTS, start=1):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    function(*arguments)


def _be_python(command: list[str], environment: dict[str, str]) -> None:
    """Does what Python does that was started with `command`."""
    os.environ.update(environment)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    try:
        runpy.run_path(command[0], run_name="__main__")
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()


def _environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """As torchrun's."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
