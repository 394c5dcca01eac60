"""How a process ends that belongs to a group: the first that fails speaks last.

It writes its name into the store that the group was made with, tells the others why, waits until
each has said in a line that it ends too, and then prints its traceback. So that is the last that
stands before what torchrun says, and it is the process that torchrun names. Nothing here waits for
long: whoever has ended, or hangs, is not waited for.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

from .channel import Channel, PeerError
from .collectives import is_waited_for
from .watch import default_store, watch

_FIRST = "wraploop/failed/first"
_SHOWN = "wraploop/failed/shown"
_CLAIM_WITHIN_S = 2.0
_LINES_WITHIN_S = 3.0
_SHOW_WITHIN_S = 10.0
_REPEATS_WITHIN_S = 2.0

_process = 0  # the one in which `install` was called last; a fork is another


def install() -> None:
    """Has an exception that ends this process end all, as above; once for each process."""
    global _process
    if _process == os.getpid():
        return
    _process = os.getpid()
    _show_last(_process)
    if threading.current_thread() is threading.main_thread():
        _take_one_interrupt()


def failed_elsewhere() -> bool:
    """Whether another process has said that it fails."""
    with suppress(Exception):  # the group or its store has gone
        store = default_store()
        if store is not None and store.check([_FIRST]):
            return int(store.get(_FIRST)) != dist.get_rank()
    return False


def _show_last(process: int) -> None:
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        def show() -> None:
            before(kind, error, trace)

        ours = os.getpid() == process and threading.current_thread() is threading.main_thread()
        store = default_store() if ours else None
        if store is None or dist.get_world_size() == 1:
            show()
        else:
            atexit.register(_give_up)
            with _uninterrupted():
                Failure(error, show, store).end()

    sys.excepthook = hook


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """A block, of bounded length, in which Ctrl-C does nothing."""
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)


def _give_up() -> None:
    """Ends this process at once if leaving the group would wait for one that does not come."""
    if is_waited_for():
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _take_one_interrupt() -> None:
    """Ignores the Ctrl-C that torchrun passes on right after the one from the terminal."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    last_s = -_REPEATS_WITHIN_S

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal last_s
        now_s = time.monotonic()
        if now_s - last_s > _REPEATS_WITHIN_S:
            last_s = now_s
            signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, interrupt)


class Failure:
    """An exception that ends this process.

    Args:
        error: the exception.
        show: prints its traceback.
        store: of the default process group.
    """

    def __init__(self, error: BaseException, show: Callable[[], None], store: Any) -> None:
        self._error = error
        self._show = show
        self._store = store
        self._rank = dist.get_rank()

    def end(self) -> None:
        """Prints the traceback, or a line where another process's says more, and waits."""
        if watching := watch():
            watching.error = self._error
        try:
            first = self._claim()
        except Exception:  # the store has gone with the process that kept it
            self._show()
            return
        if first == self._rank:
            self._lead()
        else:
            self._follow()

    def _claim(self) -> int:
        """The rank that has failed first; this one if none has yet."""
        if isinstance(self._error, PeerError) and self._error.follows:
            self._wait([_FIRST], _CLAIM_WITHIN_S)
        return int(self._store.compare_set(_FIRST, "", str(self._rank)))

    def _lead(self) -> None:
        others = [_said(rank) for rank in range(dist.get_world_size()) if rank != self._rank]
        begun_s = time.time()
        try:
            with suppress(Exception):  # the group or its store has gone: nobody is left
                if isinstance(self._error, Exception):
                    self._record()
                if isinstance(self._error, PeerError) or Channel().fail(self._error):
                    self._wait(others, _LINES_WITHIN_S)
        finally:
            self._show()
        self._say(_SHOWN)
        time.sleep(max(0.0, int(begun_s) + 1 - time.time()))  # torchrun counts in whole seconds

    def _follow(self) -> None:
        interrupted = isinstance(self._error, KeyboardInterrupt)
        if interrupted or (isinstance(self._error, PeerError) and self._error.follows):
            text = f"{type(self._error).__name__}: {self._error}".removesuffix(": ")
            sys.stderr.write(f"[rank{self._rank}]: {text}\n")  # at once: lines do not mix
            sys.stderr.flush()
        else:
            self._show()
        self._say(_said(self._rank))
        with suppress(Exception):  # the group or its store has gone
            if not isinstance(self._error, PeerError):
                Channel().fail(self._error)  # the first one does so too, and waits for this
            if not interrupted:
                self._wait([_SHOWN], _SHOW_WITHIN_S)
                time.sleep(_LINES_WITHIN_S)  # torchrun names what ends first, and ends this one

    def _record(self) -> None:
        """Gives torchrun the traceback for its summary."""
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler  # seldom

        trace = self._error.__traceback__
        try:
            raise self._error
        except Exception as error:
            get_error_handler().record_exception(error)
        finally:
            self._error.__traceback__ = trace  # without this frame

    def _say(self, key: str) -> None:
        with suppress(Exception):  # the store has gone with the process that kept it
            self._store.set(key, "")

    def _wait(self, keys: Iterable[str], within_s: float) -> None:
        """Waits for the keys, or as long as it may."""
        until = time.monotonic() + within_s
        missing = list(keys)
        while missing and time.monotonic() < until:
            missing = [key for key in missing if not self._store.check([key])]
            time.sleep(0.02)


def _said(rank: int) -> str:
    return f"wraploop/failed/said/{rank}"
