"""Where a fit is: in which epoch, in which phase, after how many batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from wraploop.draws import draws_of, knows_its_place, put_draws, start_workers
from wraploop.phases import Phase
from wraploop.running import Batches, Epoch


class Position:
    """Where a fit is.

    Args:
        fit: how many fits the learner had ended before this one.
        planned: what an epoch of it runs.

    Attributes:
        epoch: how many epochs have ended.
        phase: how many phases of the running epoch have.
        running: the phase's own epoch, `None` where none runs.
        broken: an error cut it off.
        stopped: the reason that a callback gave for ending it, if one did.
    """

    def __init__(self, fit: int, planned: list[tuple[Phase, Batches]]) -> None:
        self.fit, self.planned = fit, planned
        for phase, _ in planned:
            phase.note()
        self.epoch = self.phase = 0
        self.running: Epoch | None = None
        self.broken = False
        self.stopped: str | None = None
        self._is_next = False  # the epoch that begins is the fit's own
        self._has_ended = False

    def remaining(self, epochs: int) -> Iterator[tuple[Phase, Batches]]:
        """What is still to run of so many epochs; moves on when asked for the next."""
        while self.epoch < epochs and not self._has_ended:
            while self.phase < len(self.planned):
                self._is_next = True
                yield self.planned[self.phase]
                self.phase, self.running = self.phase + 1, None
            self.epoch, self.phase = self.epoch + 1, 0

    def end(self, stopped: str | None = None) -> None:
        """Nothing of the fit is to run; a callback has stopped it for such a reason."""
        self._has_ended, self.stopped = True, stopped

    def enter(self, epoch: Epoch) -> bool:
        """Takes note of an epoch that begins; returns whether it is the fit's own."""
        is_own, self._is_next = self._is_next, False
        if is_own:
            self.running = epoch
        return is_own

    def state_dict(self) -> dict[str, Any]:
        """The place, and the states of the phases; alike in all processes."""
        running = self.running
        return {
            "fit": self.fit,
            "stopped": self.stopped,
            "epoch": self.epoch,
            "phase": self.phase + (running is not None and running.is_over),
            "batch": running.taken if running and running.is_under_way else None,
            "phases": [phase.name for phase, _ in self.planned],
            "states": [phase.state_dict() for phase, _ in self.planned],
        }

    def draws(self) -> dict[str, Any]:
        """What this process draws from: now, and as the running epoch's batches began."""
        draws: dict[str, Any] = {"now": draws_of(*(batches for _, batches in self.planned))}
        if self.running and self.running.is_under_way:
            batches: Any = self.running.batches
            draws["begun"] = self.running.begun
            draws["place"] = batches.state_dict() if knows_its_place(batches) else None
        return draws

    def check(self, state: Mapping[str, Any]) -> None:
        """Checks that `state` is of a fit like this one.

        Raises:
            ValueError: it runs other phases.
        """
        names = [phase.name for phase, _ in self.planned]
        if state["phases"] != names:
            raise ValueError(
                f"The checkpoint was made in a fit of {', '.join(state['phases'])}, and this one "
                f"runs {', '.join(names)}. Resume with the same phases."
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Moves to where `state_dict` was taken.

        Raises:
            ValueError: that fit ran other phases.
        """
        self.check(state)
        self.epoch, self.phase = state["epoch"], state["phase"]
        for number, (phase, batches) in enumerate(self.planned):
            phase.load_state_dict(state["states"][number])
            if self.epoch or number < self.phase:
                start_workers(batches)

    def put_draws(self, draws: Mapping[str, Any]) -> None:
        """Has this process draw from what it drew from when `draws` was taken."""
        put_draws(draws["now"], *(batches for _, batches in self.planned))
