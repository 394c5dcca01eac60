import math
import time
from typing import Any

import pytest
import torch

from tests.loop import GAN, gan_learner, learner
from wraploop.callback import Callback, on
from wraploop.callbacks.criteria import (
    GL,
    PQ,
    Either,
    InvalidValue,
    Never,
    NoImprovement,
    NumberLimit,
    Patience,
    Threshold,
    TimeLimit,
)
from wraploop.callbacks.early_stopping import EarlyStopping
from wraploop.callbacks.history import History
from wraploop.callbacks.metrics import Metric, Metrics
from wraploop.events import EpochBegin
from wraploop.phases import TrainingPhase, ValidationPhase


def stops_at(criterion, losses) -> int | None:
    """After which loss it stops, counted from 1."""
    for number, loss in enumerate(losses, 1):
        if criterion.update(loss):
            return number
    return None


@pytest.mark.parametrize(
    ("criterion", "losses", "stop"),
    [
        (Never(), [1, math.nan, 9], None),
        (NoImprovement(2), [3, 2, 2.5, 1, 1, 1], 6),
        (NoImprovement(2), [3, 4, 2, 3, 1, 2, 0.5], None),
        (NoImprovement(2, min_delta=0.5), [3, 2.8, 2.7, 2], 3),
        (NoImprovement(1), [math.nan, 1], 1),
        (Patience(2), [3, 4, 3, 4, 5], 5),
        (Patience(1), [3, 3, 3.1], 3),
        (Patience(3), [5, 4, 3, 4, 5], None),
        (InvalidValue(), [1, math.inf], 2),
        (InvalidValue(), [1, math.nan], 2),
        (Threshold(0.5), [1, 0.5, 0.4], 3),
        (NumberLimit(3), [1, 1, 1, 1], 3),
        (GL(10), [1, 1.05, 0.9, 1.0], 4),
        (Either(NumberLimit(5), Threshold(2)), [3, 3, 1], 3),
        (Either(NumberLimit(2), Threshold(2)), [3, 3, 1], 2),
    ],
)
def test_a_criterion_stops_where_it_should(criterion, losses, stop):
    assert stops_at(criterion, losses) == stop


def test_pq_weighs_the_rise_against_the_progress_of_training():
    fast, slow = PQ(alpha=0.75, epochs=3), PQ(alpha=0.75, epochs=3)
    for trained in (2.0, 1.0, 0.5):
        fast.update_training(trained)
    for trained in (1.001, 1.0, 1.0):
        slow.update_training(trained)
    for each in (fast, slow):
        assert each.update(1.0) == ""
    # 5 % above the best; progress is 1000 (3.5 / 3 / 0.5 - 1) and 1000 (3.001 / 3 - 1) per mille
    assert fast.update(1.05) == ""
    assert "5 %, 0.333 ‰" in slow.update(1.05)


def test_pq_needs_two_training_epochs_to_say_anything():
    pq = PQ()
    assert pq.update(1.0) == ""
    pq.update_training(1.0)
    assert pq.update(9.0) == ""


def test_a_time_limit_counts_from_the_first_epoch_on_and_over_a_resumed_fit(monkeypatch):
    now_s = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    first = TimeLimit(10)
    assert first.update(1.0) == ""
    now_s[0] += 6
    assert first.update(1.0) == ""
    second = TimeLimit(10)
    second.load_state_dict(first.state_dict())
    now_s[0] += 1000
    assert second.update(1.0) == ""
    now_s[0] += 4
    assert "10 seconds have passed" in second.update(1.0)


@pytest.mark.parametrize("make", [NoImprovement, Patience, NumberLimit])
def test_a_count_below_one_is_an_error(make):
    with pytest.raises(ValueError, match="epochs is at least 1, and got 0"):
        make(0)


class Fake(Callback):
    """Makes the metric what the test says."""

    def __init__(self, values):
        self.values = iter(values)

    @on(EpochBegin, ValidationPhase)
    def next(self, learner):
        self.value = next(self.values)

    def __call__(self, outputs):
        return torch.tensor(self.value)


def stopped(values, stopping, name="score"):
    fake = Fake(values)
    metric = Metric(fake, name, phase=ValidationPhase, reads=("outputs",))
    one = learner(History(), Metrics(metric), fake, stopping)
    one.fit(len(values))
    return one


def test_the_fit_ends_when_there_is_no_improvement_and_says_why():
    one = stopped([3.0, 2.0, 2.5, 2.5, 2.5], EarlyStopping(2, "score"))
    assert one.history[ValidationPhase].epochs == 4
    reason = "score of ValidationPhase: no improvement on 2 for 2 epochs"
    assert one.stopped.reason == reason
    assert isinstance(one.stopped.source, EarlyStopping)


def test_a_metric_may_be_to_become_large():
    one = stopped([1.0, 2.0, 3.0, 2.0, 1.0, 9.0], EarlyStopping(2, "score", mode="max"))
    assert one.stopped is not None
    assert one.history[TrainingPhase].epochs == 5


def test_without_validation_training_is_watched():
    one = learner(History(), Metrics(), EarlyStopping(NumberLimit(2)), data={"training": []})
    one.data = {"training": learner().data["training"]}
    one.fit(5)
    assert one.stopped.reason == "loss of TrainingPhase: it has been watched for 2 epochs"


def test_an_invalid_training_loss_stops_too():
    bad = [(torch.full((2, 3), torch.nan).double(), torch.ones(2, 1).double())]
    one = learner(
        History(),
        Metrics(),
        EarlyStopping(InvalidValue()),
        data=(bad, learner().data["validation"]),
    )
    one.fit(3)
    assert one.stopped.reason == "loss of TrainingPhase: the training loss is nan"


def test_a_phase_that_the_fit_does_not_run_is_an_error_as_it_begins():
    one = gan_learner(History(), Metrics(), EarlyStopping(2, "critic_loss", phase=ValidationPhase))
    with pytest.raises(
        ValueError, match="'critic_loss' of ValidationPhase is watched, and this fit"
    ):
        one.fit(1, [GAN])


def test_a_metric_that_there_is_not_is_an_error_that_says_what_there_is():
    one = gan_learner(History(), Metrics(), EarlyStopping(2))
    message = "GANTraining has no metric 'loss'; it has critic_loss, generator_loss. EarlyStopping"
    with pytest.raises(ValueError, match=message):
        one.fit(1, [GAN])


def test_another_mode_is_an_error():
    with pytest.raises(ValueError, match="'min' or 'max', and got 'lowest'"):
        EarlyStopping(2, mode="lowest")


def test_its_state_is_that_of_its_criteria():
    first: Any = EarlyStopping(Either(NoImprovement(3), NumberLimit(10)))
    for loss in (1.0, 2.0):
        first.criterion.update(loss)
    second = EarlyStopping(Either(NoImprovement(3), NumberLimit(10)))
    second.load_state_dict(first.state_dict())
    assert stops_at(second.criterion, [3.0, 4.0]) == 2
    assert first.criterion.criteria[0].since_best == 1
