import copy
import math
import pickle
import sys
import threading
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from torch import nn

from wraploop import images
from wraploop.callback import Callback, on
from wraploop.callbacks.history import History, PhaseHistory
from wraploop.callbacks.metrics import Metric, Metrics, PhaseMetrics
from wraploop.callbacks.records import Series
from wraploop.events import CancelFit, StepEnd
from wraploop.gan import GANTraining
from wraploop.images import image_grid, save_image
from wraploop.learner import Learner
from wraploop.phases import TrainingPhase, ValidationPhase
from wraploop.plots import (
    plot_lr_find,
    plot_metrics,
    plot_schedule,
    save_figure,
)

BATCH = (torch.ones(2, 1), torch.ones(2, 1))


def learner(*callbacks: Callback, steps: int = 4) -> Learner:
    return Learner(
        nn.Linear(1, 1),
        nn.functional.mse_loss,
        optimizer=partial(torch.optim.SGD, lr=0.05),
        data=([BATCH] * steps, [BATCH] * 2),
        callbacks=[History(), *callbacks],
        default_callbacks=False,
    )


def lines(panel: Axes) -> dict[str, tuple[list[float], list[float]]]:
    """What is drawn, by label."""
    drawn: Any = panel.get_lines()
    return {str(d.get_label()): (list(d.get_xdata()), list(d.get_ydata())) for d in drawn}


def recorded(names, epochs: int, steps: int, cut: int = 0) -> Any:
    """A learner with numbers in its records, of `epochs` and `cut` more steps."""
    metrics = PhaseMetrics()
    for name in names:
        metrics.steps[name], metrics.epochs[name] = Series(), Series()
        for step in range(1, epochs * steps + cut + 1):
            metrics.steps[name].append(step, 1 / step)
        for epoch in range(1, epochs + 1):
            metrics.epochs[name].append(epoch, 2 / epoch)
    history = PhaseHistory(epochs, epochs * steps + cut, cut or steps)
    return SimpleNamespace(
        metrics={"TrainingPhase": metrics},
        history={"TrainingPhase": history},
        phases=[TrainingPhase()],
        phase=None,
    )


# Metrics


def test_lines_are_the_metrics_of_each_phase_and_the_steps_of_training():
    one = learner(Metrics(error=lambda outputs, targets: (outputs - targets).abs().mean()))
    one.fit(3)
    figure = plot_metrics(one)
    assert [panel.get_ylabel() for panel in figure.axes] == ["loss", "error"]
    for panel in figure.axes:
        name, drawn = panel.get_ylabel(), lines(panel)
        assert set(drawn) == {"TrainingPhase", "ValidationPhase", "TrainingPhase, each step"}
        for phase in (TrainingPhase, ValidationPhase):
            series = one.metrics[phase].epochs[name]
            assert drawn[phase.name] == ([1, 2, 3], list(series.values))
        steps = one.metrics[TrainingPhase].steps[name]
        at = [step / 4 for step in range(1, 13)]
        assert drawn["TrainingPhase, each step"] == (at, list(steps.values))
        assert panel.get_xlabel() == "epoch"


def test_training_goes_on_while_a_figure_is_kept():
    one = learner(Metrics())
    one.fit(1)
    before = plot_metrics(one)
    one.fit(1)
    assert lines(before.axes[0])["TrainingPhase"][0] == [1]
    assert lines(plot_metrics(one).axes[0])["TrainingPhase"][0] == [1, 2]


def test_a_phase_without_a_metric_has_no_line_for_it():
    one = learner(Metrics(Metric(lambda o, t: 1.0, "one", phase=ValidationPhase)))
    one.fit(2)
    first, second = plot_metrics(one).axes
    assert "TrainingPhase" in lines(first)
    assert lines(second) == {"ValidationPhase": ([1, 2], [1, 1])}


def test_the_two_losses_of_a_gan_are_two_panels():
    one = Learner(
        {"generator": nn.Linear(2, 3), "critic": nn.Linear(3, 1)},
        optimizer=partial(torch.optim.SGD, lr=0.1),
        callbacks=[History(), Metrics()],
        default_callbacks=False,
    )
    one.epoch(GANTraining(2, critic_steps=2), [torch.randn(4, 3)] * 6)
    critic, generator = plot_metrics(one).axes
    assert [critic.get_ylabel(), generator.get_ylabel()] == ["critic_loss", "generator_loss"]
    losses = one.metrics[GANTraining].steps
    for panel, name in ((critic, "critic_loss"), (generator, "generator_loss")):
        at = [step / 6 for step in losses[name].at]
        assert lines(panel)["GANTraining, each step"] == (at, list(losses[name].values))
    assert len(losses["generator_loss"]) == 3


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("epochs", [1, 200])
def test_each_metric_has_a_panel_and_nothing_overlaps(count, epochs, tmp_path):
    names = [f"metric_{number}" for number in range(count)]
    figure = plot_metrics(recorded(names, epochs, steps=3))
    save_figure(tmp_path / "plot.png", figure)
    assert [panel.get_ylabel() for panel in figure.axes] == names
    boxes = [panel.get_tightbbox() for panel in figure.axes]
    boxes.append(figure.legends[0].get_window_extent())
    for index, box in enumerate(boxes):
        assert box is not None
        assert not any(box.overlaps(other) for other in boxes[:index] if other)
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= figure.bbox.x1
        assert box.y1 <= figure.bbox.y1


@pytest.mark.parametrize(("epochs", "ticks"), [(1, [0, 1]), (3, [0, 1, 2, 3])])
def test_epochs_are_counted_in_whole_numbers_from_0(epochs, ticks):
    (panel,) = plot_metrics(recorded(["loss"], epochs, steps=5)).axes
    left, right = panel.get_xlim()
    assert [tick for tick in panel.get_xticks() if left <= tick <= right] == ticks
    assert left == 0


def test_few_epochs_are_marked_and_many_are_not():
    def marker(epochs: int) -> Any:
        return plot_metrics(recorded(["loss"], epochs, steps=5)).axes[0].get_lines()[1].get_marker()

    assert marker(1) == "o"
    assert marker(200) in ("", "None")


def test_steps_of_an_epoch_that_was_cut_off_lie_behind_the_last_epoch():
    class Stops(Callback):
        @on(StepEnd, TrainingPhase)
        def stop(self, learner):
            if learner.history[TrainingPhase].steps == 10:
                raise CancelFit("enough")

    one = learner(Metrics(), Stops())
    one.fit(5)
    drawn = lines(plot_metrics(one).axes[0])
    assert drawn["TrainingPhase"][0] == [1, 2]
    assert drawn["TrainingPhase, each step"][0] == [step / 4 for step in range(1, 11)]


def test_steps_of_a_first_epoch_that_was_cut_off_fill_it():
    drawn = lines(plot_metrics(recorded(["loss"], epochs=0, steps=8, cut=2)).axes[0])
    assert drawn["TrainingPhase, each step"][0] == [0.5, 1]


def test_numbers_that_are_none_leave_gaps(tmp_path):
    one = recorded(["loss"], 2, steps=2)
    one.metrics["TrainingPhase"].epochs["loss"].append(3, math.nan)
    one.metrics["TrainingPhase"].epochs["loss"].append(4, math.inf)
    save_figure(tmp_path / "plot.png", plot_metrics(one))


def test_a_learner_without_metrics_has_nothing_to_plot():
    with pytest.raises(ValueError, match=r"the learner has no metrics. Add `Metrics\(\)`"):
        plot_metrics(learner())


def test_metrics_that_recorded_nothing_yet_cannot_be_plotted():
    with pytest.raises(ValueError, match=r"no metrics are recorded yet. Run an epoch"):
        plot_metrics(learner(Metrics()))


# Schedules and learning rates


def test_a_schedule_is_a_line_over_steps_from_0():
    (panel,) = plot_schedule(lambda step: 0.1 * step, 4, label="learning rate").axes
    ((x, y),) = lines(panel).values()
    assert x == [0, 1, 2, 3]
    assert y == [0.1 * step for step in range(4)]
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("step", "learning rate")


def test_schedules_by_name_are_lines_with_a_legend():
    figure = plot_schedule({"critic": lambda step: 1.0, "generator": float}, 3)
    assert lines(figure.axes[0]) == {
        "critic": ([0, 1, 2], [1, 1, 1]),
        "generator": ([0, 1, 2], [0, 1, 2]),
    }
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["critic", "generator"]


@pytest.mark.parametrize(("schedule", "steps"), [({}, 3), (float, 0)])
def test_no_schedule_or_no_step_is_an_error(schedule, steps):
    with pytest.raises(ValueError, match="Expected schedules and at least 1 step, and got"):
        plot_schedule(schedule, steps)


RATES = [10.0**power for power in range(-6, 2)]
LOSSES = [2.2, 2.0, 1.0, 0.3, 0.5, 9.0, 1e9, math.inf]
SMOOTHED = [2.2, 2.1, 1.5, 0.9, 0.7, 4.0, 1e8, math.inf]


def test_losses_lie_over_a_logarithmic_axis_with_a_line_for_each_suggestion():
    figure = plot_lr_find(RATES, LOSSES, SMOOTHED, {"steepest": 1e-4, "minimum / 10": 1e-3})
    (panel,) = figure.axes
    drawn = lines(panel)
    assert panel.get_xscale() == "log"
    assert drawn["loss"] == (RATES, LOSSES)
    assert drawn["smoothed loss"] == (RATES, SMOOTHED)
    assert drawn["steepest: 1.00e-04"][0] == [1e-4, 1e-4]
    assert drawn["minimum / 10: 1.00e-03"][0] == [1e-3, 1e-3]
    assert {text.get_text() for text in figure.legends[0].get_texts()} == set(drawn)


def test_a_loss_that_explodes_leaves_the_rest_readable():
    low, high = plot_lr_find(RATES, LOSSES, SMOOTHED, {}).axes[0].get_ylim()
    assert 0 < low < 0.3
    assert 2.2 < high < 3


@pytest.mark.parametrize("loss", [0.0, 3.0, math.nan, math.inf])
def test_losses_that_are_all_the_same_can_be_plotted(loss, tmp_path):
    figure = plot_lr_find(RATES, [loss] * 8, [loss] * 8, {})
    save_figure(tmp_path / "plot.png", figure)


@pytest.mark.parametrize(("rates", "losses"), [([], []), ([1.0], []), ([0.0], [1.0])])
def test_rates_and_losses_that_do_not_fit_are_an_error(rates, losses):
    with pytest.raises(ValueError, match="as many positive rates as losses and smoothed losses"):
        plot_lr_find(rates, losses, losses, {})


# Figures


def test_a_notebook_shows_a_figure_and_its_copies():
    figure = plot_schedule(float, 3)
    for each in (figure, copy.deepcopy(figure), pickle.loads(pickle.dumps(figure))):
        shown: Any = each
        assert shown._repr_png_().startswith(b"\x89PNG")


def test_figures_are_drawn_in_threads_without_pyplot(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    threads = [
        threading.Thread(
            target=lambda at=at: save_figure(tmp_path / f"{at}.png", plot_schedule(float, 3))
        )
        for at in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    assert len(list(tmp_path.iterdir())) == 3
    assert "matplotlib.pyplot" not in sys.modules


def test_a_figure_that_cannot_be_drawn_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "new" / "plot.png"
    save_figure(path, plot_schedule(float, 3))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="Unknown symbol"):
        save_figure(path, plot_schedule(float, 3, label=r"$\nonsense$"))
    assert [each.name for each in path.parent.iterdir()] == ["plot.png"]
    assert path.read_bytes() == before


@pytest.mark.parametrize(("name", "begins"), [("a.svg", b"<?xml"), ("a", b"\x89PNG")])
def test_a_files_ending_says_in_which_format_it_is_written(name, begins, tmp_path):
    save_figure(str(tmp_path / name), Figure())
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes().startswith(begins)


def test_without_matplotlib_an_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "wraploop\[plot\]"'):
        plot_schedule(float, 3)
    monkeypatch.setitem(sys.modules, "matplotlib.image", None)
    with pytest.raises(ImportError, match=r'pip install "wraploop\[plot\]"'):
        save_image("grid.png", torch.zeros(2, 2, dtype=torch.uint8))


# Images


def test_a_grid_has_every_pixel_in_its_place_and_grey_between():
    one = torch.arange(5 * 2 * 3, dtype=torch.uint8).reshape(5, 2, 3)
    grid = image_grid(one, 2, padding=2)
    assert grid.shape == (3 * 4 + 2, 2 * 5 + 2)
    expected = torch.full_like(grid, 128)
    for index in range(5):
        y, x = 2 + 4 * (index // 2), 2 + 5 * (index % 2)
        expected[y : y + 2, x : x + 3] = one[index]
    assert torch.equal(grid, expected)
    assert torch.equal(image_grid(one[:, None], 2, padding=2), expected)


def test_colours_come_last():
    one = torch.rand(1, 3, 2, 4, requires_grad=True)
    grid = image_grid(one, padding=0)
    assert grid.shape == (2, 4, 3)
    assert torch.equal(grid, (one[0].permute(1, 2, 0) * 255).round().to(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_floats_are_clamped_to_0_and_1(dtype):
    one = torch.tensor([[[-1.0, 0.0, 0.5, 1.0, 7.0, math.inf, -math.inf]]], dtype=dtype)
    assert image_grid(one, padding=0).tolist() == [[0, 0, 128, 255, 255, 255, 0]]


def test_a_nan_shows_as_magenta():
    grid = image_grid(torch.tensor([[[0.0, math.nan]]]), padding=0)
    assert grid.tolist() == [[[0, 0, 0], [255, 0, 255]]]
    colours = torch.ones(1, 3, 1, 2)
    colours[0, 1, 0, 1] = math.nan
    assert image_grid(colours, padding=0).tolist() == [[[255, 255, 255], [255, 0, 255]]]


@pytest.mark.parametrize(
    ("count", "columns", "shape"),
    [(1, None, (1, 1)), (2, None, (1, 2)), (9, None, (3, 3)), (10, None, (3, 4)), (3, 8, (1, 3))],
)
def test_a_grid_is_nearly_square_and_no_wider_than_there_are_images(count, columns, shape):
    assert image_grid(torch.zeros(count, 1, 1), columns, padding=0).shape == shape


@pytest.mark.parametrize(
    ("given", "came"),
    [
        (torch.zeros(4, 4), r"shape \(4, 4\) of torch.float32"),
        (torch.zeros(1, 2, 4, 4), r"shape \(1, 2, 4, 4\)"),
        (torch.zeros(0, 4, 4), r"shape \(0, 4, 4\)"),
        (torch.zeros(1, 4, 4).long(), "of torch.int64"),
    ],
)
def test_images_of_another_shape_or_type_are_an_error(given, came):
    with pytest.raises(ValueError, match=rf"\(N, 3, H, W\), floats from 0 to 1.* and got .*{came}"):
        image_grid(given)


@pytest.mark.parametrize("options", [{"columns": 0}, {"padding": -1}])
def test_no_columns_or_negative_padding_is_an_error(options):
    with pytest.raises(
        ValueError, match="`columns` and `scale` are at least 1, `padding` at least 0"
    ):
        image_grid(torch.zeros(1, 2, 2), **options)


@pytest.mark.parametrize("shape", [(16, 16), (16, 16, 3)])
def test_what_is_written_can_be_read_back(shape, tmp_path):
    count = math.prod(shape)
    grid = (torch.arange(count) % 256).to(torch.uint8).reshape(shape)
    save_image(tmp_path / "grid.png", grid)
    pixels = torch.tensor(imread(tmp_path / "grid.png") * 255).round().to(torch.uint8)
    assert torch.equal(
        pixels[..., :3], grid if grid.ndim == 3 else grid[..., None].expand(16, 16, 3)
    )
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


@pytest.mark.parametrize("grid", [torch.zeros(2, 2), torch.zeros(2, 2, 4, dtype=torch.uint8)])
def test_what_is_no_grid_is_not_written(grid, tmp_path):
    with pytest.raises(ValueError, match="Make one of images with `image_grid"):
        save_image(tmp_path / "grid.png", grid)
    assert not list(tmp_path.iterdir())


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file.png"
    path.write_text("old")
    with images.whole(path) as (unfinished, kind):
        unfinished.write_text("half")
        assert path.read_text() == "old"
        assert kind == "png"
        assert list(tmp_path.glob("*.png")) == [path]
    assert path.read_text() == "half"


def test_images_can_be_shown_larger():
    images = torch.tensor([[[0.0, 1.0]]])
    large = image_grid(images, scale=3, padding=0)
    assert large.tolist() == [[0, 0, 0, 255, 255, 255]] * 3
    with pytest.raises(ValueError, match="scale=0"):
        image_grid(images, scale=0)
