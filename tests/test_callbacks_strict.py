from types import SimpleNamespace

import pytest
import torch

from tests.loop import GAN, batches, gan_learner, learner
from wraploop.callback import Callback, on
from wraploop.callbacks.strict import Guarded, UndeclaredAccess
from wraploop.events import EpochEnd, StepBegin, StepEnd
from wraploop.phases import TrainingPhase


def guarded(**declared):
    callback = type("Cb", (Callback,), declared)()
    nest = SimpleNamespace(a=1, b=SimpleNamespace(c=SimpleNamespace(x=2, y=3), d=4))
    return nest, Guarded(nest, "", callback)


def test_what_is_not_declared_cannot_be_read():
    _, view = guarded()
    with pytest.raises(UndeclaredAccess, match=r"Cb\(\) reads 'a', which it has not declared"):
        _ = view.a


def test_what_is_read_cannot_be_written():
    nest, view = guarded(reads=("a",))
    assert view.a == 1
    with pytest.raises(UndeclaredAccess, match=r"Cb\(\) writes 'a', .* add it to `writes`"):
        view.a = 2
    assert nest.a == 1


def test_what_is_written_can_be_read():
    nest, view = guarded(writes=("a",))
    view.a = view.a + 1
    assert nest.a == 2


def test_only_the_declared_part_of_a_nest_is_there():
    nest, view = guarded(writes=("b.c.x",))
    view.b.c.x = view.b.c.x + 1
    assert nest.b.c.x == 3
    assert isinstance(view.b.c, Guarded)
    with pytest.raises(UndeclaredAccess, match=r"writes 'b\.c\.y'"):
        view.b.c.y = 0
    with pytest.raises(UndeclaredAccess, match=r"reads 'b\.d'"):
        _ = view.b.d
    assert vars(view.b.c) == {"x": 3}


def test_what_is_below_a_declared_name_is_declared():
    nest, view = guarded(writes=("b",))
    view.b.c.y = 5
    assert nest.b.c.y == 5


def test_keys_count_as_names():
    callback = type("Cb", (Callback,), {"reads": ("rates.lr",), "writes": ("kept.x",)})()
    learner = SimpleNamespace(rates={"lr": 1, "momentum": 2}, kept={"x": 0})
    view = Guarded(learner, "", callback)
    view.kept["x"] = view.rates["lr"]
    assert (learner.kept["x"], "momentum" in view.rates, len(view.rates)) == (1, True, 2)
    with pytest.raises(UndeclaredAccess, match=r"reads 'rates\.momentum'"):
        _ = view.rates["momentum"]
    with pytest.raises(UndeclaredAccess, match=r"writes 'rates\.lr'"):
        view.rates["lr"] = 3


class Reads(Callback):
    def __init__(self, read, reads=(), writes=()):
        self.read, self.reads, self.writes = read, reads, writes
        self.got = None

    @on(StepEnd, TrainingPhase)
    def look(self, learner):
        self.got = self.read(learner)


@pytest.mark.parametrize(
    ("read", "path"),
    [
        (lambda learner: learner.step.loss, "step.loss"),
        (lambda learner: learner.model, "model"),
        (lambda learner: learner.models, "model"),
        (lambda learner: learner.optimizers, "optimizer"),
        (lambda learner: learner.data, "data"),
        (lambda learner: learner.callbacks, "callbacks"),
        (lambda learner: setattr(learner.step, "x", 1), "step.x"),
        (lambda learner: setattr(learner, "x", 1), "x"),
    ],
)
def test_a_strict_learner_holds_callbacks_to_what_they_declare(read, path):
    one = learner(Reads(read))
    with pytest.raises(UndeclaredAccess, match=rf"Reads\(\) \w+ '{path}'"):
        one.run_step(TrainingPhase(), batches()[0])


def test_without_strict_nothing_is_held_back():
    one = learner(reads := Reads(lambda learner: learner.step.loss), strict=False)
    one.run_step(TrainingPhase(), batches()[0])
    assert isinstance(reads.got, torch.Tensor)


def test_where_the_loop_is_may_always_be_looked_at():
    def look(learner):
        return learner.phase.name, type(learner.event), learner.in_step, learner.step.cancelled

    one = learner(reads := Reads(look))
    one.run_step(TrainingPhase(), batches()[0])
    assert reads.got == ("TrainingPhase", StepEnd, True, False)


def test_a_declared_step_attribute_can_be_replaced():
    class Halve(Callback):
        writes = ("step.batch",)

        @on(StepBegin)
        def halve(self, learner):
            learner.step.batch = tuple(part[:2] for part in learner.step.batch)

    one = learner(Halve())
    one.epoch(TrainingPhase())
    assert len(one.step.inputs) == 2


def test_the_default_callbacks_are_honest(capsys):
    learner(defaults=True).fit(1)
    gan_learner(defaults=True).fit(1, [GAN])


def test_functions_declare_what_they_read():
    one, losses = learner(), []

    @one.on(EpochEnd, TrainingPhase, reads=("step.loss",))
    def keep(learner):
        losses.append(learner.step.loss.item())

    @one.on(EpochEnd, TrainingPhase)
    def look(learner):
        return learner.step.loss

    with pytest.raises(UndeclaredAccess, match=r"FunctionCallback\(look\) reads 'step.loss'"):
        one.epoch(TrainingPhase())
    assert len(losses) == 1
