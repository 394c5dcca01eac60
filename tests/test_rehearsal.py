import copy
import functools
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from wraploop.callback import Callback, Handler, on
from wraploop.callbacks.history import History
from wraploop.callbacks.metrics import Metrics
from wraploop.events import CancelFit, EpochBegin, Event, StepBegin, StepEnd
from wraploop.gan import GANTraining
from wraploop.learner import Learner
from wraploop.phases import AbstractTrainingPhase, TrainingPhase, ValidationPhase
from wraploop.processes import random_state
from wraploop.rehearsal import NotCopyable, kept_draws, rehearsed
from wraploop.wrappers.distributed import DistributedModel
from wraploop.wrappers.threaded import ThreadedCPUParallel


class Net(nn.Module):
    """With everything that a step may change: weights, buffers, attributes."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        self.calls, self.seen = 0, []

    def forward(self, x):
        self.calls += 1
        self.seen.append(self.calls)
        return self.body(x) + torch.rand(())


def noisy_loss(outputs, targets):
    noise = torch.rand(()) + random.random() + np.random.rand()
    return nn.functional.cross_entropy(outputs, targets) * noise


def loader(rows=24):
    generator = torch.Generator().manual_seed(5)
    data = TensorDataset(torch.randn(rows, 4), torch.randint(3, (rows,)))
    return DataLoader(data, batch_size=8, shuffle=True, generator=generator)


def supervised(wrap=lambda model: model) -> tuple[Learner, TrainingPhase]:
    random_state.seed(0)
    learner = Learner(
        wrap(Net()),
        noisy_loss,
        optimizer=functools.partial(torch.optim.Adam, lr=0.1),
        data=(loader(), loader(8)),
        callbacks=[History(), Metrics()],
        default_callbacks=False,
    )
    return learner, TrainingPhase()


def gan() -> tuple[Learner, GANTraining]:
    random_state.seed(0)
    models = {
        "generator": nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)),
        "critic": nn.utils.spectral_norm(nn.Linear(4, 1)),
    }
    learner = Learner(
        models,
        optimizer=functools.partial(torch.optim.Adam, lr=0.1),
        data=loader(),
        callbacks=[History(), Metrics()],
        default_callbacks=False,
    )
    return learner, GANTraining(latent_size=2, critic_steps=2)


SETTINGS = {
    "plain": supervised,
    "threads": lambda: supervised(lambda model: ThreadedCPUParallel(model, threads=2)),
    "distributed": lambda: supervised(DistributedModel),
    "gan": gan,
}


@pytest.fixture(params=SETTINGS)
def setting(request):
    """A learner that has trained already, has gradients left, and its phase."""
    learner, phase = SETTINGS[request.param]()
    learner.fit(1, [phase])
    for model in learner.models.values():
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.25)
    return learner, phase


def everything(learner: Learner, phase) -> dict:
    """A copy of all that has to stay as it is."""
    models = {}
    for key, model in learner.models.items():
        models[key] = {
            "tensors": {n: p.detach().clone() for n, p in model.named_parameters()}
            | {n: b.clone() for n, b in model.named_buffers()},
            "grads": {n: copy.copy(p.grad) for n, p in model.named_parameters()},
            "training": [m.training for m in model.modules()],
            "plain": (getattr(model, "calls", None), list(getattr(model, "seen", []))),
        }
    return {
        "models": models,
        "optimizers": {k: copy.deepcopy(o.state_dict()) for k, o in learner.optimizers.items()},
        "phase": {k: v for k, v in vars(phase).items() if isinstance(v, int)},
        "history": {k: copy.copy(vars(v)) for k, v in learner.history.items()},
        "metrics": repr(learner.metrics),
        "generators": [
            batches.generator.get_state()
            for batches in learner.data.values()
            if isinstance(batches, DataLoader) and batches.generator is not None
        ],
        "random": random_state.get(),
    }


IDENTITIES = (
    *("model", "optimizer", "loss_fn", "step", "in_step", "stopped", "phase", "running"),
    *("event", "phases", "history", "metrics"),
)


def identities(learner: Learner) -> list[object]:
    """What is the same object afterwards."""
    models = [p for model in learner.models.values() for p in model.parameters()]
    listed = learner.callbacks.listed
    return [*(getattr(learner, name) for name in IDENTITIES), *models, *listed, *learner.callbacks]


def is_same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(is_same, a, b))
    return str(a) == str(b)


def train_hard(learner: Learner, phase) -> None:
    for batch in learner.data["training"]:
        learner.run_step(phase, batch)


def test_after_a_rehearsal_everything_is_bit_for_bit_as_before(setting):
    learner, phase = setting
    before, objects = everything(learner, phase), identities(learner)
    with rehearsed(learner, phase, callbacks=[History(), Metrics()]) as copied:
        assert type(copied) is type(phase)
        assert copied is not phase
        train_hard(learner, copied)
        learner.fit(1, [copied])
        rehearsed_weights = everything(learner, copied)
    assert not is_same(rehearsed_weights["models"], before["models"])
    assert not is_same(rehearsed_weights["optimizers"], before["optimizers"])
    after = everything(learner, phase)
    for name in before:
        assert is_same(before[name], after[name]), name
    assert all(a is b for a, b in zip(objects, identities(learner), strict=True))


def test_after_an_error_in_it_too(setting):
    learner, phase = setting
    before, objects = everything(learner, phase), identities(learner)

    class Fails(Callback):
        @on(StepEnd)
        def fail(self, learner):
            raise OSError("the disk is full")

    with (
        pytest.raises(OSError, match="the disk is full"),
        rehearsed(learner, phase, callbacks=[Fails()]) as copied,
    ):
        learner.fit(1, [copied])
    assert is_same(before, everything(learner, phase))
    assert all(a is b for a, b in zip(objects, identities(learner), strict=True))
    assert learner.phase is None
    learner.fit(1, [phase])
    assert learner.history[phase].epochs == 2


@pytest.mark.parametrize("name", SETTINGS)
def test_a_rehearsed_step_is_the_step_that_follows(name):
    learner, phase = SETTINGS[name]()
    batch = next(iter(learner.data["training"]))
    with rehearsed(learner, phase) as copied:
        assert list(learner.callbacks) == []
        learner.run_step(copied, batch)
        first = everything(learner, copied)["models"]
    learner.run_step(phase, batch)
    assert is_same(first, everything(learner, phase)["models"])


class Rehearses(Callback):
    """Rehearses a fit, with a cancellation at its end, wherever it is called."""

    def __init__(self, event: type[Event]):
        self.event, self.rehearsals = event, 0

    def handlers(self) -> list[Handler]:
        return [(self.event, AbstractTrainingPhase, self.rehearse)]

    def rehearse(self, learner):
        self.rehearsals += 1
        event, step, phase = learner.event, learner.step, learner.phase
        running, in_step = learner.running, learner.in_step

        class Stops(Callback):
            @on(StepEnd)
            def stop(self, learner):
                if learner.step.loss is not None and len(learner.step.inputs) == 8:
                    raise CancelFit("seen enough")

        with rehearsed(learner, phase, callbacks=[Stops()]) as copied:
            learner.run_step(copied, (torch.randn(5, 4), torch.randint(3, (5,))))
            learner.fit(1, [copied])
            assert learner.stopped.reason == "seen enough"
        assert learner.stopped is None
        assert (learner.event, learner.step, learner.phase) == (event, step, phase)
        assert (learner.running, learner.in_step) == (running, in_step)


@pytest.mark.parametrize("event", [EpochBegin, StepBegin, StepEnd])
@pytest.mark.parametrize("name", ["plain", "threads"])
def test_a_fit_with_rehearsals_in_it_is_bit_for_bit_the_fit_without(name, event):
    plain, phase = SETTINGS[name]()
    plain.fit(2)
    learner, _ = SETTINGS[name]()
    learner.callbacks.add(rehearses := Rehearses(event))
    learner.fit(2)
    assert rehearses.rehearsals == {EpochBegin: 2}.get(event, 6)
    mine, theirs = everything(learner, phase), everything(plain, phase)
    for key in theirs:
        assert is_same(mine[key], theirs[key]), key


def test_the_copied_optimizer_trains_the_copied_model_and_hooks_stay_behind():
    learner, phase = supervised()
    called = []
    hook = learner.optimizer.register_step_pre_hook(lambda *_: called.append(1))
    torch.optim.lr_scheduler.StepLR(learner.optimizer, 1)  # which replaces optimizer.step
    with rehearsed(learner, phase) as copied:
        held = learner.optimizer.param_groups[0]["params"]
        assert all(a is b for a, b in zip(held, learner.model.parameters(), strict=True))
        train_hard(learner, copied)
    assert not called
    hook.remove()


def test_an_optimizer_with_attributes_of_its_own_is_copied_whole():
    learner, _ = supervised()

    class ByClosure(AbstractTrainingPhase):
        def step(self, learner, batch):
            def closure():
                learner.optimizer.zero_grad()
                learner.step.loss = learner.loss_fn(learner.model.body(batch[0]), batch[1])
                learner.step.loss.backward()
                return learner.step.loss

            learner.optimizer.step(closure)

    learner.optimizer = torch.optim.LBFGS(learner.model.parameters(), max_iter=2)
    before = copy.deepcopy(learner.model.state_dict())
    with rehearsed(learner, ByClosure()) as copied:
        train_hard(learner, copied)
        assert not is_same(dict(before), dict(learner.model.state_dict()))
    assert is_same(dict(before), dict(learner.model.state_dict()))


def test_what_the_phase_and_the_loss_share_with_the_model_is_one_copy():
    class Regularized(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, outputs, targets):
            return nn.functional.cross_entropy(outputs, targets) + self.model.body[0].weight.norm()

    class Watches(TrainingPhase):
        def __init__(self, learner):
            self.model, self.learner = learner.model, learner

    learner, _ = supervised()
    learner.loss_fn = Regularized(learner.model)
    with rehearsed(learner, Watches(learner)) as copied:
        assert copied.model is learner.model is learner.loss_fn.model  # pyright: ignore
        assert copied.learner is learner  # pyright: ignore
        train_hard(learner, copied)


def test_tensors_derived_from_parameters_do_not_hinder():
    with pytest.warns(FutureWarning, match="weight_norm"):
        model = nn.utils.weight_norm(nn.Linear(4, 3))
    assert not model.weight.is_leaf
    learner, phase = supervised()
    learner.model, learner.optimizer = model, torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(dict(model.state_dict()))
    with rehearsed(learner, phase) as copied:
        train_hard(learner, copied)
        assert not is_same(before, dict(learner.model.state_dict()))
    assert is_same(before, dict(model.state_dict()))


def test_what_cannot_be_copied_is_named_before_anything_runs():
    class Streams(TrainingPhase):
        def __init__(self):
            self.numbers = (n for n in range(3))

    learner, _ = supervised()
    before = everything(learner, TrainingPhase())
    with (
        pytest.raises(NotCopyable, match=r"cannot be copied .*generator.* Give it a __deepcopy__"),
        rehearsed(learner, Streams()),
    ):
        raise AssertionError("it was opened")
    assert is_same(before, everything(learner, TrainingPhase()))


class Drawing(Dataset):
    """Samples that are drawn, and counted."""

    def __init__(self):
        self.own, self.pythons, self.count = np.random.default_rng(0), random.Random(0), 0

    def __len__(self):
        return 6

    def __getitem__(self, index):
        self.count += 1
        return self.own.random(), self.pythons.random(), index


def drawn(batches):
    return [[part.tolist() for part in batch] for batch in batches]


@pytest.mark.parametrize("persistent_workers", [False, True])
def test_data_draw_afterwards_what_they_would_have_drawn(persistent_workers):
    def make():
        dataset = Drawing()
        sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(1))
        workers = {"num_workers": 1, "persistent_workers": True} if persistent_workers else {}
        generator = torch.Generator().manual_seed(2)
        return DataLoader(dataset, 2, sampler=sampler, generator=generator, **workers)

    plain, tried = make(), make()
    expected = [drawn(plain) for _ in range(2)]
    results = []
    for _ in range(2):
        with kept_draws(tried):
            next(iter(tried))
            drawn(tried)
        results.append(drawn(tried))
    assert results == expected
    assert tried.dataset.count == plain.dataset.count  # pyright: ignore


def test_a_loader_at_work_goes_on_where_it_was():
    whole = drawn(loader_with_workers())
    batches = loader_with_workers()
    seen = []
    for number, batch in enumerate(batches):
        seen.append([part.tolist() for part in batch])
        if number == 0:
            with kept_draws(batches):
                assert len(drawn(batches)) == 3
    assert seen == whole


def loader_with_workers():
    generator = torch.Generator().manual_seed(3)
    data = TensorDataset(torch.arange(6))
    workers = {"num_workers": 1, "persistent_workers": True}
    return DataLoader(data, 2, shuffle=True, generator=generator, **workers)


def test_validation_is_rehearsed_in_its_mode():
    learner, _ = supervised()
    with rehearsed(learner, ValidationPhase()) as copied:
        assert learner.model.training
        learner.epoch(copied)
        assert not learner.step.outputs.requires_grad
    assert learner.model.calls == 0
