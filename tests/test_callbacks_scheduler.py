import math
from functools import partial
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR

from tests.loop import (
    ADAM,
    GAN,
    SkipSecond,
    assert_equal,
    batches,
    gan_learner,
    learner,
    net,
    weights,
)
from wraploop.callback import Callback, on
from wraploop.callbacks.history import History
from wraploop.callbacks.metrics import Metrics
from wraploop.callbacks.scheduler import Scheduler, TorchScheduler
from wraploop.events import EpochBegin, FitEnd, StepBegin, StepEnd
from wraploop.phases import TrainingPhase, ValidationPhase
from wraploop.schedules import one_cycle


def by_hand(rates, parts, **options):
    """SGD with a rate for each step."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, **options)
    for rate, (inputs, targets) in zip(rates, parts, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        torch.nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def test_each_step_is_made_with_the_rate_that_its_schedule_gives():
    one = learner(Scheduler(lr=lambda step: 0.1 / (1 + step)))
    one.fit(2)
    rates = [0.1 / (1 + step) for step in range(8)]
    assert_equal(weights(one.model), by_hand(rates, batches() * 2))
    assert list(one.hyperparameters["lr"].values) == rates
    assert list(one.hyperparameters["lr"].at) == list(range(1, 9))


def test_a_rate_may_be_set_epoch_by_epoch():
    one = learner(Scheduler(each=EpochBegin, lr=lambda epoch: 1e-4 * (1 - epoch / 10)))
    one.fit(2)
    assert_equal(weights(one.model), by_hand([1e-4] * 4 + [9e-5] * 4, batches() * 2))
    assert list(one.hyperparameters["lr"].values) == pytest.approx([1e-4, 9e-5], rel=1e-12)


def test_cancelled_steps_do_not_count():
    one = learner(SkipSecond(), Scheduler(lr=lambda step: 0.1 / (1 + step)))
    one.epoch(TrainingPhase())
    parts = batches()
    assert_equal(weights(one.model), by_hand([0.1, 0.05, 0.1 / 3], [parts[0], *parts[2:]]))


def test_any_hyperparameter_of_any_optimizer_can_be_scheduled():
    one = gan_learner(
        Scheduler("critic", lr=lambda step: 0.01 * 2**step, weight_decay=lambda step: step / 10),
        Scheduler("generator", betas=lambda step: (0.5, 0.9 + step / 100)),
    )
    one.fit(1, [GAN])
    critic, generator = (
        one.optimizer.critic.param_groups[0],
        one.optimizer.generator.param_groups[0],
    )
    assert (critic["lr"], critic["weight_decay"]) == (0.08, 0.3)
    assert generator["betas"] == (0.5, 0.93)
    assert generator["lr"] == 0.01
    assert list(one.hyperparameters["critic.lr"].values) == [0.01, 0.02, 0.04, 0.08]


def test_a_scaled_group_gets_its_share():
    def optimizer(parameters):
        groups = [{"params": parameters[:2], "lr_scale": 0.1}, {"params": parameters[2:]}]
        return torch.optim.SGD(groups, lr=1.0)

    one = learner(Scheduler(lr=lambda step: 0.5), optimizer=optimizer)
    one.epoch(TrainingPhase())
    assert [group["lr"] for group in one.optimizer.param_groups] == [0.05, 0.5]


def test_a_schedule_goes_on_where_its_state_was_saved():
    first, second = (Scheduler(lr=lambda step: 0.1 / (1 + step)) for _ in range(2))
    learner(first).fit(1)
    one = learner(second)
    second.load_state_dict(first.state_dict())
    one.epoch(TrainingPhase())
    assert one.optimizer.param_groups[0]["lr"] == 0.1 / 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scheduler(), "Give schedules by name"),
        (lambda: Scheduler(each=StepEnd, lr=float), "each=StepBegin or each=EpochBegin"),
        (
            lambda: learner(Scheduler("critic", lr=float)),
            "no optimizer 'critic': name one of optim",
        ),
        (lambda: gan_learner(Scheduler(lr=float)), "several optimizers: name one of"),
        (
            lambda: learner(Scheduler(momentom=float)),
            r"no hyperparameters \['momentom'\]; .*'moment",
        ),
        (
            lambda: learner(Scheduler(lr=float), Scheduler(lr=abs)),
            "both write 'hyperparameters.lr'",
        ),
        (
            lambda: learner(Scheduler(lr=float), Scheduler("optimizer", lr=abs)),
            "both write 'hyperparameters.lr'",
        ),
        (lambda: TorchScheduler(float, each=StepBegin), "each=EpochEnd or each=StepEnd"),
        (
            lambda: learner(TorchScheduler(ReduceLROnPlateau)),
            "A `metric` is for ReduceLROnPlateau, which needs one",
        ),
    ],
)
def test_what_cannot_be_scheduled_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_schedule_is_a_function():
    rate: Any = 1
    with pytest.raises(TypeError, match="as lr a function of the count, and got 1"):
        Scheduler(lr=rate)


def test_what_makes_no_scheduler_is_an_error():
    with pytest.raises(TypeError, match=r"makes a torch\.optim\.lr_scheduler"):
        learner(TorchScheduler(lambda optimizer: None))


@pytest.mark.parametrize(
    ("make", "each"),
    [
        (partial(StepLR, step_size=3, gamma=0.5), StepEnd),
        (partial(OneCycleLR, max_lr=0.5, total_steps=9), StepEnd),
        (partial(LambdaLR, lr_lambda=lambda epoch: 0.9**epoch), None),
    ],
)
def test_a_scheduler_of_torch_is_stepped_as_by_hand(make, each):
    options = {} if each is None else {"each": each}
    one = learner(TorchScheduler(make, **options), optimizer=ADAM)
    one.fit(2)
    model = net()
    optimizer = ADAM(model.parameters())
    scheduler, rates = make(optimizer), []
    for _ in range(2):
        for inputs, targets in batches():
            torch.nn.functional.mse_loss(model(inputs), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            if each is not None:
                rates.append(optimizer.param_groups[0]["lr"])
                scheduler.step()
        if each is None:
            rates.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
    assert_equal(weights(one.model), weights(model), rtol=0, atol=0)
    assert list(one.hyperparameters["lr"].values) == rates


def test_a_scheduler_that_is_made_already_is_stepped_too():
    optimizer = ADAM(net().parameters())
    scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
    one = learner(model=net(), optimizer=ADAM)
    with pytest.raises(ValueError, match="The StepLR is of another optimizer"):
        one.callbacks.add(TorchScheduler(scheduler))
    own = StepLR(one.optimizer, step_size=1, gamma=0.5)
    one.callbacks.set([TorchScheduler(own)])
    one.fit(3)
    assert one.optimizer.param_groups[0]["lr"] == 0.01 * 0.5**3
    assert repr(TorchScheduler(own)) == "TorchScheduler(StepLR)"


def test_a_plateau_is_told_the_metric():
    plateau = partial(ReduceLROnPlateau, factor=0.1, patience=0, threshold=0.5)
    scheduled = TorchScheduler(plateau, metric="loss", phase=ValidationPhase)
    one = learner(History(), Metrics(), scheduled)
    one.fit(5)
    optimizer = torch.optim.SGD(net().parameters(), lr=0.1)
    by_hand, rates = plateau(optimizer), []
    for loss in one.metrics[ValidationPhase].epochs["loss"].values:
        rates.append(optimizer.param_groups[0]["lr"])
        by_hand.step(loss)
    assert list(one.hyperparameters["lr"].values) == rates
    assert len(set(rates)) > 2


def test_the_state_of_a_scheduler_of_torch_is_its_own():
    first, second = (
        TorchScheduler(partial(StepLR, step_size=2, gamma=0.5), each=StepEnd) for _ in range(2)
    )
    one = learner(first)
    one.epoch(TrainingPhase())
    other = learner(second)
    other.optimizer.load_state_dict(one.optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    other.epoch(TrainingPhase())
    assert other.optimizer.param_groups[0]["lr"] == 0.1 * 0.5**4


def test_one_cycle_starts_peaks_and_ends_where_it_says():
    for steps in (2, 3, 10, 100, 101, 1000):
        rate = one_cycle(steps, 0.1, warmup=0.3, div=25.0, final_div=1e4)
        rates = [rate(step) for step in range(steps)]
        peak = round(0.3 * (steps - 1))
        assert rates[peak] == max(rates) == 0.1
        assert rates[0] == (0.1 / 25 if peak else 0.1)
        assert rates[-1] == 0.1 / 1e4
        assert rates[: peak + 1] == sorted(rates[: peak + 1])
        assert rates[peak:] == sorted(rates[peak:], reverse=True)
        assert rate(steps) == rate(10 * steps) == rates[-1]
    middle = one_cycle(101, 0.1, warmup=0.5, div=10.0)(25)
    assert math.isclose(middle, 0.01 + (0.1 - 0.01) / 2, rel_tol=1e-12)


def test_one_cycle_of_one_step_is_its_peak():
    assert one_cycle(1, 0.1)(0) == 0.1


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"warmup": 1.5}, {"warmup": -0.1}, {"maximum": -1.0}, {"div": 0.0}]
)
def test_an_impossible_cycle_is_an_error(options):
    with pytest.raises(ValueError, match=r"steps is at least 1|a warmup from 0 to 1"):
        one_cycle(**{"steps": 10, "maximum": 0.1, **options})


def test_a_rate_that_is_no_number_is_not_recorded_but_set():
    class Keep(Callback):
        reads = ("optimizer",)

        @on(FitEnd)
        def keep(self, learner):
            self.betas = learner.optimizer.param_groups[0]["betas"]

    one = learner(Scheduler(betas=lambda step: (0.1, 0.2)), keep := Keep(), optimizer=ADAM)
    one.fit(1)
    assert keep.betas == (0.1, 0.2)
    assert one.hyperparameters == {}
