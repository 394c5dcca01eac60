"""What is given is looked at where it is given, and the message says what was expected."""

# pyright: reportArgumentType=false

import pytest
import torch
from torch import nn

from tests.loop import batches, gan_learner, learner
from wraploop import (
    Event,
    Learner,
    StepEnd,
    fine_tune,
    fit_one_cycle,
    freeze,
    lr_find,
    one_cycle,
    unfreeze,
)
from wraploop.callbacks import (
    EMA,
    AccumulateGradients,
    Checkpoints,
    ClipGradients,
    FunctionCallback,
    GarbageCollect,
    Metric,
    SaveImages,
    Traces,
    accuracy,
    throttle,
)
from wraploop.freezing import frozen
from wraploop.gan import R1, GANTraining, Hinge
from wraploop.phases import AbstractTrainingPhase, TrainingPhase


def phase(**attributes):
    return type("Own", (AbstractTrainingPhase,), attributes)


MISTAKES = {
    "latent size": (lambda: GANTraining("64"), "latent_size is a whole number .* got '64'"),
    "half a step": (lambda: GANTraining(4, critic_steps=1.5), "critic_steps is a whole number"),
    "a penalty": (lambda: GANTraining(4, penalties=R1()), r"Expected a list of penalties"),
    "a class of penalties": (lambda: GANTraining(4, penalties=[R1]), "add parentheses"),
    "a class of losses": (lambda: GANTraining(4, loss=Hinge), "add parentheses"),
    "a weight": (lambda: R1("10"), "weight is a number, and got '10'"),
    "frozen name": (lambda: freeze("critic"), "Expected modules or lists .* got 'critic'"),
    "frozen names": (lambda: unfreeze({"critic": nn.Linear(1, 1)}), "Expected modules or lists"),
    "frozen parameter": (lambda: freeze(nn.Linear(1, 1).weight), "Expected modules or lists"),
    "frozen learner": (lambda: frozen(learner()).__enter__(), "Expected modules or lists"),
    "epochs": (lambda: learner().fit("3"), "epochs is a whole number of at least 0, and got '3'"),
    "phase class": (lambda: learner().fit(1, TrainingPhase), r"write \[TrainingPhase\(\)\]"),
    "phase name": (lambda: learner().fit(1, "train"), "Expected a list of phases, and got 'train'"),
    "resume": (lambda: learner().fit(1, resume=True), "resume is 'auto', or the path"),
    "cycle": (lambda: fit_one_cycle(learner(), "3", 0.1), "epochs is a whole number"),
    "highest rate": (lambda: fit_one_cycle(learner(), 3, "0.1"), "max_lr is a number"),
    "cycle's steps": (lambda: one_cycle("3", 0.1), "steps is a whole number"),
    "sweep": (lambda: lr_find(learner(), steps="5"), "steps is a whole number of at least 2"),
    "decay": (lambda: EMA("0.9"), "decay is a number, and got '0.9'"),
    "averaged model": (lambda: EMA(models="generator"), r"write \('generator',\)"),
    "norm": (lambda: ClipGradients("1"), "max_norm is a number"),
    "gathered steps": (lambda: AccumulateGradients(2.0), "steps is a whole number"),
    "saved steps": (lambda: Checkpoints("x", every_steps="5"), "every_steps is a whole number"),
    "collected": (lambda: GarbageCollect("5"), "every_steps is a whole number"),
    "throttled class": (lambda: throttle(EMA, StepEnd, every=2), "add parentheses"),
    "throttled": (lambda: throttle(EMA(), StepEnd, every="2"), "every is a whole number"),
    "read letters": (lambda: Metric(accuracy, reads="outputs"), r"write \('outputs',\)"),
    "read by a function": (lambda: FunctionCallback(print, StepEnd, reads="x"), r"write \('x',\)"),
    "no function": (lambda: FunctionCallback("print", StepEnd), "Expected a function"),
    "a trace alone": (lambda: Traces(print), "Expected functions by name"),
    "traced numbers": (lambda: Traces({"a": 1}), "Expected functions by name"),
    "swapped": (lambda: SaveImages(print, "folder"), "Expected a function of the learner"),
    "fired event": (lambda: phase(fires=StepEnd), r"write \(StepEnd,\)"),
    "handled class": (lambda: learner().handle(StepEnd), r"as in handle\(StepEnd\(\)\)"),
    "a bare decorator": (lambda: learner().on(print), "takes a subclass of Event as event"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_type_is_told_where_it_is_given(mistake):
    make, message = MISTAKES[mistake]
    with pytest.raises(TypeError, match=message):
        make()


def test_numbers_of_numpy_are_numbers():
    one = learner()
    count = torch.ones(1, dtype=torch.int64).numpy()[0]
    one.fit(count)
    assert GANTraining(count).latent_size == 1


def test_freezing_takes_whatever_gives_parameters():
    layer = nn.Linear(2, 2)
    freeze(layer.parameters())
    assert not any(each.requires_grad for each in layer.parameters())


def test_data_may_be_replaced_as_a_learner_takes_it():
    one = learner()
    one.data = (batches(1), batches(2))
    assert list(one.data) == ["training", "validation"]
    one.fit(1)
    with pytest.raises(TypeError, match="Expected batches as training data"):
        one.data = 3


def test_a_name_of_data_that_is_nearly_right_is_told():
    one = Learner(nn.Linear(1, 1), optimizer=torch.optim.SGD, data={"train": []})
    with pytest.raises(ValueError, match="Is one of 'train' and 'training' misspelt"):
        one.fit(1)


def test_data_for_validation_by_another_name_is_told():
    data = {"training": batches(2), "val": batches(2), "test": batches(2)}
    one = Learner(nn.Linear(3, 1).double(), nn.MSELoss(), optimizer=torch.optim.SGD, data=data)
    with pytest.warns(UserWarning, match="'val' is not used: ValidationPhase runs over") as told:
        one.fit(1)
    assert not [each for each in told if "'test'" in str(each.message)]


class Returning(TrainingPhase):
    def step(self, learner, batch):
        return learner.loss_fn(learner.model(batch[0]), batch[1])


def test_a_step_that_leaves_the_update_to_others_is_told():
    with pytest.warns(UserWarning, match="Returning.step returned something, which nothing uses"):
        learner().epoch(Returning(), batches(2))


def test_several_optimizers_are_told_by_name():
    with pytest.raises(ValueError, match="name one of generator, critic, as optimizer='generator'"):
        lr_find(gan_learner(), GANTraining(2))


def test_a_state_of_something_else_is_told():
    one = learner()
    with pytest.raises(ValueError, match=r"got no callbacks, models, optimizers.*learner.model"):
        one.load_state_dict(one.model.state_dict())


def test_events_of_ones_own_are_handled():
    class Own(Event):
        """Something else."""

    learner().handle(Own())


def test_a_learner_without_an_optimizer_evaluates_and_says_that_it_cannot_train(tmp_path):
    one = Learner(nn.Linear(3, 1).double(), nn.MSELoss(), data=batches(2))
    assert one.evaluate(batches=batches(2)).keys() == {"loss"}
    with pytest.raises(TypeError, match=r"got a list\. Batches come behind the phase"):
        one.evaluate(batches(2))
    assert "Linear" in str(one)
    one.save(tmp_path / "saved")
    one.load(tmp_path / "saved")
    for train in (
        lambda: one.fit(1),
        lambda: one.epoch(TrainingPhase()),
        lambda: fit_one_cycle(one, 1, 0.1),
        lambda: fine_tune(one, 1),
        lambda: lr_find(one),
        lambda: one.run_step(TrainingPhase(), batches(1)[0]),
    ):
        with pytest.raises(ValueError, match="The learner has no optimizer to train with"):
            train()
    with one.using(optimizer=torch.optim.SGD):
        one.fit(1)
        one.save(tmp_path / "trained")
    one.load(tmp_path / "trained")
    assert one.optimizers == {}


def test_one_callback_is_no_list_of_them():
    with pytest.raises(TypeError, match=r"write \[GarbageCollect\(\)\]"):
        Learner(nn.Linear(1, 1), callbacks=GarbageCollect())


@pytest.mark.parametrize(
    "shapes", [((4, 1), (4, 1)), ((4, 1), (4,)), ((4,), (4,)), ((4, 3), (4, 1))]
)
def test_accuracy_of_one_score_a_row_is_refused(shapes):
    outputs, targets = map(torch.zeros, shapes)
    with pytest.raises(ValueError, match="accuracy takes scores of shape"):
        accuracy(outputs, targets)
