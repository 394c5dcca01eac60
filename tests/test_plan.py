from torch import nn

from tests.loop import GAN, gan_learner, learner
from wraploop import wrap
from wraploop.callback import Callback, on
from wraploop.callbacks.history import History
from wraploop.callbacks.metrics import Metrics
from wraploop.callbacks.stop import StopOnNaNLoss
from wraploop.events import Event, StepEnd
from wraploop.freezing import freeze
from wraploop.gan import GANTraining
from wraploop.phases import TrainingPhase


def lines(learner) -> list[str]:
    return [line.strip() for line in learner.plan().splitlines()]


def test_models_are_shown_with_their_wrappers_and_parameters():
    one = gan_learner()
    freeze(one.model.critic[0])
    inner = wrap(one.model.critic, {"name": "ThreadedCPUParallel", "threads": 2})
    one.model.critic = wrap(inner, "DistributedModel")
    found = lines(one)
    assert "generator: Sequential, 27 parameters" in found
    critic = "critic: DistributedModel(ThreadedCPUParallel(Sequential)), 21 parameters"
    assert f"{critic}, 16 of them frozen" in found


def test_optimizers_data_and_phases_are_shown():
    found = lines(learner())
    assert "optimizer: SGD, lr 0.1, 21 parameters" in found
    assert "training: 4 batches (list)" in found
    assert "ValidationPhase over validation data" in found
    without = learner(data={"training": map(str, "")})
    assert "training: batches without a length (map)" in lines(without)


def test_the_phases_of_the_last_fit_are_shown():
    one = gan_learner()
    one.fit(1, [GAN])
    assert "GANTraining over training data" in lines(one)


def test_callbacks_are_shown_by_event_in_the_order_in_which_they_are_called():
    class Own(Event):
        """Happens."""

    class Follow(Callback):
        reads = ("metrics",)

        @on(StepEnd, TrainingPhase)
        def see(self, learner):
            pass

        @on(Own)
        def answer(self, learner):
            pass

    class Waits(Callback):
        @on(StepEnd, GANTraining)
        def see(self, learner):
            pass

    found = lines(learner(Follow(), Waits(), Metrics(), History(), StopOnNaNLoss(), strict=False))
    assert "StepEnd: Waits() " not in found
    assert "StepEnd: History(), Metrics(), Follow() (in TrainingPhase)" in found
    assert "BackwardEnd: StopOnNaNLoss() (in TrainingPhase)" in found
    assert "EpochEnd: History(), Metrics()" in found
    assert "Own: Follow()" in found
    assert "never called in these phases: Waits()" in found


def test_a_learner_prints_as_its_plan():
    one = learner(model=nn.Linear(3, 1).double())
    assert str(one) == one.plan()
    assert repr(one).startswith("Learner(models: model; data: training, validation;")
