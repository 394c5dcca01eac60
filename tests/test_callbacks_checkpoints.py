from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.loop import (
    ADAM,
    GAN,
    assert_equal,
    assert_same,
    batches,
    gan_learner,
    learner,
    net,
    weights,
)
from wraploop import wrap
from wraploop.callbacks.average import EMA
from wraploop.callbacks.checkpoints import Checkpoints
from wraploop.callbacks.early_stopping import EarlyStopping
from wraploop.callbacks.history import History
from wraploop.callbacks.metrics import Metrics
from wraploop.callbacks.scheduler import Scheduler, TorchScheduler
from wraploop.callbacks.throttling import throttle
from wraploop.events import StepEnd
from wraploop.phases import TrainingPhase, ValidationPhase


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def epochs(folder):
    return [int(name.split("_")[1]) for name in names(folder)]


def full(checkpoints, optimizer=ADAM):
    """A learner with everything that has a state."""
    return learner(
        checkpoints,
        History(),
        throttle(Metrics(), StepEnd, every=2),
        EMA(0.9),
        EarlyStopping(3),
        Scheduler(weight_decay=lambda step: step / 100),
        TorchScheduler(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2)),
        optimizer=optimizer,
    )


def test_every_epoch_is_kept_unless_told_otherwise(tmp_path):
    learner(History(), Metrics(), Checkpoints(tmp_path)).fit(5)
    assert epochs(tmp_path) == [1, 2, 3, 4, 5]


def test_the_best_and_the_latest_are_kept(tmp_path):
    checkpoints: Any = Checkpoints(tmp_path, keep_top_k=2, keep_latest=1)
    one = learner(History(), Metrics(), checkpoints)
    for _ in range(6):
        one.fit(1)
        losses = list(one.metrics[ValidationPhase].epochs["loss"].values)
        ranked = sorted(range(len(losses)), key=losses.__getitem__)
        kept = sorted({*ranked[:2], len(losses) - 1})
        expected = [f"epoch_{index + 1:04}_loss_{losses[index]:.6g}" for index in kept]
        assert names(tmp_path) == expected
        assert checkpoints.best.name.startswith(f"epoch_{ranked[0] + 1:04}")
        assert checkpoints.latest == tmp_path / expected[-1]


def test_large_may_be_good(tmp_path):
    one = learner(
        History(), Metrics(), Checkpoints(tmp_path, mode="max", keep_top_k=1, keep_latest=1)
    )
    one.fit(4)
    losses = list(one.metrics[ValidationPhase].epochs["loss"].values)
    assert epochs(tmp_path) == sorted({losses.index(max(losses)) + 1, 4})


def test_none_but_the_latest_may_be_kept(tmp_path):
    learner(History(), Metrics(), Checkpoints(tmp_path / "two", keep_top_k=0)).fit(4)
    assert epochs(tmp_path / "two") == [3, 4]
    one = Checkpoints(tmp_path / "one", keep_top_k=0, keep_latest=1)
    learner(History(), Metrics(), one).fit(4)
    assert epochs(tmp_path / "one") == [4]


def test_without_a_metric_the_latest_are_kept(tmp_path):
    checkpoints: Any = Checkpoints(tmp_path, None, every_epochs=2, every_steps=3)
    learner(History(), checkpoints).fit(3)  # 12 steps
    assert names(tmp_path) == ["step_00000009", "step_00000012"]
    assert checkpoints.latest == tmp_path / "step_00000012"
    assert checkpoints.best is None


def test_saving_after_steps_leaves_the_best_epochs(tmp_path):
    one = learner(History(), Metrics(), Checkpoints(tmp_path, keep_top_k=1, every_steps=3))
    one.fit(3)
    losses = list(one.metrics[ValidationPhase].epochs["loss"].values)
    best = f"epoch_{losses.index(min(losses)) + 1:04}_loss_{min(losses):.6g}"
    assert names(tmp_path) == sorted({best, f"epoch_0003_loss_{losses[2]:.6g}", "step_00000012"})


def test_a_nan_is_the_worst(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_top_k=1)
    one = learner(History(), Metrics(), checkpoints)
    one.fit(1)
    with torch.no_grad():
        one.model[0].weight.fill_(torch.nan)
    one.fit(1)
    assert epochs(tmp_path) == [1, 2]
    assert checkpoints.best == tmp_path / names(tmp_path)[0]


def test_every_so_many_epochs(tmp_path):
    learner(History(), Metrics(), Checkpoints(tmp_path, every_epochs=2)).fit(5)
    assert epochs(tmp_path) == [2, 4]


def test_weights_are_read_without_this_library(tmp_path):
    checkpoints: Any = Checkpoints(tmp_path)
    one = learner(History(), Metrics(), checkpoints)
    one.model = wrap(one.model, {"name": "ThreadedCPUParallel", "threads": 2})
    one.fit(1)
    plain = net()
    plain.load_state_dict(load_file(checkpoints.latest / "model.safetensors"))
    assert_equal(weights(plain), weights(one.model), rtol=0, atol=0)
    torch.load(checkpoints.latest / "learner.pt", weights_only=True)


def test_a_fit_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(tmp_path):
    through = full(Checkpoints(tmp_path / "through"))
    through.fit(4)
    stopped = full(checkpoints := Checkpoints(tmp_path / "stopped"))
    stopped.fit(2)
    resumed = full(Checkpoints(tmp_path / "stopped"))
    resumed.load(checkpoints.latest)
    resumed.fit(2)
    assert_equal(weights(resumed.model), weights(through.model), rtol=0, atol=0)
    for mine, theirs in zip(resumed.callbacks, through.callbacks, strict=True):
        assert_same(mine.state_dict(), theirs.state_dict())
    assert names(tmp_path / "through") == names(tmp_path / "stopped")


def test_a_checkpoint_has_what_callbacks_know_at_its_epoch_whatever_their_order(tmp_path):
    first, second = (full(Checkpoints(tmp_path / folder)) for folder in ("a", "b"))
    second.callbacks.set(reversed(second.callbacks.listed))
    for one, folder in ((first, "a"), (second, "b")):
        one.fit(1)
        (path,) = (tmp_path / folder).iterdir()
        saved = torch.load(path / "learner.pt", weights_only=True)["callbacks"]
        assert saved["TorchScheduler"]["scheduler"]["last_epoch"] == 1
        epochs = saved["Metrics"]["callback"]["records"]["ValidationPhase"]["epochs"]
        assert epochs["loss"]["at"].tolist() == [1]
        assert saved["Checkpoints"]["saved"][0][1] == 1


def test_several_models_and_optimizers_are_saved_by_name(tmp_path):
    one, other = gan_learner(), gan_learner()
    one.fit(1, [GAN])
    one.save(tmp_path / "here")
    assert names(tmp_path / "here") == [
        "checkpoint.json",
        "critic.safetensors",
        "generator.safetensors",
        "learner.pt",
    ]
    other.load(tmp_path / "here")
    for name in ("critic", "generator"):
        assert_equal(weights(other.models[name]), weights(one.models[name]), rtol=0, atol=0)
        state = other.optimizers[name].state_dict()["state"]
        assert_same(state, one.optimizers[name].state_dict()["state"])


def test_tied_weights_stay_tied(tmp_path):
    def tied():
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)).double()
        model[1].weight = model[0].weight
        return model

    one, other = learner(model=tied()), learner(model=tied())
    one.save(tmp_path / "here")
    other.load(tmp_path / "here")
    assert other.model[1].weight is other.model[0].weight
    assert_equal(weights(other.model), weights(one.model), rtol=0, atol=0)


def test_a_checkpoint_is_replaced_when_the_new_one_is_whole(tmp_path):
    one = learner()
    one.save(tmp_path / "here")
    before = load_file(tmp_path / "here" / "model.safetensors")
    one.epoch(TrainingPhase())

    class Unsaveable(nn.Module):
        def state_dict(self, *args, **kwargs):
            raise OSError("no space left")

    with one.using(model=Unsaveable()), pytest.raises(OSError, match="no space left"):
        one.save(tmp_path / "here")
    assert names(tmp_path) == ["here"]
    assert_equal(load_file(tmp_path / "here" / "model.safetensors"), before)
    one.save(tmp_path / "here")
    assert names(tmp_path) == ["here"]
    assert_equal(load_file(tmp_path / "here" / "model.safetensors"), weights(one.model))


def test_what_does_not_fit_is_an_error(tmp_path):
    learner().save(tmp_path / "here")
    with pytest.raises(ValueError, match="of models model, and the learner's are generator, cri"):
        gan_learner().load(tmp_path / "here")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no checkpoint.json in .*empty, which has \[\]"):
        learner().load(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="it is no folder"):
        learner().load(tmp_path / "nowhere")
    wider = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    with pytest.raises(RuntimeError, match="size mismatch"):
        learner(model=wider).load(tmp_path / "here")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "low"}, "Expected the mode 'min' or 'max', and got 'low'"),
        ({"keep_top_k": -1}, "keep_top_k is at least 0, and got -1"),
        ({"every_epochs": 0}, "every_epochs is at least 1, and got 0"),
    ],
)
def test_impossible_arguments_are_errors(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        Checkpoints(tmp_path, **options)


def test_a_training_metric_may_be_watched(tmp_path):
    data = {"training": batches()}
    learner(History(), Metrics(), Checkpoints(tmp_path), data=data).fit(2)
    learner(History(), Metrics(), Checkpoints(tmp_path / "t", phase=TrainingPhase)).fit(2)
    assert epochs(tmp_path / "t") == [1, 2]
