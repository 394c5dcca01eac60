"""Callbacks beside each other, and what users do with them."""

import copy
import os
import pickle
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

from wraploop import Learner, StepEnd, TrainingPhase, ValidationPhase, fine_tune
from wraploop.callbacks import (
    EMA,
    AccumulateGradients,
    Checkpoints,
    ClipGradients,
    EarlyStopping,
    FunctionCallback,
    History,
    Metrics,
    Scheduler,
    TorchScheduler,
    Traces,
    throttle,
)
from wraploop.callbacks.criteria import GL, NoImprovement

DATA = [(torch.full((4, 2), float(i)), torch.full((4, 1), 100.0)) for i in (1, 2, 3)]


def made(*callbacks, model: Any = None, data: Any = DATA, lr=1.0) -> Any:
    torch.manual_seed(0)
    return Learner(
        nn.Linear(2, 1) if model is None else model,
        nn.functional.mse_loss,
        optimizer=partial(torch.optim.SGD, lr=lr),
        data=data,
        callbacks=[History(), *callbacks],
        default_callbacks=False,
    )


def test_the_update_left_at_the_epochs_end_is_clipped_and_averaged():
    learner = made(AccumulateGradients(5), ClipGradients(0.25), ema := EMA(0.5))
    before = nn.utils.parameters_to_vector(learner.model.parameters()).detach().clone()
    learner.fit(1)
    after = nn.utils.parameters_to_vector(learner.model.parameters()).detach()
    assert (after - before).norm().item() == pytest.approx(0.25, rel=1e-4)
    averaged = nn.utils.parameters_to_vector(ema.averages["model"].values())
    assert torch.allclose(averaged, (before + after) / 2)


@pytest.mark.parametrize("turn", [1, -1])
def test_it_is_made_at_the_epochs_own_rate(turn):
    schedule = TorchScheduler(partial(StepLR, step_size=1, gamma=0.0))
    learner = made(*[AccumulateGradients(5), schedule][::turn])
    before = learner.model.weight.detach().clone()
    learner.fit(1)
    assert not torch.equal(before, learner.model.weight)


def test_fine_tuning_takes_iterators_of_parameters_and_a_single_group(tmp_path):
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    learner = made(Metrics(), saved := Checkpoints(tmp_path, every_epochs=1), model=model)
    before = model[0].weight.detach().clone()
    fine_tune(learner, 0, 1e-6, groups=[part.parameters() for part in model])
    assert torch.equal(before, model[0].weight)
    learner.load(saved.best)
    with learner.using(callbacks=[traces := Traces({"lr": _lr}), History()]):
        fine_tune(learner, 1, 1e-6, groups=[model], freeze_epochs=1)
        assert max(learner.traces[TrainingPhase]["lr"].values) == 1e-6
    assert traces not in learner.callbacks.listed


def _lr(learner):
    return learner.optimizer.param_groups[0]["lr"]


def test_numbers_of_numpys_are_loaded(tmp_path):
    learner = made(Scheduler(lr=lambda step: np.interp(step, [0, 9], [0.0, 1e-3])))
    learner.fit(1)
    learner.save(tmp_path / "it")
    learner.load(tmp_path / "it")


def test_what_is_no_checkpoint_is_not_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(FileExistsError, match="no checkpoint"):
            made().save(path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / f".it.{os.getpid()}").mkdir()  # which a killed process left
    made().save(tmp_path / "it")


def test_what_a_block_records_ends_with_it():
    learner = made(Scheduler(lr=lambda step: 0.1))
    learner.fit(1)
    with learner.using(callbacks=[Scheduler(lr=lambda step: 0.5)]):
        learner.fit(1)
    assert list(learner.hyperparameters["lr"].values) == [0.1] * 3


def test_a_negative_loss_that_rises_is_above_its_lowest():
    criterion = GL(2)
    assert [bool(criterion.update(loss)) for loss in (-0.5, -0.9, -0.3)] == [False, False, True]


def test_a_model_that_the_optimizer_does_not_hold_is_an_error():
    learner = made()
    with learner.using(model=nn.Linear(2, 1)), pytest.raises(ValueError, match="holds none"):
        learner.fit(1)


def test_averages_begin_with_the_weights_that_are_there_at_the_first_update(tmp_path):
    saved = made()
    saved.fit(1)
    saved.save(tmp_path / "it")
    by_hand, loaded = made(first := EMA(0.9)), made(second := EMA(0.9))
    by_hand.model.load_state_dict(saved.model.state_dict())
    loaded.load(tmp_path / "it")
    for learner, ema in ((by_hand, first), (loaded, second)):
        with learner.using(ema):
            assert torch.equal(learner.model.weight, saved.model.weight)


def test_another_optimizer_is_refused_before_anything_is_loaded(tmp_path):
    saved, other = made(), made(model=nn.Linear(2, 1))
    saved.fit(1)
    saved.save(tmp_path / "it")
    before = other.model.weight.detach().clone()
    message = "of optimizers .*SGD of 2 parameters.*, and the learner's are .*Adam of 2 parameters"
    with other.using(optimizer=torch.optim.Adam), pytest.raises(ValueError, match=message):
        other.load(tmp_path / "it")
    assert torch.equal(other.model.weight, before)


def test_settings_of_a_criterion_are_not_those_of_the_checkpoint():
    first, second = NoImprovement(2), NoImprovement(20)
    first.update(1.0)
    first.update(2.0)
    second.load_state_dict(first.state_dict())
    assert (second.epochs, second.since_best) == (20, 1)


def test_an_evaluation_leaves_no_trace(tmp_path):
    checkpoints, stopping = Checkpoints(tmp_path, keep_top_k=1), EarlyStopping(1)
    learner = made(Metrics(), checkpoints, stopping, ema := EMA(0.5), data=(DATA, DATA))
    learner.fit(1)
    saved, history = sorted(os.listdir(tmp_path)), repr(learner.history)
    with learner.using(ema):
        averaged = learner.evaluate()["loss"]
    assert learner.evaluate()["loss"] == learner.metrics[ValidationPhase].epochs["loss"].last
    assert averaged != learner.metrics[ValidationPhase].epochs["loss"].last
    assert repr(learner.history) == history
    learner.epoch(ValidationPhase())  # nothing has been trained since
    assert sorted(os.listdir(tmp_path)) == saved
    assert stopping.criterion.state_dict()["since_best"] == 0


def test_stopping_early_starts_anew_after_a_fit_that_it_has_ended():
    learner = made(Metrics(), EarlyStopping(2), data=(DATA, DATA), lr=0.0)
    for _ in range(2):
        learner.fit(9)
        assert learner.stopped is not None
    assert learner.history[TrainingPhase].epochs == 6


def test_the_best_is_found_in_a_folder_of_another_run(tmp_path):
    learner = made(Metrics(), Checkpoints(tmp_path))
    learner.fit(3)
    again = Checkpoints(tmp_path)
    assert again.best == learner.callbacks.get(Checkpoints).best
    assert again.latest == learner.callbacks.get(Checkpoints).latest


def test_callbacks_begin_anew_with_another_learner(tmp_path):
    told: list[int] = []
    counted = FunctionCallback(
        lambda learner: told.append(learner.history[TrainingPhase].steps),
        StepEnd,
        reads=("history",),
    )
    callbacks = (
        *(Metrics(), EarlyStopping(2), Scheduler(lr=lambda step: 1e-9 / (1 + step))),
        throttle(counted, StepEnd, every=2),
    )
    kept, rates = Checkpoints(tmp_path), []
    for fold in ("first", "second"):
        kept.folder = tmp_path / fold
        learner = made(*callbacks, kept)
        told.clear()
        learner.fit(2)
        assert learner.stopped is None
        assert told == [1, 3, 5]
        assert len(os.listdir(tmp_path / fold)) == len(kept.saved) == 2
        rates.append(list(learner.hyperparameters["lr"].values))
    assert rates[0] == rates[1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_copy_of_a_learner_goes_on_by_itself(copied):
    callbacks = Metrics(), ClipGradients(0.25), AccumulateGradients(2), Scheduler(lr=_falling)
    learner = made(*callbacks)
    learner.fit(1)
    copy_of_it = copied(learner)
    weight = learner.model.weight.detach().clone()

    copy_of_it.fit(2)
    assert learner.model.weight.equal(weight)
    assert learner.history[TrainingPhase].epochs == 1
    learner.fit(2)
    assert learner.model.weight.equal(copy_of_it.model.weight)
    for each in learner, copy_of_it:
        assert each.history[TrainingPhase].epochs == 3
        assert len(each.metrics[TrainingPhase].epochs["loss"].values) == 3
        assert list(each.hyperparameters["lr"].values) == [_falling(step) for step in range(9)]


def _falling(step: int) -> float:
    return 0.5 / (1 + step)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: made().fit(-1), ValueError, "epochs is at least 0, and got -1"),
        (lambda: made().fit(1, TrainingPhase()), TypeError, r"write \[TrainingPhase\(\)\]"),
        (lambda: made().callbacks.set(EMA()), TypeError, "Expected a list of callbacks"),
        (lambda: Metrics(nn.Softmax), TypeError, "add parentheses"),
        (lambda: EarlyStopping("loss"), TypeError, "the metric is the second"),  # pyright: ignore
        (
            lambda: made(Metrics(), Checkpoints("x", "los")).fit(1),
            ValueError,
            "has no metric 'los'",
        ),
        (lambda: made().using(None).__enter__(), TypeError, "an EMA, and got None"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_phase_without_batches_is_said_to_have_no_metrics():
    learner = made(Metrics(), EarlyStopping(2), data=(DATA, []))
    with (
        pytest.warns(UserWarning, match="no batches for ValidationPhase"),
        pytest.raises(ValueError, match="it has none, as no step of it came to its end"),
    ):
        learner.fit(1)


def test_averages_that_have_joined_no_learner_are_not_used():
    with pytest.raises(ValueError, match="no averages"), made().using(EMA(0.9)):
        pass
