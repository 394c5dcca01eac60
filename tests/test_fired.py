import pytest
import torch

from tests.loop import GAN, PlainStep, gan_learner, learner
from wraploop.callback import Callback, on
from wraploop.events import BackwardEnd, Event, LossBegin, StepBegin, StepEnd
from wraploop.phases import AbstractTrainingPhase, AbstractValidationPhase, TrainingPhase


class Decoded(Event):
    """Samples are decoded."""


class OnDecoded(Callback):
    count = 0

    @on(Decoded)
    def see(self, learner):
        self.count += 1


class Decodes(Callback):
    fires = (Decoded,)

    @on(StepEnd, TrainingPhase)
    def decode(self, learner):
        learner.handle(Decoded())


def test_an_event_that_never_fires_is_an_error_before_anything_is_trained():
    message = r"OnDecoded\(\)\.see answers Decoded, which never happens: TrainingPhase, Valid"
    with pytest.raises(ValueError, match=message):
        learner(OnDecoded()).fit(1)


def test_validation_has_no_backward():
    class Waits(Callback):
        @on(BackwardEnd, AbstractValidationPhase)
        def wait(self, learner):
            pass

    with pytest.raises(ValueError, match="BackwardEnd, which never happens: ValidationPhase fires"):
        learner(Waits()).fit(1)


def test_callbacks_may_fire_events_and_say_so():
    learner(Decodes(), answer := OnDecoded()).fit(1)
    assert answer.count == 4


def test_phases_may_fire_events_and_say_so():
    class Decoding(PlainStep):
        fires = (Decoded,)

        def step(self, learner, batch):
            super().step(learner, batch)
            learner.handle(Decoded())

    one = learner(answer := OnDecoded())
    one.fit(1, [Decoding()])
    assert answer.count == 4


def test_of_a_phase_that_does_not_say_nothing_is_known():
    one = learner(answer := OnDecoded())
    one.fit(1, [PlainStep()])
    assert answer.count == 0


def test_a_step_of_ones_own_inherits_no_knowledge():
    class Own(TrainingPhase):
        def step(self, learner, batch):
            pass

    assert Own.fires is None
    assert issubclass(Own, AbstractTrainingPhase)


def test_methods_for_phases_that_do_not_run_and_for_all_events_are_fine():
    class Anything(Callback):
        def __init__(self):
            self.seen = []

        @on(Event)
        @on(LossBegin, AbstractValidationPhase)
        @on(StepBegin)
        def see(self, learner):
            self.seen.append(type(learner.event).__name__)

    one = gan_learner(anything := Anything())
    one.fit(1, [GAN])
    assert anything.seen.count("BackwardEnd") == 8


def test_methods_without_a_mark_are_an_error():
    class Named(Callback):
        def on_step_end(self, learner):
            pass

    message = r"Named\(\) is never called: none of its methods \(on_step_end\) says at which event"
    with pytest.raises(ValueError, match=message):
        learner(Named()).fit(1)


def test_methods_named_as_elsewhere_are_an_error_whatever_they_take():
    class Lightnings(Callback):
        def on_train_epoch_end(self, trainer, module):
            pass

    class Fastais(Callback):
        def after_batch(self):
            pass

    for callback, name in ((Lightnings(), "on_train_epoch_end"), (Fastais(), "after_batch")):
        with pytest.raises(
            ValueError, match=rf"none of its methods \({name}\) says at which event"
        ):
            learner(callback).fit(1)


def test_a_callback_that_only_keeps_a_state_is_none():
    class Keeps(Callback):
        kept = 0

        def grow(self):
            self.kept += 1

        def state_dict(self):
            return {"kept": self.kept}

    learner(Keeps()).fit(1)


def test_a_callback_whose_methods_are_called_by_others_is_none():
    class Keeps(Callback):
        loss = torch.nn.MSELoss()

        def draw(self):
            return 0

        def see(self, module, inputs, outputs):
            pass

    learner(Keeps()).fit(1)
