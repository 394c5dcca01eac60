"""Telling, when a process does not come, which one it is and what each is doing.

Every process has a thread that looks now and then whether somebody has raised the alarm, in the
store that the process group was made with, and answers what its process is doing. A process that
hangs in Python or waits for the others answers too; one that has ended, or is stopped, does not.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

_LOOK_EVERY_S = 0.5
_ANSWER_WITHIN_S = 2.5
_GONE = "it has ended, or is stopped"
_END_WITHIN_S = 10.0  # the store may be slow to answer on a busy machine
_LIBRARIES = (  # Python's own, what is installed, and this one
    *(str(Path(file).parent) for file in (os.__file__, Path(torch.__file__).parent)),
    str(Path(__file__).parents[1]),
)


class Watch:
    """This process's part in it.

    Args:
        store: of the default process group.

    Attributes:
        doing: what this process last said, or says, to the others.
        is_waiting: whether it still waits for their answer.
        error: what ends it; None while nothing does.
    """

    doing = "nothing yet"
    is_waiting = False
    error: BaseException | None = None

    def __init__(self, store: Any) -> None:
        self._store = store
        self._alarms = 0
        self._main = threading.main_thread().ident
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="wraploop-watch", daemon=True)
        self._thread.start()
        atexit.register(self.end)

    def end(self) -> None:
        """Stops looking: a thread that is in the store when Python ends would abort the process."""
        atexit.unregister(self.end)
        self._ended.set()
        self._thread.join(_END_WITHIN_S)

    def is_of(self, store: Any) -> bool:
        """Whether this is the watch over the processes that share `store`, and goes on."""
        return self._store is store and self._thread.is_alive()

    def ask(self) -> str:
        """What the other processes are doing, a line for each that is not waiting."""
        number = self._alarms
        try:
            self._store.set(_alarm(number), "")
            return "\n".join(self._answers(number))
        except Exception as error:  # the store has gone with the process that kept it
            return f"  nobody could be asked: {error}"

    def _answers(self, number: int) -> list[str]:
        until = time.monotonic() + _ANSWER_WITHIN_S
        missing = set(range(dist.get_world_size())) - {dist.get_rank()}
        answers = {}
        while missing and time.monotonic() < until:
            for rank in sorted(missing):
                if self._store.check([_answer(number, rank)]):
                    answers[rank] = self._store.get(_answer(number, rank)).decode()
            missing -= answers.keys()
            time.sleep(0.05)
        lines = [f"  rank {rank} {answer}" for rank, answer in sorted(answers.items())]
        return lines + [f"  rank {rank} does not answer: {_GONE}" for rank in sorted(missing)]

    def _look(self) -> None:
        try:
            while not self._ended.wait(_LOOK_EVERY_S) and dist.is_initialized():
                if self._store.check([_alarm(self._alarms)]):
                    self._store.set(_answer(self._alarms, dist.get_rank()), self._report())
                    self._alarms += 1
        except Exception:  # the process group has ended
            return

    def _report(self) -> str:
        if self.is_waiting:
            return f"waits too: {self.doing}"
        if self.error is not None:
            return f"has failed: {type(self.error).__name__}: {self.error}"
        frame = sys._current_frames().get(self._main or 0)
        return f"did not come; it is at {_place(frame)}, after: {self.doing}"


def _place(frame: FrameType | None) -> str:
    """Where `frame` is, and which line of the script has led there."""
    stack = traceback.walk_stack(frame) if frame else ()
    calls = [f"{f.f_code.co_filename}:{line}" for f, line in stack]
    own = [call for call in calls if not call.startswith((*_LIBRARIES, "<"))]
    places = dict.fromkeys([*calls[:1], *own[:1]])
    return ", called from ".join(places) or "nowhere"


def _alarm(number: int) -> str:
    return f"wraploop/alarm/{number}"


def _answer(number: int, rank: int) -> str:
    return f"wraploop/answer/{number}/{rank}"


_watch: Watch | None = None


def watch() -> Watch | None:
    """This process's watch; None where there is no store to watch."""
    global _watch
    store = default_store()
    if store is None:
        return None
    if _watch is None or not _watch.is_of(store):
        if _watch:
            _watch.end()
        _watch = Watch(store)
    return _watch


def default_store() -> Any:
    """The store that the process group was made with; None where torch does not say which."""
    try:
        return dist.distributed_c10d._get_default_store()
    except (AttributeError, ValueError):
        return None
