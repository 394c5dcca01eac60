"""Threads that outlive a call, and what of torch's state must be carried into them.

Grad mode, inference mode, autocast, default device, torch-function modes and the number of operator
threads are kept per thread by torch: a new thread has none of them. Saved-tensor hooks are too, and
stay behind.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from contextvars import Context, copy_context
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

from .internals import as_it_is, function_modes, has_saved_tensors_hooks, wake_engine

T = TypeVar("T")


class Disagreement(RuntimeError):
    """A piece of work waited for another that had ended; which may itself have failed."""


class Threads:
    """Worker threads that outlive a call, and end with this object.

    The calling thread does the first piece of work.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        """Starts afresh, as also in a forked process, which has none of its parent's threads."""
        self._process = os.getpid()
        self._workers: list[_Worker] = []
        self._busy = threading.Lock()
        self._turn = threading.RLock()
        wake_engine()

    def turn(self) -> AbstractContextManager[Any]:
        """A block that one thread at a time is in."""
        if os.getpid() != self._process:
            self._begin()
        return self._turn

    def run(
        self,
        work: list[Callable[[], T]],
        operator_threads: int | None,
        on_failure: Callable[[], None] = lambda: None,
    ) -> list[T]:
        """Does all pieces of work at the same time; the results in order, or an error at the end.

        Args:
            work: the pieces.
            operator_threads: how many threads each piece's operators may use; None: no limit.
            on_failure: called after an error or an interrupt; none may wait for another then.
        """
        if os.getpid() != self._process:
            self._begin()
        if not self._busy.acquire(blocking=False):  # two steps at once: the second gets its own
            return Threads().run(work, operator_threads, on_failure)
        before = torch.get_num_threads()
        try:
            while len(self._workers) < len(work) - 1:
                self._workers.append(_Worker(len(self._workers) + 1, self))
            enter = _surroundings(operator_threads)
            tasks = [_Task(partial(_inside, enter, copy_context(), piece)) for piece in work[1:]]
            for worker, task in zip(self._workers, tasks, strict=False):
                worker.tasks.put(task)
            first = _Task(work[0])
            if operator_threads is not None:
                torch.set_num_threads(operator_threads)
            with _no_saved_tensors_hooks():
                first.do()
            if first.error is not None:
                on_failure()
            return _results([first, *tasks])
        except BaseException:
            on_failure()
            workers, self._workers = self._workers, []  # an error may have left torch's state there
            _wait_for(workers)
            for worker in workers:
                worker.tasks.put(None)
            raise
        finally:
            if operator_threads is not None:
                torch.set_num_threads(before)
            self._busy.release()


class _Task:
    """A piece of work, done once, and what became of it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work: Callable[[], Any] | None = work
        self._ended = threading.Lock()
        self._ended.acquire()
        self.result: Any = None
        self.error: BaseException | None = None

    def do(self) -> None:
        work, self._work = self._work, None
        try:
            assert work is not None
            self.result = work()
        except BaseException as error:
            self.error = error
        finally:
            del work
            self._ended.release()

    def wait(self) -> None:
        self._ended.acquire()


def _results(tasks: list[_Task]) -> list[Any]:
    for task in tasks:
        task.wait()
    errors = [task.error for task in tasks if task.error is not None]
    try:
        for error in errors:
            if not isinstance(error, Disagreement):  # which may only follow from another's failure
                raise error
        if errors:
            raise errors[0]
        return [task.result for task in tasks]
    finally:
        del errors


def _wait_for(workers: list[_Worker]) -> None:
    """Waits until they have done all that they were given."""
    ends = [_Task(lambda: None) for _ in workers]
    for worker, end in zip(workers, ends, strict=True):
        worker.tasks.put(end)
    for end in ends:
        end.wait()


class _Worker(threading.Thread):
    """Does tasks in order, until `None` comes, or what it works for is gone."""

    def __init__(self, number: int, works_for: Threads) -> None:
        super().__init__(name=f"wraploop-lane-{number}", daemon=True)
        self.tasks: SimpleQueue[_Task | None] = SimpleQueue()
        weakref.finalize(works_for, self.tasks.put, None).atexit = False
        self.start()

    def run(self) -> None:
        while (task := self.tasks.get()) is not None:
            task.do()
            del task  # with what it has computed, before the next one comes


def _no_saved_tensors_hooks() -> AbstractContextManager[Any]:
    """Keeps the calling thread's hooks from what is saved in its lane.

    Checkpointing counts what is saved, in order, and lanes save at the same time.
    """
    if not has_saved_tensors_hooks():
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(as_it_is, as_it_is)


def _inside(enter: Callable[[ExitStack], None], context: Context, work: Callable[[], T]) -> T:
    with ExitStack() as stack:
        enter(stack)
        return context.run(work)


def _surroundings(operator_threads: int | None) -> Callable[[ExitStack], None]:
    """What the calling thread has set that torch keeps per thread, to be entered by another."""
    devices = [d for d in ("cpu", _accelerator()) if d]
    casts = [(d, torch.get_autocast_dtype(d), torch.is_autocast_enabled(d)) for d in devices]
    cache = torch.is_autocast_cache_enabled()
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    modes = function_modes()

    def enter(stack: ExitStack) -> None:
        if operator_threads is not None:
            torch.set_num_threads(operator_threads)
        stack.enter_context(torch.inference_mode(inference))
        stack.enter_context(torch.set_grad_enabled(grad))
        for device, dtype, enabled in casts:
            if enabled or torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, dtype, enabled, cache))
        for mode in modes:
            stack.enter_context(mode)

    return enter


def _accelerator() -> str | None:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found.type if found else None
