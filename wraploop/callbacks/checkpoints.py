"""Saving checkpoints while training goes on."""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from typing_extensions import override

from wraploop import processes
from wraploop.callback import Callback, on
from wraploop.callbacks.leaving import EXIT_STATUS, Leaving
from wraploop.callbacks.watched import Watched
from wraploop.checkpoint import Writer, check_replaced, copied, steps_of
from wraploop.events import CancelFit, EpochEnd, FitBegin, FitEnd, StepEnd
from wraploop.given import check_numbers, whole
from wraploop.phases import AbstractTrainingPhase, Phase

if TYPE_CHECKING:
    from wraploop.learner import Learner
    from wraploop.position import Position


_LONGEST = 100  # of a metric's name in that of a folder


class Saved(NamedTuple):
    """A checkpoint: its folder's name, and after which epoch with which metric, if after one."""

    name: str
    epoch: int | None = None
    value: float = math.nan


class Checkpoints(Callback):
    """Saves the learner while it is fitted; keeps the best and the latest.

    `learner.load(path)` reads one, `learner.fit(..., resume="auto")` goes on from the newest. They
    are written while training goes on: it stops no longer than copying the state takes, and the
    next one waits. Nothing is removed before a newer one is whole. On SIGTERM it saves after the
    running step, and the program ends.

    The folders are called `epoch_0003_loss_0.25`, and `step_00000120` between.

    Args:
        folder: where they are put; it is made.
        metric: the metric by which the best are told; with `None` there is no best.
        phase: whose metric, and after whose epochs; unless given, validation where a fit has it,
            else training.
        mode: `"min"` if a small metric is good, `"max"` if a large one.
        keep_top_k: how many of the best are kept besides the latest; all unless given.
        keep_latest: how many of the latest are kept: if the newest is damaged, one before it helps.
        every_epochs: after every so many-th epoch.
        every_steps: after every so many-th training step as well.
        leave_within_s: after SIGTERM the program ends within so many seconds, even if no step ends;
            what is being written is written first.

    Raises:
        ValueError: another mode, a negative number; as a fit begins, a phase that it does not run,
            or a metric that there is not.
        OSError: as a fit begins, it cannot write to the folder; at the next save, or as the fit
            ends, one could not be written.
    """

    reads = (
        *("callbacks", "event", "history", "metrics", "model", "optimizer"),
        *("phases", "position", "running", "step"),
    )

    def __init__(
        self,
        folder: str | os.PathLike[str],
        metric: str | None = "loss",
        *,
        phase: type[Phase] | None = None,
        mode: str = "min",
        keep_top_k: int | None = None,
        keep_latest: int = 2,
        every_epochs: int = 1,
        every_steps: int | None = None,
        leave_within_s: float = 10.0,
    ) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"Expected the mode 'min' or 'max', and got {mode!r}.")
        check_numbers(leave_within_s=leave_within_s)
        if Path(folder).exists() and not Path(folder).is_dir():
            raise ValueError(f"Checkpoints go to a folder, and {str(folder)!r} is a file.")
        self.folder, self.mode = Path(folder).absolute(), mode
        self.watched = Watched(metric, phase)
        self.keep_top_k = None if keep_top_k is None else whole("keep_top_k", keep_top_k, least=0)
        self.keep_latest = whole("keep_latest", keep_latest)
        self.every_epochs = whole("every_epochs", every_epochs)
        self.every_steps = None if every_steps is None else whole("every_steps", every_steps)
        self.saved: list[Saved] = []
        if metric is None:
            self.reads = tuple(name for name in self.reads if name != "metrics")
        self._writer, self._is_saving = Writer(), False
        self._leaving = Leaving(
            leave_within_s, lambda: self._is_saving or self._writer.is_writing()
        )

    @override
    def attach(self, learner: Learner) -> None:
        self.saved, self.watched.seen = [], 0

    @property
    def latest(self) -> Path | None:
        """The newest checkpoint; of those in the folder if none has been saved here."""
        self._writer.wait()
        if self.saved:
            return self.folder / self.saved[-1].name
        found = self._found()
        return self.folder / max(found, key=lambda each: each.epoch or 0).name if found else None

    @property
    def best(self) -> Path | None:
        """The one with the best metric; of those in the folder if none has been saved here."""
        self._writer.wait()
        ranked = self._ranked(self.saved or self._found())
        return self.folder / ranked[0].name if ranked else None

    @on(FitBegin)
    def begin(self, learner: Learner) -> None:
        """Checks that there is something to go by, and somewhere to save."""
        self.watched.check(learner, self)
        wrong = ""
        if processes.is_main_process():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=self.folder):
                    pass
            except OSError as error:
                wrong = f"{self!r} cannot write to its folder: {error}"
        if wrong := processes.broadcast(wrong):
            raise OSError(wrong)
        self._leaving.begin()

    @on(StepEnd)
    def save_step(self, learner: Learner) -> None:
        """Saves, if it is time; and if the process has been told to end, it does."""
        if (learner.event and learner.event.is_cancelling) or not _is_in_fits_own_epoch(learner):
            return  # there is no going on from here; another step will do
        steps = steps_of(learner)
        is_leaving = self._leaving.is_due()
        trains = isinstance(learner.phase, AbstractTrainingPhase) and not learner.step.cancelled
        if is_leaving or (trains and self.every_steps and steps % self.every_steps == 0):
            self._save(learner, Saved(f"step_{steps:08}"))
        if is_leaving:
            self._leaving.reach()
            self._leave()

    @on(EpochEnd)
    def save(self, learner: Learner) -> None:
        """Saves, if it is time, and removes what is no longer kept."""
        if not self.watched.is_due(learner):
            return
        _note_stop(learner)
        epoch = learner.history[learner.phase].epochs
        if epoch % self.every_epochs:
            return
        if self.watched.metric is None:
            self._save(learner, Saved(f"epoch_{epoch:04}", epoch))
            return
        value = self.watched.value(learner)
        metric = _file_name(self.watched.metric)
        self._save(learner, Saved(f"epoch_{epoch:04}_{metric}_{value:.6g}", epoch, value))

    @on(FitEnd)
    def end(self, learner: Learner) -> None:
        """Saves that the fit is over, if a callback stopped it; waits until all is written.

        If the process has been told to end since it was last asked, it does.
        """
        self._leaving.end()
        position = learner.position
        if position and position.broken:
            self._writer.wait()
            return
        is_leaving = self._leaving.was_told()
        if position and (position.stopped or is_leaving):
            if not (learner.step.cancelled and _is_cut(position)):
                self._save(learner, Saved(f"step_{steps_of(learner):08}"))
        if is_leaving:
            self._leave()
        processes.on_main(self._writer.wait)

    def _leave(self) -> NoReturn:
        processes.on_main(self._writer.wait)
        raise SystemExit(EXIT_STATUS)

    def _save(self, learner: Learner, new: Saved) -> None:
        self.saved = [*(each for each in self.saved if each.name != new.name), new]
        kept = self._kept()
        removed, self.saved = [each for each in self.saved if each not in kept], kept
        state = learner.state_dict()
        self._is_saving = True  # and waits for what is being written
        try:
            processes.on_main(lambda: self._write(state, new, removed, steps_of(learner)))
        finally:
            self._is_saving = False

    def _write(self, state: dict[str, Any], new: Saved, removed: list[Saved], steps: int) -> None:
        if not processes.is_main_process():
            return
        path = self.folder / new.name
        check_replaced(path)
        paths = [self.folder / each.name for each in removed]
        self._writer.wait()  # so that there are never two copies
        self._writer.write(copied(state), path, steps, paths)

    def _found(self) -> list[Saved]:
        """What lies in the folder after epochs, by its name."""
        named = self.watched.metric and re.escape(_file_name(self.watched.metric))
        metric = rf"_{named}_(\S+)" if named else "()"
        name = re.compile(rf"epoch_(\d+){metric}")
        there = map(name.fullmatch, os.listdir(self.folder) if self.folder.is_dir() else [])
        return [Saved(each[0], int(each[1]), float(each[2] or "nan")) for each in there if each]

    def _kept(self) -> list[Saved]:
        latest = self.saved[-self.keep_latest :]
        best = self._ranked(self.saved)[: self.keep_top_k]
        return [each for each in self.saved if each in best or each in latest]

    def _ranked(self, saved: list[Saved]) -> list[Saved]:
        """Those with a metric, the best first."""
        ranked = [each for each in saved if each.epoch is not None and self.watched.metric]
        return sorted(ranked, key=self._rank)

    def _rank(self, saved: Saved) -> float:
        if math.isnan(saved.value):
            return math.inf
        return saved.value if self.mode == "min" else -saved.value

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"saved": [tuple(each) for each in self.saved], "seen": self.watched.seen}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        there = processes.broadcast(os.listdir(self.folder) if self.folder.is_dir() else [])
        saved = [Saved(*each) for each in state["saved"]]
        self.saved = [each for each in saved if each.name in there]
        self.watched.seen = state["seen"]

    def __repr__(self) -> str:
        kept = f"{self.watched.metric!r}, mode={self.mode!r}, keep_top_k={self.keep_top_k}"
        return f"Checkpoints({str(self.folder)!r}, {kept})"


def _is_in_fits_own_epoch(learner: Learner) -> bool:
    """Whether the epoch is not one that a callback runs within a fit: a position knows none."""
    position = learner.position
    return position is None or position.running in (None, learner.running)


def _note_stop(learner: Learner) -> None:
    """Has what is saved as an epoch ends say that a callback stops the fit with it."""
    position, cancel = learner.position, learner.event and learner.event.cancel
    if position and position.running is learner.running and isinstance(cancel, CancelFit):
        position.stopped = cancel.reason


def _is_cut(position: Position) -> bool:
    """Whether the fit has ended in the middle of an epoch."""
    return position.running is not None and not position.running.is_over


def _file_name(metric: str) -> str:
    return re.sub(r"[^\w.=-]", "_", metric)[:_LONGEST]
