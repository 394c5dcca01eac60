import csv
import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from wraploop import DistributedModel
from wraploop.callback import Callback, on
from wraploop.callbacks.history import History
from wraploop.callbacks.log_files import CSVLogger, JSONLinesLogger
from wraploop.callbacks.log_tensors import LogHistograms, LogImages
from wraploop.callbacks.loggers import Entry, Logger, MemoryLogger, pixels
from wraploop.callbacks.logs import LogHyperparameters, LogMetrics, LogTraces
from wraploop.callbacks.metrics import Metrics, accuracy
from wraploop.callbacks.records import ByPhase, Series
from wraploop.callbacks.trackers import TrackerLogger
from wraploop.events import CancelFit, CancelStep, StepBegin, StepEnd
from wraploop.gan import GANTraining
from wraploop.learner import Learner
from wraploop.named import OptimizerLike
from wraploop.phases import TrainingPhase, ValidationPhase

SGD = functools.partial(torch.optim.SGD, lr=0.1)


def learner(*callbacks: Callback, model=None, steps=4, optimizer: OptimizerLike = SGD) -> Learner:
    torch.manual_seed(0)
    batches = [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(steps)]
    return Learner(
        model or nn.Linear(4, 3),
        nn.functional.cross_entropy,
        optimizer=optimizer,
        data=(batches, batches[:2]),
        callbacks=[*callbacks, Metrics(accuracy), History()],
        default_callbacks=False,
        strict=True,
    )


def tags(logger: MemoryLogger) -> set[str]:
    return {entry.name for entry in logger.entries}


class Cancels(Callback):
    """Cancels the second step, and the fit at the first of the second epoch."""

    seen = 0

    @on(StepBegin, TrainingPhase)
    def cancel(self, learner):
        self.seen += 1
        if self.seen == 2:
            raise CancelStep
        if self.seen == 5:
            raise CancelFit("enough")


class TracesSomething(Callback):
    """Traces the step's number, a tensor and a text."""

    reads = ("history",)
    writes = ("traces",)

    def attach(self, learner):
        learner.traces = ByPhase(dict)

    @on(StepEnd)
    def take(self, learner):
        at = learner.history[learner.phase].steps
        traces = learner.traces[learner.phase]
        traces.setdefault("number", Series()).append(at, torch.tensor(at / 2))
        traces["text"] = Text([at], ["a text"])
        if at == 3:
            traces.setdefault("once", Series()).append(at, 7.0)


class Text:
    def __init__(self, at, values):
        self.at, self.values = at, values


def test_metrics_are_logged_under_phase_and_name_at_training_steps():
    logger = MemoryLogger()
    one = learner(LogMetrics(logger))
    one.fit(2)
    training, validation = one.metrics[TrainingPhase], one.metrics[ValidationPhase]
    for name in ("loss", "accuracy"):
        steps = list(zip(range(1, 9), training.steps[name].values, strict=True))
        assert logger.series(f"TrainingPhase/{name}") == steps
        for phase, record in (("TrainingPhase", training), ("ValidationPhase", validation)):
            epochs = list(zip([4, 8], record.epochs[name].values, strict=True))
            assert logger.series(f"{phase}/epoch/{name}") == epochs
    assert logger.series("epoch") == [(4, 1), (8, 2)]
    assert len(logger.entries) == 2 * 8 + 4 * 2 + 2
    one.fit(1)
    assert logger.series("epoch")[-1] == (12, 3)


def test_step_values_are_logged_every_so_many_steps():
    logger = MemoryLogger()
    one = learner(LogMetrics(logger, every_steps=3))
    one.fit(2)
    losses = one.metrics[TrainingPhase].steps["loss"].values
    assert logger.series("TrainingPhase/loss") == [(3, losses[2]), (6, losses[5])]


def test_cancelled_steps_and_broken_epochs_are_not_logged():
    logger = MemoryLogger()
    logs = [LogMetrics(logger), LogHyperparameters(logger), LogHistograms(logger, every_steps=1)]
    one = learner(*logs, LogImages(lambda _: torch.ones(2, 2), logger), Cancels())
    one.fit(2)
    assert [step for step, _ in logger.series("TrainingPhase/loss")] == [1, 2, 3]
    assert [step for step, _ in logger.series("lr/optimizer")] == [1, 2, 3]
    assert [step for step, _ in logger.series("model/bias")] == [1, 2, 3]
    assert [step for step, _ in logger.series("epoch")] == [3]
    assert [step for step, _ in logger.series("images")] == [3]
    assert [step for step, _ in logger.series("TrainingPhase/epoch/loss")] == [3]
    assert one.stopped is not None


def gan(*callbacks: Callback) -> Learner:
    torch.manual_seed(0)
    models = {"generator": nn.Linear(3, 2), "critic": nn.Linear(2, 1)}
    adam = functools.partial(torch.optim.Adam, lr=0.01, betas=(0.5, 0.9))
    return Learner(
        models,
        optimizer={"generator": adam, "critic": SGD},
        data=[torch.randn(6, 2) for _ in range(4)],
        callbacks=[*callbacks, Metrics(), History()],
        default_callbacks=False,
        strict=True,
    )


def test_a_gans_losses_rates_and_parameters_are_logged_under_their_networks():
    logger = MemoryLogger()
    one = gan(LogMetrics(logger), LogHyperparameters(logger), LogHistograms(logger, every_steps=4))
    phase = GANTraining(3, critic_steps=2)
    one.epoch(phase)
    assert [step for step, _ in logger.series("GANTraining/critic_loss")] == [1, 2, 3, 4]
    assert [step for step, _ in logger.series("GANTraining/generator_loss")] == [2, 4]
    assert logger.series("lr/generator") == [(step, 0.01) for step in (1, 2, 3, 4)]
    assert logger.series("lr/critic") == [(step, 0.1) for step in (1, 2, 3, 4)]
    assert logger.series("betas.0/generator") == [(1, 0.5)]
    assert logger.series("betas.1/generator") == [(1, 0.9)]
    assert logger.series("momentum/critic") == [(1, 0)]
    for name, model in one.models.items():
        for part in ("weight", "bias"):
            [(step, values)] = logger.series(f"{name}/{part}")
            assert step == 4
            assert torch.equal(values, getattr(model, part).detach().flatten().double())


def test_what_only_some_steps_have_is_logged_when_it_is_new():
    logger = MemoryLogger()
    one = gan(LogMetrics(logger, every_steps=3))
    one.epoch(GANTraining(3, critic_steps=2))
    generators = one.metrics["GANTraining"].steps["generator_loss"]
    assert logger.series("GANTraining/generator_loss") == [(3, generators.values[0])]


def test_a_hyperparameter_is_logged_when_it_changes_and_lr_always():
    class Changes(Callback):
        reads = ("optimizer", "history")

        @on(StepBegin, TrainingPhase)
        def change(self, learner):
            if learner.history.training_steps == 2:
                learner.optimizer.param_groups[1]["momentum"] = 0.5
                learner.optimizer.param_groups[0]["lr"] = torch.tensor(0.25)

    def groups(params):
        return torch.optim.SGD([{"params": params[:1]}, {"params": params[1:]}], lr=0.125)

    logger = MemoryLogger()
    configuration = {"batch_size": 6, "name": "first", "fast": True}
    logs = LogHyperparameters(logger, configuration=configuration)
    one = learner(logs, Changes(), optimizer=groups)
    one.fit(1)
    one.fit(1)
    assert logger.entries[:3] == [
        Entry("setting", name, None, value) for name, value in configuration.items()
    ]
    assert sum(entry.kind == "setting" for entry in logger.entries) == 3
    assert logger.series("lr/optimizer/0") == [
        (1, 0.125),
        (2, 0.125),
        *((i, 0.25) for i in range(3, 9)),
    ]
    assert logger.series("lr/optimizer/1") == [(step, 0.125) for step in range(1, 9)]
    assert logger.series("momentum/optimizer/0") == [(1, 0)]
    assert logger.series("momentum/optimizer/1") == [(1, 0), (3, 0.5)]


def test_the_latest_number_of_each_trace_is_logged_and_nothing_else():
    logger = MemoryLogger()
    learner(LogTraces(logger, every_steps=2), TracesSomething()).fit(1)
    assert logger.series("TrainingPhase/traces/number") == [(2, 1.0), (4, 2.0)]
    assert logger.series("TrainingPhase/traces/once") == [(4, 7.0)]
    assert tags(logger) == {"TrainingPhase/traces/number", "TrainingPhase/traces/once"}


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ((2, 3, 4, 5), ["images/0", "images/1"]),
        ((2, 1, 4, 5), ["images/0", "images/1"]),
        ((2, 4, 5), ["images/0", "images/1"]),
        ((3, 4, 5), ["images"]),
        ((1, 4, 5), ["images"]),
        ((4, 5), ["images"]),
    ],
)
def test_images_of_every_shape_are_logged_one_by_one(shape, names):
    logger, images = MemoryLogger(), torch.rand(shape)
    one = learner(LogImages(lambda _: images, logger, every_epochs=2))
    one.fit(3)
    assert [(entry.name, entry.step) for entry in logger.entries] == [(name, 8) for name in names]
    singles = images if len(names) > 1 else images[None]
    for entry, image in zip(logger.entries, singles, strict=True):
        assert torch.equal(entry.value, pixels(image))


def test_images_of_another_shape_are_an_error():
    one = learner(LogImages(lambda _: torch.ones(5), MemoryLogger()))
    with pytest.raises(ValueError, match=r"\(H, W\), and returned the shape \(5,\)"):
        one.fit(1)


def test_logging_images_changes_nothing_of_the_training():
    seen = []

    def sample(learner):
        seen.append((learner.model.training, torch.is_grad_enabled()))
        return learner.model(torch.randn(8, 4)).sigmoid()

    def trained(*callbacks):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3))
        one = learner(*callbacks, model=model)
        torch.manual_seed(3)
        one.fit(2)
        return one.model.state_dict()

    torch.manual_seed(1)
    plain = trained()
    torch.manual_seed(1)
    logged = trained(LogImages(sample, MemoryLogger(), phase=TrainingPhase))
    assert seen == [(False, False)] * 2
    for name, tensor in plain.items():
        assert torch.equal(tensor, logged[name]), name


def test_pixels_are_clamped_bytes_with_channels_last():
    image = torch.tensor([[[0.0, 1.0]], [[-1.0, 2.0]], [[math.nan, 0.2]]])
    assert pixels(image).tolist() == [[[0, 0, 0], [255, 255, 51]]]
    assert pixels(torch.tensor([[7]], dtype=torch.uint8)).tolist() == [[[7]]]
    with pytest.raises(ValueError, match=r"1 or 3 channels, or \(H, W\), and got \(2, 4, 4\)"):
        pixels(torch.ones(2, 4, 4))
    with pytest.raises(TypeError, match=r"floats in \[0, 1\] or of uint8, and got torch.int64"):
        pixels(torch.ones(4, 4, dtype=torch.int64))


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_a_csv_file_holds_every_number_and_grows(tmp_path):
    path = tmp_path / "logs" / "numbers.csv"
    logger = CSVLogger(path)
    assert not path.parent.exists()
    logger.hyperparameters({"batch_size": 64, "name": "a, b"})
    logger.numbers({"loss": 0.1, "norm": math.inf}, 1)
    logger.numbers({}, 2)
    expected = [
        ["step", "name", "value"],
        ["", "batch_size", "64"],
        ["", "name", "a, b"],
        ["1", "loss", "0.1"],
        ["1", "norm", "inf"],
    ]
    assert rows(path) == expected  # while it is open
    logger.close()
    logger.numbers({"loss": 1 / 3}, 3)
    logger.close()
    path.write_text(path.read_text() + "4,lo")  # the disk was full
    again = CSVLogger(path)
    again.numbers({"loss": torch.tensor(0.5)}, 5)
    last = [["3", "loss", str(1 / 3)], ["4", "lo"], ["5", "loss", "0.5"]]
    assert rows(path) == [*expected, *last]


def test_files_of_another_form_are_refused_and_left_alone(tmp_path):
    path = tmp_path / "other"
    path.write_text("epoch,loss\n1,2\n")
    with pytest.raises(
        ValueError, match=r"CSVLogger\('.*other'\) adds .* begins with 'epoch,loss'"
    ):
        CSVLogger(path)
    with pytest.raises(ValueError, match=r"JSONLinesLogger\('.*other'\) adds .*'epoch,loss'"):
        JSONLinesLogger(path)
    assert path.read_text() == "epoch,loss\n1,2\n"


def test_a_json_lines_file_is_strict_json_line_by_line(tmp_path):
    path = tmp_path / "log.jsonl"
    logger = JSONLinesLogger(path)
    logger.hyperparameters({"rate": math.inf, "fast": True})
    logger.numbers({"a/loss": 0.1, "nan": math.nan, "down": -math.inf}, 12)
    logger.histogram("w", torch.tensor([[0.0, 1.0], [1.0, math.nan]], dtype=torch.bfloat16), 13)
    logger.histogram("nothing", torch.tensor([math.nan]), 13)
    logger.text("sample", "to be\nor not", 14)
    with pytest.raises(ValueError, match="'step' is when something was logged"):
        logger.numbers({"step": 1.0}, 15)
    JSONLinesLogger(path).numbers({"a/loss": 1 / 3}, 15)

    def refuse(constant):
        raise AssertionError(constant)

    lines = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    histogram = lines.pop(2)["w"]
    assert lines == [
        {"hyperparameters": {"rate": "inf", "fast": True}},
        {"step": 12, "a/loss": 0.1, "nan": "nan", "down": "-inf"},
        {"step": 14, "sample": {"text": "to be\nor not"}},
        {"step": 15, "a/loss": 1 / 3},
    ]
    counts, edges = np.histogram([0.0, 1.0, 1.0], 64)
    assert histogram["counts"] == counts.tolist()
    assert histogram["edges"] == pytest.approx(edges.tolist())


def read_events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), {"tensors": 0, "images": 0, "histograms": 0})
    accumulator.Reload()
    return accumulator


def test_tensorboard_files_hold_numbers_histograms_images_and_text(tmp_path):
    logger = TrackerLogger.named("tensorboard", "run", logging_dir=str(tmp_path))
    assert not list(tmp_path.iterdir())
    image = torch.rand(3, 4, 5)
    one = learner(
        LogMetrics(logger),
        LogHyperparameters(logger, configuration={"batch_size": 6}),
        LogHistograms(logger, every_steps=4),
        LogImages(lambda _: image, logger),
    )
    one.fit(1)
    logger.text("sample", "to be", 4)
    events = read_events(tmp_path / "run")  # before it is closed
    losses = [(event.step, event.value) for event in events.Scalars("TrainingPhase/loss")]
    assert [step for step, _ in losses] == [1, 2, 3, 4]
    recorded = one.metrics[TrainingPhase].steps["loss"].values
    assert [value for _, value in losses] == pytest.approx(list(recorded))
    assert [event.step for event in events.Scalars("ValidationPhase/epoch/accuracy")] == [4]
    [histogram] = events.Histograms("model/weight")
    weight = one.model.weight.detach()
    assert (histogram.step, histogram.histogram_value.num) == (4, weight.numel())
    assert histogram.histogram_value.sum == pytest.approx(weight.double().sum().item())
    assert histogram.histogram_value.min == weight.min()
    [shown] = events.Images("images")
    assert (shown.step, shown.height, shown.width) == (4, 4, 5)
    path = tmp_path / "image.png"
    path.write_bytes(shown.encoded_image_string)
    with Image.open(path) as decoded:
        assert np.array_equal(np.asarray(decoded), pixels(image).numpy())
    [text] = events.Tensors("sample/text_summary")
    assert text.tensor_proto.string_val == [b"to be"]
    assert "batch_size: 6" in next((tmp_path / "run").rglob("hparams.yml")).read_text()
    logger.close()


def test_a_tracker_of_ones_own_is_started_once_and_takes_numbers():
    class Own(GeneralTracker):
        name = "own"
        requires_logging_directory = False
        writer = None

        def __init__(self):
            super().__init__()
            self.calls = []

        @property
        def tracker(self):
            return self.writer

        def start(self):
            self.calls.append("start")
            self.writer = object()

        def log(self, values, step=None, **kwargs):
            self.calls.append((values, step))

        def finish(self):
            self.calls.append("finish")

    own = Own()
    logger = TrackerLogger(own)
    logger.close()
    logger.numbers({"loss": 1.0}, 1)
    logger.numbers({"loss": 2.0}, 2)
    logger.close()
    assert own.calls == ["start", ({"loss": 1.0}, 1), ({"loss": 2.0}, 2), "finish"]
    with pytest.raises(ValueError, match=r"TrackerLogger\(Own\) takes numbers, and no text"):
        logger.text("a", "b", 1)
    lazy = TrackerLogger(functools.partial(Own))
    assert lazy.tracker is lazy.tracker
    assert isinstance(lazy.tracker, Own)


def test_a_tracker_that_cannot_be_made_is_an_error_at_once():
    with pytest.raises(ValueError, match=r"called 'tensorbored'; there are .*'wandb'"):
        TrackerLogger.named("tensorbored", "run")
    with pytest.raises(TypeError, match="logging_dir"):
        TrackerLogger.named("tensorboard", "run")
    with pytest.raises(TypeError, match=r"a tracker of accelerate.* and got 'tensorboard'"):
        TrackerLogger("tensorboard")  # pyright: ignore


def test_a_tracker_does_not_start_a_process_group(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    logger = TrackerLogger.named("tensorboard", "run", logging_dir=str(tmp_path))
    with pytest.raises(RuntimeError, match=r"has joined no process group yet. Wrap a model in"):
        logger.numbers({"loss": 1.0}, 1)


def test_a_logger_that_does_not_take_what_is_logged_is_an_error(tmp_path):
    logger = CSVLogger(tmp_path / "a.csv")
    with pytest.raises(
        ValueError, match=r"LogHistograms logs histograms, and CSVLogger\(.*\) takes n"
    ):
        LogHistograms(MemoryLogger(), logger)
    with pytest.raises(
        ValueError, match=r"LogImages logs images, and JSONLinesLogger\(.*\) takes h"
    ):
        LogImages(lambda _: torch.ones(2, 2), JSONLinesLogger(tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match=r"CSVLogger\(.*\) takes numbers, and no images"):
        logger.image("a", torch.ones(2, 2), 1)
    with pytest.raises(ValueError, match="LogMetrics has no logger"):
        LogMetrics()
    with pytest.raises(TypeError, match=r"LogTraces expected a Logger, .* add parentheses"):
        LogTraces(MemoryLogger)  # pyright: ignore


def test_intervals_below_one_and_odd_configurations_are_errors():
    logger = MemoryLogger()
    for make in (LogMetrics, LogHyperparameters, LogHistograms, LogTraces):
        with pytest.raises(ValueError, match="every_steps is at least 1, and got 0"):
            make(logger, every_steps=0)
    with pytest.raises(ValueError, match="every_epochs is at least 1, and got -1"):
        LogImages(lambda _: torch.ones(2, 2), logger, every_epochs=-1)
    with pytest.raises(TypeError, match=r"numbers, strings and bools, and 'sizes' is \[1\]"):
        LogHyperparameters(logger, configuration={"sizes": [1]})  # pyright: ignore


def loggers_in(folder: Path) -> list[Logger]:
    return [
        CSVLogger(folder / "log.csv"),
        JSONLinesLogger(folder / "log.jsonl"),
        TrackerLogger.named("tensorboard", "run", logging_dir=str(folder)),
        MemoryLogger(),
    ]


def in_one_of_two_processes(rank: int, folder: str) -> None:
    """Called by tests/test_callbacks_processes.py, in a process group of two."""
    own = Path(folder) / f"rank{rank}"
    csv_logger, json_logger, tracker, memory = loggers_in(own)
    torch.manual_seed(0)
    one = learner(
        LogMetrics(csv_logger, json_logger, tracker, memory),
        LogHyperparameters(csv_logger, tracker, configuration={"batch_size": 6}),
        LogHistograms(tracker, json_logger, every_steps=2),
        LogImages(lambda learner: learner.model(torch.ones(6, 4)).sigmoid(), tracker),
        model=DistributedModel(nn.Linear(4, 3)),
    )
    one.fit(2)
    assert own.exists() == (rank == 0)
    if rank == 0:
        losses = list(one.metrics[TrainingPhase].steps["loss"].values)
        kept = [row for row in rows(own / "log.csv") if row[1] == "TrainingPhase/loss"]
        assert [float(value) for *_, value in kept] == losses
        events = read_events(own / "run")
        assert events.Images("images")[0].width == 3
        assert [event.step for event in events.Histograms("model/weight")] == [2, 4, 6, 8]
        assert len(events.Scalars("TrainingPhase/loss")) == 8
    assert isinstance(memory, MemoryLogger)
    assert bool(memory.entries) == (rank == 0)
