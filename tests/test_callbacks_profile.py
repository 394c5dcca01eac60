import json
import time
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from wraploop.callback import Callback, on
from wraploop.callbacks.function import FunctionCallback
from wraploop.callbacks.profile import TorchProfiler
from wraploop.callbacks.throttling import throttle
from wraploop.callbacks.timings import Duration, NoPhase, Timings
from wraploop.events import (
    BackwardBegin,
    BackwardEnd,
    CancelFit,
    CancelStep,
    Event,
    StepBegin,
    StepEnd,
)
from wraploop.learner import Learner
from wraploop.phases import TrainingPhase, ValidationPhase

NAP_S = 0.05


def learner(*callbacks, steps=4, **options) -> Learner:
    batch = torch.ones(4, 2), torch.ones(4, 1)
    return Learner(
        options.pop("model", None) or nn.Linear(2, 1),
        nn.functional.mse_loss,
        optimizer=torch.optim.SGD,
        data=([batch] * steps, [batch] * 2),
        callbacks=callbacks,
        default_callbacks=False,
        **options,
    )


def nap() -> None:
    time.sleep(NAP_S)


class Naps(nn.Linear):
    """A forward that takes its time."""

    def forward(self, input):
        nap()
        return super().forward(input)


class Sleeper(Callback):
    """Two methods at one event, one at another."""

    @on(StepBegin)
    def first(self, learner):
        nap()

    @on(StepBegin)
    def second(self, learner):
        pass

    @on(BackwardEnd)
    def last(self, learner):
        pass


def test_gaps_and_calls_are_counted_by_phase_and_event():
    one = learner(Sleeper(), Timings())
    one.fit(2)
    gaps, calls = one.timings.gaps, one.timings.calls
    assert {what: took.count for what, took in gaps[TrainingPhase].items()} == {
        "FitBegin -> EpochBegin": 1,
        "EpochEnd -> EpochBegin": 1,
        "EpochBegin -> StepBegin": 2,
        "StepBegin -> LossBegin": 8,
        "LossBegin -> BackwardBegin": 8,
        "BackwardBegin -> BackwardEnd": 8,
        "BackwardEnd -> StepEnd": 8,
        "StepEnd -> StepBegin": 6,
        "StepEnd -> EpochEnd": 2,
    }
    assert gaps[ValidationPhase]["LossBegin -> StepEnd"].count == 4
    assert list(gaps[NoPhase]) == ["EpochEnd -> FitEnd"]
    assert {what: took.count for what, took in calls[TrainingPhase].items()} == {
        "Sleeper().first at StepBegin": 8,
        "Sleeper().second at StepBegin": 8,
        "Sleeper().last at BackwardEnd": 8,
    }
    assert calls[ValidationPhase]["Sleeper().first at StepBegin"].count == 4


@pytest.mark.parametrize("order", [1, -1])
def test_time_is_the_forwards_or_the_callbacks_wherever_it_is_spent(order):
    one = learner(*[Sleeper(), Timings()][::order], model=Naps(2, 1))
    one.epoch(TrainingPhase())
    gaps, calls = one.timings.gaps[TrainingPhase], one.timings.calls[TrainingPhase]
    forward, call = gaps["StepBegin -> LossBegin"], calls["Sleeper().first at StepBegin"]
    assert NAP_S <= forward.mean_s < 1.9 * NAP_S
    assert NAP_S <= call.mean_s < 1.9 * NAP_S
    assert forward.total_s == pytest.approx(4 * forward.mean_s)
    for others in (gaps, calls):
        for what, took in others.items():
            assert took in (forward, call) or took.mean_s < NAP_S / 2, what


class PartBegin(Event):
    """Something within an answer."""


class PartDone(Event):
    """And something after it."""


class Nests(Callback):
    fires = (PartBegin, PartDone)

    @on(BackwardBegin)
    def fire(self, learner):
        nap()
        learner.handle(PartBegin())
        nap()
        learner.handle(PartDone())
        nap()


def test_what_is_fired_within_an_answer_has_gaps_of_its_own():
    one = learner(Nests(), Timings())
    one.epoch(TrainingPhase())
    gaps, calls = one.timings.gaps[TrainingPhase], one.timings.calls[TrainingPhase]
    assert NAP_S <= gaps["PartBegin -> PartDone"].mean_s < 1.9 * NAP_S
    assert not [what for what in gaps if what.endswith("-> PartBegin") or what[:8] == "PartDone"]
    assert gaps["BackwardBegin -> BackwardEnd"].mean_s < NAP_S / 2
    assert gaps["LossBegin -> BackwardBegin"].mean_s < NAP_S / 2
    assert calls["Nests().fire at BackwardBegin"].mean_s >= 3 * NAP_S


def test_cancelled_steps_and_failed_fits_leave_it_right():
    class Cancels(Callback):
        seen = 0

        @on(BackwardBegin)
        def cancel(self, learner):
            self.seen += 1
            if self.seen == 2:
                raise CancelStep
            if self.seen == 3:
                raise OSError("gone")

    one = learner(Cancels(), Timings())
    with pytest.raises(OSError, match="gone"):
        one.fit(1)
    one.fit(1)
    gaps, calls = one.timings.gaps[TrainingPhase], one.timings.calls[TrainingPhase]
    assert calls["Cancels().cancel at BackwardBegin"].count == 3 + 4
    assert gaps["StepBegin -> LossBegin"].count == 3 + 4
    assert gaps["BackwardEnd -> StepEnd"].count == 3 + 4
    assert "FitEnd -> FitBegin" not in one.timings.gaps[NoPhase]


def test_removed_it_costs_nothing_and_put_back_it_goes_on():
    one = learner(sleeper := Sleeper(), Timings())
    one.fit(1)
    timings = one.callbacks.remove(Timings)
    one.fit(1)
    one.callbacks.choose_table(TrainingPhase)
    assert one.callbacks.table[StepEnd] == ((), None)
    assert one.callbacks.table[BackwardEnd] == (((sleeper, sleeper.last),), None)
    assert one.timings.gaps[TrainingPhase]["StepBegin -> LossBegin"].count == 4
    assert timings is not None
    one.callbacks.add(timings)
    one.fit(1)
    assert one.timings.gaps[TrainingPhase]["StepBegin -> LossBegin"].count == 8


def test_callbacks_are_named_through_throttles_and_under_strict():
    naps = FunctionCallback(lambda learner: None, StepEnd)
    one = learner(throttle(naps, StepEnd, every=2), Timings(), strict=True)
    one.fit(1)
    calls = one.timings.calls[TrainingPhase]
    assert calls["FunctionCallback(<lambda>).<lambda> at StepEnd"].count == 4


def test_the_table_is_to_be_read():
    one = learner(Sleeper(), Timings())
    one.fit(1)
    lines = str(one.timings).splitlines()
    assert lines[0].split() == ["phase", "what", "count", "total", "s", "mean", "ms"]
    assert len({len(line) for line in lines}) == 1
    row = next(line for line in lines if "Sleeper().first at StepBegin" in line).split()
    took = one.timings.calls[TrainingPhase]["Sleeper().first at StepBegin"]
    assert row[0] == "TrainingPhase"
    assert row[-3:] == ["4", f"{took.total_s:.4f}", f"{took.mean_s * 1000:.4f}"]
    assert Duration().mean_s == 0


# torch's profiler


def trace(folder) -> list[str]:
    """The names of what a trace shows."""
    events = json.loads((folder / "trace_rank0.json").read_text())["traceEvents"]
    return [event.get("name", "") for event in events]


def is_through(profiler: TorchProfiler) -> bool:
    return profiler.averages is not None


def marks(profiler: TorchProfiler) -> dict[str, int]:
    return {a.key: a.count for a in profiler.averages if a.key.startswith("training step")}


def test_the_chosen_steps_are_profiled_and_no_others(tmp_path):
    one = learner(profiler := TorchProfiler(tmp_path / "deep" / "er", first_step=3, steps=2))
    assert not is_through(profiler)
    one.fit(2)
    assert marks(profiler) == {"training step 3": 1, "training step 4": 1}
    counts = {average.key: average.count for average in profiler.averages}
    assert counts["aten::addmm"] == 2
    names = trace(tmp_path / "deep" / "er")
    assert names.count("aten::addmm") == 2
    assert "training step 4" in names
    assert [path.name for path in (tmp_path / "deep" / "er").iterdir()] == ["trace_rank0.json"]
    assert not torch.autograd.profiler._is_profiler_enabled


def test_a_profile_goes_on_in_the_next_epoch_of_a_fit(tmp_path):
    one = learner(profiler := TorchProfiler(tmp_path, 2, 3, record_shapes=True), steps=2)
    one.fit(3, [TrainingPhase()])
    assert list(marks(profiler)) == [f"training step {n}" for n in (2, 3, 4)]
    assert "Input Dims" in (tmp_path / "trace_rank0.json").read_text()


class Ends(Callback):
    """Ends things at the backward of a step."""

    def __init__(self, step: int, error: Exception):
        self.step, self.error, self.count = step, error, 0

    @on(BackwardBegin)
    def end(self, learner):
        self.count += 1
        if self.count == self.step:
            raise self.error


@pytest.mark.parametrize(
    ("error", "marked"),
    [
        (CancelFit("enough"), ["2", "3"]),
        (OSError("gone"), ["2", "3"]),
        (CancelStep(), ["2", "3", "4", "5"]),
    ],
)
def test_a_fit_cut_off_in_the_middle_of_it_leaves_a_whole_trace(tmp_path, error, marked):
    one = learner(profiler := TorchProfiler(tmp_path, 2, 20), Ends(3, error), steps=5)
    with pytest.raises(OSError, match="gone") if isinstance(error, OSError) else nullcontext():
        one.fit(1)
    assert list(marks(profiler)) == [f"training step {n}" for n in marked]
    assert f"training step {marked[-1]}" in trace(tmp_path)
    assert not torch.autograd.profiler._is_profiler_enabled
    one.fit(1)
    assert list(marks(profiler)) == [f"training step {n}" for n in marked]


def test_outside_of_a_fit_it_ends_with_the_epoch_and_with_a_broken_step(tmp_path):
    one = learner(profiler := TorchProfiler(tmp_path / "a", 1, 20))
    one.epoch(TrainingPhase())
    assert len(marks(profiler)) == 4

    batch = one.data["training"][0]  # pyright: ignore
    two = learner(profiler := TorchProfiler(tmp_path / "b", 1, 20), Ends(2, OSError("gone")))
    two.run_step(TrainingPhase(), batch)
    assert not is_through(profiler)
    with pytest.raises(OSError, match="gone"):
        two.run_step(TrainingPhase(), batch)
    assert len(marks(profiler)) == 2
    assert not torch.autograd.profiler._is_profiler_enabled


def test_a_fit_too_short_leaves_no_trace(tmp_path):
    one = learner(profiler := TorchProfiler(tmp_path / "traces", first_step=50))
    one.fit(1)
    assert not is_through(profiler)
    assert not (tmp_path / "traces").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"first_step": 0}, "first_step is at least 1, and got 0"),
        ({"steps": 0}, "steps is at least 1, and got 0"),
        ({"shapes": True}, r"Cannot set \['shapes'\]; options are .*record_shapes"),
        ({"schedule": None}, r"Cannot set \['schedule'\]"),
        ({"on_trace_ready": None}, r"Cannot set \['on_trace_ready'\]"),
    ],
)
def test_arguments_that_cannot_be_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        TorchProfiler(tmp_path, **arguments)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"Traces go to a folder, and .*file' is a file"):
        TorchProfiler(tmp_path / "file")


def test_both_declare_what_they_touch(tmp_path):
    one = learner(Timings(), profiler := TorchProfiler(tmp_path), strict=True)
    one.fit(1)
    assert one.timings.calls[TrainingPhase][f"{profiler!r}.start at StepBegin"].count == 4
    assert len(marks(profiler)) == 3
