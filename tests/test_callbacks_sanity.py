import copy
import functools
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from wraploop import processes
from wraploop.callback import Callback, on
from wraploop.callbacks.checks import STANDARD_CHECKS, Check, NotSeen, described
from wraploop.callbacks.history import History
from wraploop.callbacks.metrics import Metrics
from wraploop.callbacks.sanity import SanityCheck, SanityCheckError
from wraploop.events import CancelStep, StepBegin, StepEnd
from wraploop.gan import GANTraining
from wraploop.learner import Learner
from wraploop.phases import AbstractTrainingPhase, TrainingPhase, ValidationPhase
from wraploop.wrappers.distributed import DistributedModel

NUMBERS = torch.Generator().manual_seed(0)
BATCH = (torch.randn(8, 4, generator=NUMBERS), torch.randint(3, (8,), generator=NUMBERS))
REAL = torch.randn(8, 4, generator=NUMBERS)
ADAM = functools.partial(torch.optim.Adam, lr=0.1)


def learner(*callbacks, model=None, loss_fn=nn.functional.cross_entropy, data=None, **options):
    torch.manual_seed(0)
    options = {"optimizer": ADAM, "default_callbacks": False, **options}
    return Learner(
        model or nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)),
        loss_fn,
        data=([BATCH] * 3, [BATCH]) if data is None else data,
        callbacks=callbacks,
        **options,
    )


def state(learner):
    return copy.deepcopy([m.state_dict() for m in learner.models.values()])


def is_untouched(learner, before) -> bool:
    pairs = zip(before, state(learner), strict=True)
    tensors = all(torch.equal(a[key], b[key]) for a, b in pairs for key in a)
    return tensors and not any(o.state for o in learner.optimizers.values())


class Counts(Callback):
    steps = 0

    @on(StepEnd)
    def count(self, learner):
        self.steps += 1


def report_of(learner, phases=()) -> str:
    """The report of a check that fails, before anything has been trained."""
    learner.callbacks.add(counts := Counts())
    before = state(learner)
    with pytest.raises(SanityCheckError) as caught:
        learner.fit(1, phases)
    assert counts.steps == 0
    assert is_untouched(learner, before)
    return str(caught.value)


def test_the_standard_checks_pass_and_say_what_they_have_seen(capsys):
    one = learner(SanityCheck(), lr_free := Counts())
    one.fit(0)
    assert capsys.readouterr().out == ""
    one.fit(2)
    lines = capsys.readouterr().out.splitlines()
    loss, norm = (float(lines[at].split()[1 + (at == 4)]) for at in (3, 4))
    assert 0.1 < loss < 5
    assert 0.01 < norm < 10
    assert lines[:3] == [
        "SanityCheck of TrainingPhase",
        "  batch      (float32 (8, 4), int64 (8,))",
        "  outputs    float32 (8, 3)",
    ]
    assert lines[5:12] == [f"  ok       {check.name}" for check in STANDARD_CHECKS]
    assert lines[12:] == [
        "SanityCheck of ValidationPhase",
        *lines[1:3],
        lines[15],
        "  ok       there are batches",
        "  ok       the step runs",
        "  ok       losses are finite numbers",
    ]
    assert lr_free.steps == 8


def test_a_fit_with_it_is_bit_for_bit_the_fit_without():
    def fitted(*callbacks):
        generator = torch.Generator().manual_seed(1)
        torch.manual_seed(0)
        rows = TensorDataset(torch.randn(20, 4), torch.randint(3, (20,)))
        data = DataLoader(rows, batch_size=6, shuffle=True, generator=generator)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
        one = learner(*callbacks, History(), Metrics(), model=model, data=(data, data))
        one.fit(2)
        return one

    plain, checked = fitted(), fitted(SanityCheck())
    for key, value in plain.model.state_dict().items():
        assert torch.equal(value, checked.model.state_dict()[key]), key
    assert repr(plain.metrics) == repr(checked.metrics)
    assert repr(plain.history) == repr(checked.history)


def test_a_phase_is_checked_once_and_again_after_it_failed(capsys):
    one = learner(SanityCheck())
    one.fit(3)
    one.fit(1)
    assert capsys.readouterr().out.count("SanityCheck of TrainingPhase") == 1
    bad = learner(SanityCheck(), loss_fn=lambda outputs, targets: outputs.sum() * math.nan)
    for _ in range(2):
        with pytest.raises(SanityCheckError):
            bad.fit(1)
    bad.loss_fn = nn.functional.cross_entropy
    bad.fit(1)


class Says(nn.Module):
    """Returns a string."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return "yes"


class Unused(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 3), nn.Linear(4, 3))

    def forward(self, input):
        return self[0](input)


class Infinite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *grads):
        return grads[0] * math.inf


def one_argument(outputs):
    return outputs.sum()


FAILURES = {
    "a NaN loss": (
        {"loss_fn": lambda outputs, targets: outputs.sum() * math.nan},
        ["ERROR    losses are finite numbers: loss is nan", "ERROR    gradients are finite: norm"],
    ),
    "a loss of each row": (
        {"loss_fn": functools.partial(nn.functional.cross_entropy, reduction="none")},
        [
            "ERROR    losses are finite numbers: loss is float32 (8,), which is no single number: "
            "reduce it, as by `.mean()`",
            "ERROR    the step runs: it raised RuntimeError: grad can be",
            "-        some parameter changes",
        ],
    ),
    "infinite gradients": (
        {
            "loss_fn": lambda outputs, targets: nn.functional.cross_entropy(
                Infinite.apply(outputs), targets
            )
        },
        ["ERROR    gradients are finite: norm", "ok       losses are finite numbers"],
    ),
    "a model that returns a string": (
        {"model": Says()},
        ["ERROR    the step runs: it raised TypeError: cross_entropy", "outputs    str"],
    ),
    "a loss function of another arity": (
        {"loss_fn": one_argument},
        ["ERROR    the step runs: it raised TypeError: one_argument() takes 1 positional"],
    ),
    "no loss function": (
        {"loss_fn": None},
        ["ERROR    the step runs: it raised TypeError: This phase needs a loss function"],
    ),
    "numbers as batches": (
        {"data": ([1, 2, 3], [BATCH])},
        [
            "batch      int",
            "ERROR    the step runs: it raised TypeError: TrainingPhase takes batches of (inputs",
        ],
    ),
    "no batches": (
        {"data": ([], [BATCH])},
        ["ERROR    there are batches: there are none", "-        the step runs"],
    ),
    "a frozen model": (
        {"model": nn.Linear(4, 3).requires_grad_(False)},
        ["ERROR    the step runs: it raised RuntimeError: element 0 of tensors does not require"],
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_cannot_be_trained_is_reported_before_it_is(name):
    options, expected = FAILURES[name]
    report = report_of(learner(SanityCheck(), **options))
    for line in expected:
        assert line in report, report


def test_what_the_step_raised_is_the_cause():
    with pytest.raises(SanityCheckError) as caught:
        learner(SanityCheck(), loss_fn=one_argument).fit(1)
    assert isinstance(caught.value.__cause__, TypeError)
    assert "one_argument" in str(caught.value.__cause__)


def test_reading_a_batch_that_fails_is_reported():
    class Breaks:
        def __iter__(self):
            raise OSError("no such disk")

    report = report_of(learner(SanityCheck(), data=(Breaks(), [BATCH])))
    assert "ERROR    there are batches: reading one raised OSError: no such disk" in report
    assert "-        the step runs" in report


class NeverUpdates(AbstractTrainingPhase):
    def step(self, learner, batch):
        learner.step.loss = learner.loss_fn(learner.model(batch[0]), batch[1])
        learner.step.loss.backward()


class Silent(AbstractTrainingPhase):
    def step(self, learner, batch):
        loss = learner.loss_fn(learner.model(batch[0]), batch[1])
        loss.backward()
        learner.optimizer.step()


def test_a_step_without_an_update_or_a_loss_is_an_error():
    report = report_of(learner(SanityCheck()), [NeverUpdates()])
    assert "all 6 that are trained are what they were, and no optimizer made an update" in report
    assert "ok       every parameter gets a gradient" in report
    report = report_of(learner(SanityCheck()), [Silent()])
    assert "ERROR    losses are finite numbers: the step stored none of loss in" in report
    assert "ok       some parameter changes" in report


class ByClosure(AbstractTrainingPhase):
    def step(self, learner, batch):
        def closure():
            learner.optimizer.zero_grad()
            learner.step.loss = learner.loss_fn(learner.model(batch[0]), batch[1])
            learner.step.loss.backward()
            return learner.step.loss

        learner.optimizer.step(closure)
        learner.optimizer.zero_grad()


def test_gradients_that_an_optimizer_makes_itself_are_seen(capsys):
    learner(SanityCheck(), optimizer=torch.optim.LBFGS).fit(1, [ByClosure()])
    said = capsys.readouterr().out
    assert "  gradients  norm " in said
    assert "ok       every parameter gets a gradient" in said


def test_a_step_that_cancels_itself_is_an_error():
    class Cancels(TrainingPhase):
        def step(self, learner, batch):
            raise CancelStep

    report = report_of(learner(SanityCheck()), [Cancels()])
    assert "ERROR    the step runs: it was cancelled" in report


def test_no_change_is_no_wonder_while_the_learning_rate_is_zero():
    learner(SanityCheck(), optimizer=functools.partial(torch.optim.SGD, lr=0.0)).fit(1)


def test_unused_parameters_and_missing_validation_are_warnings(capsys):
    one = learner(SanityCheck(), model=Unused(), data=[BATCH])
    one.fit(1)
    said = capsys.readouterr().out
    assert "warning  every parameter gets a gradient: 1.weight, 1.bias got none" in said
    assert "unchanged  1.weight, 1.bias" in said
    assert "warning  there is validation data: there is none: Learner(data=(training" in said


def test_validation_that_fit_is_given_counts(capsys):
    one = learner(SanityCheck(), data={})
    one.fit(1, [(TrainingPhase(), [BATCH]), (ValidationPhase(), [BATCH])])
    assert "ok       there is validation data" in capsys.readouterr().out


def test_an_iterator_loses_nothing_and_the_report_says_so(capsys):
    batches = iter([BATCH] * 3)
    one = learner(SanityCheck(), counts := Counts(), data=(batches, [BATCH]))
    one.fit(1, [TrainingPhase()])
    assert counts.steps == 3
    said = capsys.readouterr().out
    assert "no step    the batches are an iterator, which would lose the one" in said
    assert "-        the step runs" in said
    assert "ok       there is validation data" in said
    with one.run_epoch(ValidationPhase()):
        one.run_step(ValidationPhase(), BATCH)
    assert "no step    this epoch's loop was given no batches" in capsys.readouterr().out


def test_what_cannot_be_copied_is_trained_unchecked(capsys):
    class Streams(TrainingPhase):
        def __init__(self):
            self.numbers = (n for n in range(3))

    learner(SanityCheck(), counts := Counts()).fit(1, [Streams()])
    assert counts.steps == 3
    assert "no step    Steps are rehearsed on copies" in capsys.readouterr().out


def test_a_step_that_changes_its_batch_changes_a_copy():
    class Scales(TrainingPhase):
        def step(self, learner, batch):
            batch[0].mul_(2)
            super().step(learner, batch)

    data = [(torch.ones(8, 4), BATCH[1])]
    learner(SanityCheck(), data=(data, data)).fit(1, [Scales()])
    assert torch.equal(data[0][0], torch.full((8, 4), 2.0))


def test_own_checks_replace_the_standard_ones(capsys):
    seen_in = []

    def few_rows(seen):
        seen_in.append(seen)
        return "" if len(seen.batch[0]) <= 4 else f"{len(seen.batch[0])} rows"

    def breaks(seen):
        return seen.stored["latents"]

    def cannot_tell(seen):
        raise NotSeen

    checks = [
        Check("few rows", few_rows, phase=TrainingPhase),
        Check("latents", breaks, is_error=False),
        Check("weather", cannot_tell),
    ]
    report = report_of(learner(SanityCheck(*checks)))
    assert report.splitlines()[-3:] == [
        "  ERROR    few rows: 8 rows",
        "  warning  latents: the check itself raised KeyError: 'latents'",
        "  -        weather",
    ]
    seen = seen_in[0]
    assert set(seen.losses) == {"loss"}
    assert seen.stored["outputs"].shape == (8, 3)
    assert seen.trainable == ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"]
    assert (seen.unchanged, seen.without_gradient, seen.rates) == ([], [], [0.1])
    capsys.readouterr()
    learner(SanityCheck(*checks[1:])).fit(1)
    assert "few rows" not in capsys.readouterr().out


def test_the_norm_is_that_of_the_plain_steps_gradients():
    norms = []
    check = Check("norms", lambda seen: norms.append(seen.gradient_norms) or "")
    one = learner(SanityCheck(check))
    plain = copy.deepcopy(one.model)
    one.fit(1)
    nn.functional.cross_entropy(plain(BATCH[0]), BATCH[1]).backward()
    expected = torch.cat([p.grad.flatten() for p in plain.parameters()]).norm().item()
    assert norms[0] == [("optimizer", pytest.approx(expected, rel=1e-5))]


def test_checks_are_checks():
    with pytest.raises(TypeError, match=r"Expected a Check\(name, function\), and got 'loss'"):
        SanityCheck("loss")  # pyright: ignore


def test_callbacks_that_make_the_batch_take_part_as_copies():
    class Halves(Callback):
        writes = ("step.batch",)
        count = 0

        @on(StepBegin)
        def halve(self, learner):
            self.count += 1
            learner.step.batch = tuple(part[:4] for part in learner.step.batch)

    shapes = []
    check = Check("shape", lambda seen: shapes.append(described(seen.batch)) or "")
    one = learner(halves := Halves(), SanityCheck(check))
    one.fit(1)
    assert shapes == ["(float32 (4, 4), int64 (4,))"] * 2
    assert halves.count == 4


def gan(*callbacks, critic=None):
    torch.manual_seed(0)
    models = {"generator": nn.Linear(2, 4), "critic": critic or nn.Linear(4, 1)}
    return learner(*callbacks, model=models, loss_fn=None, data=[REAL] * 4)


def test_a_gan_is_checked_like_anything_else(capsys):
    plain, checked = gan(), gan(SanityCheck())
    for one in (plain, checked):
        torch.manual_seed(1)
        one.fit(2, [phase := GANTraining(latent_size=2)])
        assert phase.critic_updates == 8
    said = capsys.readouterr().out
    assert "batch      float32 (8, 4)" in said
    assert "(critic), " in said
    assert "(generator)" in said
    assert said.count("_loss") == 2
    assert "ok       every parameter gets a gradient" in said
    for a, b in zip(state(plain), state(checked), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_gans_generator_that_has_no_turn_is_named(capsys):
    gan(SanityCheck()).fit(1, [GANTraining(latent_size=2, critic_steps=2)])
    assert "gradient: generator.weight, generator.bias got none" in capsys.readouterr().out
    report = report_of(gan(SanityCheck(), critic=nn.Linear(3, 1)), [GANTraining(latent_size=2)])
    assert "ERROR    the step runs: it raised RuntimeError: mat1 and mat2" in report


def test_it_declares_what_it_reads():
    learner(SanityCheck(), strict=True).fit(1)
    report = report_of(learner(SanityCheck(), strict=True, loss_fn=one_argument))
    assert "one_argument() takes 1" in report


class Raises(nn.Module):
    """A loss that fails on rank 1, after the model has run."""

    def forward(self, outputs, targets):
        if processes.rank() == 1:
            raise ArithmeticError("only here")
        return nn.functional.cross_entropy(outputs, targets)


class Lacking:
    """Batches that rank 1 cannot read."""

    def __iter__(self):
        if processes.rank() == 1:
            raise OSError("no such disk")
        return iter([BATCH])


def in_one_of_two_processes(rank: int, folder: str) -> None:
    """Called by tests/test_callbacks_processes.py, in a process group of two."""

    def distributed(batch, **options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3))
        return learner(SanityCheck(), model=DistributedModel(model, batch=batch), **options)

    good = distributed("global", data=([BATCH], [BATCH]))
    good.fit(1)
    total = good.model[0].weight.sum().item()
    assert processes.sum(total) == pytest.approx(2 * total, rel=1e-12)

    spoiled = (torch.full_like(BATCH[0], math.nan), BATCH[1])
    mine = spoiled if rank == 1 else BATCH
    report = report_of(distributed("local", data=([mine], [mine])))
    wrong = ("so another process finds", "loss is nan")[rank]
    assert f"ERROR    losses are finite numbers: {wrong}" in report
    assert "ERROR    gradients are finite: norm nan" in report
    report = report_of(distributed("global", data=([mine], [mine])))
    assert "ERROR    the step runs: it raised PeerError: Rank 1 has another batch" in report

    ends = distributed("global", loss_fn=Raises())
    report = report_of(ends)
    told = ("PeerError: Rank 1 failed, so rank 0 cannot go on: ArithmeticError: only here", "Arith")
    assert f"ERROR    the step runs: it raised {told[rank]}" in report
    report = report_of(distributed("global", data=(Lacking(), [BATCH])))
    assert "ERROR    there are batches: reading one raised " in report
    assert "-        the step runs" in report
    assert "OSError: no such disk" in report
    some = [BATCH] if rank == 0 else []
    report = report_of(distributed("global", data=(some, [BATCH])))
    assert f"there are batches: {('so another process finds', 'there are none')[rank]}" in report
    once = distributed("global", data=([BATCH] if rank == 0 else iter([BATCH]), [BATCH]))
    once.fit(1)

    assert processes.sum(1) == 2
