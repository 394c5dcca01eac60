import pytest
import torch
from torch import nn

from tests.loop import (
    ADAM,
    GAN,
    SGD,
    PlainStep,
    SkipSecond,
    assert_equal,
    batches,
    gan_learner,
    learner,
    net,
    weights,
)
from wraploop.callback import Callback, on
from wraploop.callbacks.gradients import AccumulateGradients, ClipGradients
from wraploop.events import StepBegin, StepEnd
from wraploop.named import Named
from wraploop.phases import AbstractTrainingPhase, TrainingPhase


def joined(*parts):
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def uneven():
    return [(x[:rows], y[:rows]) for (x, y), rows in zip(batches(5), (6, 2, 5, 6, 3), strict=True)]


MOMENTUM = [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
]


@pytest.mark.parametrize("optimizer", MOMENTUM)
@pytest.mark.parametrize("phase", [TrainingPhase(), PlainStep()])
def test_accumulated_steps_are_one_step_on_their_batches_joined(optimizer, phase):
    parts = uneven()
    one = learner(AccumulateGradients(2), data=parts, optimizer=optimizer)
    other = learner(data=[joined(*parts[:2]), joined(*parts[2:4]), parts[4]], optimizer=optimizer)
    for each in (one, other):
        each.epoch(phase)
        each.epoch(phase)
    assert_equal(weights(one.model), weights(other.model))


def test_a_parameter_of_two_optimizers_is_updated_by_both():
    class Two(AbstractTrainingPhase):
        def step(self, learner, batch):
            loss = nn.functional.mse_loss(learner.model(batch[0]), batch[1])
            loss.backward()
            for optimizer in learner.optimizers.values():
                optimizer.step()
            for optimizer in learner.optimizers.values():
                optimizer.zero_grad()

    def made(*callbacks, data):
        one = learner(*callbacks, data={"training": data})
        parameters = list(one.model.parameters())
        pair = Named("optimizer", {"first": SGD(parameters), "second": SGD(parameters[2:])})
        one.optimizer = pair
        return one

    parts = uneven()[:4]
    one = made(AccumulateGradients(2), data=parts)
    other = made(data=[joined(*parts[:2]), joined(*parts[2:])])
    for each in (one, other):
        each.epoch(Two())
    assert_equal(weights(one.model), weights(other.model))


def test_sums_are_added_up():
    parts = uneven()[:4]
    one = learner(AccumulateGradients(4, reduction="sum"), data=parts)
    other = learner(data=[joined(*parts)])
    for each in (one, other):
        each.loss_fn = nn.MSELoss(reduction="sum")
        each.epoch(TrainingPhase())
    assert_equal(weights(one.model), weights(other.model))


def test_weights_rest_between_updates():
    seen = []

    class Watch(Callback):
        reads = ("model", "step.accumulated")

        @on(StepEnd, AbstractTrainingPhase)
        def see(self, learner):
            seen.append((learner.step.accumulated, weights(learner.model)["0.weight"]))

    learner(AccumulateGradients(2), Watch(), optimizer=ADAM).epoch(TrainingPhase())
    assert [accumulated for accumulated, _ in seen] == [1, 0, 1, 0]
    values = [value for _, value in seen]
    assert torch.equal(values[1], values[2])
    assert not torch.equal(values[0], values[1])
    assert not torch.equal(values[2], values[3])


def test_each_network_of_a_gan_accumulates_its_own():
    real = [x for x, _ in batches(4)]
    one, other = gan_learner(AccumulateGradients(2), data=real), gan_learner(data=real)
    critic = weights(one.model.critic)
    torch.manual_seed(0)
    one.run_step(GAN, real[0])
    assert_equal(weights(one.model.critic), critic)
    assert all(p.grad is None for p in one.model.critic.parameters())
    one.run_step(GAN, real[1])

    torch.manual_seed(0)
    for name in ("critic", "generator"):
        gradients = {}
        for x in real[:2]:
            step_gradients(other, x, gradients)
        for parameter, parts in gradients[name].items():
            parameter.grad = sum(parts) / 2
        getattr(other.optimizer, name).step()
        torch.manual_seed(0)
    assert_equal(weights(one.model.critic), weights(other.model.critic))


def step_gradients(learner, real, gradients):
    """What GANTraining's backwards give, without an update."""

    class Keep(Callback):
        reads = ("optimizer",)

        def __init__(self):
            self.hooks = []

        @on(StepBegin)
        def watch(self, learner):
            for name, optimizer in learner.optimizers.items():

                def keep(optimizer, args, kwargs, name=name):
                    kept = gradients.setdefault(name, {})
                    for p in optimizer.param_groups[0]["params"]:
                        kept.setdefault(p, []).append(p.grad)
                        p.grad = None

                self.hooks.append(optimizer.register_step_pre_hook(keep))

        @on(StepEnd)
        def unwatch(self, learner):
            for hook in self.hooks:
                hook.remove()

    with learner.using(callbacks=[Keep()]):
        learner.run_step(GAN, real)


def test_a_cancelled_step_leaves_nothing_to_accumulate():
    parts = batches(3)
    one = learner(AccumulateGradients(2), SkipSecond(), data=parts)
    other = learner(data=[joined(parts[0], parts[2])])
    one.epoch(TrainingPhase())
    other.epoch(TrainingPhase())
    assert_equal(weights(one.model), weights(other.model))


def test_what_a_broken_epoch_has_accumulated_is_dropped():
    one = learner(AccumulateGradients(3), data=[*batches(1), "no batch"])
    before = weights(one.model)
    with pytest.raises(TypeError):
        one.epoch(TrainingPhase())
    assert_equal(weights(one.model), before)
    one.data["training"] = parts = batches(3)
    one.epoch(TrainingPhase())
    other = learner(data=[joined(*parts)])
    other.epoch(TrainingPhase())
    assert_equal(weights(one.model), weights(other.model))


@pytest.mark.parametrize("phase", [TrainingPhase(), PlainStep()])
@pytest.mark.parametrize(
    ("bounds", "clip"),
    [
        ({"max_norm": 0.1}, lambda ps: nn.utils.clip_grad_norm_(ps, 0.1)),
        (
            {"max_norm": 0.1, "norm_type": float("inf")},
            lambda ps: nn.utils.clip_grad_norm_(ps, 0.1, float("inf")),
        ),
        ({"max_value": 0.01}, lambda ps: nn.utils.clip_grad_value_(ps, 0.01)),
    ],
)
def test_clipping_is_torchs_before_the_update(phase, bounds, clip):
    one, model = learner(ClipGradients(**bounds)), net()
    optimizer = SGD(model.parameters())
    one.epoch(phase)
    for inputs, targets in batches():
        nn.functional.mse_loss(model(inputs), targets).backward()
        clip(list(model.parameters()))
        optimizer.step()
        optimizer.zero_grad()
    assert_equal(weights(one.model), weights(model), rtol=0, atol=0)


@pytest.mark.parametrize("clip_first", [True, False])
def test_what_is_clipped_is_what_was_accumulated(clip_first):
    parts = batches(2)
    callbacks = [ClipGradients(0.1), AccumulateGradients(2)]
    one = learner(*(callbacks if clip_first else callbacks[::-1]), data=parts)
    other = learner(ClipGradients(0.1), data=[joined(*parts)])
    one.epoch(TrainingPhase())
    other.epoch(TrainingPhase())
    assert_equal(weights(one.model), weights(other.model))
    assert other.step.gradient_norm["optimizer"] > 0.1


def test_the_norms_of_each_optimizer_are_kept():
    one = gan_learner(ClipGradients(1e9))
    one.run_step(GAN, batches()[0][0])
    assert one.step.gradient_norm.keys() == {"critic", "generator"}


def test_a_closure_makes_its_gradients_too_late():
    class Closure(AbstractTrainingPhase):
        def step(self, learner, batch):
            learner.optimizer.step(lambda: 0.0)

    for callback in (ClipGradients(1.0), AccumulateGradients(2)):
        one = learner(callback, optimizer=torch.optim.LBFGS)
        with pytest.raises(TypeError, match="LBFGS computes its gradients within it"):
            one.run_step(Closure(), None)


def test_no_hooks_are_left_behind():
    one = learner(ClipGradients(1.0), AccumulateGradients(2))
    one.fit(1)
    with pytest.raises(TypeError):
        one.run_step(TrainingPhase(), "no batch")
    assert not one.optimizer._optimizer_step_pre_hooks
    assert not one.optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClipGradients(), "Give a positive bound"),
        (lambda: ClipGradients(-1.0), "max_norm=-1.0"),
        (lambda: AccumulateGradients(0), "steps is at least 1, and got 0"),
        (
            lambda: AccumulateGradients(2, reduction="max"),
            "the reduction 'mean' or 'sum', and got 'max'",
        ),
    ],
)
def test_impossible_arguments_are_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
