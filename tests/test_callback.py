import pytest
import torch
from torch import nn

from wraploop.callback import Callback, Table, on
from wraploop.events import EpochEnd, Event, FitBegin, LossBegin, StepBegin, StepEnd
from wraploop.learner import Learner
from wraploop.order import in_order
from wraploop.phases import (
    AbstractTrainingPhase,
    AbstractValidationPhase,
    Phase,
    TrainingPhase,
    ValidationPhase,
)


class Maker(Callback):
    writes = ("thing",)


class Taker(Callback):
    reads = ("thing.part",)
    writes = ("taken",)


class LastTaker(Callback):
    reads = ("taken", "step.loss", "model")


class Bystander(Callback):
    pass


class Everything(Callback):
    def __init__(self):
        self.seen = []

    @on(Event)
    def see(self, learner):
        self.seen.append((type(learner.event), type(learner.phase)))


class TwoMoments(Callback):
    def __init__(self):
        self.seen = []

    @on(StepEnd, AbstractTrainingPhase)
    @on(EpochEnd, AbstractValidationPhase)
    def see(self, learner):
        self.seen.append(type(learner.event))


def learner(*callbacks: Callback) -> Learner:
    model = nn.Linear(1, 1)
    batches = [(torch.ones(2, 1), torch.ones(2, 1))] * 2
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    return Learner(
        model,
        nn.functional.mse_loss,
        optimizer=sgd,
        data=(batches, batches),
        callbacks=callbacks,
        default_callbacks=False,
    )


def test_a_method_is_called_at_subclasses_of_its_event_and_phase():
    seen = learner(everything := Everything()).fit(1) or everything.seen
    assert seen[0] == (FitBegin, type(None))
    assert (LossBegin, TrainingPhase) in seen
    assert (EpochEnd, ValidationPhase) in seen


def test_a_method_may_be_marked_for_several_moments():
    learner(two := TwoMoments()).fit(1)
    assert two.seen == [StepEnd, StepEnd, EpochEnd]


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ("StepEnd", "subclass of Event as event, and got 'StepEnd'"),
        (StepEnd(), "Write StepEnd, without parentheses"),
        (TrainingPhase, "subclass of Event"),
    ],
)
def test_only_an_event_class_can_be_marked(event, message):
    with pytest.raises(TypeError, match=message):
        on(event)


def test_only_a_phase_class_can_be_marked():
    with pytest.raises(TypeError, match="Write TrainingPhase, without parentheses"):
        on(StepEnd, TrainingPhase())  # pyright: ignore[reportArgumentType]


def test_a_fit_begins_in_no_phase():
    with pytest.raises(TypeError, match=r"write @on\(FitBegin\)"):
        on(FitBegin, AbstractTrainingPhase)


def test_one_name_is_not_a_tuple_of_names():
    with pytest.raises(TypeError, match=r"OneRead.reads is a tuple of names; write \('loss',\)"):
        type("OneRead", (Callback,), {"reads": "loss"})


@pytest.mark.parametrize("seed", range(5))
def test_writers_come_before_readers_whatever_the_lists_order(seed):
    callbacks = [Maker(), Taker(), LastTaker()]
    order = torch.randperm(3, generator=torch.Generator().manual_seed(seed))
    assert in_order([callbacks[i] for i in order]) == callbacks


def test_who_reads_the_callbacks_comes_after_all_others():
    class Reporter(Callback):
        reads = ("callbacks", "thing")

    reporter, callbacks = Reporter(), [Maker(), Taker(), Bystander()]
    assert in_order([reporter, *callbacks]) == [*callbacks, reporter]
    both = [first := Reporter(), Bystander(), second := Reporter(), Maker()]
    assert in_order(both)[-2:] == [first, second]


def test_ties_keep_the_lists_order():
    first, maker, second, taker = Bystander(), Maker(), Bystander(), Taker()
    assert in_order([first, taker, second, maker]) == [first, second, maker, taker]
    assert in_order([second, maker, first, taker]) == [second, maker, first, taker]


def test_two_writers_of_one_thing_are_an_error_that_names_them():
    class PartMaker(Callback):
        writes = ("thing.part",)

    with pytest.raises(ValueError, match=r"Maker\(\) and PartMaker\(\) both write 'thing.part'"):
        in_order([Maker(), PartMaker()])


def test_names_that_merely_start_alike_are_different_things():
    class OtherMaker(Callback):
        writes = ("things",)

    assert len(in_order([Maker(), OtherMaker()])) == 2


def test_a_reader_without_a_writer_is_an_error_when_the_learner_is_made():
    with pytest.raises(ValueError, match=r"LastTaker\(\) reads 'taken', which no callback writes"):
        learner(LastTaker())


def test_a_cycle_is_an_error_that_names_who_waits_for_whom():
    class Chicken(Callback):
        reads, writes = ("egg",), ("chicken",)

    class Egg(Callback):
        reads, writes = ("chicken",), ("egg",)

    with pytest.raises(ValueError, match=r"Chicken\(\) reads 'egg', which Egg\(\) writes; Egg"):
        in_order([Chicken(), Bystander(), Egg()])


def test_callbacks_are_found_replaced_and_removed_by_type():
    callbacks = learner(maker := Maker(), taker := Taker()).callbacks
    assert callbacks.get(Maker) is maker
    assert callbacks.get(Bystander) is None
    assert callbacks.replace(other := Maker()) is maker
    assert callbacks.get(Maker) is other
    assert callbacks.replace(bystander := Bystander()) is None
    assert callbacks.remove(Bystander) is bystander
    assert callbacks.remove(Bystander) is None
    assert list(callbacks) == [other, taker]
    callbacks.set([maker])
    assert list(callbacks) == [maker]
    callbacks.add(taker)
    assert list(callbacks) == [maker, taker]


def test_the_last_writer_cannot_be_removed_from_under_its_reader():
    callbacks = learner(Maker(), taker := Taker()).callbacks
    with pytest.raises(ValueError, match="no callback writes"):
        callbacks.remove(Maker)
    assert taker in list(callbacks)
    assert len(callbacks) == 2


def test_each_callback_is_attached_once():
    class Attached(Callback):
        count = 0

        def attach(self, learner):
            self.count += 1

    first, second = Attached(), Attached()
    callbacks = learner(first).callbacks
    callbacks.add(second)
    callbacks.set([second, first])
    callbacks.set([])
    callbacks.set([first])
    assert (first.count, second.count) == (1, 1)


def test_a_callback_that_cannot_join_is_not_there():
    class Refuses(Callback):
        def attach(self, learner):
            raise ValueError("not here")

    one = learner(both := TwoMoments())
    with pytest.raises(ValueError, match="not here"):
        one.callbacks.add(Refuses())
    assert list(one.callbacks) == [both]
    one.fit(1)
    assert len(both.seen) == 3


def test_a_callback_may_stand_around_the_calls_of_all():
    class Around(Callback):
        def __init__(self):
            self.calls = []

        def around(self, callback, call):
            def called(learner):
                self.calls.append((callback, type(learner.event)))
                call(learner)

            return called

    around, both = Around(), TwoMoments()
    one = learner(both, around)
    one.fit(1)
    assert around.calls == [(both, StepEnd), (both, StepEnd), (both, EpochEnd)]
    one.callbacks.remove(Around)
    one.fit(1)
    assert len(around.calls) == 3
    assert both.seen == [StepEnd, StepEnd, EpochEnd] * 2


def test_a_callback_added_while_training_is_called_from_then_on():
    class Adds(Callback):
        @on(StepBegin, TrainingPhase)
        def add(self, learner):
            if learner.callbacks.get(TwoMoments) is None:
                learner.callbacks.add(TwoMoments())

    one = learner(Adds())
    one.epoch(TrainingPhase())
    found = one.callbacks.get(TwoMoments)
    assert found is not None
    assert found.seen == [StepEnd, StepEnd]


def test_the_table_is_worked_out_once_for_each_event_and_phase_type():
    one = learner(counting := CountingHandlers())
    one.fit(3)
    kinds = 2 + 7 + 5  # of events: in no phase, in training, in validation
    assert counting.asked == kinds + 1  # a fit checks that its events are fired


class CountingHandlers(Callback):
    asked = 0

    def handlers(self):
        self.asked += 1
        return super().handlers()


def test_a_class_is_not_a_callback():
    with pytest.raises(TypeError, match="add parentheses"):
        learner(Maker)  # pyright: ignore[reportArgumentType]


def test_the_table_of_no_phase_holds_only_what_asks_for_no_phase():
    both = [TwoMoments(), Everything()]
    assert len(Table(both, type(None))[StepEnd][0]) == 1
    assert len(Table(both, TrainingPhase)[StepEnd][0]) == 2
    assert len(Table([TwoMoments()], Phase)[StepEnd][0]) == 0
