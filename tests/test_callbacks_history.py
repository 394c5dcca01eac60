import pytest
import torch
from torch import nn

from wraploop.callback import Callback, on
from wraploop.callbacks.history import History
from wraploop.callbacks.records import ByPhase, Series
from wraploop.events import CancelFit, CancelStep, StepBegin, StepEnd
from wraploop.learner import Learner
from wraploop.phases import TrainingPhase, ValidationPhase


def learner(*callbacks: Callback) -> Learner:
    model = nn.Linear(1, 1)
    data = [(torch.ones(2, 1), torch.ones(2, 1))] * 16
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    return Learner(
        model,
        nn.functional.mse_loss,
        optimizer=sgd,
        data=(data, data[:4]),
        callbacks=[*callbacks, History()],
        default_callbacks=False,
    )


def counts(learner: Learner, phase) -> tuple[int, int, int]:
    history = learner.history[phase]
    return history.epochs, history.steps, history.steps_in_epoch


def test_history_counts_epochs_steps_and_steps_in_the_epoch():
    one = learner()
    assert counts(one, TrainingPhase) == (0, 0, 0)
    one.fit(10)
    assert counts(one, TrainingPhase) == (10, 160, 16)
    assert counts(one, ValidationPhase) == (10, 40, 4)


def test_history_goes_on_in_the_next_fit():
    one = learner()
    one.fit(1)
    one.fit(2)
    assert counts(one, TrainingPhase()) == (3, 48, 16)


def test_cancelled_steps_do_not_count():
    class EverySecond(Callback):
        seen = 0

        @on(StepBegin, TrainingPhase)
        def cancel(self, learner):
            self.seen += 1
            if self.seen % 2:
                raise CancelStep

    one = learner(EverySecond())
    one.epoch(TrainingPhase())
    assert counts(one, TrainingPhase) == (1, 8, 8)


@pytest.mark.parametrize("event", [StepBegin, StepEnd])
def test_an_epoch_cut_off_by_a_cancelled_fit_does_not_count(event):
    class Stops(Callback):
        @on(event)
        def stop(self, learner):
            raise CancelFit("enough")

    one = learner(Stops())
    one.fit(3)
    assert counts(one, TrainingPhase) == (0, int(event is StepEnd), int(event is StepEnd))


def test_records_are_found_by_phase_class_and_name():
    records = ByPhase(list)
    records[TrainingPhase].append(1)
    assert records[TrainingPhase()] is records["TrainingPhase"] is records[TrainingPhase]
    assert dict(records) == {"TrainingPhase": [1]}
    with pytest.raises(KeyError, match=r"No phase named 'Trainig' has run; there are \['Train"):
        records["Trainig"]


NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_CUDA)])
def test_a_series_keeps_order_whatever_it_is_given(device):
    series = Series()
    expected = []
    for index in range(150):
        series.append(index + 1, index / 2 if index % 3 else torch.tensor(index / 2, device=device))
        expected.append(index / 2)
    assert list(series.values) == expected
    assert list(series.at) == list(range(1, 151))
    assert series.last == expected[-1]


def test_a_series_shows_its_latest():
    series = Series()
    for at in range(1, 11):
        series.append(at, at / 2)
    assert repr(series) == (
        "Series(2 more, 3: 1.5, 4: 2, 5: 2.5, 6: 3, 7: 3.5, 8: 4, 9: 4.5, 10: 5)"
    )
