import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from wraploop.callback import Callback, on
from wraploop.events import (
    BackwardBegin,
    BackwardEnd,
    CancelStep,
    LossBegin,
)
from wraploop.gan import (
    R1,
    AdversarialLoss,
    GANTraining,
    GradientPenalty,
    Hinge,
    LeastSquares,
    NonSaturating,
    PathLength,
    Relativistic,
    RelativisticAverage,
    Wasserstein,
)
from wraploop.gan.penalties import CriticHalf, GeneratorHalf
from wraploop.learner import Learner
from wraploop.phases import AbstractTrainingPhase

SGD = partial(torch.optim.SGD, lr=0.1)
LOSSES = [
    NonSaturating(),
    LeastSquares(),
    Hinge(),
    Wasserstein(),
    Relativistic(),
    RelativisticAverage(),
]


def make_models():
    torch.manual_seed(0)
    generator = nn.Sequential(
        nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)
    )
    critic = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1))
    return {"generator": generator.double(), "critic": critic.double()}


def make_learner(phase_batches=1, optimizer=SGD, models=None, callbacks=()):
    models = models or make_models()
    torch.manual_seed(1)
    return Learner(
        models,
        optimizer=optimizer,
        data=[torch.randn(6, 2, dtype=torch.float64) for _ in range(phase_batches)],
        callbacks=callbacks,
        default_callbacks=False,
    )


def train(phase, **options):
    learner = make_learner(**options)
    torch.manual_seed(2)
    learner.epoch(phase)
    return learner


class Calls:
    """Counts how often something happens to a module."""

    def __init__(self, module):
        self.forwards = self.parameter_backwards = 0
        module.register_forward_hook(self.forward)
        first = next(module.parameters())
        first.register_post_accumulate_grad_hook(self.backward)

    def forward(self, *_):
        self.forwards += 1

    def backward(self, *_):
        self.parameter_backwards += 1


# Losses


def mean(numbers):
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


REAL, FAKE = [0.3, -1.2, 2.0], [-0.4, 1.5, 0.1]
PAIRS = list(zip(REAL, FAKE, strict=True))
FORMULAS = {
    "NonSaturating": (
        -mean(log_sigmoid(r) for r in REAL) - mean(log_sigmoid(-f) for f in FAKE),
        mean(-log_sigmoid(f) for f in FAKE),
    ),
    "LeastSquares": (
        0.5 * mean((r - 1) ** 2 for r in REAL) + 0.5 * mean(f**2 for f in FAKE),
        0.5 * mean((f - 1) ** 2 for f in FAKE),
    ),
    "Hinge": (
        -mean(min(0, r - 1) for r in REAL) - mean(min(0, -f - 1) for f in FAKE),
        -mean(FAKE),
    ),
    "Wasserstein": (mean(FAKE) - mean(REAL), -mean(FAKE)),
    "Relativistic": (
        -mean(log_sigmoid(r - f) for r, f in PAIRS),
        -mean(log_sigmoid(f - r) for r, f in PAIRS),
    ),
    "RelativisticAverage": (
        -mean(log_sigmoid(r - mean(FAKE)) for r in REAL)
        - mean(log_sigmoid(mean(REAL) - f) for f in FAKE),
        -mean(log_sigmoid(f - mean(REAL)) for f in FAKE)
        - mean(log_sigmoid(mean(FAKE) - r) for r in REAL),
    ),
}


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_losses_are_those_of_their_papers(loss):
    real = torch.tensor(REAL, dtype=torch.float64)[:, None]
    fake = torch.tensor(FAKE, dtype=torch.float64)[:, None]
    critic, generator = FORMULAS[type(loss).__name__]

    assert loss.critic(real, fake).item() == pytest.approx(critic, rel=1e-12)
    seen = real if loss.generator_sees_real else None
    assert loss.generator(seen, fake).item() == pytest.approx(generator, rel=1e-12)


# Penalties, against derivatives worked out by hand


def critic_half(critic, real, fake):
    real = real.requires_grad_()
    return CriticHalf(critic, real, fake, critic(real), critic(fake))


class Quadratic(nn.Module):
    """`a x² / 2` summed over a row, so the gradient is `a x`."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, x):
        return self.a * x.flatten(1).square().sum(1, keepdim=True) / 2


def test_r1_is_half_the_mean_squared_slope_at_the_real_samples():
    critic, real = Quadratic(), torch.randn(5, 1, 2, 2, dtype=torch.float64)
    penalty = R1(weight=4.0)(critic_half(critic, real.clone(), torch.randn_like(real)))
    (gradient,) = torch.autograd.grad(penalty, critic.a)

    squares = real.square().sum((1, 2, 3)).mean()
    torch.testing.assert_close(penalty, 4.0 / 2 * 1.5**2 * squares, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, 4.0 * 1.5 * squares, rtol=1e-12, atol=0)


def test_gradient_penalty_draws_slopes_between_real_and_fake_to_one():
    critic = Quadratic()
    real, fake = torch.randn(2, 5, 3, dtype=torch.float64)
    torch.manual_seed(3)
    penalty = GradientPenalty(weight=10.0)(critic_half(critic, real.clone(), fake))
    (gradient,) = torch.autograd.grad(penalty, critic.a)

    torch.manual_seed(3)
    shares = torch.rand(5, 1, dtype=torch.float64)
    lengths = (shares * real + (1 - shares) * fake).norm(dim=1)
    torch.testing.assert_close(penalty, 10 * (1.5 * lengths - 1).square().mean())
    torch.testing.assert_close(gradient, 10 * (2 * (1.5 * lengths - 1) * lengths).mean())


def test_gradient_penalty_of_a_flat_critic_is_its_weight_and_no_nan():
    critic = nn.Linear(3, 1).double()
    nn.init.zeros_(critic.weight)
    real, fake = torch.randn(2, 5, 3, dtype=torch.float64)
    penalty = GradientPenalty(weight=10.0)(critic_half(critic, real, fake))
    (gradient,) = torch.autograd.grad(penalty, critic.weight)

    assert penalty.item() == 10
    assert gradient.isfinite().all()


def test_path_length_draws_lengths_to_their_running_mean():
    generator = nn.Linear(3, 8, bias=False).double()
    latents = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    penalty = PathLength(weight=2.0, decay=0.9)
    half = GeneratorHalf(generator, latents, generator(latents).reshape(5, 2, 2, 2))
    penalty(half)
    mean_before = penalty.mean_length
    torch.manual_seed(4)
    term = penalty(half)

    torch.manual_seed(4)
    directions = torch.randn(5, 2, 2, 2, dtype=torch.float64).flatten(1) / 2  # 4 pixels
    lengths = (directions @ generator.weight).norm(dim=1)
    expected_mean = 0.9 * mean_before + 0.1 * lengths.mean().item()
    assert penalty.mean_length == pytest.approx(expected_mean, rel=1e-12)
    torch.testing.assert_close(term, 2 * (lengths - expected_mean).square().mean())


def test_a_lazy_penalty_is_added_every_so_many_updates_and_that_much_stronger():
    phase = GANTraining(3, penalties=[R1(weight=1.0, every_steps=3)])
    added = []
    plain_loss = phase.loss.critic

    class Recording(Callback):
        @on(BackwardBegin)
        def record(self, learner):
            if learner.step.trains == "critic":
                critic = copy.deepcopy(learner.model.critic)
                real, fake = learner.step.real.clone().requires_grad_(), learner.step.fake
                scores = critic(real)
                (slope,) = torch.autograd.grad(scores.sum(), real)
                r1 = slope.square().sum(1).mean().item() / 2
                rest = learner.step.critic_loss - plain_loss(scores, critic(fake))
                added.append(round(rest.item() / r1, 8))

    train(phase, phase_batches=7, callbacks=[Recording()])
    assert added == [3, 0, 0, 3, 0, 0, 3]


# The step


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_a_step_is_the_plain_step_written_out(loss):
    learner = train(GANTraining(3, loss=loss))

    models = make_models()
    generator, critic = models["generator"], models["critic"]
    torch.manual_seed(1)
    real = torch.randn(6, 2, dtype=torch.float64)
    torch.manual_seed(2)
    fake = generator(torch.randn(6, 3, dtype=torch.float64)).detach()
    loss.critic(critic(real), critic(fake)).backward()
    torch.optim.SGD(critic.parameters(), lr=0.1).step()
    fake = generator(torch.randn(6, 3, dtype=torch.float64))
    real_scores = critic(real) if loss.generator_sees_real else None
    loss.generator(real_scores, critic(fake)).backward()
    torch.optim.SGD(generator.parameters(), lr=0.1).step()

    for name, model in models.items():
        for key, value in model.state_dict().items():
            mine = learner.models[name].state_dict()[key]
            torch.testing.assert_close(mine, value, rtol=1e-12, atol=1e-15, msg=f"{name}.{key}")


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_a_step_that_reuses_fakes_is_the_tutorials(loss):
    phase = GANTraining(3, loss=loss, reuse_fakes=True, critic_steps=2)
    learner = train(phase, phase_batches=2)

    models = make_models()
    generator, critic = models["generator"], models["critic"]
    optimizers = {name: torch.optim.SGD(m.parameters(), lr=0.1) for name, m in models.items()}
    torch.manual_seed(1)
    batches = [torch.randn(6, 2, dtype=torch.float64) for _ in range(2)]
    real = fake = torch.empty(0)
    torch.manual_seed(2)
    for real in batches:
        fake = generator(torch.randn(6, 3, dtype=torch.float64))
        critic.zero_grad()
        loss.critic(critic(real), critic(fake.detach())).backward()
        optimizers["critic"].step()
    real_scores = critic(real) if loss.generator_sees_real else None
    loss.generator(real_scores, critic(fake)).backward()
    optimizers["generator"].step()

    for name, model in models.items():
        for key, value in model.state_dict().items():
            mine = learner.models[name].state_dict()[key]
            torch.testing.assert_close(mine, value, rtol=1e-12, atol=1e-15, msg=f"{name}.{key}")


@pytest.mark.parametrize("reuse_fakes", [False, True])
def test_gradients_cross_each_network_once_a_step(reuse_fakes):
    models = make_models()
    generator, critic = Calls(models["generator"]), Calls(models["critic"])
    phase = GANTraining(3, penalties=[R1(), PathLength()], reuse_fakes=reuse_fakes)
    train(phase, models=models)

    assert (critic.forwards, critic.parameter_backwards) == (3, 1)  # real, fake, fake again
    assert generator.forwards == 2 - reuse_fakes
    assert generator.parameter_backwards == 1


def test_the_generator_is_updated_at_every_critic_stepsth_step():
    phase = GANTraining(3, critic_steps=3)
    steps = []

    class Recording(Callback):
        @on(BackwardEnd)
        def record(self, learner):
            steps.append(learner.step.trains)

    train(phase, phase_batches=7, callbacks=[Recording()])
    assert steps == (["critic"] * 3 + ["generator"]) * 2 + ["critic"]
    assert (phase.critic_updates, phase.generator_updates) == (7, 2)


def test_events_come_once_for_each_half():
    events = []

    class Recording(Callback):
        @on(LossBegin)
        @on(BackwardBegin)
        @on(BackwardEnd)
        def record(self, learner):
            events.append((learner.step.trains, type(learner.event)))

    train(GANTraining(3), callbacks=[Recording()])
    kinds = [LossBegin, BackwardBegin, BackwardEnd]
    assert events == [(half, kind) for half in ("critic", "generator") for kind in kinds]


def test_the_critic_has_no_gradients_after_the_generators_backward():
    seen = []

    class Recording(Callback):
        @on(BackwardEnd)
        def record(self, learner):
            named = learner.models.items()
            seen.append({n for n, m in named if any(p.grad is not None for p in m.parameters())})

    train(GANTraining(3), callbacks=[Recording()])
    assert seen == [{"critic"}, {"generator"}]


def test_latents_have_the_batchs_dtype_and_differ_between_the_halves():
    seen = []
    models = make_models()
    models["generator"].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    train(GANTraining(3), models=models)

    assert [(each.dtype, each.shape) for each in seen] == [(torch.float64, (6, 3))] * 2
    assert not torch.equal(*seen)


def test_batches_may_be_tuples_that_begin_with_the_samples():
    real = torch.randn(6, 2, dtype=torch.float64)
    for batch in (real, [real], (real, torch.arange(6))):
        learner = make_learner()
        torch.manual_seed(2)
        learner.run_step(GANTraining(3), batch)
        assert learner.step.rows == 6
        assert learner.step.real is real
        assert not real.requires_grad


# Freezing


def frozen_ones(model):
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


def test_what_was_frozen_stays_frozen_and_nothing_else():
    models = make_models()
    models["critic"][0].requires_grad_(False)
    before = copy.deepcopy(models["critic"][0].state_dict())
    learner = train(
        GANTraining(3, penalties=[R1(), GradientPenalty(), PathLength()]), models=models
    )

    assert frozen_ones(learner.model.critic) == ["0.weight", "0.bias"]
    assert frozen_ones(learner.model.generator) == []
    for name, value in learner.model.critic[0].state_dict().items():
        assert torch.equal(value, before[name])


def test_the_critic_is_thawed_when_the_generators_half_fails():
    models = make_models()

    class Failing(Callback):
        @on(LossBegin)
        def fail(self, learner):
            if learner.step.trains == "generator":
                assert len(frozen_ones(learner.model.critic)) == 6
                raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        train(GANTraining(3), models=models, callbacks=[Failing()])
    assert frozen_ones(models["critic"]) == []


def test_a_step_cancelled_in_the_generators_half_leaves_no_gradients_and_nothing_frozen():
    class Cancelling(Callback):
        @on(BackwardEnd, AbstractTrainingPhase)
        def cancel(self, learner):
            if learner.step.trains == "generator":
                raise CancelStep

    learner = train(GANTraining(3), callbacks=[Cancelling()])
    assert learner.step.cancelled
    for model in learner.models.values():
        assert frozen_ones(model) == []
        assert all(parameter.grad is None for parameter in model.parameters())


# Errors


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GANTraining(0), ValueError, "latent_size"),
        (lambda: GANTraining(3, critic_steps=0), ValueError, "critic_steps"),
        (lambda: GANTraining(3, loss=Hinge), TypeError, "Expected a loss such as"),  # type: ignore[arg-type]
        (lambda: GANTraining(3, penalties=[F.relu]), TypeError, "Expected a penalty such as"),  # type: ignore[list-item]
        (lambda: R1(every_steps=0), ValueError, "every_steps"),
        (AdversarialLoss, TypeError, "abstract"),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_made(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("batch", "came"),
    [
        (torch.zeros(4, 2, dtype=torch.uint8), r"a tensor of torch\.uint8"),
        ({"images": torch.zeros(4, 2)}, "dict"),
        ([], "list"),
        (torch.tensor(1.0), "0-dimensional"),
    ],
)
def test_a_batch_without_samples_is_refused(batch, came):
    with pytest.raises(TypeError, match=f"floating-point samples.*{came}"):
        make_learner().run_step(GANTraining(3), batch)


def test_models_of_other_names_are_refused():
    models = make_models()
    learner = make_learner(models={"generator": models["generator"], "judge": models["critic"]})
    with pytest.raises(TypeError, match="learner's are generator, judge"):
        learner.run_step(GANTraining(3), torch.zeros(4, 2).double())
