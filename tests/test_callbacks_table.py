import pytest
import torch
from torch import nn

from wraploop.callback import Callback, on
from wraploop.callbacks.history import History
from wraploop.callbacks.metrics import Metric, Metrics
from wraploop.callbacks.table import EpochTable
from wraploop.events import CancelFit, StepEnd
from wraploop.learner import Learner
from wraploop.phases import TrainingPhase, ValidationPhase

BATCH = (torch.ones(2, 1), torch.ones(2, 1))


def fit(epochs: int, *callbacks: Callback) -> Learner:
    one = Learner(
        nn.Linear(1, 1),
        nn.functional.mse_loss,
        optimizer=torch.optim.SGD,
        data=([BATCH], [BATCH]),
        callbacks=[History(), EpochTable(), *callbacks],
        default_callbacks=False,
    )
    one.fit(epochs)
    return one


def rows(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_each_epoch_of_each_phase_is_a_row_under_one_header(capsys):
    one = fit(2, Metrics())
    printed = rows(capsys)
    assert printed[0] == ["epoch", "phase", "loss", "seconds"]
    assert [row[:2] for row in printed[1:]] == [
        ["1", "TrainingPhase"],
        ["1", "ValidationPhase"],
        ["2", "TrainingPhase"],
        ["2", "ValidationPhase"],
    ]
    for row in printed[1:]:
        value = one.metrics[row[1]].at_epoch(int(row[0]))["loss"]
        assert row[2] == f"{value:.5g}"


def test_columns_line_up_and_a_metric_without_a_value_shows_as_a_dash(capsys):
    a_rather_long_metric = Metric(lambda o, t: 12.5, "a_rather_long_metric", phase=ValidationPhase)
    fit(2, Metrics(a_rather_long_metric))
    lines = capsys.readouterr().out.splitlines()
    table = lines[2:]  # the header is printed again as the metric turns up
    assert len({len(line) for line in table}) == 1
    assert [line.split()[3] for line in table] == ["a_rather_long_metric", "12.5", "-", "12.5"]


def test_a_broken_epoch_has_no_row(capsys):
    class Stops(Callback):
        @on(StepEnd, TrainingPhase)
        def stop(self, learner):
            raise CancelFit("enough")

    fit(2, Metrics(), Stops())
    assert rows(capsys) == []


def test_processes_other_than_the_first_print_nothing(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    fit(1, Metrics())
    assert rows(capsys) == []


def test_a_table_without_metrics_is_an_error():
    with pytest.raises(ValueError, match=r"EpochTable\(\) reads 'metrics', which no callback"):
        fit(1)
