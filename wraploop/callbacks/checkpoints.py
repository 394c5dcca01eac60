"""Saving checkpoints while training goes on."""

from __future__ import annotations

import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from wraploop import processes
from wraploop.callback import Callback, on
from wraploop.callbacks.watched import Watched
from wraploop.checkpoint import save
from wraploop.events import EpochEnd, FitBegin
from wraploop.phases import Phase

if TYPE_CHECKING:
    from wraploop.learner import Learner


@dataclass(frozen=True)
class Saved:
    """A checkpoint: after which epoch, what the metric was, and its folder's name."""

    epoch: int
    value: float
    name: str


class Checkpoints(Callback):
    """Saves the learner after epochs, `learner.load(path)` reads it; keeps the best and the latest.

    The folders are called `epoch_0003_loss_0.25`. Nothing is removed before the newer one is whole.

    Args:
        folder: where they are put; it is made.
        metric: the metric by which the best are told.
        phase: whose metric, and after whose epochs; unless given, validation where a fit has it,
            else training.
        mode: `"min"` if a small metric is good, `"max"` if a large one.
        keep_top_k: how many of the best are kept besides the latest; all unless given.
        every_epochs: after every so many-th epoch.

    Raises:
        ValueError: another mode, a negative number; as a fit begins, a phase that it does not run,
            or a metric that there is not.
        OSError: as a fit begins, it cannot write to the folder.
    """

    reads = ("callbacks", "history", "metrics", "model", "optimizer", "phases")

    def __init__(
        self,
        folder: str | os.PathLike[str],
        metric: str = "loss",
        *,
        phase: type[Phase] | None = None,
        mode: str = "min",
        keep_top_k: int | None = None,
        every_epochs: int = 1,
    ) -> None:
        if mode not in ("min", "max") or every_epochs < 1 or (keep_top_k or 0) < 0:
            raise ValueError(
                "Expected mode 'min' or 'max', every_epochs at least 1 and keep_top_k at least 0, "
                f"and got {mode=}, {every_epochs=}, {keep_top_k=}."
            )
        if Path(folder).exists() and not Path(folder).is_dir():
            raise ValueError(f"Checkpoints go to a folder, and {str(folder)!r} is a file.")
        self.folder, self.watched, self.mode = Path(folder), Watched(metric, phase), mode
        self.keep_top_k, self.every_epochs = keep_top_k, every_epochs
        self.saved: list[Saved] = []

    @property
    def latest(self) -> Path | None:
        """The newest checkpoint; of those in the folder if none has been saved here."""
        saved = self.saved or self._found()
        return self.folder / max(saved, key=lambda each: each.epoch).name if saved else None

    @property
    def best(self) -> Path | None:
        """The one with the best metric; of those in the folder if none has been saved here."""
        saved = self.saved or self._found()
        return self.folder / min(saved, key=self._rank).name if saved else None

    @on(FitBegin)
    def begin(self, learner: Learner) -> None:
        """Checks that there is something to go by, and somewhere to save."""
        self.watched.check(learner)
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

    @on(EpochEnd)
    def save(self, learner: Learner) -> None:
        """Saves, if it is time, and removes what is no longer kept."""
        if not self.watched.is_due(learner):
            return
        epoch = learner.history[learner.phase].epochs
        if epoch % self.every_epochs:
            return
        value = self.watched.value(learner)
        metric = self.watched.metric.replace(os.sep, "_")
        name = f"epoch_{epoch:04}_{metric}_{value:.6g}"
        before = [each for each in self.saved if each.name != name]
        self.saved = [*before, Saved(epoch, value, name)]
        kept = self._kept()
        removed, self.saved = [each for each in self.saved if each not in kept], kept
        save(learner, self.folder / name)
        if processes.is_main_process():
            for each in removed:
                shutil.rmtree(self.folder / each.name, ignore_errors=True)

    def _found(self) -> list[Saved]:
        """What lies in the folder, by its name."""
        name = re.compile(rf"epoch_(\d+)_{re.escape(self.watched.metric)}_(\S+)")
        there = map(name.fullmatch, os.listdir(self.folder) if self.folder.is_dir() else [])
        return [Saved(int(each[1]), float(each[2]), each[0]) for each in there if each]

    def _kept(self) -> list[Saved]:
        if self.keep_top_k is None:
            return self.saved
        best = sorted(self.saved, key=self._rank)[: self.keep_top_k]
        return [each for each in self.saved if each in best or each is self.saved[-1]]

    def _rank(self, saved: Saved) -> float:
        if math.isnan(saved.value):
            return math.inf
        return saved.value if self.mode == "min" else -saved.value

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"saved": [astuple(each) for each in self.saved], "seen": self.watched.seen}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.saved = [Saved(*each) for each in state["saved"]]
        self.watched.seen = state["seen"]

    def __repr__(self) -> str:
        kept = f"{self.watched.metric!r}, mode={self.mode!r}, keep_top_k={self.keep_top_k}"
        return f"Checkpoints({str(self.folder)!r}, {kept})"
