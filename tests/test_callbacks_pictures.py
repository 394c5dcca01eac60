from functools import partial
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from torch import nn

from wraploop import DistributedModel
from wraploop.callback import Callback, on
from wraploop.callbacks.history import History
from wraploop.callbacks.metrics import Metrics
from wraploop.callbacks.pictures import PlotMetrics, SaveImages
from wraploop.callbacks.strict import UndeclaredAccess
from wraploop.events import CancelFit, StepBegin
from wraploop.gan import GANTraining
from wraploop.learner import Learner
from wraploop.phases import Phase, TrainingPhase, ValidationPhase
from wraploop.plots import plot_metrics

BATCH = (torch.ones(2, 1), torch.ones(2, 1))
SIZE = (450, 700)  # pixels of a figure with one panel


class CutOff(Callback):
    """Ends the fit at the first step of a phase's epoch."""

    reads = ("history",)

    def __init__(self, phase: type[Phase], epoch: int):
        self.phase, self.epoch = phase, epoch

    @on(StepBegin)
    def stop(self, learner):
        phase = learner.phase
        if isinstance(phase, self.phase) and learner.history[phase].epochs == self.epoch - 1:
            raise CancelFit("enough")


def learner(*callbacks: Callback, model: nn.Module | None = None) -> Learner:
    return Learner(
        model or nn.Linear(1, 1),
        nn.functional.mse_loss,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        data=([BATCH] * 3, [BATCH]),
        callbacks=[*callbacks, History(), Metrics()],
        default_callbacks=False,
        strict=True,
    )


@pytest.fixture
def drawn(monkeypatch):
    """The epochs that training and validation had when the metrics were drawn."""
    seen = []

    def follow(learner):
        history = learner.history
        seen.append((history[TrainingPhase].epochs, history[ValidationPhase].epochs))
        return plot_metrics(learner)

    monkeypatch.setattr("wraploop.callbacks.pictures.plot_metrics", follow)
    return seen


# PlotMetrics


def test_metrics_are_drawn_after_the_last_phase_of_each_epoch(drawn, tmp_path):
    path = tmp_path / "new" / "metrics.png"
    learner(PlotMetrics(path)).fit(3)
    assert drawn == [(1, 1), (2, 2), (3, 3)]
    assert imread(path).shape[:2] == SIZE
    assert list(path.parent.iterdir()) == [path]


def test_metrics_are_drawn_every_so_many_epochs_and_at_the_end(drawn, tmp_path):
    learner(PlotMetrics(tmp_path / "metrics.png", every_epochs=2)).fit(5)
    assert drawn == [(2, 2), (4, 4), (5, 5)]


def test_an_epoch_by_itself_is_drawn_at_its_end(drawn, tmp_path):
    one = learner(PlotMetrics(tmp_path / "metrics.png"))
    one.fit(1, [TrainingPhase()])
    one.epoch(ValidationPhase())
    one.epoch(TrainingPhase())
    assert drawn == [(1, 0), (1, 1), (2, 1)]


def test_a_fit_that_is_cut_off_is_drawn_as_far_as_it_came(drawn, tmp_path):
    learner(PlotMetrics(tmp_path / "one.png"), CutOff(TrainingPhase, 3)).fit(5)
    assert drawn == [(1, 1), (2, 2)]
    drawn.clear()
    learner(PlotMetrics(tmp_path / "two.png"), CutOff(ValidationPhase, 2)).fit(5)
    assert drawn == [(1, 1), (2, 1)]


def test_a_fit_without_a_whole_epoch_draws_nothing(tmp_path):
    learner(PlotMetrics(tmp_path / "one.png"), CutOff(TrainingPhase, 1)).fit(5)
    assert not list(tmp_path.iterdir())


def test_the_two_losses_of_a_gan_are_drawn_and_its_samples(tmp_path):
    latents = torch.randn(4, 2)
    samples = SaveImages(
        tmp_path, lambda one: one.model.generator(latents).reshape(4, 2, 3), name="samples"
    )
    one = Learner(
        {"generator": nn.Linear(2, 6), "critic": nn.Linear(6, 1)},
        optimizer=partial(torch.optim.SGD, lr=0.1),
        callbacks=[History(), Metrics(), PlotMetrics(tmp_path / "metrics.png"), samples],
        default_callbacks=False,
        strict=True,
    )
    one.fit(2, [(GANTraining(2), [torch.randn(4, 6)] * 3)])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "metrics.png",
        "samples_0001.png",
        "samples_0002.png",
    ]
    assert imread(tmp_path / "metrics.png").shape[:2] == (370, 900)
    assert imread(tmp_path / "samples_0002.png").shape[:2] == (7, 9)


# SaveImages


def test_images_are_numbered_by_the_epochs_of_their_phase(tmp_path):
    given = torch.rand(3, 2, 2)
    one = learner(
        SaveImages(tmp_path / "training", lambda one: given, every_epochs=2, columns=1),
        SaveImages(tmp_path / "looks", lambda one: given, phase=ValidationPhase, name="seen"),
    )
    one.fit(2)
    one.fit(3)
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    looks = [f"looks/seen_000{epoch}.png" for epoch in range(1, 6)]
    assert names == [*looks, "training/images_0002.png", "training/images_0004.png"]
    pixels = imread(tmp_path / "training" / "images_0002.png")
    assert pixels.shape[:2] == (10, 4)
    torch.testing.assert_close(torch.tensor(pixels[1:3, 1:3, 0]), given[0], rtol=0, atol=0.51 / 255)


def test_training_goes_on_as_it_would_without_pictures(tmp_path):
    def trained(*callbacks: Callback) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 1))
        one = learner(*callbacks, model=model)
        one.fit(3)
        assert all(module.training for module in model.modules())
        return model.state_dict()

    seen = []

    def sample(one):
        images = one.model(torch.randn(4, 1)).reshape(4, 1, 1)
        seen.append((one.model.training, images.requires_grad))
        return images

    plain, pictured = trained(), trained(SaveImages(tmp_path, sample))
    assert seen == [(False, False)] * 3
    for name, value in plain.items():
        torch.testing.assert_close(pictured[name], value, rtol=0, atol=0, msg=name)


def test_an_epoch_that_was_cut_off_has_no_images(tmp_path):
    given = torch.rand(1, 2, 2)
    learner(SaveImages(tmp_path, lambda one: given), CutOff(TrainingPhase, 2)).fit(5)
    assert [path.name for path in tmp_path.iterdir()] == ["images_0001.png"]


def test_what_the_function_reads_has_to_be_declared(tmp_path):
    def last(one):
        assert one.metrics[TrainingPhase].epochs["loss"].last > 0
        return one.step.outputs.detach().reshape(1, 1, 2) + len(one.data)

    with pytest.raises(UndeclaredAccess, match=r"SaveImages.* reads 'metrics'"):
        learner(SaveImages(tmp_path, last)).fit(1)
    learner(SaveImages(tmp_path, last, reads=("step", "data", "metrics"))).fit(1)
    assert [path.name for path in tmp_path.iterdir()] == ["images_0001.png"]


@pytest.mark.parametrize("every_epochs", [0, -1])
def test_less_often_than_never_is_an_error(every_epochs, tmp_path):
    message = f"every_epochs is at least 1, and got {every_epochs}"
    with pytest.raises(ValueError, match=message):
        PlotMetrics(tmp_path / "metrics.png", every_epochs=every_epochs)
    with pytest.raises(ValueError, match=message):
        SaveImages(tmp_path, lambda one: torch.ones(1, 2, 2), every_epochs=every_epochs)
    with pytest.raises(ValueError, match="`columns` and `scale` are at least 1, got columns=0"):
        SaveImages(tmp_path, lambda one: torch.ones(1, 2, 2), columns=0)


# Processes


def in_one_of_two_processes(rank: int, folder: str) -> None:
    """Called by tests/test_callbacks_processes.py, in a process group of two."""
    torch.manual_seed(0)
    called = []

    def sample(one):
        called.append(rank)
        return one.model(torch.rand(5, 1)).sigmoid().reshape(5, 1, 1)

    mine = f"{folder}/of_rank_{rank}"
    one = learner(
        PlotMetrics(f"{mine}/metrics.png"),
        SaveImages(mine, sample),
        model=DistributedModel(nn.Linear(1, 1)),
    )
    one.fit(2)
    assert called == [rank] * 2


def check_what_processes_wrote(folder: Path) -> None:
    written = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    assert written == [
        "of_rank_0/images_0001.png",
        "of_rank_0/images_0002.png",
        "of_rank_0/metrics.png",
    ]
    assert imread(folder / "of_rank_0" / "images_0002.png").shape[:2] == (5, 7)
    assert not (folder / "of_rank_1").exists()
