import math

import pytest
import torch
from torch import nn

from tests.loop import PlainStep
from wraploop.callbacks.history import History
from wraploop.callbacks.stop import StopOnNaNLoss
from wraploop.events import BackwardEnd
from wraploop.learner import Learner
from wraploop.phases import AbstractTrainingPhase, TrainingPhase, ValidationPhase


def learner(training) -> Learner:
    torch.manual_seed(0)
    return Learner(
        nn.Linear(1, 1),
        nn.functional.mse_loss,
        optimizer=torch.optim.SGD,
        data=training,
        callbacks=[StopOnNaNLoss(), History()],
        default_callbacks=False,
    )


GOOD = (torch.ones(2, 1), torch.ones(2, 1))
BAD = (torch.ones(2, 1), torch.full((2, 1), math.nan))


def test_a_nan_loss_ends_the_fit_before_the_weights_are_spoiled():
    expected = learner([GOOD])
    expected.fit(1)
    one = learner([GOOD, BAD, GOOD])
    one.fit(5)
    assert one.stopped is not None
    assert one.stopped.reason == "loss is NaN"
    assert isinstance(one.stopped.source, StopOnNaNLoss)
    assert (one.history[TrainingPhase].epochs, one.history[TrainingPhase].steps) == (0, 1)
    assert one.model.weight.equal(expected.model.weight)
    assert one.model.weight.grad is None


def test_a_nan_in_validation_ends_nothing():
    one = learner({"training": [GOOD], "validation": [BAD]})
    one.fit(1)
    assert one.stopped is None
    assert one.history[ValidationPhase].steps == 1


@pytest.mark.parametrize("bad", ["critic_loss", "generator_loss"])
def test_every_loss_that_a_phase_names_is_looked_at(bad):
    class TwoLosses(AbstractTrainingPhase):
        losses = ("critic_loss", "generator_loss")

        def step(self, learner, batch):
            for name in self.losses:
                setattr(learner.step, name, torch.tensor(math.nan if name == bad else 1.0))
                learner.handle(BackwardEnd())

    one = learner([torch.ones(2)])
    one.fit(1, [TwoLosses()])
    assert one.stopped is not None
    assert one.stopped.reason == f"{bad} is NaN"


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_loss_ends_the_fit_too(value):
    one = learner([(torch.ones(2, 1), torch.ones(2, 1))])
    one.loss_fn = lambda outputs, targets: outputs.mean() * 0 + value
    before = one.model.weight.clone()
    one.fit(1)
    assert one.stopped is not None
    assert one.stopped.reason == "loss is infinite"
    assert one.model.weight.equal(before)


def test_a_step_without_events_is_stopped_before_its_update():
    expected = learner([GOOD])
    expected.fit(1, [PlainStep()])
    one = learner([GOOD, BAD, GOOD])
    one.fit(5, [PlainStep()])
    assert one.stopped is not None
    assert one.stopped.reason == "loss is NaN"
    assert isinstance(one.stopped.source, StopOnNaNLoss)
    assert one.model.weight.equal(expected.model.weight)
    assert not one.optimizer._optimizer_step_pre_hooks


def test_a_step_of_two_updates_is_stopped_before_the_one_that_is_spoiled():
    class Twice(AbstractTrainingPhase):
        losses = ("first", "second")

        def step(self, learner, batch):
            for name, (inputs, targets) in zip(self.losses, batch, strict=True):
                loss = learner.loss_fn(learner.model(inputs), targets)
                setattr(learner.step, name, loss)
                loss.backward()
                learner.optimizer.step()
                learner.optimizer.zero_grad()

    one, expected = learner([(GOOD, BAD)]), learner([GOOD])
    one.fit(1, [Twice()])
    expected.fit(1)
    assert one.stopped is not None
    assert one.stopped.reason == "second is NaN"
    assert one.model.weight.equal(expected.model.weight)


def test_a_step_without_an_update_is_looked_at_as_it_ends():
    class NoUpdate(AbstractTrainingPhase):
        def step(self, learner, batch):
            learner.step.loss = torch.tensor(math.nan)

    one = learner([GOOD, GOOD])
    one.fit(1, [NoUpdate()])
    assert one.stopped is not None
    assert one.history[NoUpdate].steps == 1


def test_a_loss_is_read_once_for_each_update():
    class Counted:
        reads = 0

        def __float__(self):
            Counted.reads += 1
            return 1.0

    class Both(AbstractTrainingPhase):
        def step(self, learner, batch):
            learner.step.loss = Counted()
            learner.handle(BackwardEnd())
            learner.optimizer.step()

    one = learner([GOOD, GOOD])
    one.fit(1, [Both()])
    assert Counted.reads == 2


def test_no_rows_have_no_say():
    empty = (torch.ones(0, 1), torch.ones(0, 1))
    one = learner([empty])
    one.fit(1)
    assert one.stopped is None
