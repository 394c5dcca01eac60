from typing import Any

import pytest
import torch
from torch import nn

from tests.loop import ADAM, GAN, SGD, batches, gan_learner, learner, net, weights
from wraploop import wrap
from wraploop.callback import Callback, on
from wraploop.callbacks.history import History
from wraploop.callbacks.scheduler import Scheduler
from wraploop.events import CancelFit, StepEnd
from wraploop.freezing import freeze, frozen, unfreeze
from wraploop.parameter_groups import by_layer, grouped
from wraploop.phases import AbstractTrainingPhase, TrainingPhase, ValidationPhase
from wraploop.recipes import fine_tune, fit_one_cycle
from wraploop.schedules import one_cycle


class Rates(Callback):
    """The rates and weight decays that each step was made with."""

    reads = ("optimizer",)

    def __init__(self):
        self.seen = []

    @on(StepEnd, AbstractTrainingPhase)
    def see(self, learner):
        self.seen.append(
            [
                (group["lr"], group.get("weight_decay"))
                for optimizer in learner.optimizers.values()
                for group in optimizer.param_groups
            ]
        )


def test_one_cycle_goes_over_all_steps_and_leaves_the_optimizer_as_it_was():
    one = learner(rates := Rates(), History())
    listed = one.callbacks.listed
    fit_one_cycle(one, 3, 0.5, weight_decay=0.01, warmup=0.5, div=10, final_div=100)
    rate = one_cycle(12, 0.5, warmup=0.5, div=10, final_div=100)
    assert rates.seen == [[(rate(step), 0.01)] for step in range(12)]
    group = one.optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.1, 0)
    assert one.callbacks.listed == listed
    assert list(one.hyperparameters["lr"].values) == [rate(step) for step in range(12)]
    assert one.history[ValidationPhase].epochs == 3


def test_a_scheduler_of_the_learners_own_rests_meanwhile():
    own = Scheduler(lr=lambda step: 0.1)
    one = learner(own, rates := Rates())
    fit_one_cycle(one, 1, 0.5)
    assert own.count == 0
    assert rates.seen[0] == [(0.5 / 25, 0)]
    one.epoch(TrainingPhase())
    assert own.count == 4


def test_phases_of_ones_own_and_several_optimizers_go_through_the_cycle():
    one = gan_learner(rates := Rates())
    fit_one_cycle(one, 2, {"critic": 0.4, "generator": 0.1}, phases=[GAN])
    assert len(rates.seen) == 8
    ratios = {round(critic / generator, 9) for (generator, _), (critic, _) in rates.seen}
    assert ratios == {4.0}


def test_everything_is_put_back_when_the_fit_is_cancelled_or_fails():
    def stop(learner):
        raise CancelFit("enough")

    one = learner(History())
    one.on(StepEnd, TrainingPhase)(stop)
    listed = one.callbacks.listed
    fit_one_cycle(one, 1, 0.5)
    assert one.stopped.reason == "enough"
    one.data["training"] = ["no batch"]
    with pytest.raises(TypeError, match="TrainingPhase takes batches"):
        fit_one_cycle(one, 1, 0.5, weight_decay=0.3)
    assert one.callbacks.listed == listed
    assert one.optimizer.param_groups[0]["lr"] == 0.1
    assert one.optimizer.param_groups[0]["weight_decay"] == 0


def test_what_has_no_cycle_is_an_error():
    with pytest.raises(ValueError, match="batches of TrainingPhase, a map, have no length"):
        fit_one_cycle(learner(data={"training": map(str, "")}), 1, 0.1)
    with pytest.raises(ValueError, match=r"Rates for \['critic'\], but the optimizers are \['opt"):
        fit_one_cycle(learner(), 1, {"critic": 0.1})
    with pytest.raises(ValueError, match=r"Rprop, the optimizer of optimizer, has no weight decay"):
        fit_one_cycle(learner(optimizer=torch.optim.Rprop), 1, 0.1, weight_decay=0.1)


def test_a_frozen_part_has_no_gradient_and_does_not_change():
    one = learner()
    freeze(one.model[0])
    before = weights(one.model)
    with one.run_epoch(TrainingPhase()):
        inputs, targets = batches()[0]
        nn.functional.mse_loss(one.model(inputs), targets).backward()
    assert one.model[0].weight.grad is None
    assert one.model[2].weight.grad is not None
    one.fit(1)
    after = weights(one.model)
    assert torch.equal(after["0.weight"], before["0.weight"])
    assert not torch.equal(after["2.weight"], before["2.weight"])
    unfreeze(one.model[0])
    one.fit(1)
    assert not torch.equal(weights(one.model)["0.weight"], before["0.weight"])


def test_frozen_for_a_block_parameters_are_then_what_they_were():
    model: Any = net()
    model[0].bias.requires_grad_(False)
    with frozen(model[0], [model[2].weight]):
        assert [p.requires_grad for p in model.parameters()] == [False, False, False, True]
    with pytest.raises(ZeroDivisionError), frozen(model):
        raise ZeroDivisionError
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]


@pytest.mark.parametrize("wrapper", [None, {"name": "ThreadedCPUParallel", "threads": 2}])
def test_fine_tuning_trains_the_head_and_then_all_with_rates_of_their_own(wrapper):
    one = learner(rates := Rates(), optimizer=lambda p: torch.optim.SGD(p, lr=0.3))
    one.model = wrap(one.model, wrapper)
    start, seen = weights(one.model), []
    one.on(StepEnd, TrainingPhase, reads=("model",))(lambda at: seen.append(weights(at.model)))
    fine_tune(one, 2, 0.2, freeze_epochs=1, backbone_factor=0.1)
    assert len(seen) == 4 + 8
    assert torch.equal(seen[3]["0.weight"], start["0.weight"])
    assert not torch.equal(seen[0]["2.weight"], start["2.weight"])
    assert not torch.equal(seen[4]["0.weight"], start["0.weight"])
    assert max(head for _, (head, _) in rates.seen[:4]) == 0.2
    for (backbone, _), (head, _) in rates.seen[4:]:
        assert backbone == pytest.approx(head / 10, rel=1e-12)
    assert max(head for _, (head, _) in rates.seen[4:]) == 0.1
    assert [(len(g["params"]), g["lr"]) for g in one.optimizer.param_groups] == [(4, 0.3)]
    assert "lr_scale" not in one.optimizer.param_groups[0]
    assert all(p.requires_grad for p in one.model.parameters())


def test_a_scaled_group_moves_as_much_less():
    one, other = learner(), learner()
    with grouped(one.optimizer, [one.model[0], one.model[2]], [0.1, 1.0]):
        one.run_step(TrainingPhase(), batches()[0])
    other.run_step(TrainingPhase(), batches()[0])
    start = weights(net())
    for name, end in weights(other.model).items():
        factor = 0.1 if name.startswith("0") else 1.0
        moved = weights(one.model)[name] - start[name]
        torch.testing.assert_close(moved, factor * (end - start[name]), rtol=1e-9, atol=1e-15)


def test_groups_are_for_the_block_and_moments_outlive_it():
    one = learner(optimizer=ADAM)
    own = one.optimizer.param_groups
    with grouped(one.optimizer, [one.model[0]], [0.5]):
        assert [(g["lr"], len(g["params"])) for g in one.optimizer.param_groups] == [
            (0.005, 2),
            (0.01, 2),
        ]
        one.run_step(TrainingPhase(), batches()[0])
    assert one.optimizer.param_groups is own
    assert len(one.optimizer.state) == 4


def test_one_optimizer_of_several_models_is_tuned_for_one():
    one = learner()
    models = {"encoder": net(), "head": net()}
    both = SGD([p for model in models.values() for p in model.parameters()])

    class Encode(AbstractTrainingPhase):
        def step(self, learner, batch):
            outputs = [model(batch[0]) for model in learner.models.values()]
            learner.step.loss = (sum(outputs) - batch[1]).square().mean()
            learner.step.loss.backward()
            learner.optimizer.step()
            learner.optimizer.zero_grad()

    with one.using(model=models, optimizer=both):
        with pytest.raises(ValueError, match="Name the model to tune, encoder or head; got ''"):
            fine_tune(one, 1)
        start = weights(one.model.encoder)
        fine_tune(one, 1, 0.1, model="encoder", phases=[Encode()])
        assert not torch.equal(weights(one.model.encoder)["0.weight"], start["0.weight"])


def test_impossible_groups_are_errors():
    one = learner()
    message = r"all parameters are in one layer.*groups=\[model\.features"
    with pytest.raises(ValueError, match=message):
        by_layer(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="Groups 0 and 1 share a parameter"):
        fine_tune(one, 1, groups=[one.model, one.model[0]])
    with pytest.raises(ValueError, match="none of the parameters of group 1"):
        fine_tune(one, 1, groups=[one.model, net()])


def test_fine_tuning_stops_when_its_first_half_is_cancelled():
    one = learner(rates := Rates())
    one.on(StepEnd, TrainingPhase)(lambda learner: (_ for _ in ()).throw(CancelFit("enough")))
    fine_tune(one, 3)
    assert len(rates.seen) == 1
