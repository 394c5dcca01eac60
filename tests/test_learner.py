import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from wraploop.callback import Callback, on
from wraploop.callbacks.history import History
from wraploop.callbacks.metrics import Metrics
from wraploop.events import (
    BackwardBegin,
    BackwardEnd,
    CancelEpoch,
    CancelFit,
    CancelStep,
    EpochBegin,
    EpochEnd,
    Event,
    FitBegin,
    FitEnd,
    LossBegin,
    StepBegin,
    StepEnd,
)
from wraploop.learner import Learner
from wraploop.phases import AbstractTrainingPhase, TrainingPhase, ValidationPhase

BEGINS = (FitBegin, EpochBegin, StepBegin, BackwardBegin)
SGD = partial(torch.optim.SGD, lr=0.1)


class Scale(nn.Module):
    """FluxTraining's test model: its one weight is to become 3."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.rand(1))

    def forward(self, x):
        return self.factor * x


def batches(count: int = 16, rows: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    xs = [torch.rand(rows, 1) * 99 + 1 for _ in range(count)]
    return [(x, 3 * x) for x in xs]


def learner(*callbacks: Callback, count: int = 16, model=None, optimizer=None) -> Learner:
    data = batches(count)
    return Learner(
        model or Scale(),
        nn.functional.l1_loss,
        optimizer=optimizer or partial(torch.optim.SGD, lr=0.001),
        data=(data, data),
        callbacks=callbacks,
        default_callbacks=False,
    )


class Record(Callback):
    """Records the names of all events."""

    def __init__(self):
        self.events = []

    @on(Event)
    def record(self, learner):
        self.events.append(type(learner.event))


def raising(error, event, phase=None, at=(1,)) -> Callback:
    """A callback that raises `error` at the given occurrences of an event."""

    class Raising(Callback):
        seen = 0

        @on(event, *([phase] if phase else []))
        def act(self, learner):
            self.seen += 1
            if self.seen in at:
                raise error

    return Raising()


def assert_every_begin_has_one_end(events):
    due = []
    for event in events:
        if event in BEGINS:
            due.append(event.end)
        elif due and event is due[-1]:
            due.pop()
        else:
            assert event is LossBegin, f"{event} ends nothing: {events}"
    assert not due


@pytest.mark.parametrize(
    "optimizer", [partial(torch.optim.SGD, lr=0.001), partial(torch.optim.Adam, lr=0.2)]
)
def test_fit_finds_the_factor(optimizer):
    torch.manual_seed(0)
    one = learner(optimizer=optimizer)
    one.fit(5)
    assert abs(one.model.factor.item() - 3) < 0.1


def test_the_events_of_a_fit_come_in_this_order():
    learner(record := Record(), count=1).fit(1)
    training = [StepBegin, LossBegin, BackwardBegin, BackwardEnd, StepEnd]
    validation = [StepBegin, LossBegin, StepEnd]
    expected = [
        FitBegin,
        *[EpochBegin, *training, EpochEnd],
        *[EpochBegin, *validation, EpochEnd],
        FitEnd,
    ]
    assert record.events == expected


@pytest.mark.parametrize("error", [CancelStep(), CancelEpoch(), CancelFit("enough"), ValueError()])
@pytest.mark.parametrize(
    "event", [StepBegin, LossBegin, BackwardBegin, BackwardEnd, StepEnd, EpochBegin, EpochEnd]
)
def test_every_begin_has_exactly_one_end_whatever_is_raised_where(error, event):
    one = learner(record := Record(), raising(error, event), count=2)
    expected = ValueError
    if isinstance(error, CancelStep) and event in (EpochBegin, EpochEnd):
        expected = RuntimeError
    try:
        one.fit(2)
    except expected:
        pass
    assert_every_begin_has_one_end(record.events)
    assert record.events[-1] is FitEnd
    assert one.phase is None
    assert one.running is None


@pytest.mark.parametrize("event", [FitBegin, FitEnd])
def test_a_fit_cancelled_at_its_border_fires_both_ends_of_it(event):
    one = learner(record := Record(), raising(CancelFit("no"), event))
    one.fit(1)
    assert record.events[0] is FitBegin
    assert record.events.count(FitEnd) == 1
    assert one.stopped is not None


def test_a_step_that_fails_ends_what_it_began():
    class Fails(AbstractTrainingPhase):
        def step(self, learner, batch):
            learner.handle(BackwardBegin())
            raise KeyboardInterrupt

    one = learner(record := Record())
    with pytest.raises(KeyboardInterrupt):
        one.fit(1, [(Fails(), [1, 2])])
    assert record.events == [
        *(FitBegin, EpochBegin, StepBegin, BackwardBegin),
        *(BackwardEnd, StepEnd, EpochEnd, FitEnd),
    ]


def test_an_error_is_not_lost_to_what_its_ends_raise():
    one = learner(raising(ValueError("first"), LossBegin), raising(CancelFit("no"), StepEnd))
    with pytest.raises(ValueError, match="first"):
        one.fit(1)
    one = learner(raising(CancelFit("first"), LossBegin), raising(CancelStep("no"), StepEnd))
    one.fit(1)
    assert one.stopped is not None
    assert one.stopped.reason == "first"


def test_a_cancelled_step_is_skipped_and_the_next_one_runs():
    class Counts(nn.Linear):
        calls = 0

        def forward(self, input):
            self.calls += 1
            return super().forward(input)

    model = Counts(1, 1)
    one = learner(History(), raising(CancelStep, StepBegin, at=range(2, 99, 2)), model=model)
    one.epoch(TrainingPhase())
    assert model.calls == 8
    assert one.history[TrainingPhase].steps == 8


def test_a_cancelled_epoch_ends_once_and_counts_and_the_fit_goes_on():
    record = Record()
    one = learner(History(), record, raising(CancelEpoch, StepBegin, TrainingPhase, at=[3]))
    one.fit(2)
    assert one.history[TrainingPhase].epochs == 2
    assert one.history[TrainingPhase].steps == 2 + 16
    assert one.history[ValidationPhase].steps == 32
    assert record.events.count(EpochEnd) == 4
    assert one.stopped is None


def test_a_cancelled_fit_returns_and_tells_reason_and_source():
    source = raising(CancelFit("enough"), StepEnd, at=[20])
    one = learner(History(), source)
    one.fit(10)
    assert one.stopped is not None
    assert one.stopped.reason == "enough"
    assert one.stopped.source is source
    assert one.history[TrainingPhase].epochs == 1
    one.fit(1)
    assert one.stopped is None


def test_the_end_of_a_cancelled_fit_knows_that_it_was():
    class AtEnd(Callback):
        @on(FitEnd)
        def see(self, learner):
            self.reason = learner.stopped.reason

    one = learner(at_end := AtEnd(), raising(CancelFit("enough"), LossBegin))
    one.fit(1)
    assert at_end.reason == "enough"


def test_a_cancelled_fit_passes_through_a_bare_epoch():
    one = learner(History(), raising(CancelFit("enough"), StepEnd))
    with pytest.raises(CancelFit, match="enough"):
        one.epoch(TrainingPhase())
    assert one.history[TrainingPhase].epochs == 0


@pytest.mark.parametrize("first", [True, False])
def test_an_event_at_which_one_cancels_reaches_all(first):
    record, cancel = Record(), raising(CancelFit("enough"), StepBegin)
    one = learner(*([cancel, record] if first else [record, cancel]))
    one.fit(1)
    assert record.events == [FitBegin, EpochBegin, StepBegin, StepEnd, EpochEnd, FitEnd]


def test_the_strongest_of_several_cancellations_acts():
    one = learner(
        raising(CancelStep, StepBegin),
        raising(CancelFit("enough"), StepBegin),
        raising(CancelEpoch, StepBegin),
    )
    one.fit(1)
    assert one.stopped is not None


@pytest.mark.parametrize(
    ("cancel", "event", "message"),
    [
        (CancelStep, EpochBegin, r"raised CancelStep at EpochBegin, when no step runs"),
        (CancelEpoch, FitBegin, r"raised CancelEpoch at FitBegin, when no epoch runs"),
    ],
)
def test_cancelling_what_does_not_run_is_an_error(cancel, event, message):
    with pytest.raises(RuntimeError, match=message):
        learner(raising(cancel, event)).fit(1)


def test_a_callback_may_replace_the_batch():
    class Doubles(Callback):
        writes = ("step.batch",)

        @on(StepBegin)
        def double(self, learner):
            learner.step.batch = tuple(2 * each for each in learner.step.batch)

    one = learner(Doubles())
    state = one.run_step(TrainingPhase(), (torch.ones(2, 1), torch.ones(2, 1)))
    assert state.inputs.equal(torch.full((2, 1), 2.0))


def test_the_last_steps_state_stays_to_be_read():
    one = learner()
    state = one.run_step(TrainingPhase(), batches(1)[0])
    assert one.step is state
    with pytest.raises(AttributeError, match="no 'outputz' so far; it has batch, inputs, targets"):
        _ = one.step.outputz


def test_a_step_within_a_step_puts_the_outer_ones_state_back():
    class Outer(AbstractTrainingPhase):
        def step(self, learner, batch):
            learner.step.mine = batch
            inner = learner.run_step(ValidationPhase(), batches(1)[0])
            assert learner.step.mine == batch
            assert inner.loss > 0

    one = learner(record := Record())
    state = one.run_step(Outer(), "batch")
    assert one.step is state
    assert record.events == [StepBegin, StepBegin, LossBegin, StepEnd, StepEnd]


def test_a_step_within_a_backward_ends_its_own_and_not_the_outer_ones():
    class Outer(AbstractTrainingPhase):
        def step(self, learner, batch):
            learner.handle(BackwardBegin())
            learner.run_step(TrainingPhase(), batch)
            learner.handle(BackwardEnd())

    learner(record := Record()).run_step(Outer(), batches(1)[0])
    assert_every_begin_has_one_end(record.events)


def test_a_step_within_a_step_can_be_cancelled_alone():
    class Outer(AbstractTrainingPhase):
        def step(self, learner, batch):
            learner.step.inner = learner.run_step(ValidationPhase(), batches(1)[0])

    state = learner(raising(CancelStep, LossBegin, ValidationPhase)).run_step(Outer(), "batch")
    assert state.inner.cancelled
    assert not state.cancelled


def test_the_last_steps_tensors_are_let_go_when_the_next_step_stores_its_own():
    class Watches(AbstractTrainingPhase):
        last = None

        def step(self, learner, batch):
            if self.last is not None:
                assert self.last() is None
            learner.step.outputs = nn.Linear(1, 1)
            self.last = weakref.ref(learner.step.outputs)

    gc.disable()
    try:
        learner().epoch(Watches(), [1, 2, 3])
    finally:
        gc.enable()


@pytest.mark.parametrize("event", [StepBegin, LossBegin, StepEnd])
def test_a_cancelled_steps_tensors_are_let_go_without_garbage_collection(event):
    one = learner(raising(CancelStep, event))
    gc.disable()
    try:
        inputs, targets = batches(1)[0]
        last = weakref.ref(one.run_step(TrainingPhase(), (inputs, targets)))
        one.callbacks.set([])
        one.run_step(TrainingPhase(), (inputs, targets))
        assert last() is None
    finally:
        gc.enable()


def test_a_loop_of_ones_own_runs_within_an_epoch():
    one = learner(History(), record := Record())
    phase = TrainingPhase()
    with one.run_epoch(phase) as epoch:
        assert one.running is epoch
        assert one.phase is phase
        one.run_step(phase, batches(1)[0])
    assert record.events[0] is EpochBegin
    assert record.events[-1] is EpochEnd
    assert one.history[phase].epochs == 1


def test_cancelling_leaves_the_body_of_an_epoch_of_ones_own():
    one = learner(History())
    with one.run_epoch(TrainingPhase()):
        raise CancelEpoch
    assert one.history[TrainingPhase].epochs == 1


def test_an_epoch_cancelled_as_it_begins_runs_no_step():
    one = learner(record := Record(), raising(CancelEpoch, EpochBegin, at=[1, 2]))
    phase = TrainingPhase()
    with one.run_epoch(phase, batches()) as epoch:
        assert list(epoch) == []
        one.run_step(phase, batches(1)[0])
        pytest.fail("the first step leaves the body")
    one.epoch(phase)
    assert record.events == [EpochBegin, EpochEnd] * 2


def test_a_fit_cancelled_as_an_epoch_begins_does_not_enter_its_body():
    one = learner(record := Record(), raising(CancelFit("no"), EpochBegin))
    with pytest.raises(CancelFit), one.run_epoch(TrainingPhase()):
        pytest.fail("not entered")
    assert record.events == [EpochBegin, EpochEnd]


def test_a_validation_epoch_can_run_within_training():
    one = learner(History())
    training, validation = TrainingPhase(), ValidationPhase()
    with one.run_epoch(training):
        one.run_step(training, batches(1)[0])
        one.epoch(validation)
        assert one.phase is training
        assert torch.is_grad_enabled()
        one.run_step(training, batches(1)[0])
    assert one.history[training].steps_in_epoch == 2
    assert one.history[validation].epochs == 1


def test_training_needs_no_validation_and_batches_no_length():
    class Endless:
        def __iter__(self):
            return iter(batches(3))

    one = Learner(
        Scale(), nn.L1Loss(), optimizer=SGD, data=Endless(), callbacks=[History()],
        default_callbacks=False,
    )  # fmt: skip
    one.fit(2)
    assert list(one.history) == ["TrainingPhase"]
    assert one.history[TrainingPhase].steps == 6


def test_any_number_of_phases_make_an_epoch():
    class Second(ValidationPhase):
        pass

    one = learner(History())
    one.fit(2, phases=[TrainingPhase(), (ValidationPhase(), batches(2)), (Second(), batches(3))])
    steps = {name: counts.steps for name, counts in one.history.items()}
    assert steps == {"TrainingPhase": 32, "ValidationPhase": 4, "Second": 6}


def test_a_phase_without_batches_says_so():
    learner = Learner(nn.Linear(1, 1), nn.L1Loss(), optimizer=SGD, data=[])
    with pytest.warns(UserWarning, match="no batches for TrainingPhase, which made no step"):
        learner.fit(1)


def test_a_used_up_iterator_is_an_error():
    one = learner()
    with pytest.raises(ValueError, match="batches of TrainingPhase are an iterator that is used"):
        one.fit(2, [(TrainingPhase(), iter(batches(2)))])


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (None, []),
        ([1], ["training"]),
        (([1],), ["training"]),
        (([1], [2]), ["training", "validation"]),
        ({"training": [1], "test": [2]}, ["training", "test"]),
    ],
)
def test_data_is_a_pair_or_a_mapping_or_one_iterable(data, expected):
    assert list(Learner(Scale(), optimizer=SGD, data=data).data) == expected


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (([1], [2], [3]), ValueError, "got 3 items"),
        (5, TypeError, "Expected batches as training data"),
        (([1], None), TypeError, "Expected batches as validation data"),
        (TensorDataset(torch.ones(2, 3)), TypeError, "which has samples: give DataLoader"),
    ],
)
def test_other_data_is_an_error_that_says_what_came(data, error, message):
    with pytest.raises(error, match=message):
        Learner(Scale(), optimizer=SGD, data=data)


def test_a_phase_without_batches_is_an_error_that_says_what_there_is():
    one = Learner(Scale(), optimizer=SGD, data={"test": [1]}, default_callbacks=False)
    with pytest.raises(ValueError, match="TrainingPhase has no batches: it runs over 'training'"):
        one.fit(1)
    with pytest.raises(ValueError, match="there is 'test'"):
        one.epoch(ValidationPhase())
    with pytest.raises(ValueError, match="given no batches"), one.run_epoch(TrainingPhase()) as e:
        list(e)


def test_a_phase_class_is_not_a_phase():
    one = learner()
    for run in (one.epoch, one.run_step, lambda phase, data: one.fit(1, [(phase, data)])):
        with pytest.raises(TypeError, match=r"Expected a Phase.*add parentheses"):
            run(TrainingPhase, batches(1))  # pyright: ignore[reportArgumentType]


def test_a_missing_loss_function_is_an_error_that_says_so():
    one = Learner(Scale(), optimizer=SGD, default_callbacks=False)
    with pytest.raises(TypeError, match="the learner has none"):
        one.run_step(TrainingPhase(), batches(1)[0])


def test_what_no_callback_writes_is_an_error_that_says_so():
    with pytest.raises(AttributeError, match=r"no 'history'.*with the callback History\(\)"):
        _ = learner().history


def two_models() -> dict[str, nn.Module]:
    return {"generator": nn.Linear(2, 3), "critic": nn.Linear(3, 1)}


class CriticStep(AbstractTrainingPhase):
    losses = ("critic_loss",)

    def step(self, learner, batch):
        fake = learner.model.generator(batch).detach()
        learner.step.critic_loss = learner.model.critic(fake).mean()
        learner.step.critic_loss.backward()
        learner.optimizer.critic.step()
        learner.optimizer.critic.zero_grad()


def test_models_optimizers_and_parameters_go_by_name():
    models = two_models()
    one = Learner(models, optimizer=SGD)
    assert one.model.generator is models["generator"]
    assert one.model["critic"] is models["critic"]
    assert list(one.models) == list(one.optimizers) == ["generator", "critic"]
    for name, model in models.items():
        params = list(model.parameters())
        assert [id(p) for p in one.params[name]] == [id(p) for p in params]
        held = one.optimizer[name].param_groups[0]["params"]
        assert [id(p) for p in held] == [id(p) for p in params]


def test_an_update_of_one_model_leaves_the_other_bit_identical():
    optimizers = {"critic": SGD, "generator": partial(torch.optim.Adam, lr=0.1)}
    one = Learner(two_models(), optimizer=optimizers, default_callbacks=False)
    generator, critic = (
        [p.clone() for p in params] for params in (one.params.generator, one.params.critic)
    )
    one.run_step(CriticStep(), torch.randn(4, 2))
    assert all(a.equal(b) for a, b in zip(generator, one.params.generator, strict=True))
    assert not any(a.equal(b) for a, b in zip(critic[:1], one.params.critic, strict=False))
    assert isinstance(one.optimizer.generator, torch.optim.Adam)


def test_a_model_may_go_without_an_optimizer():
    one = Learner(two_models(), optimizer={"critic": SGD})
    with pytest.raises(AttributeError, match="no optimizer 'generator'; there are critic"):
        _ = one.optimizer.generator


def test_one_optimizer_may_hold_the_parameters_of_several_models():
    models = two_models()
    both = torch.optim.SGD([p for m in models.values() for p in m.parameters()], lr=0.1)
    one = Learner(models, optimizer=both)
    assert one.optimizer is both
    assert one.optimizers == {"optimizer": both}


def test_an_unknown_name_is_an_error_that_lists_what_there_is():
    one = Learner(two_models(), optimizer=SGD)
    with pytest.raises(AttributeError, match="no model 'critc'; there are generator, critic"):
        _ = one.model.critc
    with pytest.raises(KeyError, match="no optimizer 'critc'"):
        _ = one.optimizer["critc"]
    with pytest.raises(AttributeError, match="no model 'critc'"):
        one.model.critc = nn.Linear(1, 1)


def test_several_models_are_not_called_as_one():
    one = Learner(two_models(), nn.L1Loss(), optimizer=SGD, default_callbacks=False)
    with pytest.raises(TypeError, match="several models, generator, critic: name the one to call"):
        one.run_step(TrainingPhase(), batches(1)[0])


@pytest.mark.parametrize("name", ["keys", "_private", "not a name", "for.get"])
def test_a_name_that_cannot_be_an_attribute_is_refused(name):
    with pytest.raises(ValueError, match="Cannot name a model"):
        Learner({name: Scale()}, optimizer=SGD)


@pytest.mark.parametrize(
    ("model", "optimizer", "error", "message"),
    [
        (3, SGD, TypeError, "Expected a torch.nn.Module as 'model', and got 3"),
        ({}, SGD, ValueError, "got none"),
        (Scale(), 0.1, TypeError, "an optimizer or a factory.*and got 0.1"),
        (Scale(), {"model": SGD}, TypeError, "goes with a mapping of models"),
        (Scale(), list, TypeError, "and got \\[Parameter"),
        (nn.ReLU(), SGD, ValueError, "model has no parameters"),
        (Scale(), SGD([nn.Parameter(torch.ones(1))]), ValueError, "holds none of its parameters"),
        (two_models(), {"critc": SGD}, ValueError, r"\['critc'\], but the models are \['generat"),
        (
            two_models(),
            {"critic": SGD([nn.Parameter(torch.ones(1))])},
            ValueError,
            "The SGD given for critic holds none of its parameters",
        ),
    ],
)
def test_models_and_optimizers_that_do_not_fit_are_errors(model, optimizer, error, message):
    with pytest.raises(error, match=message):
        Learner(model, optimizer=optimizer)


def test_default_callbacks_give_way_to_those_of_their_kind():
    one = Learner(Scale(), optimizer=SGD, callbacks=[mine := Metrics()])
    names = sorted(repr(each) for each in one.callbacks)
    assert names == ["EpochTable()", "History()", "Metrics()", "ProgressBar()", "StopOnNaNLoss()"]
    assert one.callbacks.get(Metrics) is mine


def test_steps_of_two_phases_in_one_epoch_are_kept_apart():
    one = learner(History(), Metrics())
    training, validation = TrainingPhase(), ValidationPhase()
    losses = {training.name: [], validation.name: []}
    with one.run_epoch(training):
        for batch in batches(3):
            for phase in (training, validation):
                losses[phase.name].append(one.run_step(phase, batch).loss.item())
    recorded = {name: list(record.steps["loss"].values) for name, record in one.metrics.items()}
    assert recorded == losses


def test_events_of_ones_own_are_ended_too():
    class DecodeEnd(Event):
        pass

    class DecodeBegin(Event):
        end = DecodeEnd

    class Decodes(AbstractTrainingPhase):
        def step(self, learner, batch):
            learner.handle(DecodeBegin())
            if batch == "good":
                learner.handle(DecodeEnd())

    one = learner(record := Record(), raising(CancelStep, DecodeBegin, at=[1]))
    one.epoch(Decodes(), ["good", "bad", "good"])
    step = [StepBegin, DecodeBegin, DecodeEnd, StepEnd]
    assert record.events == [EpochBegin, *step * 3, EpochEnd]


@pytest.mark.parametrize(("event", "epochs"), [(EpochEnd, 2), (EpochBegin, 1)])
def test_a_model_put_in_place_without_its_optimizer_is_an_error(event, epochs):
    class Replaces(Callback):
        @on(event, TrainingPhase)
        def replace(self, learner):
            learner.model = Scale()

    with pytest.raises(ValueError, match="holds none of its parameters"):
        learner(Replaces()).fit(epochs)


def test_a_model_may_be_put_in_place_as_an_epoch_ends_and_its_optimizer_as_the_next_begins():
    class Replaces(Callback):
        @on(EpochEnd, TrainingPhase)
        def replace(self, learner):
            learner.model = Scale()

        @on(EpochBegin, TrainingPhase)
        def remake(self, learner):
            learner.optimizer = torch.optim.SGD(learner.model.parameters(), lr=0.1)

    learner(Replaces()).fit(2)


def test_an_optimizer_put_in_place_need_be_none_of_torch():
    class Counted:
        def __init__(self, optimizer):
            self.optimizer, self.steps = optimizer, 0
            self.param_groups, self.zero_grad = optimizer.param_groups, optimizer.zero_grad

        def step(self):
            self.steps += 1
            self.optimizer.step()

    it = learner()
    before = it.model.factor.item()
    it.optimizer = counted = Counted(it.optimizer)
    it.epoch(TrainingPhase())
    assert counted.steps > 0
    assert it.model.factor.item() != before
