import time

import pytest

from tests.loop import batches, learner
from wraploop.callback import Callback, on
from wraploop.callbacks.function import FunctionCallback
from wraploop.callbacks.history import History
from wraploop.callbacks.metrics import Metrics
from wraploop.callbacks.table import EpochTable
from wraploop.callbacks.throttling import throttle
from wraploop.events import CancelStep, EpochBegin, EpochEnd, StepBegin, StepEnd
from wraploop.phases import TrainingPhase, ValidationPhase


class Count(Callback):
    reads = ("step.loss",)

    def __init__(self):
        self.steps, self.epochs, self.twice = 0, 0, 0

    @on(StepEnd)
    def step(self, learner):
        self.steps += 1

    @on(StepEnd)
    def again(self, learner):
        self.twice += 1

    @on(EpochBegin)
    def epoch(self, learner):
        self.epochs += 1


def run(callback, epochs=1):
    one = learner(callback, data=batches(16))
    for _ in range(epochs):
        one.epoch(TrainingPhase())
    return one


@pytest.mark.parametrize(("every", "calls"), [(1, 16), (2, 8), (3, 6), (16, 1), (100, 1)])
def test_it_answers_the_first_and_then_every_so_many_th(every, calls):
    run(throttle(count := Count(), StepEnd, every=every))
    assert (count.steps, count.twice, count.epochs) == (calls, calls, 1)


def test_other_events_are_answered_as_ever_and_counting_goes_on():
    run(throttle(count := Count(), StepEnd, every=10), epochs=2)
    assert (count.steps, count.epochs) == (4, 2)


def test_each_phase_is_counted_by_itself():
    one = learner(throttle(count := Count(), StepEnd, every=3), data=(batches(4), batches(4)))
    one.fit(1)
    assert count.steps == 2 + 2


@pytest.mark.parametrize(("every_s", "calls"), [(0, 16), (1000, 1)])
def test_it_answers_when_so_many_seconds_have_passed(every_s, calls):
    run(throttle(count := Count(), StepEnd, every_s=every_s))
    assert count.steps == calls


def test_seconds_are_counted_from_the_last_answer(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    seen = []

    def clock(learner):
        seen.append(now[0])

    one = learner(throttle(FunctionCallback(clock, StepEnd), StepEnd, every_s=2.5))
    for _ in range(8):
        one.run_step(TrainingPhase(), batches()[0])
        now[0] += 1.0
    assert seen == [0.0, 3.0, 6.0]


def test_a_throttled_cancellation_skips_every_second_step():
    def skip(learner):
        raise CancelStep

    skipper = FunctionCallback(skip, StepBegin, TrainingPhase)
    one = learner(History(), throttle(skipper, StepBegin, every=2), data=batches(16))
    one.epoch(TrainingPhase())
    assert one.history[TrainingPhase].steps == 8


def test_it_keeps_its_place_in_the_order_and_can_be_looked_up():
    metrics = Metrics()
    one = learner(EpochTable(), throttled := throttle(metrics, StepEnd, every=2), History())
    assert [type(c.unwrapped) for c in one.callbacks] == [History, Metrics, EpochTable]
    assert one.callbacks.get(Metrics) is metrics
    one.epoch(TrainingPhase())
    assert list(one.metrics[TrainingPhase].steps["loss"].at) == [1, 3]
    one.callbacks.remove(EpochTable)
    assert one.callbacks.remove(Metrics) is metrics
    assert throttled not in list(one.callbacks)


def test_a_throttled_default_is_not_added_again():
    one = learner(throttle(EpochTable(), EpochEnd, every=2), defaults=True)
    assert sum(isinstance(c.unwrapped, EpochTable) for c in one.callbacks) == 1


def test_its_state_is_the_callbacks_and_its_counts():
    first = throttle(History(), StepEnd, every=3)
    run(first)
    second = throttle(other := History(), StepEnd, every=3)
    one = learner(second)
    second.load_state_dict(first.state_dict())
    assert one.history["TrainingPhase"].steps == 6
    one.epoch(TrainingPhase())  # 17th to 20th: the 19th is answered
    assert other.state_dict()["TrainingPhase"]["steps"] == 7


def test_a_cancellation_names_the_callback_itself():
    def stop(learner):
        raise CancelStep("enough")

    source = []

    class Watch(Callback):
        pass

    inner = FunctionCallback(stop, StepEnd)
    one = learner(throttle(inner, StepEnd, every=1), Watch())
    one.callbacks.choose_table(TrainingPhase)
    one.in_step = True
    try:
        one.callbacks.call(StepEnd(), one.callbacks.table[StepEnd][0])
    except CancelStep as cancel:
        source.append(cancel.source)
    assert source == [inner]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of"),
        ({"every": 2, "every_s": 1.0}, "give one of"),
        ({"every": 0}, "every is at least 1, and got 0"),
        ({"every_s": -1.0}, "every_s is at least 0, and got -1.0"),
    ],
)
def test_impossible_arguments_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        throttle(Count(), StepEnd, **options)


def test_an_event_that_it_does_not_answer_is_an_error_that_says_what_it_does():
    with pytest.raises(ValueError, match="does not answer StepBegin, but EpochBegin, StepEnd"):
        throttle(Count(), StepBegin, every=2)


def test_validation_steps_can_be_left_alone():
    count = Count()
    one = learner(
        throttle(FunctionCallback(count.step, StepEnd, ValidationPhase), StepEnd, every=2)
    )
    one.fit(1)
    assert count.steps == 1
