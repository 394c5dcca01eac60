"""SIGTERM: whether this process, or another, has been told to end."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from wraploop import processes

EXIT_STATUS = 128 + signal.SIGTERM
_ASK_EVERY_S = 1.0
_LOOK_EVERY_S = 0.1
_MOST_STEPS = 1000


class Leaving:
    """Waits for SIGTERM, which whoever ends a job sends, to one process or to all.

    Processes agree between steps, about once a second, so that all leave after the same step.
    A thread waits, as the main one may be in a call that takes long.

    Args:
        within_s: how long after the signal this process ends all the same, if no step ends; if
            another has failed, which is why it is told, it ends at once.
        is_saving: whether this process saves, which is not counted in.
    """

    def __init__(self, within_s: float, is_saving: Callable[[], bool]) -> None:
        self.within_s = within_s
        self._is_saving = is_saving
        self._is_on = self._is_told = False
        self._put_back: list[Any] = []

    def begin(self) -> None:
        """Waits from now on, unless the signal is somebody else's, or this not the main thread."""
        self._is_on, self._is_told = True, False
        self._steps, self._ask_at, self._asked_s = 0, 1, time.monotonic()
        self._in_time = threading.Event()
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and not self._put_back and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, lambda *_: self._tell_with_children())
            ours, theirs = socket.socketpair()
            theirs.setblocking(False)
            before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
            self._put_back = [before, theirs]
            _waiting.add(self)
            threading.Thread(
                target=self._wait, args=(ours, self._in_time), name="wraploop-leaving", daemon=True
            ).start()

    def end(self) -> None:
        """Waits no longer."""
        self._is_on = False
        if self._put_back:
            self._in_time.set()
            self.put_back()

    def put_back(self) -> None:
        """Has the signal go where it went before."""
        if self._put_back:
            before, theirs = self._put_back
            self._put_back = []
            signal.set_wakeup_fd(before)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            theirs.close()  # which ends the thread, and that closes `ours`

    def is_due(self) -> bool:
        """Whether to leave now, after a step; alike in all processes."""
        if not self._is_on:
            return False
        if processes.world_size() == 1:
            return self._is_told
        self._steps += 1
        if self._steps < self._ask_at:
            return False
        now_s = time.monotonic()
        said = processes.gather((self._is_told, now_s - self._asked_s), "who is told to end")
        slowest_s = max(took_s for _, took_s in said)
        a_second = round(self._steps / max(slowest_s, 1e-6) * _ASK_EVERY_S)
        self._ask_at, self._steps = min(max(a_second, 1), _MOST_STEPS), 0
        self._asked_s = now_s
        return any(told for told, _ in said)

    def was_told(self) -> bool:
        """Whether it has been told to leave until `end`; alike in all processes."""
        return any(processes.gather(self._is_told, "who was told to end"))

    def reach(self) -> None:
        """A step has ended in time: what remains to be done may take as long as it takes."""
        self._in_time.set()

    def _tell(self) -> None:
        self._is_told = True

    def _tell_with_children(self) -> None:
        self._tell()
        # Whoever ends a job may tell all of its processes: a loader's workers end too, which torch
        # would make an error in the middle of the step that is to end.
        if hasattr(signal, "SIGCHLD"):  # not on Windows
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def _wait(self, ours: socket.socket, in_time: threading.Event) -> None:
        with ours:
            while received := ours.recv(1):
                if received[0] == signal.SIGTERM:
                    self._tell()
                    until_s = time.monotonic() + self.within_s
                    while not in_time.wait(_LOOK_EVERY_S):
                        if self._is_saving():
                            until_s = time.monotonic() + self.within_s
                        if time.monotonic() > until_s or processes.failed_elsewhere():
                            os._exit(EXIT_STATUS)


_waiting: weakref.WeakSet[Leaving] = weakref.WeakSet()
_forking = threading.local()


def _hold() -> None:
    """Has a forked process get no signal before it is its own."""
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])


def _let_go() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _put_back_in_child() -> None:
    """A forked process would tell its parent when it is told to end, and not end."""
    for each in list(_waiting):
        each.put_back()
    _let_go()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=_put_back_in_child)
