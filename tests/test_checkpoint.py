"""Files of checkpoints: whole or not there, whatever happens while they are written."""

import copy
import enum
import multiprocessing
import os
import pickle
import resource
import signal
import threading
import time
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils.data import DataLoader

from tests.loop import ADAM, assert_same, batches, gan_learner, learner
from wraploop import checkpoint
from wraploop.callback import Callback, on
from wraploop.callbacks.checkpoints import Checkpoints
from wraploop.callbacks.history import History
from wraploop.callbacks.metrics import Metrics
from wraploop.checkpoint import NotWhole, copied, newest, read, write
from wraploop.events import EpochEnd, StepEnd
from wraploop.phases import TrainingPhase


def states():
    """Of a learner, at two moments."""
    one = learner(History(), Metrics(), optimizer=ADAM)
    one.epoch(TrainingPhase())
    first = copied(one.state_dict())
    one.epoch(TrainingPhase())
    return first, copied(one.state_dict())


def test_what_is_written_is_read(tmp_path):
    state, _ = states()
    write(state, tmp_path / "deep" / "here", 4)
    assert_same(read(tmp_path / "deep" / "here"), state)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["here"]


def test_a_copy_does_not_change_with_the_learner():
    one = learner(optimizer=ADAM)
    state = copied(one.state_dict())
    before = pickle.dumps(state)
    one.epoch(TrainingPhase())
    assert pickle.dumps(state) == before


def die_at(monkeypatch, count):
    """Ends the process, as a kill would, at the `count`-th thing that writing does to the disk."""
    calls = 0

    def dying(call, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == count:
            os._exit(7)
        return call(*args, **kwargs)

    for module, name in [
        (os, "replace"),
        (os, "fsync"),
        (safetensors.torch, "save_file"),
        (torch, "save"),
        (checkpoint.shutil, "rmtree"),
        (os, "mkdir"),
    ]:
        monkeypatch.setattr(module, name, partial(dying, getattr(module, name)))


def test_a_kill_at_any_moment_leaves_one_that_is_whole(tmp_path, monkeypatch):
    first, second = states()
    write(first, tmp_path / "here", 4)
    count, status = 0, 7
    while status == 7:
        count += 1
        child = os.fork()
        if not child:
            die_at(monkeypatch, count)
            write(second, tmp_path / "here", 8)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found = read(tmp_path / "here")
        at = found["callbacks"]["History"]["TrainingPhase"]["steps"]
        assert_same(found, {4: first, 8: second}[at])
    assert status == 0
    assert count > 10
    assert_same(read(tmp_path / "here"), second)
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_a_full_disk_is_an_error_that_loses_nothing(tmp_path):
    first, second = states()
    write(first, tmp_path / "here")
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (10, 300, 2000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
        try:
            with pytest.raises(OSError, match=r"could not be written|too large"):
                write(second, tmp_path / "here")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        assert_same(read(tmp_path / "here"), first)
        assert [path.name for path in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize("file", ["model.safetensors", "learner.pt", "checkpoint.json"])
@pytest.mark.parametrize("damage", ["truncated", "a bit", "empty", "gone"])
def test_damage_is_detected_and_the_one_before_used(tmp_path, file, damage):
    first, second = states()
    write(first, tmp_path / "first", 4)
    write(second, tmp_path / "second", 8)
    assert newest(tmp_path) == tmp_path / "second"
    path = tmp_path / "second" / file
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "a bit":
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    else:
        path.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"")
    if (file, damage) == ("checkpoint.json", "gone"):
        assert newest(tmp_path) == tmp_path / "first"
        return
    with pytest.warns(UserWarning, match=r"second is not whole.*It is passed over"):
        assert newest(tmp_path) == tmp_path / "first"
    with pytest.raises(NotWhole, match="second is not whole"):
        read(tmp_path / "second")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    state, _ = states()
    mark = tmp_path / "ran"
    state["callbacks"]["History"] = Evil(mark)
    write(state, tmp_path / "here")
    one = learner(History())
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        one.load(tmp_path / "here")
    with pytest.raises(pickle.UnpicklingError):
        one.fit(1, resume=tmp_path / "here")
    assert not mark.exists()


class Stage(str, enum.Enum):
    WARM = "warm"


class Number(enum.IntEnum):
    TWO = 2


@pytest.mark.parametrize(
    ("value", "read_back"),
    [
        (Stage.WARM, "warm"),
        (Number.TWO, 2),
        ({np.float64(0.5): np.str_("x"), (np.int64(1), 2): None}, {0.5: "x", (1, 2): None}),
        (Counter(a=1), {"a": 1}),
        ([np.bool_(True), torch.float32, 3j, b"x"], [True, torch.float32, 3j, b"x"]),
        (torch.eye(2).to_sparse(), torch.eye(2).to_sparse()),
    ],
    ids=str,
)
def test_what_is_saved_can_be_loaded(tmp_path, value, read_back):
    state, _ = states()
    write(copied({**state, "callbacks": {"value": value}}), tmp_path / "here")
    found = read(tmp_path / "here")["callbacks"]["value"]
    if isinstance(found, torch.Tensor):
        found, read_back = found.to_dense(), read_back.to_dense()
    assert_same(found, read_back)


def test_models_may_have_what_safetensors_cannot_hold(tmp_path):
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(3, dtype=torch.complex128))
    model.register_buffer("graph", torch.eye(2).to_sparse())
    one, other = learner(model=model), learner(model=copy.deepcopy(model))
    with torch.no_grad():
        one.model.weight.add_(1j)
    one.save(tmp_path / "here")
    other.load(tmp_path / "here")
    assert torch.equal(other.model.weight, one.model.weight)


def test_a_folder_is_where_it_was_when_it_was_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save = Checkpoints("here", None)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    learner(History(), save).fit(1)
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["epoch_0001"]


def test_a_metric_may_have_any_name(tmp_path):
    name = "val/l1 " + "x" * 300
    learner(History(), Metrics(**{name: nn.functional.l1_loss}), Checkpoints(tmp_path, name)).fit(1)
    again: Any = Checkpoints(tmp_path, name)
    assert again.best == again.latest
    assert again.best.is_dir()


def test_what_is_left_of_a_checkpoint_is_replaced(tmp_path):
    one = learner()
    one.save(tmp_path / "here")
    (tmp_path / "here" / "checkpoint.json").unlink()
    one.save(tmp_path / "here")
    one.load(tmp_path / "here")


def test_a_state_that_could_not_be_loaded_is_not_saved(tmp_path):
    class Odd(Callback):
        def state_dict(self):
            return {"seen": [1, object()]}

    with pytest.raises(TypeError, match=r"callbacks\['Odd'\]\['seen'\]\[1\] is a builtins.object"):
        learner(Odd()).save(tmp_path / "here")
    assert not (tmp_path / "here").exists()


def test_what_is_no_checkpoint_is_not_replaced(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="here is no checkpoint"):
        learner().save(tmp_path / "here")
    assert (tmp_path / "here" / "thesis.tex").exists()


def test_nothing_is_changed_by_a_checkpoint_that_does_not_fit(tmp_path):
    gan_learner().save(tmp_path / "here")
    other = gan_learner()
    other.model.critic[2] = nn.Linear(4, 2).double()
    before = copied(other.state_dict())
    with pytest.raises(RuntimeError, match=r"critic does not fit: size mismatch for 2.weight"):
        other.load(tmp_path / "here")
    assert_same(copied(other.state_dict()), before)


class Slow:
    """A disk on which a checkpoint takes until it is let."""

    def __init__(self, monkeypatch, error=None):
        self.may_end, self.begun, self.error = threading.Event(), [], error
        self.write = checkpoint.write
        monkeypatch.setattr(checkpoint, "write", self)

    def __call__(self, state, path, steps=0):
        self.begun.append(path.name)
        assert self.may_end.wait(30)
        if self.error:
            raise self.error
        self.write(state, path, steps)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    disk = Slow(monkeypatch)
    seen = []

    class Look(Callback):
        reads = ("callbacks", "history")

        @on(StepEnd)
        def look(self, learner):
            seen.append([*disk.begun])
            if learner.history[TrainingPhase].steps == 3:
                assert not newest(tmp_path)
                disk.may_end.set()

    save = Checkpoints(tmp_path, None, every_steps=2)
    learner(History(), save, Look(), data={"training": learner().data["training"]}).fit(1)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["epoch_0001", "step_00000004"]
    assert seen[1] in ([], ["step_00000002"])
    assert seen[2] == ["step_00000002"]  # the third step was made while it was being written
    state: Any = read(tmp_path / "step_00000004")
    assert state["callbacks"]["History"]["TrainingPhase"]["steps"] == 4


def test_an_error_in_writing_ends_the_fit_and_keeps_the_one_before(tmp_path, monkeypatch):
    save = Checkpoints(tmp_path, None, every_steps=1)
    one = learner(History(), save)
    one.fit(1)
    before = sorted(path.name for path in tmp_path.iterdir())
    disk = Slow(monkeypatch, OSError("no space left on device"))
    disk.may_end.set()
    with pytest.raises(OSError, match="no space left"):
        one.fit(1)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert one.history[TrainingPhase].steps < 8


def test_sigterm_saves_and_leaves_and_is_somebody_elses_afterwards(tmp_path):
    class Tell(Callback):
        @on(StepEnd)
        def tell(self, learner):
            os.kill(os.getpid(), signal.SIGTERM)

    save = Checkpoints(tmp_path, None)
    with pytest.raises(SystemExit) as left:
        learner(History(), save, Tell()).fit(3)
    assert left.value.code == 143
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_sigterm_after_the_last_step_saves_and_leaves_too(tmp_path):
    one = learner(History(), Checkpoints(tmp_path, None, every_epochs=2))

    @one.on(EpochEnd)
    def tell(learner):
        if not isinstance(learner.phase, TrainingPhase):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as left:
        one.fit(1)
    assert left.value.code == 143
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000004"]
    again = learner(History(), Checkpoints(tmp_path, None))
    again.fit(1, resume="auto")  # which has nothing left to do
    assert again.history[TrainingPhase].steps == 4
    assert_same(again.model.state_dict(), one.model.state_dict())


def test_a_forked_process_that_is_told_to_end_does_so_alone(tmp_path):
    one = learner(History(), Checkpoints(tmp_path, None))

    @one.on(StepEnd)
    def end_a_child(learner):
        child = os.fork()
        if not child:
            threading.Event().wait(60)
            os._exit(0)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM

    one.fit(2)
    assert one.history[TrainingPhase].steps == 8


def test_sigterm_to_a_loaders_workers_too_saves_and_leaves(tmp_path):
    loader = DataLoader(batches(), batch_size=None, num_workers=2)  # type: ignore[arg-type]
    one = learner(History(), Checkpoints(tmp_path, None), data=(loader, []))
    before = signal.getsignal(signal.SIGCHLD)

    @one.on(StepEnd, reads=("history",))
    def tell_all(learner):
        if learner.history[TrainingPhase].steps == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            workers = multiprocessing.active_children()
            for worker in workers:
                os.kill(worker.pid or 0, signal.SIGTERM)
            for worker in workers:
                worker.join()
            time.sleep(0.05)  # for what torch does when one has ended

    try:
        with pytest.raises(SystemExit) as left:
            one.fit(1)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert left.value.code == 143
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]


def test_who_is_told_to_end_while_it_saves_saves_first(tmp_path, monkeypatch):
    disk = Slow(monkeypatch)
    child = os.fork()
    if not child:
        try:
            one = learner(History(), Checkpoints(tmp_path, None, every_steps=2, leave_within_s=0.2))

            @one.on(StepEnd, reads=("history",))
            def tell(learner):
                if learner.history[TrainingPhase].steps == 3:
                    threading.Timer(1.0, disk.may_end.set).start()
                    os.kill(os.getpid(), signal.SIGTERM)

            one.fit(1)
        except SystemExit as left:
            os._exit(left.code)  # type: ignore[arg-type]
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
    assert sorted(each.name for each in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]


def test_who_cannot_end_a_step_is_ended(tmp_path):
    child = os.fork()
    if not child:
        try:
            one = learner(History(), Checkpoints(tmp_path, None, leave_within_s=0.2))

            @one.on(StepEnd)
            def hang(learner):
                os.kill(os.getpid(), signal.SIGTERM)
                threading.Event().wait(60)

            one.fit(1)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
