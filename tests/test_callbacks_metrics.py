import functools

import pytest
import torch
import torchmetrics
from torch import nn

from wraploop import processes
from wraploop.callback import Callback, on
from wraploop.callbacks.history import History
from wraploop.callbacks.meters import LossMeter, count_rows
from wraploop.callbacks.metrics import Metric, Metrics, accuracy
from wraploop.callbacks.stop import StopOnNaNLoss
from wraploop.events import BackwardEnd, CancelFit, CancelStep, StepBegin
from wraploop.learner import Learner
from wraploop.phases import AbstractTrainingPhase, TrainingPhase, ValidationPhase

SIZES = [8, 8, 8, 3]


def batches(sizes=SIZES):
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(rows, 4, generator=generator),
            torch.randint(3, (rows,), generator=generator),
        )
        for rows in sizes
    ]


def learner(*callbacks: Callback, data=None) -> Learner:
    torch.manual_seed(0)
    data = batches() if data is None else data
    return Learner(
        nn.Linear(4, 3),
        nn.functional.cross_entropy,
        optimizer=functools.partial(torch.optim.SGD, lr=0.1),
        data=(data, data),
        callbacks=[History(), *callbacks],
        default_callbacks=False,
    )


def of_all_rows(learner: Learner, function) -> float:
    inputs, targets = (torch.cat(parts) for parts in zip(*learner.data["validation"], strict=True))
    with torch.no_grad():
        return float(function(learner.model(inputs), targets))


@pytest.mark.parametrize("function", [nn.functional.cross_entropy, accuracy])
def test_an_epochs_value_is_that_of_all_its_rows_with_a_ragged_last_batch(function):
    one = learner(Metrics(value=function))
    one.epoch(ValidationPhase())
    recorded = one.metrics[ValidationPhase].epochs["value"]
    assert recorded.last == pytest.approx(of_all_rows(one, function), rel=1e-6)
    assert list(recorded.at) == [1]


def test_the_loss_is_always_taken_step_by_step_and_epoch_by_epoch():
    losses = []

    class Keeps(Callback):
        @on(BackwardEnd)
        def keep(self, learner):
            losses.append(learner.step.loss.item())

    one = learner(Metrics(), Keeps())
    one.fit(2)
    recorded = one.metrics[TrainingPhase]
    assert list(recorded.steps["loss"].values) == losses
    assert list(recorded.steps["loss"].at) == list(range(1, 9))
    means = [
        sum(loss * rows for loss, rows in zip(part, SIZES, strict=True)) / sum(SIZES)
        for part in (losses[:4], losses[4:])
    ]
    assert list(recorded.epochs["loss"].values) == pytest.approx(means, rel=1e-12)
    assert recorded.at_epoch(2) == {"loss": recorded.epochs["loss"].last}
    assert recorded.at_epoch(3) == {}


def test_a_torchmetrics_object_is_computed_over_each_epoch_and_phase_by_itself():
    one = learner(Metrics(accuracy, theirs=torchmetrics.Accuracy("multiclass", num_classes=3)))
    one.fit(2)
    for phase in (TrainingPhase, ValidationPhase):
        epochs = one.metrics[phase].epochs
        assert list(epochs["theirs"].values) == pytest.approx(list(epochs["accuracy"].values))
        assert "theirs" not in one.metrics[phase].steps
    assert one.metrics[TrainingPhase].epochs["theirs"].last != pytest.approx(
        one.metrics[ValidationPhase].epochs["theirs"].last
    )


def test_a_collection_of_torchmetrics_gives_each_its_own_name():
    collection = torchmetrics.MetricCollection(
        {
            "micro": torchmetrics.Accuracy("multiclass", num_classes=3, average="micro"),
            "top": torchmetrics.Accuracy("multiclass", num_classes=3, top_k=3),
        }
    )
    one = learner(Metrics(collection))
    one.epoch(ValidationPhase())
    epochs = one.metrics[ValidationPhase].at_epoch(1)
    assert epochs["top"] == 1
    assert epochs["micro"] == pytest.approx(of_all_rows(one, accuracy))


def test_a_metric_of_one_phase_is_absent_from_the_others():
    one = learner(Metrics(Metric(accuracy, phase=ValidationPhase)))
    one.fit(1)
    assert set(one.metrics[ValidationPhase].epochs) == {"loss", "accuracy"}
    assert set(one.metrics[ValidationPhase].steps) == {"loss", "accuracy"}
    assert set(one.metrics[TrainingPhase].epochs) == {"loss"}
    assert set(one.metrics[TrainingPhase].steps) == {"loss"}


def test_accuracy_takes_classes_and_scores_as_targets():
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.6, 0.4]])
    assert accuracy(scores, scores.round()) == accuracy(scores, scores) == 1
    assert accuracy(scores, torch.tensor([0, 1, 0, 0])) == 0.75


class GANLike(AbstractTrainingPhase):
    """Two losses, no outputs and targets; a generator's turn every second step."""

    losses = ("critic_loss", "generator_loss")

    def __init__(self):
        self.turn = 0

    def step(self, learner, batch):
        self.turn += 1
        learner.step.critic_loss = batch.mean()
        if self.turn % 2 == 0:
            learner.step.generator_loss = -batch.mean()


def test_a_phase_names_its_losses_and_a_step_may_have_some_of_them():
    one = learner(Metrics(accuracy))
    one.epoch(GANLike(), [torch.full((rows,), float(rows)) for rows in (1, 2, 3, 6)])
    recorded = one.metrics[GANLike]
    assert list(recorded.steps["critic_loss"].values) == [1, 2, 3, 6]
    assert list(recorded.steps["generator_loss"].values) == [-2, -6]
    assert list(recorded.steps["generator_loss"].at) == [2, 4]
    assert recorded.at_epoch(1) == {
        "critic_loss": (1 + 4 + 9 + 36) / 12,
        "generator_loss": -(4 + 36) / 8,
    }


def test_an_epochs_mean_that_was_gone_on_with_is_the_same_to_the_bit():
    values = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tolist()

    def taken(meter, some):
        for value in some:
            meter.append(1, value, 3)
        return meter

    through = taken(LossMeter("loss", {}), values).result()
    for at in range(1, 8):
        meter = LossMeter("loss", {})
        meter.load_state_dict([taken(LossMeter("loss", {}), values[:at]).state_dict()])
        assert taken(meter, values[at:]).result() == through


def test_a_step_may_say_how_many_rows_it_has():
    class Says(ValidationPhase):
        def step(self, learner, batch):
            learner.step.loss, learner.step.rows = batch

    one = learner(Metrics())
    one.epoch(Says(), [(1.0, 1), (4.0, 2)])
    assert one.metrics[Says].epochs["loss"].last == 3


def test_metrics_record_no_graph():
    grads = []

    def watched(outputs, targets):
        grads.append((torch.is_grad_enabled(), outputs.requires_grad))
        return (outputs * 2).sum()

    learner(Metrics(watched)).epoch(TrainingPhase())
    assert grads == [(False, False)] * len(SIZES)


def test_cancelled_steps_and_broken_epochs_have_no_metrics():
    class Cancels(Callback):
        seen = 0

        @on(StepBegin)
        def cancel(self, learner):
            self.seen += 1
            if self.seen == 2:
                raise CancelStep
            if self.seen == 4:
                raise CancelFit("enough")

    one = learner(Metrics(), Cancels())
    one.fit(1)
    assert len(one.metrics[TrainingPhase].steps["loss"]) == 2
    assert one.metrics[TrainingPhase].epochs == {}


@pytest.mark.parametrize(
    ("value", "came"), [(torch.ones(2), r"a tensor of shape \(2,\)"), ("high", "'high'")]
)
def test_a_metric_that_is_no_number_is_an_error_that_names_it(value, came):
    one = learner(Metrics(odd=lambda outputs, targets: value))
    with pytest.raises(
        TypeError, match=f"metric 'odd' should come to one number, and came to {came}"
    ):
        one.epoch(ValidationPhase())


def test_two_metrics_of_one_name_are_an_error():
    with pytest.raises(ValueError, match="Two metrics are called 'accuracy'"):
        Metrics(accuracy, accuracy)
    with pytest.raises(ValueError, match="Two metrics are called 'loss'"):
        learner(Metrics(loss=accuracy)).epoch(TrainingPhase())


def test_what_is_neither_function_nor_torchmetrics_object_is_no_metric():
    with pytest.raises(TypeError, match="Expected a function or a torchmetrics object, and got 3"):
        Metrics(3)


@pytest.mark.parametrize(
    ("batch", "rows"),
    [
        (torch.ones(5, 2), 5),
        ([torch.ones(4), torch.ones(3)], 4),
        ({"ids": {"x": torch.ones(6)}}, 6),
        ((torch.tensor(1.0), torch.ones(2)), 2),
        ((1, "two", torch.ones(7)), 7),
        (torch.ones(0, 2), 0),
        ("no tensor", 1),
        (torch.tensor(1.0), 1),
        ([], 1),
    ],
)
def test_rows_are_those_of_the_first_tensor(batch, rows):
    assert count_rows(batch) == rows


def in_one_of_two_processes(rank: int, folder: str) -> None:
    """Called by tests/test_callbacks_processes.py, in a process group of two."""
    mine = batches()[:3] if rank == 0 else batches()[3:]
    one = learner(Metrics(accuracy), data=mine)
    one.epoch(ValidationPhase())
    whole = learner()
    for name, function in [("loss", nn.functional.cross_entropy), ("accuracy", accuracy)]:
        recorded = one.metrics[ValidationPhase].epochs[name].last
        assert recorded == pytest.approx(of_all_rows(whole, function), rel=1e-6)
    stop_together(rank)


def stop_together(rank: int) -> None:
    good, spoiled = batches([4])[0], torch.full((4, 4), torch.nan)
    data = [good, good, (spoiled, good[1]) if rank == 1 else good, good]
    one = learner(StopOnNaNLoss(), data=data)
    one.fit(3)
    assert one.stopped is not None
    assert (
        one.stopped.reason
        == ("the loss of another process is NaN or infinite", "loss is NaN")[rank]
    )
    assert one.history[TrainingPhase].steps == 2
    weights = one.model.weight.sum().item()
    assert processes.sum(weights) == pytest.approx(2 * weights, rel=1e-12)
