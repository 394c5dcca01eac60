import copy
import random

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.loop import ADAM, assert_same, batches, gan_learner, learner
from wraploop import wrap
from wraploop.callbacks.gradients import ClipGradients
from wraploop.callbacks.history import History
from wraploop.callbacks.metrics import Metrics
from wraploop.callbacks.scheduler import Scheduler
from wraploop.gan import GANTraining
from wraploop.lr_finder import LRSweep, lr_find
from wraploop.phases import AbstractTrainingPhase, TrainingPhase


def everything(one):
    """All that must stay, to be compared."""
    models = {name: copy.deepcopy(model.state_dict()) for name, model in one.models.items()}
    optimizers = {name: copy.deepcopy(o.state_dict()) for name, o in one.optimizers.items()}
    states = torch.get_rng_state(), random.getstate()
    records = repr(one.history), repr(one.metrics), one.step, one.stopped
    return models, optimizers, states, records


def noisy():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1)
    ).double()


@pytest.mark.parametrize("wrapper", [None, {"name": "ThreadedCPUParallel", "threads": 2}])
def test_the_learner_is_left_bit_identical(wrapper):
    inputs, targets = (torch.cat(column) for column in zip(*batches(), strict=True))
    dataset = TensorDataset(inputs, targets)
    generator = torch.Generator()
    loader = DataLoader(dataset, batch_size=5, shuffle=True, generator=generator)
    data = loader, batches(1)
    one = learner(History(), Metrics(), optimizer=ADAM, model=noisy(), data=data)
    one.model = wrap(one.model, wrapper)
    one.fit(1)
    before = everything(one), generator.get_state()
    parameters = [id(p) for p in one.model.parameters()]
    sweep = lr_find(one, steps=30)
    assert len(sweep.losses) > 3
    assert_same(before, (everything(one), generator.get_state()))
    assert [id(p) for p in one.model.parameters()] == parameters
    assert all(p.grad is None for p in one.model.parameters())


def test_losses_are_those_of_training_with_these_rates():
    one, other = learner(), learner()
    sweep = lr_find(one, start=1e-4, end=1e-1, steps=4)
    scheduler = Scheduler(lr=lambda step: [1e-4, 1e-3, 1e-2, 1e-1][step])
    losses = []
    other.callbacks.set([scheduler])
    for batch in other.data["training"]:
        losses.append(other.run_step(TrainingPhase(), batch).loss.item())
    assert sweep.losses == pytest.approx(losses, rel=1e-9)
    assert sweep.rates == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])
    first, second = sweep.losses[:2]
    assert sweep.smoothed[0] == pytest.approx(first)
    assert sweep.smoothed[1] == pytest.approx((0.98 * first + second) / 1.98)


def test_it_stops_where_the_loss_explodes_and_suggests_less():
    torch.manual_seed(0)
    x = torch.randn(64, 3).double()
    data = [(x, x.sum(1, keepdim=True))]
    one = learner(model=nn.Linear(3, 1).double(), data=data)
    sweep = lr_find(one, start=1e-5, end=100.0, steps=200)
    assert len(sweep.rates) < 200
    assert sweep.losses[-1] > sweep.losses[0]
    low = sweep.rates[sweep.smoothed.index(min(sweep.smoothed))]
    assert sweep.suggestions["minimum / 10"] == pytest.approx(low / 10)
    assert 1e-3 < sweep.suggestions["steepest"] < low
    assert f"steepest: {sweep.suggestions['steepest']:.2e}" in str(sweep)
    assert len(sweep.plot().axes) == 1


def test_suggestions_are_found_by_hand():
    rates = [1e-3, 1e-2, 1e-1, 1.0, 10.0]
    sweep = LRSweep(rates, [], [5.0, 4.0, 1.0, 0.5, 9.0])
    assert sweep.suggestions == {"steepest": 1e-2, "minimum / 10": 0.1}
    assert LRSweep(rates, [], [1.0, 2.0, 3.0, 4.0, 5.0]).suggestions == {}


def test_one_of_several_networks_can_be_swept():
    one = gan_learner(History(), Metrics())
    before = everything(one)
    phase = GANTraining(latent_size=2)
    sweep = lr_find(one, phase, optimizer="critic", loss="critic_loss", steps=12, end=0.1)
    assert len(sweep.rates) == 12
    assert_same(before, everything(one))
    assert (phase.critic_updates, phase.generator_updates) == (0, 0)
    with pytest.raises(ValueError, match="several optimizers"):
        lr_find(one, phase)


def test_callbacks_that_change_a_step_take_part():
    one, clipped = learner(), learner(ClipGradients(1e-9))
    free, held = (
        lr_find(each, start=0.1, end=1.0, steps=8, stop_factor=1e9) for each in (one, clipped)
    )
    assert held.losses[4:] == pytest.approx(held.losses[:4], rel=1e-5)
    assert free.losses[4:] != pytest.approx(free.losses[:4], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 0.0}, "0 < start < end"),
        ({"end": 1e-9}, "0 < start < end"),
        ({"steps": 1}, "steps is at least 2, and got 1"),
        ({"optimizer": "critic"}, "no optimizer 'critic'"),
        ({"batches": iter(batches())}, "an iterator, which a sweep would use up"),
        ({"batches": []}, "no batches to try rates on"),
        ({"loss": "fake_loss", "steps": 2}, "has come to its end with a 'fake_loss'"),
    ],
)
def test_what_cannot_be_swept_is_an_error_and_changes_nothing(options, message):
    one = learner(History(), Metrics())
    before = everything(one)
    with pytest.raises(ValueError, match=message):
        lr_find(one, **options)
    assert_same(before, everything(one))


def test_a_step_that_fails_changes_nothing():
    class Fails(AbstractTrainingPhase):
        def step(self, learner, batch):
            with torch.no_grad():
                learner.model[0].weight.zero_()
            raise ZeroDivisionError

    one = learner(History(), Metrics())
    before = everything(one)
    with pytest.raises(ZeroDivisionError):
        lr_find(one, Fails())
    assert_same(before, everything(one))
