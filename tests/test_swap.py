import pytest
import torch
from torch import nn

from tests.loop import ADAM, assert_equal, batches, learner, net, weights
from wraploop.callback import Callback, on
from wraploop.callbacks.average import EMA
from wraploop.callbacks.history import History
from wraploop.events import StepEnd
from wraploop.phases import TrainingPhase


def test_everything_is_swapped_and_put_back():
    one = learner(history := History())
    before = one.model, one.optimizer, one.loss_fn, one.data, weights(one.model)
    other, data = net(), batches(2)
    with one.using(model=other, optimizer=ADAM, loss_fn=nn.L1Loss(), data=data, callbacks=[]):
        assert one.model is other
        assert isinstance(one.optimizer, torch.optim.Adam)
        assert isinstance(one.loss_fn, nn.L1Loss)
        assert one.data == {"training": data}
        assert list(one.callbacks) == []
        start = weights(other)
        one.fit(1)
        assert not torch.equal(weights(other)["0.weight"], start["0.weight"])
    assert (one.model, one.optimizer, one.loss_fn, one.data) == before[:4]
    assert next(iter(one.callbacks)) is history
    assert_equal(weights(one.model), before[4], rtol=0, atol=0)
    assert one.history[TrainingPhase].steps == 0


def test_everything_is_put_back_after_an_error():
    one = learner(History())
    optimizer, listed = one.optimizer, list(one.callbacks)
    with pytest.raises(ZeroDivisionError), one.using(optimizer=ADAM, callbacks=[]):
        raise ZeroDivisionError
    assert one.optimizer is optimizer
    assert list(one.callbacks) == listed


def test_nothing_is_swapped_if_one_thing_cannot_be():
    one = learner(History())
    model = one.model
    with pytest.raises(ValueError, match="holds none of its parameters"):
        with one.using(model=net(), optimizer=one.optimizer):
            pass
    assert one.model is model


def test_a_history_that_stays_goes_on_and_one_of_the_blocks_own_ends_with_it():
    one = learner(History())
    one.fit(1)
    with one.using(callbacks=[*one.callbacks.listed]):
        one.fit(1)
    assert one.history[TrainingPhase].epochs == 2
    with one.using(callbacks=[History()]):
        one.fit(1)
        assert one.history[TrainingPhase].epochs == 1
    assert one.history[TrainingPhase].epochs == 2


def test_what_no_callback_wrote_before_is_gone_again():
    one = learner()
    with one.using(callbacks=[History()]):
        one.fit(1)
    with pytest.raises(AttributeError, match=r"comes with the callback History\(\)"):
        _ = one.history


def test_blocks_can_be_nested():
    one = learner(ema := EMA(0.5))
    one.fit(1)
    first = one.optimizer
    with one.using(optimizer=ADAM):
        second = one.optimizer
        with one.using(ema, optimizer=ADAM):
            assert one.optimizer not in (first, second)
        assert one.optimizer is second
    assert one.optimizer is first


def test_a_block_can_be_opened_while_callbacks_are_called():
    class Peek(Callback):
        reads = ("data",)
        inside = None

        @on(StepEnd, TrainingPhase)
        def peek(self, learner):
            if self.inside is None:
                self.inside = []
                with learner.using(callbacks=[]):
                    learner.run_step(TrainingPhase(), learner.data["training"][0])
                    self.inside.append(len(learner.callbacks))

    one = learner(History(), peek := Peek(), strict=False)
    one.epoch(TrainingPhase())
    assert peek.inside == [0]
    assert one.history[TrainingPhase].steps == 4


def test_an_unknown_name_is_an_error_that_lists_what_can_be_swapped():
    with pytest.raises(TypeError, match=r"Cannot swap \['optimiser'\]; .* optimizer, loss_fn"):
        with learner().using(optimiser=ADAM):
            pass
