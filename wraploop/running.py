"""What is running: the state of a step, and an epoch."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from wraploop.draws import State, draws_of, put_draws
from wraploop.events import CancelEpoch
from wraploop.later import batches_after
from wraploop.phases import Batch, Phase

Batches: TypeAlias = Iterable[Batch]


class StepState:
    """The state of one step: its batch, whether it was cancelled, and whatever is stored in it.

    Raises:
        AttributeError: asked for what has not been stored yet.

    Examples:
        >>> state = StepState()
        >>> state.loss = 0.5
        >>> state
        StepState(loss)
    """

    __slots__ = ("__dict__", "__weakref__", "_numbers")

    cancelled = False

    def __init__(self) -> None:
        self._numbers: dict[str, tuple[Any, float]] = {}

    def __getattr__(self, name: str) -> Any:
        stored = ", ".join(vars(self)) or "nothing"
        raise AttributeError(f"The step has no {name!r} so far; it has {stored}.")

    if TYPE_CHECKING:

        def __setattr__(self, name: str, value: Any) -> None: ...

    def __repr__(self) -> str:
        return f"StepState({', '.join(vars(self))})"


def number_in(step: StepState, name: str) -> float:
    """What is stored in a step, as a number; it is read off its device once."""
    value, known = vars(step)[name], step._numbers.get(name)
    if known is None or known[0] is not value:
        known = step._numbers[name] = value, number(value)
    return known[1]


def number(value: Tensor | float) -> float:
    """A number, or a tensor of one element, as a number; waits for the tensor's device."""
    return value.item() if isinstance(value, Tensor) else float(value)


class Epoch:
    """One run of a phase over batches; iterating over it gives the batches.

    Attributes:
        phase: the phase that runs.
        batches: what it runs over, `None` in a loop of one's own that did not say.
        taken: how many batches have been taken.
        begun: what was drawn from as iterating over the batches began; see `draws`.
        is_over: its loop has ended, and it ends.
        cancelled: `CancelEpoch` was raised in it.
        skipped: `CancelEpoch` was raised as it began, and its body, which runs no step, is open.
        broken: an error or `CancelFit` cut it off, so that it does not count.
    """

    def __init__(self, phase: Phase, batches: Batches | None) -> None:
        self.phase, self.batches = phase, batches
        self.taken = 0
        self.begun: State | None = None
        self.cancelled = self.skipped = self.broken = self.is_over = False
        self._resumed: Iterator[Batch] | None = None
        self._begun_s = time.perf_counter()

    @property
    def seconds(self) -> float:
        """How long it has been running."""
        return time.perf_counter() - self._begun_s

    def __iter__(self) -> Iterator[Batch]:
        if self.skipped:
            return
        if self.batches is None:
            raise ValueError("This epoch was given no batches: `run_epoch(phase, batches)`.")
        if self._resumed is None:
            self.begun = draws_of(self.batches)
        for batch in self.batches if self._resumed is None else self._resumed:
            self.taken += 1
            yield batch
        if not self.taken and isinstance(self.batches, Iterator):
            raise ValueError(
                f"The batches of {self.phase.name} are an iterator that is used up. "
                "Give something that starts afresh every epoch: a DataLoader, or a list."
            )
        if not self.taken:
            warnings.warn(
                f"There are no batches for {self.phase.name}, which made no step. If a DataLoader "
                "drops the last batch, it may have had no whole one.",
                stacklevel=2,
            )

    def give_back(self) -> None:
        """The batch that was taken last does not count: going on would begin with it."""
        self.taken = max(0, self.taken - 1)

    @property
    def is_under_way(self) -> bool:
        """Whether its batches are being gone through."""
        return self.begun is not None and not self.is_over

    def go_on(self, taken: int, draws: Mapping[str, Any], ready: Callable[[], None]) -> None:
        """Goes on where it was after so many batches.

        Args:
            taken: how many had been taken.
            draws: what was drawn from as iterating began, and the place that the batches gave.
            ready: called when the batches are there.
        """
        self.taken, self.begun = taken, draws["begun"]
        self._resumed = self._go_on(draws, ready)

    def _go_on(self, draws: Mapping[str, Any], ready: Callable[[], None]) -> Iterator[Batch]:
        batches: Any = self.batches
        put_draws(draws["begun"], batches)
        if draws["place"] is None:
            yield from batches_after(batches, self.taken, ready)
        else:
            batches.load_state_dict(draws["place"])
            iterator = iter(batches)
            ready()
            yield from iterator

    def cut(self, error: BaseException) -> None:
        """An error or a cancellation leaves the epoch before it is through."""
        self.skipped, self.cancelled = False, self.cancelled or isinstance(error, CancelEpoch)
        self.broken = not isinstance(error, CancelEpoch)
        self.is_over = not self.broken
