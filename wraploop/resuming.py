"""Going on with a fit from a checkpoint, as if it had never stopped.

A fit that goes on fires FitBegin and, in the middle of an epoch, EpochBegin, as callbacks need them
to open what they work with. Then everything is put to how it was in the checkpoint, once more.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from wraploop import processes
from wraploop.callbacks.checkpoints import Checkpoints
from wraploop.checkpoint import newest, read_alike
from wraploop.state import State, own_draws, part_if_new, put_state, put_trains

if TYPE_CHECKING:
    from wraploop.learner import Learner
    from wraploop.position import Position

AUTO = "auto"


class Resumption:
    """What a fit goes on from.

    Args:
        state: of the learner.
        position: of the fit that goes on; it moves to where that one was.
    """

    def __init__(self, state: State, position: Position) -> None:
        self._state: State | None = state
        self._position, self._place = position, state["position"]
        self._processes = {"processes": state["processes"]}
        self._is_in_epoch = False
        if self._place:
            position.load_state_dict(self._place)
            self._is_in_epoch = self._place["batch"] is not None

    def load(self, learner: Learner) -> None:
        """Puts everything to how it was."""
        assert self._state is not None
        self._are_alike = processes.draw_alike()
        put_state(learner, self._state)
        put_trains(learner, self._state)
        self._put_draws()

    def in_fit(self, learner: Learner) -> None:
        """The fit has begun."""
        if not self._is_in_epoch:
            self.load(learner)
            self._state = None  # which is large

    def in_epoch(self, learner: Learner) -> None:
        """An epoch of the fit has begun."""
        if self._is_in_epoch:
            self._is_in_epoch = False
            self.load(learner)
            self._state = None
            draws = own_draws(self._processes, self._are_alike)
            learner.running.go_on(self._place["batch"], draws, self._put_draws)

    def _put_draws(self) -> None:
        if self._place:
            self._position.put_draws(own_draws(self._processes, self._are_alike))
            part_if_new(self._processes, self._are_alike)


def resumption_of(
    learner: Learner, resume: str | PathLike[str] | None, position: Position
) -> Resumption | None:
    """What a fit goes on from, already loaded; `None` if it begins at its beginning.

    With `"auto"`, a script whose fits come one after the other goes on with the one that was
    running: fits before it are over, and are passed over, as is one that a callback has stopped.

    Raises:
        ValueError: there is no `Checkpoints` callback, or the checkpoint is of another fit.
        OSError: a process cannot read the checkpoint.
    """
    if resume is None:
        return None
    if not isinstance(resume, (str, PathLike)):
        raise TypeError(f"resume is 'auto', or the path of a checkpoint, and got {resume!r}.")
    path = _newest(learner) if resume == AUTO else Path(resume)
    if path is None:
        return None
    state = read_alike(path)
    saved = state["position"] or {"fit": 0, "stopped": None}  # saved before any fit
    if resume == AUTO and saved["fit"] < position.fit:
        return None
    if resume == AUTO and saved["fit"] > position.fit:
        position.end()
        state = {**state, "position": None}
    elif resume == AUTO and saved["stopped"]:
        position.end(saved["stopped"])
    resumption = Resumption(state, position)
    resumption.load(learner)
    return resumption


def _newest(learner: Learner) -> Path | None:
    checkpoints = learner.callbacks.get(Checkpoints)
    if checkpoints is None:
        raise ValueError(
            "resume='auto' goes on from the newest checkpoint of the Checkpoints callback, and the "
            "learner has none. Add Checkpoints(folder, every_steps=...)."
        )
    return processes.on_main(lambda: newest(checkpoints.folder))
