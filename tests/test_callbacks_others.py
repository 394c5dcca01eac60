"""Traces, to-device, garbage collection, functions: the small callbacks."""

import gc
import weakref

import pytest
import torch
from torch import nn

from tests.loop import ADAM, assert_equal, batches, learner, net, weights
from wraploop.callback import Callback, on
from wraploop.callbacks.device import ToDevice
from wraploop.callbacks.function import FunctionCallback
from wraploop.callbacks.garbage import GarbageCollect
from wraploop.callbacks.history import History
from wraploop.callbacks.traces import Traces
from wraploop.events import CancelStep, EpochEnd, StepBegin, StepEnd
from wraploop.phases import AbstractTrainingPhase, TrainingPhase, ValidationPhase


def test_traces_keep_what_functions_return_step_by_step():
    functions = {
        "norm": lambda learner: learner.model[0].weight.norm().item(),
        "outputs": lambda learner: learner.step.outputs,
    }
    one = learner(History(), Traces(functions, phase=ValidationPhase))
    one.fit(2)
    traces = one.traces[ValidationPhase]
    assert traces["norm"].at == [1, 2, 3, 4]
    assert traces["norm"].values[-1] == one.model[0].weight.norm().item()
    assert not traces["outputs"].values[0].requires_grad
    assert one.traces[TrainingPhase] == {}


def test_traces_of_several_phases_stand_side_by_side():
    one = learner(
        History(),
        Traces({"a": lambda learner: 1}, phase=TrainingPhase),
        Traces({"b": lambda learner: 2}, phase=ValidationPhase),
    )
    one.fit(1)
    assert one.traces[TrainingPhase]["a"].values == [1] * 4
    assert one.traces[ValidationPhase]["b"].values == [2] * 2
    with pytest.raises(ValueError, match=r"both write 'traces\.a'"):
        learner(History(), Traces({"a": repr}), Traces({"a": str}))


def test_cancelled_steps_leave_no_trace():
    def skip(learner):
        raise CancelStep

    one = learner(
        History(),
        FunctionCallback(skip, StepBegin, TrainingPhase),
        Traces({"loss": lambda learner: learner.step.loss}),
    )
    one.fit(1)
    assert one.traces[TrainingPhase] == {}
    with pytest.raises(ValueError, match="Give functions of the learner by name"):
        Traces({})


def test_a_trace_keeps_no_graph():
    one = learner(History(), Traces({"loss": lambda learner: learner.step.loss}))
    one.epoch(TrainingPhase())
    assert all(not value.requires_grad for value in one.traces[TrainingPhase]["loss"].values)


def test_moving_to_where_one_is_changes_nothing():
    one, other = learner(ToDevice("cpu"), optimizer=ADAM), learner(optimizer=ADAM)
    optimizer, parameters = one.optimizer, list(one.model.parameters())
    for each in (one, other):
        each.fit(3)
    assert one.optimizer is optimizer
    assert all(a is b for a, b in zip(one.model.parameters(), parameters, strict=True))
    assert_equal(weights(one.model), weights(other.model), rtol=0, atol=0)


NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@NO_CUDA
def test_models_and_moments_are_moved_in_place():
    one = learner(optimizer=ADAM)
    one.epoch(TrainingPhase())
    parameters = list(one.model.parameters())
    one.callbacks.add(ToDevice("cuda"))
    one.epoch(TrainingPhase())
    assert all(a is b for a, b in zip(one.model.parameters(), parameters, strict=True))
    assert {p.device.type for p in parameters} == {"cuda"}
    assert {state["exp_avg"].device.type for state in one.optimizer.state.values()} == {"cuda"}


def test_models_that_cannot_be_moved_in_place_are_an_error():
    with pytest.raises(RuntimeError, match="parameters of model cannot be moved to meta in place"):
        learner(ToDevice("meta")).epoch(TrainingPhase())


class Looks(AbstractTrainingPhase):
    def step(self, learner, batch):
        assert batch["name"] == "a"


class Devices(Callback):
    reads = ("step.batch",)

    def __init__(self):
        self.devices = []

    @on(StepBegin)
    def look(self, learner):
        self.devices.append(learner.step.batch["x"][0].device.type)


def test_models_may_be_left_where_they_are():
    one = learner(ToDevice("meta", models=False), seen := Devices())
    with one.run_epoch(TrainingPhase()):
        one.run_step(Looks(), {"x": [torch.ones(2)], "name": "a"})
        assert {p.device.type for p in one.model.parameters()} == {"cpu"}
    assert seen.devices == ["meta"]
    assert repr(ToDevice("meta")) == "ToDevice('meta')"


class Node:
    pass


def test_garbage_is_collected_every_so_many_steps():
    references = []

    class Litter(Callback):
        @on(StepEnd)
        def litter(self, learner):
            node = Node()
            node.__dict__["itself"] = node
            references.append(weakref.ref(node))

    one = learner(Litter(), GarbageCollect(every_steps=4), data=batches(6))
    gc.disable()
    try:
        one.epoch(TrainingPhase())
        assert [reference() is None for reference in references] == [True] * 4 + [False] * 2
    finally:
        gc.enable()
    with pytest.raises(ValueError, match="every_steps is at least 1, and got 0"):
        GarbageCollect(0)


def test_a_function_is_called_at_its_event_in_its_phase():
    one, seen = learner(), []

    @one.on(EpochEnd, ValidationPhase)
    def see(learner):
        seen.append(learner.phase.name)

    one.fit(2)
    assert seen == ["ValidationPhase"] * 2
    assert see.__name__ == "see"


def test_functions_have_their_place_in_the_order():
    one = learner()
    with pytest.raises(ValueError, match=r"FunctionCallback\(print\) reads 'counted', which no"):
        one.on(StepEnd, TrainingPhase, reads=("counted",))(print)
    assert len(one.callbacks) == 0


def test_what_is_written_by_one_function_is_read_by_another():
    seen = []

    def count(learner):
        learner.counted = getattr(learner, "counted", 0) + 1

    reader = FunctionCallback(lambda at: seen.append(at.counted), StepEnd, reads=("counted",))
    writer = FunctionCallback(count, StepEnd, writes=("counted",))
    learner(reader, writer, data={"training": batches(3)}).fit(1)
    assert seen == [1, 2, 3]


def test_a_plain_function_is_no_callback():
    with pytest.raises(TypeError, match="Make one of a function with FunctionCallback"):
        learner(print)
    with pytest.raises(TypeError, match="@on takes a subclass of Event"):
        FunctionCallback(print, "StepEnd")  # pyright: ignore[reportArgumentType]
    assert isinstance(net(), nn.Module)
