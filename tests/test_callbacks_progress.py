import io
import sys

import pytest
import torch
from torch import nn

import tests.loop
from wraploop.callback import Callback, on
from wraploop.callbacks.history import History
from wraploop.callbacks.progress import ProgressBar
from wraploop.events import CancelEpoch, StepBegin
from wraploop.learner import Learner
from wraploop.phases import TrainingPhase, ValidationPhase

BATCH = (torch.ones(2, 1), torch.ones(2, 1))


class Watch(Callback):
    """Keeps the totals and counts of the open bar at each step."""

    def __init__(self, progress: ProgressBar) -> None:
        self.progress = progress
        self.seen = []

    @on(StepBegin)
    def watch(self, learner):
        bar = self.progress._bars.get(learner.running)
        self.seen.append(None if bar is None else (bar.desc, bar.n, bar.total))


def learner(*callbacks: Callback, **options) -> tuple[Learner, list, io.StringIO]:
    screen = io.StringIO()
    progress = ProgressBar(file=screen, mininterval=0, miniters=1, **options)
    watch = Watch(progress)
    one = Learner(
        nn.Linear(1, 1),
        nn.functional.mse_loss,
        optimizer=torch.optim.SGD,
        data=([BATCH] * 3, [BATCH] * 2),
        callbacks=[History(), progress, watch, *callbacks],
        default_callbacks=False,
    )
    return one, watch.seen, screen


def test_the_bar_is_as_long_as_the_batches_that_are_run_over():
    one, seen, _ = learner()
    one.fit(1, [(TrainingPhase(), [BATCH] * 2), ValidationPhase()])
    one.epoch(TrainingPhase())
    assert [each[1:] for each in seen] == [(0, 2), (1, 2), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
    assert seen[0][0] == "TrainingPhase 1"
    assert seen[-1][0] == "TrainingPhase 2"


def test_batches_without_a_length_are_counted():
    one, seen, _ = learner()
    one.epoch(TrainingPhase(), (BATCH for _ in range(2)))
    assert [each[1:] for each in seen] == [(0, None), (1, None)]


def test_a_validation_epoch_within_training_has_a_bar_of_its_own():
    one, seen, _ = learner()
    phase = TrainingPhase()
    with one.run_epoch(phase, range(2)):
        one.run_step(phase, BATCH)
        one.epoch(ValidationPhase())
        one.run_step(phase, BATCH)
        one.run_step(ValidationPhase(), BATCH)
        one.run_step(phase, BATCH)
    assert [each[1:] for each in seen] == [(0, 2), (0, 2), (1, 2), (1, 2), (2, 2), (2, 2)]


def test_the_bar_shows_the_losses():
    one, _, screen = learner(losses_every_s=0)
    one.epoch(ValidationPhase())
    assert f"loss={one.step.loss.item():.3g}" in screen.getvalue()
    assert "2/2" in screen.getvalue()


@pytest.mark.parametrize("error", [CancelEpoch, KeyboardInterrupt])
def test_the_bar_is_closed_however_the_epoch_ends(error):
    class Raises(Callback):
        @on(StepBegin)
        def act(self, learner):
            raise error

    one, _, _ = learner(Raises())
    try:
        one.epoch(TrainingPhase())
    except KeyboardInterrupt:
        pass
    progress = one.callbacks.get(ProgressBar)
    assert progress is not None
    assert progress._bars == {}


def test_a_step_outside_an_epoch_needs_no_bar():
    one, seen, screen = learner()
    one.run_step(TrainingPhase(), BATCH)
    assert seen == [None]
    assert screen.getvalue() == ""


def test_a_program_without_output_shows_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdout", None)
    learner = tests.loop.learner(defaults=True)
    learner.fit(1)
    assert learner.history[TrainingPhase].epochs == 1


def test_processes_other_than_the_first_show_nothing(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    one, _, screen = learner()
    one.fit(1)
    assert screen.getvalue() == ""


@pytest.mark.parametrize("options", [{"disable": True}, {"mininterval": 0}])
def test_options_of_tqdm_are_its_own(options):
    file = io.StringIO()
    one = tests.loop.learner(History(), ProgressBar(file=file, **options))
    one.fit(1)
    assert one.history[TrainingPhase].steps == 4
    assert ("4/4" in file.getvalue()) == (not options.get("disable"))
