"""Processes that do what they are asked, and sleep in between.

A process that is not asked is blocked reading a pipe, and takes no time from the others.
"""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from wraploop.processes import connecting

from .server import CONTEXT

TIMEOUT_S = 300.0


class Member:
    """One process, as the functions that it is asked to call see it.

    Attributes:
        kept: whatever they keep from call to call.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.kept: dict[str, Any] = {}


class Crew:
    """Processes that make up a process group, if they are several.

    Args:
        size: how many.
        apart: whether they send each other all, and do not read each other's memory.

    Examples:
        with Crew(2) as crew:
            crew.ask(2, function, *args)
    """

    def __init__(self, size: int, apart: bool = False) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="bench-")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = CONTEXT.Pipe()
            arguments = (theirs, rank, size, Path(self._folder.name) / "meeting", apart)
            process = CONTEXT.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def ask(self, members: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function(member, *args)` returns in each of the first `members` processes.

        Raises:
            RuntimeError: it has failed in one of them, or a process has ended.
        """
        asked = self._pipes[:members]
        for pipe in asked:
            pipe.send((function, args))
        answers: dict[Connection, Any] = {}
        while len(answers) < len(asked):
            ready = wait([pipe for pipe in asked if pipe not in answers], TIMEOUT_S)
            if not ready:
                raise RuntimeError(f"{function.__name__}{args} has taken more than {TIMEOUT_S} s.")
            answers.update({pipe: _received(pipe) for pipe in asked if pipe in ready})
        return [answers[pipe] for pipe in asked]

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pipe in self._pipes:
            pipe.close()  # which has the process end
        for process in self._processes:
            process.join(0 if error else 10)
            process.kill()
            process.join()
        self._folder.cleanup()


def _received(pipe: Connection) -> Any:
    try:
        answer, failure = pipe.recv()
    except EOFError:
        failure, answer = "A process of the benchmark has ended.", None
    if failure:
        raise RuntimeError(failure)
    return answer


def _serve(pipe: Connection, rank: int, size: int, meeting: Path, apart: bool) -> None:
    if apart:
        connecting.own_arena = lambda: None
    if size > 1:
        dist.init_process_group(
            *("gloo", f"file://{meeting}"),
            timeout=timedelta(seconds=TIMEOUT_S),
            world_size=size,
            rank=rank,
        )
    member = Member(rank)
    torch.set_num_threads(1)
    try:
        _answer_all(pipe, member)
    finally:
        if size > 1:
            dist.destroy_process_group()


def _answer_all(pipe: Connection, member: Member) -> None:
    """Answers until nobody asks any more."""
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((function(member, *args), ""))
        except Exception:
            pipe.send((None, f"rank {member.rank}: {traceback.format_exc()}"))
