"""A fit that is stopped after any step, and goes on, ends with the bits it would have had."""

import io
import random
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CyclicLR
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    default_collate,
)

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
from wraploop import shard, wrap
from wraploop.callback import Callback, on
from wraploop.callbacks.average import EMA
from wraploop.callbacks.checkpoints import Checkpoints
from wraploop.callbacks.criteria import NumberLimit
from wraploop.callbacks.early_stopping import EarlyStopping
from wraploop.callbacks.gradients import AccumulateGradients, ClipGradients
from wraploop.callbacks.history import History
from wraploop.callbacks.metrics import Metrics
from wraploop.callbacks.progress import ProgressBar
from wraploop.callbacks.scheduler import Scheduler, TorchScheduler
from wraploop.callbacks.stop import StopOnNaNLoss
from wraploop.checkpoint import newest, read
from wraploop.events import (
    BackwardEnd,
    CancelEpoch,
    CancelFit,
    EpochBegin,
    LossBegin,
    StepEnd,
)
from wraploop.gan import GANTraining, NonSaturating
from wraploop.gan.penalties import R1, PathLength
from wraploop.learner import Learner
from wraploop.phases import AbstractTrainingPhase, TrainingPhase, ValidationPhase
from wraploop.recipes import fine_tune, fit_one_cycle

SAMPLES = TensorDataset(*(torch.cat(parts) for parts in zip(*batches(4, 5), strict=True)))


class Killed(Exception):
    pass


class KillAfter(Callback):
    """Raises after so many steps of this process, of whatever phase, when they are saved."""

    reads = ("callbacks",)

    def __init__(self, steps):
        self.steps = steps

    @on(StepEnd)
    def count(self, learner):
        self.steps -= 1
        if self.steps == 0:
            raise Killed


class Drawing(Dataset):
    """Draws noise, from every generator there is, for each sample that is read."""

    def __len__(self):
        return 18

    def __getitem__(self, index):
        noise = torch.rand(3, dtype=torch.float64) * random.random() * np.random.rand()
        return SAMPLES[index][0] + noise, SAMPLES[index][1]


class Stream(IterableDataset):
    def __init__(self, noise=1.0):
        self.noise = noise

    def __iter__(self):
        for index in range(18):
            inputs, targets = SAMPLES[index]
            yield inputs + self.noise * torch.rand(3, dtype=torch.float64), targets


class Own(Drawing):
    """Draws from a generator of its own."""

    def __init__(self):
        self.generator = np.random.default_rng(3)

    def __getitem__(self, index):
        return SAMPLES[index][0] * self.generator.random(), SAMPLES[index][1]


class OwnSampler:
    """Keeps a random state of its own, from epoch to epoch."""

    def __init__(self):
        self.random = random.Random(3)
        self.numpy = np.random.default_rng(4)

    def __iter__(self):
        order = self.random.sample(range(18), 18)
        return iter(order[self.numpy.integers(3) :])

    def __len__(self):
        return 18


class Stateful:
    """Says itself where it is, as torchdata's loaders do."""

    def __init__(self):
        self.at, self.epoch = 0, 0

    def __iter__(self):
        data = batches(4, 5, seed=self.epoch)
        while self.at < len(data):
            self.at += 1
            yield data[self.at - 1]
        self.at, self.epoch = 0, self.epoch + 1

    def state_dict(self):
        return {"at": self.at, "epoch": self.epoch}

    def load_state_dict(self, state):
        self.at, self.epoch = state.pop("at"), state.pop("epoch")  # which is its own


class Lazy:
    """Draws each batch when it is asked for it."""

    def __iter__(self):
        for _ in range(4):
            yield torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)


def with_generator(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(SAMPLES, 4, shuffle=True, generator=generator)


def with_sampler():
    sampler = RandomSampler(SAMPLES, replacement=True, num_samples=18)
    return DataLoader(Drawing(), 4, sampler=sampler, drop_last=True)


class Normalizing(DataLoader):
    """Does something to the batches that its base class makes."""

    def __iter__(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        for inputs, targets in super().__iter__():
            yield 2 * (inputs - 1), targets


class Mixing:
    """A function of samples that draws from a generator of its own."""

    def __init__(self):
        self.generator = np.random.RandomState(0)

    def __call__(self, samples):
        inputs, targets = default_collate(samples)
        return inputs * self.generator.rand(), targets


class Zipped:
    def __init__(self, *loaders):
        self.loaders = loaders

    def __iter__(self):
        for (inputs, targets), (others, _) in zip(*self.loaders, strict=True):
            yield inputs + others, targets


class WithoutReplacement:
    """Changes the very state that it gives away."""

    def __init__(self):
        self.weight = torch.ones(18)

    def __len__(self):
        return 9

    def __iter__(self):
        for index in torch.multinomial(self.weight, 9).tolist():
            self.weight[index] = 1e-9
            yield index

    def state_dict(self):
        return {"weight": self.weight}

    def load_state_dict(self, state):
        self.weight.copy_(state["weight"])


LOADERS = {
    "a subclass": lambda: Normalizing(SAMPLES, 4, shuffle=True),
    "mixing": lambda: DataLoader(SAMPLES, 4, collate_fn=Mixing()),
    "zipped": lambda: Zipped(with_generator(1), with_generator(2)),
    "without replacement": lambda: DataLoader(SAMPLES, 3, sampler=WithoutReplacement()),  # type: ignore[arg-type]
    "nested": lambda: DataLoader(ConcatDataset([Subset(Own(), [*range(9)]), Own()]), 6),
    "a list": lambda: batches(4, 5),
    "shuffled": lambda: DataLoader(SAMPLES, 4, shuffle=True),
    "with a generator": with_generator,
    "drawing samples": lambda: DataLoader(Drawing(), 4, shuffle=True),
    "workers": lambda: DataLoader(Drawing(), 4, shuffle=True, num_workers=1),
    "with replacement": with_sampler,
    "a stream": lambda: DataLoader(Stream(), 4),
    "own sampler": lambda: DataLoader(SAMPLES, 4, sampler=OwnSampler()),  # type: ignore[arg-type]
    "shard": lambda: shard(DataLoader(Drawing(), 4, shuffle=True)),
    "stateful": Stateful,
    "lazy": Lazy,
    "single samples": lambda: DataLoader(SAMPLES, None, shuffle=True),
}


def noisy():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1)
    ).double()


def make(folder, *callbacks, loader, kill_after=0, every_steps=1):
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    data = loader()
    return learner(
        History(),
        Metrics(),
        EMA(0.9),
        EarlyStopping(3),
        ClipGradients(0.5),
        Scheduler(weight_decay=lambda step: step / 100),
        TorchScheduler(partial(torch.optim.lr_scheduler.StepLR, step_size=2)),
        Checkpoints(folder, every_steps=every_steps, keep_top_k=1),
        *callbacks,
        *([KillAfter(kill_after)] if kill_after else []),
        model=noisy() if loader is not LOADERS["single samples"] else None,
        data=(data, loader()),
        optimizer=ADAM,
    )


def quiet():
    """No random numbers are drawn in it: they would be others with other processes."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()


WRAPPED: dict[str, Any] = {
    "none": (None, LOADERS["shuffled"]),
    "threads": ({"name": "ThreadedCPUParallel", "threads": 2}, LOADERS["shuffled"]),
    "global": ({"name": "DistributedModel", "timeout_s": 20}, LOADERS["shuffled"]),
    "local": (
        {"name": "DistributedModel", "batch": "local", "timeout_s": 20},
        lambda: shard(DataLoader(SAMPLES, 4, shuffle=True)),
    ),
    "local stream": (
        {"name": "DistributedModel", "batch": "local", "timeout_s": 20},
        lambda: shard(DataLoader(Stream(noise=0), 4)),
    ),
}
KILL_AFTER = (3, 12)


def make_wrapped(folder, kind, kill_after=0, model=quiet):
    """A learner in whatever processes there are."""
    torch.manual_seed(0)
    spec, loader = WRAPPED[kind]
    last = [KillAfter(kill_after)] if kill_after else []
    return learner(
        History(),
        Metrics(),
        Scheduler(lr=lambda step: 0.1 / (1 + step)),
        Checkpoints(folder, every_steps=1, keep_top_k=1),
        *last,
        model=wrap(model(), spec),
        data=(loader(), loader()),
        optimizer=ADAM,
        strict=False,
    )


def run_killed(folder, kind, model=quiet):
    """Leaves checkpoints of runs that were killed, and of what they would have come to."""
    through = make_wrapped(folder / "through", kind, model=model)
    through.fit(2)
    through.save(folder / "end")
    for kill_after in KILL_AFTER:
        with pytest.raises(Killed):
            make_wrapped(folder / str(kill_after), kind, kill_after, model).fit(2)


def assert_goes_on(folder, kind, model=quiet, **tolerances):
    """From its own checkpoints, whose tolerance is 0, or once from those of another kind."""
    expected = read(folder / "end")
    for kill_after in KILL_AFTER if tolerances["atol"] == 0 else KILL_AFTER[-1:]:
        resumed = make_wrapped(folder / kind / str(kill_after), kind, model=model)
        resumed.fit(2, resume=newest(folder / str(kill_after)))
        state = resumed.state_dict()
        assert_equal(state["models"]["model"], expected["models"]["model"], **tolerances)
        assert state["callbacks"]["History"] == expected["callbacks"]["History"]
        for phase in ("TrainingPhase", "ValidationPhase"):
            mine, theirs = (
                each["callbacks"]["Metrics"]["records"][phase]["epochs"]["loss"]
                for each in (state, expected)
            )
            assert_equal(mine, theirs, rtol=1e-8, atol=0)


def in_one_of_two_processes(rank: int, folder: str) -> None:
    """Each kind goes on from its own checkpoints, to the bit, and from those of one process."""
    for kind in ("global", "local", "local stream"):
        own = Path(folder) / "two" / kind
        model = noisy if kind == "global" else quiet
        run_killed(own, kind, model)
        assert_goes_on(own, kind, model, rtol=0, atol=0)
        if kind == "local":
            assert_goes_on(own, "global", rtol=1e-8, atol=1e-14)
            run_killed(own.with_name("quiet"), "global")
            assert_goes_on(own.with_name("quiet"), "local", rtol=1e-8, atol=1e-14)
        of_one = "stream" if kind == "local stream" else "none"
        assert_goes_on(Path(folder) / "one" / of_one, kind, rtol=1e-8, atol=1e-14)


def prepare(folder: Path) -> None:
    """What `in_one_of_two_processes` goes on from."""
    WRAPPED["stream"] = (None, WRAPPED["local stream"][1])
    for kind in ("none", "stream"):
        run_killed(folder / "one" / kind, kind)


def check(folder: Path) -> None:
    """One process, and threads, go on from what two have left."""
    assert_goes_on(folder / "two" / "local", "none", rtol=1e-8, atol=1e-14)
    assert_goes_on(folder / "two" / "local", "threads", rtol=1e-8, atol=1e-14)


def states(one):
    """All that is to be equal at the end."""
    state = one.state_dict()
    state["callbacks"].pop("KillAfter", None)
    state["callbacks"]["Checkpoints"] = None  # those of a killed step are not in both
    return state


@pytest.mark.parametrize("kind", LOADERS)
def test_a_fit_goes_on_from_any_step(tmp_path, kind):
    loader = LOADERS[kind]
    through = make(tmp_path / "through", loader=loader)
    through.fit(2)
    expected = states(through)
    for kill_after in range(1, 17) if kind == "shuffled" else (1, 4, 7, 11):
        folder = tmp_path / str(kill_after)
        with pytest.raises(Killed):
            make(folder, loader=loader, kill_after=kill_after).fit(2)
        resumed = make(folder, loader=loader)
        torch.manual_seed(99)
        random.seed(99)
        resumed.fit(2, resume="auto")
        assert_same(states(resumed), expected)


def test_it_may_be_killed_over_and_over(tmp_path):
    loader = LOADERS["drawing samples"]
    through = make(tmp_path / "through", loader=loader)
    through.fit(3)
    for kill_after in (3, 1, 4, 2, 5, 6, 7, 8, 9, 0):
        one = make(tmp_path / "killed", loader=loader, kill_after=kill_after, every_steps=2)
        try:
            one.fit(3, resume="auto")
            break
        except Killed:
            pass
    assert_same(states(one), states(through))


def test_accumulated_gradients_are_gone_on_with(tmp_path):
    def run(folder, kill_after=0):
        one = make(
            tmp_path / folder,
            AccumulateGradients(3),
            loader=LOADERS["shuffled"],
            kill_after=kill_after,
        )
        one.fit(2, [TrainingPhase(), ValidationPhase()], resume="auto")
        return one

    expected = states(run("through"))
    for kill_after in range(1, 10):
        with pytest.raises(Killed):
            run(str(kill_after), kill_after)
        assert_same(states(run(str(kill_after))), expected)


def test_gradients_that_a_phase_adds_up_are_gone_on_with(tmp_path):
    class EveryThird(AbstractTrainingPhase):
        def step(self, learner, batch):
            learner.step.loss = learner.loss_fn(learner.model(batch[0]), batch[1])
            learner.step.loss.backward()
            if learner.history[self].steps % 3 == 2:
                learner.optimizer.step()
                learner.optimizer.zero_grad()

    def run(folder, *callbacks):
        one = learner(History(), Checkpoints(tmp_path / folder, None, every_steps=1), *callbacks)
        one.fit(2, [EveryThird()], resume="auto")
        return weights(one.model)

    expected = run("through")
    with pytest.raises(Killed):
        run("killed", KillAfter(4))
    assert_same(run("killed"), expected)


def test_a_phase_that_counts_for_itself_goes_on_counting(tmp_path):
    class EveryOther(AbstractTrainingPhase):
        def __init__(self, factor):
            self.factor, self.steps, self.mean, self.name = factor, 0, torch.zeros(1), "Own"

        def step(self, learner, batch):
            self.steps += 1
            learner.step.loss = learner.loss_fn(learner.model(batch[0]), batch[1])
            self.mean = 0.9 * self.mean + 0.1 * learner.step.loss.detach()
            (learner.step.loss * (self.mean.item() if self.steps % 2 else self.factor)).backward()
            learner.optimizer.step()
            learner.optimizer.zero_grad()

    def run(folder, *callbacks, factor=2.0):
        one = learner(History(), Checkpoints(tmp_path / folder, None, every_steps=1), *callbacks)
        phase = EveryOther(factor)
        one.fit(2, [phase], resume="auto")
        return weights(one.model), phase

    expected, _ = run("through")
    with pytest.raises(Killed):
        run("killed", KillAfter(3))
    resumed, phase = run("killed")
    assert_same(resumed, expected)
    assert phase.steps == 8
    _, phase = run("killed", factor=3.0)
    assert phase.factor == 3.0  # what does not change as it runs is as it was given


def test_a_gan_with_lazy_penalties_goes_on(tmp_path):
    def run(folder, *callbacks):
        phase = GANTraining(
            2,
            loss=NonSaturating(),
            critic_steps=2,
            penalties=[R1(every_steps=3), PathLength(every_steps=2)],
        )
        torch.manual_seed(0)
        save = Checkpoints(tmp_path / folder, None, every_steps=1)
        one = gan_learner(History(), Metrics(), save, *callbacks)
        one.fit(3, [phase], resume="auto")
        return one.state_dict()["models"], one.position.state_dict(), states(one)["optimizers"]

    expected = run("through")
    for kill_after in range(1, 12):
        with pytest.raises(Killed):
            run(str(kill_after), KillAfter(kill_after))
        assert_same(run(str(kill_after)), expected)


@pytest.mark.parametrize("recipe", ["one cycle", "fine-tune"])
def test_recipes_go_on(tmp_path, recipe):
    def run(folder, *callbacks):
        torch.manual_seed(0)
        loader = DataLoader(SAMPLES, 4, shuffle=True)
        save = Checkpoints(tmp_path / folder, every_steps=1)
        one = learner(History(), Metrics(), save, *callbacks, data=(loader, loader))
        if recipe == "one cycle":
            fit_one_cycle(one, 3, max_lr=0.1, resume="auto")
        else:
            fine_tune(one, 2, 0.1, resume="auto")
        return one.state_dict()["models"], one.state_dict()["optimizers"]

    expected = run("through")
    for kill_after in (2, 7, 12, 16, 21, 27):
        with pytest.raises(Killed):
            run(str(kill_after), KillAfter(kill_after))
        assert_same(run(str(kill_after)), expected)


def test_fits_that_are_over_are_passed_over(tmp_path):
    ran = []

    def run(folder, *callbacks):
        one = make(tmp_path / folder, *callbacks, loader=LOADERS["shuffled"])
        one.on(StepEnd)(lambda learner: ran.append(learner.phase.name))
        one.fit(1, resume="auto")
        one.fit(2, [TrainingPhase()], resume="auto")
        one.fit(1, [ValidationPhase(), TrainingPhase()], resume="auto")
        return states(one)

    expected = run("through")
    for kill_after in (3, 12, 18, 24, 27):
        with pytest.raises(Killed):
            run(str(kill_after), KillAfter(kill_after))
        ran.clear()
        assert_same(run(str(kill_after)), expected)
        assert len(ran) == 30 - {24: 20}.get(kill_after, kill_after)  # the last training step


def test_a_fit_that_an_error_ended_may_go_on_in_the_same_program(tmp_path):
    through = make(tmp_path / "through", loader=LOADERS["shuffled"])
    through.fit(2)
    one = make(tmp_path / "killed", loader=LOADERS["shuffled"], kill_after=7)
    with pytest.raises(Killed):
        one.fit(2, resume="auto")
    one.fit(2, resume="auto")
    assert_same(states(one), states(through))


def test_what_is_saved_after_an_interruption_goes_on_with_the_batch_that_was_interrupted(tmp_path):
    class Interrupted(Callback):
        reads = ("history",)
        is_over = False

        @on(BackwardEnd)
        def interrupt(self, learner):
            if learner.history[TrainingPhase].steps == 7 and not self.is_over:
                self.is_over = True
                raise KeyboardInterrupt

    def make_one(*callbacks):
        torch.manual_seed(0)
        loader = DataLoader(SAMPLES, 4, shuffle=True)
        return learner(History(), Metrics(), *callbacks, data=(loader, loader), optimizer=ADAM)

    through = make_one()
    through.fit(2)
    one = make_one(Interrupted())
    with pytest.raises(KeyboardInterrupt):
        one.fit(2)
    one.save(tmp_path / "here")
    resumed = make_one()
    resumed.fit(2, resume=tmp_path / "here")
    assert_same(weights(resumed.model), weights(through.model))
    assert resumed.history == through.history


def test_more_epochs_may_follow(tmp_path):
    long = make(tmp_path / "long", loader=LOADERS["shuffled"])
    long.fit(4)
    short = make(tmp_path / "short", loader=LOADERS["shuffled"])
    short.fit(2)
    short.save(tmp_path / "here")
    longer = make(tmp_path / "longer", loader=LOADERS["shuffled"])
    longer.fit(4, resume=tmp_path / "here")
    assert_same(states(longer), states(long))
    again = make(tmp_path / "long", loader=LOADERS["shuffled"])
    again.fit(4, resume="auto")  # nothing is left to do
    assert_same(states(again), states(long))


class Ends(Callback):
    """Ends an epoch, or the fit, at a step."""

    reads = ("history", "running")

    def __init__(self, cancel, steps):
        self.cancel, self.steps = cancel, steps

    @on(StepEnd, TrainingPhase)
    def end(self, learner):
        taken = learner.running.taken if self.cancel is CancelEpoch else None
        if self.steps == (taken or learner.history[TrainingPhase].steps):
            raise self.cancel(*["enough"] * (self.cancel is CancelFit))


def test_an_epoch_that_a_callback_cuts_short_is_cut_short_again(tmp_path):
    def run(folder, kill_after=0):
        one = make(
            tmp_path / folder,
            Ends(CancelEpoch, 3),
            loader=LOADERS["shuffled"],
            kill_after=kill_after,
        )
        one.fit(2, resume="auto")
        return states(one)

    expected = run("through")
    for kill_after in (2, 3, 4, 9, 11):
        with pytest.raises(Killed):
            run(str(kill_after), kill_after)
        assert_same(run(str(kill_after)), expected)


def test_a_fit_that_was_stopped_after_a_step_is_over(tmp_path):
    for _ in range(3):
        one = make(tmp_path, Ends(CancelFit, 7), loader=LOADERS["shuffled"])
        one.fit(4, resume="auto")
        assert one.history[TrainingPhase].steps == 7
        assert one.stopped.reason == "enough"


def test_a_nan_is_no_end_of_the_story(tmp_path):
    one = make(tmp_path, StopOnNaNLoss(), loader=LOADERS["shuffled"])

    @one.on(LossBegin, TrainingPhase, reads=("history", "step"), writes=("step.outputs",))
    def break_down(learner):
        if learner.history[TrainingPhase].steps == 7:
            learner.step.outputs = learner.step.outputs * torch.nan

    one.fit(2, resume="auto")
    assert "NaN" in one.stopped.reason
    mended = make(tmp_path, StopOnNaNLoss(), loader=LOADERS["shuffled"])
    mended.fit(2, resume="auto")
    through = make(tmp_path / "through", StopOnNaNLoss(), loader=LOADERS["shuffled"])
    through.fit(2)
    assert_same(weights(mended.model), weights(through.model))


class Weighted(nn.Module):
    """A loss with a parameter of its own, and buffers, one of which is in no state_dict."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.ones((), dtype=torch.float64))
        self.register_buffer("last", torch.ones((), dtype=torch.float64), persistent=False)

    def forward(self, outputs, targets):
        loss = (outputs - targets).square().mean()
        self.mean = 0.9 * self.mean + 0.1 * loss.detach()
        loss = loss * torch.exp(-self.weight) / self.last + self.weight * self.mean
        self.last = loss.detach().abs() + 1
        return loss


def test_a_loss_function_what_trains_and_odd_optimizers_go_on(tmp_path):
    def run(folder, kill_after=0):
        torch.manual_seed(0)
        model, loss_fn = net(), Weighted()
        model[2].bias.requires_grad_(False)
        optimizer = torch.optim.NAdam([*model.parameters(), *loss_fn.parameters()], lr=0.01)
        callbacks = [History(), Checkpoints(tmp_path / folder, None, every_steps=1)]
        one: Any = Learner(
            model,
            loss_fn,
            optimizer=optimizer,
            data=LOADERS["shuffled"](),
            callbacks=[*callbacks, *[KillAfter(kill_after)] * bool(kill_after)],
            default_callbacks=False,
        )

        @one.on(EpochBegin, reads=("history", "model"))
        def unfreeze(learner):
            if learner.history[TrainingPhase].epochs == 1:
                learner.model[2].bias.requires_grad_(True)

        one.fit(3, resume="auto")
        state = one.state_dict()
        return [state[name] for name in ("models", "optimizers", "unsaved_buffers", "trains")]

    expected = run("through")
    for kill_after in (3, 8, 13):
        with pytest.raises(Killed):
            run(str(kill_after), kill_after)
        assert_same(run(str(kill_after)), expected)


def test_the_newest_is_that_of_the_latest_run(tmp_path):
    make(tmp_path, loader=LOADERS["shuffled"]).fit(2)
    with pytest.raises(Killed):
        make(tmp_path, loader=LOADERS["shuffled"], kill_after=3).fit(2)
    assert newest(tmp_path) == tmp_path / "step_00000003"


def test_a_learner_that_was_saved_before_its_fit_goes_on(tmp_path):
    one = make(tmp_path, loader=LOADERS["shuffled"])
    one.save(tmp_path / "start")
    one.fit(1, resume="auto")
    assert one.history[TrainingPhase].epochs == 1


def test_data_may_hold_the_learner():
    class Replay:
        def __iter__(self):
            yield from batches(2)

    replay: Any = Replay()
    one = learner(History(), data=(replay, replay))
    replay.learner = one
    one.fit(1)
    assert one.history[TrainingPhase].steps == 2


def test_the_progress_bar_begins_where_the_epoch_goes_on(tmp_path):
    with pytest.raises(Killed):
        make(tmp_path, loader=LOADERS["shuffled"], kill_after=3).fit(1)
    written = io.StringIO()
    bar = ProgressBar(file=written, mininterval=0, leave=True)
    make(tmp_path, bar, loader=LOADERS["shuffled"]).fit(1, resume="auto")
    counts = re.findall(r"TrainingPhase 1: .*? (\d)/5", written.getvalue())
    assert counts[0] == "0"
    assert counts[1:3] == ["4", "5"]


def test_a_fit_that_was_stopped_early_is_over(tmp_path):
    stopped = make(tmp_path, loader=LOADERS["shuffled"])
    stopped.fit(20, resume="auto")
    assert "no improvement" in stopped.stopped.reason
    again = make(tmp_path, loader=LOADERS["shuffled"])
    again.fit(20, resume="auto")
    assert again.stopped.reason == stopped.stopped.reason
    assert_same(weights(again.model), weights(stopped.model))
    assert again.history == stopped.history
    epochs = stopped.history[TrainingPhase].epochs
    again = make(tmp_path / "other", loader=LOADERS["shuffled"])
    again.callbacks.remove(EarlyStopping)
    again.fit(epochs + 2, resume=newest(tmp_path))  # told to go on
    assert again.history[TrainingPhase].epochs == epochs + 2


def test_a_fit_that_is_killed_as_it_stops_is_over_and_the_next_begins_anew(tmp_path):
    def run(folder, kept=""):
        if kept:
            shutil.copytree(tmp_path / "through" / kept, tmp_path / folder / kept)
        one = learner(
            *(History(), Metrics(), EarlyStopping(NumberLimit(2))),
            Checkpoints(tmp_path / folder, every_steps=1, keep_latest=100),
            data=(LOADERS["shuffled"](), LOADERS["shuffled"]()),
        )
        one.fit(9, resume="auto")
        one.fit(9, resume="auto")
        return one

    through = run("through")
    assert through.history[TrainingPhase].epochs == 4
    for saved in sorted((tmp_path / "through").iterdir()):
        assert_same(states(run(saved.name, saved.name)), states(through))


def test_a_scheduler_that_takes_its_state_apart_goes_on(tmp_path):
    def make_cyclic(folder, *more):
        cyclic = partial(CyclicLR, base_lr=1e-3, max_lr=1e-2, cycle_momentum=False)
        one = make(tmp_path / folder, *more, loader=LOADERS["shuffled"])
        one.callbacks.replace(TorchScheduler(cyclic, each=StepEnd))
        return one

    through = make_cyclic("through")
    through.fit(2)
    with pytest.raises(Killed):
        make_cyclic("killed", KillAfter(3)).fit(2)
    resumed = make_cyclic("killed")
    resumed.fit(2, resume="auto")
    assert_same(states(resumed), states(through))


def test_the_one_before_a_damaged_checkpoint_is_used(tmp_path):
    through = make(tmp_path / "through", loader=LOADERS["shuffled"])
    through.fit(2)
    with pytest.raises(Killed):
        make(tmp_path / "killed", loader=LOADERS["shuffled"], kill_after=8).fit(2)
    latest: Any = newest(tmp_path / "killed")
    weights_file = latest / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-1] + b"x")
    resumed = make(tmp_path / "killed", loader=LOADERS["shuffled"])
    with pytest.warns(UserWarning, match=f"{latest.name} is not whole: model.safetensors"):
        resumed.fit(2, resume="auto")
    assert_same(states(resumed), states(through))


def test_what_cannot_go_on_is_an_error(tmp_path):
    one = make(tmp_path, loader=LOADERS["shuffled"])
    one.fit(1)
    with pytest.raises(ValueError, match="in a fit of TrainingPhase, ValidationPhase, and this on"):
        one.fit(2, [TrainingPhase()], resume=newest(tmp_path))
    with pytest.raises(ValueError, match="Add Checkpoints"):
        gan_learner(History()).fit(1, [GAN], resume="auto")
    with pytest.raises(FileNotFoundError, match="There is no checkpoint"):
        one.fit(2, resume=tmp_path / "nowhere")
    with pytest.raises(Killed):
        make(tmp_path / "fewer", loader=LOADERS["shuffled"], kill_after=3).fit(1)
    fewer = make(tmp_path / "fewer", loader=lambda: DataLoader(SAMPLES, 12, shuffle=True))
    with pytest.raises(ValueError, match="after 3 batches of an epoch, and now there are only 2"):
        fewer.fit(1, resume="auto")


def test_a_fit_that_finds_only_damaged_checkpoints_says_that_there_is_none(tmp_path):
    one = make(tmp_path, loader=LOADERS["shuffled"])
    one.fit(1)
    for path in tmp_path.iterdir():
        (path / "checkpoint.json").write_text("{}")
    again = make(tmp_path, loader=LOADERS["shuffled"])
    with (
        pytest.warns(UserWarning, match=r"KeyError\('files'\)\. It is passed over"),
        pytest.warns(UserWarning, match="No checkpoint in .* is whole"),
    ):
        again.fit(1, resume="auto")
    assert_same(weights(again.model), weights(one.model))
