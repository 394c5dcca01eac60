"""All callbacks in two processes: what they come to is what it is in one."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import MeanAbsoluteError, SumMetric

from tests import forked
from tests import test_callbacks_logs as logs
from tests import test_callbacks_metrics as metrics
from tests import test_callbacks_pictures as pictures
from tests import test_callbacks_sanity as sanity
from tests import test_resume as resume
from tests.loop import ADAM, GAN, assert_equal, batches, gan_learner, learner, net, weights
from wraploop import DistributedModel, fine_tune, fit_one_cycle, lr_find, processes, shard
from wraploop.callbacks import (
    EMA,
    AccumulateGradients,
    Checkpoints,
    ClipGradients,
    CSVLogger,
    EarlyStopping,
    FunctionCallback,
    History,
    JSONLinesLogger,
    LogHistograms,
    LogHyperparameters,
    LogMetrics,
    Metric,
    Metrics,
    PlotMetrics,
    SanityCheck,
    Scheduler,
    StopOnNaNLoss,
    Timings,
    ToDevice,
    TorchScheduler,
    Traces,
    throttle,
)
from wraploop.callbacks.criteria import TimeLimit
from wraploop.events import StepEnd
from wraploop.phases import TrainingPhase, ValidationPhase

ROWS = (6, 5, 7, 3)  # of the batches, which two processes do not share evenly


def uneven():
    return [(x[:rows], y[:rows]) for (x, y), rows in zip(batches(4, rows=7), ROWS, strict=True)]


def everything(folder: Path):
    plateau = partial(ReduceLROnPlateau, factor=0.5, patience=0, threshold=0.5)
    total = Metric(SumMetric(), "total", reads=("targets",))
    return [
        Metrics(MeanAbsoluteError(), total, mse=torch.nn.functional.mse_loss),
        History(),
        AccumulateGradients(2),
        ClipGradients(0.5),
        EMA(0.9),
        Scheduler(weight_decay=lambda step: step / 100),
        TorchScheduler(plateau, metric="mse", phase=ValidationPhase),
        EarlyStopping(2, "meanabsoluteerror", mode="max"),
        Checkpoints(folder / "checkpoints", keep_top_k=1),
        Traces({"norm": lambda at: at.model[0].weight.norm().item()}),
        LogMetrics(CSVLogger(folder / "log.csv"), JSONLinesLogger(folder / "log.jsonl")),
        LogHyperparameters(CSVLogger(folder / "hyperparameters.csv")),
        LogHistograms(JSONLinesLogger(folder / "histograms.jsonl"), every_steps=3),
        PlotMetrics(folder / "plot.png", every_epochs=100),  # at the end: a drawing takes 0.5 s
        SanityCheck(),
        StopOnNaNLoss(),
        Timings(),
        ToDevice("cpu"),
        throttle(FunctionCallback(lambda at: None, StepEnd), StepEnd, every_s=0.001),
    ]


def of_one(model, data, folder):
    return learner(*everything(folder), model=model, data=data, optimizer=ADAM)


def assert_same_learners(one, other):
    assert_equal(weights(one.model), weights(other.model), rtol=1e-9, atol=1e-12)
    assert one.history == other.history
    assert (one.stopped is None) == (other.stopped is None)
    for phase in (TrainingPhase, ValidationPhase):
        mine, theirs = one.metrics[phase].epochs, other.metrics[phase].epochs
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert list(mine[name].values) == pytest.approx(list(theirs[name].values), rel=1e-6)
    assert one.hyperparameters.keys() == other.hyperparameters.keys()
    for name, series in one.hyperparameters.items():
        assert list(series.values) == pytest.approx(list(other.hyperparameters[name].values))
    mine, theirs = (each.callbacks.get(EMA).averages["model"] for each in (one, other))
    assert_equal(mine, theirs, rtol=1e-9, atol=1e-12)
    mine, theirs = (each.traces[TrainingPhase]["norm"].values for each in (one, other))
    assert mine == pytest.approx(theirs, rel=1e-9)
    mine, theirs = (each.callbacks.get(Checkpoints).saved for each in (one, other))
    assert [saved.epoch for saved in mine] == [saved.epoch for saved in theirs]


def in_one_of_two_processes(rank: int, root: str) -> None:
    """All callbacks together, and recipes."""
    folder, data = Path(root), uneven()
    plain = of_one(net(), (data, data[:3]), folder / "plain")
    plain.fit(6)
    kinds: Any = (("global", list), ("local", shard))
    for batch, view in kinds:
        model = DistributedModel(net(), batch=batch, timeout_s=20)
        one = of_one(model, (view(data), view(data[:3])), folder / batch)
        one.fit(6)
        assert_same_learners(one, plain)
        total = sum(targets.sum().item() for _, targets in data[:3])
        assert one.metrics[ValidationPhase].epochs["total"].last == pytest.approx(total, rel=1e-5)
        again = of_one(DistributedModel(net(), batch=batch, timeout_s=20), data, folder / "again")
        one.save(folder / f"{batch}_saved")
        again.load(folder / f"{batch}_saved")
        assert_equal(weights(again.model), weights(one.model), rtol=0, atol=0)
        assert again.history == one.history
        check_recipes(batch, view, data)
        stop_alike(rank, batch, view)
    gan()


def check_recipes(batch, view, data):
    """One cycle, fine-tuning and a sweep, as in one process."""
    one = learner(History(), Metrics(), optimizer=ADAM, data=(view(data), view(data[:1])))
    one.model = DistributedModel(one.model, batch=batch, timeout_s=20)
    plain = learner(History(), Metrics(), optimizer=ADAM, data=(data, data[:1]))
    sweeps = [lr_find(each, steps=12) for each in (one, plain)]
    assert sweeps[0].losses == pytest.approx(sweeps[1].losses, rel=1e-6)
    for each in (one, plain):
        fit_one_cycle(each, 2, 0.05)
        fine_tune(each, 2, 0.02)
    assert_equal(weights(one.model), weights(plain.model), rtol=1e-9, atol=1e-12)


def stop_alike(rank, batch, view):
    """What one process alone decides on, its clock or its rows, all do."""
    limit = TimeLimit(0.0 if rank == 1 else 1e9)
    one = learner(History(), Metrics(), EarlyStopping(limit), data=(view(uneven()), view(uneven())))
    one.model = DistributedModel(one.model, batch=batch, timeout_s=20)
    one.fit(5)
    assert processes.have_same(one.history[TrainingPhase].epochs)
    assert one.stopped is not None


def gan():
    """A GAN with its callbacks, both networks in processes."""
    callbacks = lambda: (  # noqa: E731
        History(),
        Metrics(),
        EMA(0.9, models=("generator",)),
        AccumulateGradients(2),
        Scheduler("critic", lr=lambda step: 0.01 / (1 + step)),
    )
    one, plain = gan_learner(*callbacks()), gan_learner(*callbacks())
    one.model.generator = DistributedModel(one.model.generator, timeout_s=20)
    one.model.critic = DistributedModel(one.model.critic, timeout_s=20)
    for each in (one, plain):
        torch.manual_seed(3)
        each.fit(3, [GAN])
    for name in ("generator", "critic"):
        assert_equal(weights(one.models[name]), weights(plain.models[name]), rtol=1e-9, atol=1e-12)
    mine, theirs = (each.callbacks.get(EMA).averages["generator"] for each in (one, plain))
    assert_equal(mine, theirs, rtol=1e-9, atol=1e-12)


def checkpoints_of_their_own(rank: int, root: str) -> None:
    """Of one name, on each process's own disk."""
    one = learner(model=DistributedModel(net(), timeout_s=20))
    for part in range(2):
        one.save(Path(root) / f"{part}" / "checkpoint")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"Rank 1 has another checkpoint in .* than rank 0"):
            one.load(Path(root) / f"{rank}" / "checkpoint")
    one.load(Path(root) / "0" / "checkpoint")


PARTS = {
    "their_own": checkpoints_of_their_own,
    "together": in_one_of_two_processes,
    "logs": logs.in_one_of_two_processes,
    "metrics": metrics.in_one_of_two_processes,
    "pictures": pictures.in_one_of_two_processes,
    "sanity": sanity.in_one_of_two_processes,
    "resume": resume.in_one_of_two_processes,
}


def in_process(rank: int, root: str) -> None:
    """One spawn for all, each with a process group of its own."""
    torch.set_num_threads(1)
    for name, part in PARTS.items():
        folder = Path(root) / name
        folder.mkdir(exist_ok=True)
        meeting = f"file://{folder}/meeting"
        torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
        part(rank, str(folder))
        torch.distributed.destroy_process_group()


def test_callbacks_come_to_the_same_in_two_processes(tmp_path):
    resume.prepare(tmp_path / "resume")
    forked.start_server()
    mp.start_processes(in_process, (str(tmp_path),), nprocs=2, start_method="forkserver")  # pyright: ignore
    resume.check(tmp_path / "resume")
    together = tmp_path / "together"
    for folder in ("plain", "global", "local"):
        check_files(together / folder, together / "plain")
    pictures.check_what_processes_wrote(tmp_path / "pictures")


def check_files(folder: Path, plain: Path) -> None:
    """Rank 0 alone has written, and what one process would have."""
    assert sorted(path.name for path in folder.iterdir()) == sorted(p.name for p in plain.iterdir())
    saved, expected = (sorted((each / "checkpoints").iterdir()) for each in (folder, plain))
    assert [path.name[:10] for path in saved] == [path.name[:10] for path in expected]
    lines, wanted = ((each / "log.jsonl").read_text().splitlines() for each in (folder, plain))
    assert len(lines) == len(wanted)
    for line, other in zip(map(json.loads, lines), map(json.loads, wanted), strict=True):
        if folder.name == "local":  # where losses of a step are of one process's rows
            line, other = (_of_epochs(each) for each in (line, other))
        assert line == pytest.approx(other, rel=1e-6)


def _of_epochs(line):
    return {name: value for name, value in line.items() if name.count("/") != 1}
