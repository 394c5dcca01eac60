import copy

import pytest
import torch

from tests.loop import ADAM, GAN, PlainStep, assert_equal, gan_learner, learner, weights
from wraploop import wrap
from wraploop.callback import Callback, on
from wraploop.callbacks.average import EMA
from wraploop.callbacks.gradients import AccumulateGradients
from wraploop.events import StepEnd
from wraploop.phases import AbstractTrainingPhase, TrainingPhase, ValidationPhase


class Follow(Callback):
    """The average, by hand."""

    reads = ("model",)

    def __init__(self, decay, start):
        self.decay, self.average = decay, start

    @on(StepEnd, AbstractTrainingPhase)
    def update(self, learner):
        for name, weight in learner.model.named_parameters():
            kept = self.decay * self.average[name] + (1 - self.decay) * weight.detach()
            self.average[name] = kept


@pytest.mark.parametrize("phase", [TrainingPhase(), PlainStep()])
def test_the_average_follows_the_weights_update_by_update(phase):
    one = learner(ema := EMA(0.7), optimizer=ADAM)
    one.callbacks.add(by_hand := Follow(0.7, weights(one.model)))
    one.fit(2, [phase])
    assert_equal(ema.averages["model"], by_hand.average)


def test_in_use_the_averages_are_the_weights_and_then_the_weights_are_back():
    one = learner(ema := EMA(0.7))
    one.fit(1)
    before, identities = weights(one.model), [id(p) for p in one.model.parameters()]
    with one.using(ema):
        assert_equal(weights(one.model), ema.averages["model"], rtol=0, atol=0)
        outputs = one.run_step(ValidationPhase(), one.data["validation"][0]).outputs
    assert [id(p) for p in one.model.parameters()] == identities
    assert_equal(weights(one.model), before, rtol=0, atol=0)
    plain = copy.deepcopy(one.model)
    plain.load_state_dict(ema.averages["model"])
    assert torch.equal(outputs, plain(one.data["validation"][0][0]))


def test_the_weights_are_back_after_an_error():
    one = learner(ema := EMA(0.7))
    one.fit(1)
    before = weights(one.model)
    with pytest.raises(ZeroDivisionError), one.using(ema):
        raise ZeroDivisionError
    assert_equal(weights(one.model), before, rtol=0, atol=0)


def test_steps_without_an_update_do_not_count():
    one = learner(ema := EMA(0.5), AccumulateGradients(4))
    start = weights(one.model)
    one.epoch(TrainingPhase())
    end = weights(one.model)
    assert_equal(ema.averages["model"], {n: (start[n] + end[n]) / 2 for n in start})


def test_an_optimizer_that_computes_its_gradients_itself_is_followed_too():
    class Closure(AbstractTrainingPhase):
        def step(self, learner, batch):
            def closure():
                learner.optimizer.zero_grad()
                loss = learner.loss_fn(learner.model(batch[0]), batch[1])
                loss.backward()
                return loss

            learner.optimizer.step(closure)
            learner.optimizer.zero_grad()

    one = learner(ema := EMA(0.5), optimizer=torch.optim.LBFGS)
    start = weights(one.model)
    one.run_step(Closure(), one.data["training"][0])
    end = weights(one.model)
    assert not torch.equal(start["0.weight"], end["0.weight"])
    assert_equal(ema.averages["model"], {n: (start[n] + end[n]) / 2 for n in start})


def test_each_network_is_averaged_at_its_own_updates():
    one = gan_learner(ema := EMA(0.5, models=("generator",)))
    start = weights(one.model.generator)
    one.run_step(GAN, one.data["training"][0])
    end = weights(one.model.generator)
    assert ema.averages.keys() == {"generator"}
    assert_equal(ema.averages["generator"], {n: (start[n] + end[n]) / 2 for n in start})


def test_averages_have_the_plain_models_names_and_values_under_a_wrapper():
    plain, wrapped = learner(EMA(0.9)), learner(EMA(0.9))
    wrapped.model = wrap(wrapped.model, {"name": "ThreadedCPUParallel", "threads": 2})
    for one in (plain, wrapped):
        one.fit(2)
    mine, theirs = (one.callbacks.get(EMA).averages["model"] for one in (plain, wrapped))
    assert_equal(mine, theirs)


def test_its_state_is_its_averages():
    one, other = learner(EMA(0.7)), learner(EMA(0.7))
    one.fit(1)
    averages = one.callbacks.get(EMA).averages["model"]
    other.callbacks.get(EMA).load_state_dict(one.callbacks.get(EMA).state_dict())
    assert_equal(other.callbacks.get(EMA).averages["model"], averages, rtol=0, atol=0)
    kept = {name: average.clone() for name, average in averages.items()}
    other.fit(1)
    assert_equal(averages, kept, rtol=0, atol=0)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_an_impossible_decay_is_an_error(decay):
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        EMA(decay)


def test_an_unknown_model_is_an_error_that_says_what_there_is():
    with pytest.raises(ValueError, match=r"No models \['critic'\] to average; there are \['model'"):
        learner(EMA(models=("critic",)))
