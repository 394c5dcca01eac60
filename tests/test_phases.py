import pytest
import torch
from torch import nn

from wraploop.callback import Callback, on
from wraploop.events import BackwardBegin, BackwardEnd, CancelStep, StepBegin, StepEnd
from wraploop.learner import Learner
from wraploop.phases import (
    AbstractTrainingPhase,
    AbstractValidationPhase,
    Phase,
    TrainingPhase,
    ValidationPhase,
)


def learner(model: nn.Module, *callbacks: Callback) -> Learner:
    return Learner(
        model,
        nn.functional.mse_loss,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        callbacks=callbacks,
        default_callbacks=False,
    )


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1))


def batch(rows: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 3), torch.randn(rows, 1)


def flags(module: nn.Module) -> list[bool]:
    return [each.training for each in module.modules()]


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_a_training_step_is_that_of_a_loop_written_by_hand():
    torch.manual_seed(0)
    net, (x, y) = nn.Linear(3, 1).double(), (torch.randn(5, 3).double(), torch.randn(5, 1).double())
    expected = weights(net)
    nn.functional.mse_loss(net(x), y).backward()
    for name, param in net.named_parameters():
        assert param.grad is not None
        expected[name] -= 0.1 * param.grad
    net.zero_grad()

    learner(net).run_step(TrainingPhase(), (x, y))

    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=0, msg=name)
    assert all(param.grad is None for param in net.parameters())


def test_a_training_step_stores_inputs_targets_outputs_and_loss():
    state = learner(model()).run_step(TrainingPhase(), (pair := batch()))
    assert state.inputs is pair[0]
    assert state.targets is pair[1]
    assert state.outputs.shape == (8, 1)
    assert state.loss == nn.functional.mse_loss(state.outputs, state.targets)
    assert not state.cancelled


def test_a_validation_step_stores_the_same_and_changes_nothing():
    net = model()
    before = weights(net)
    state = learner(net).run_step(ValidationPhase(), batch())
    assert state.loss == nn.functional.mse_loss(state.outputs, state.targets)
    assert state.loss.grad_fn is None
    for name, value in net.state_dict().items():
        assert value.equal(before[name]), name


class Modes(Callback):
    def __init__(self):
        self.flags = []
        self.grad = []

    @on(StepBegin)
    def see(self, learner):
        self.flags.append(flags(learner.model))
        self.grad.append(torch.is_grad_enabled())


def test_phases_put_models_in_their_mode_and_restore_what_was():
    net = model().eval()
    net[3].train()
    before = flags(net)
    one = learner(net, modes := Modes())
    one.epoch(TrainingPhase(), [batch()])
    one.epoch(ValidationPhase(), [batch()])
    assert modes.flags == [[True] * 5, [False] * 5]
    assert modes.grad == [True, False]
    assert flags(net) == before


def test_a_part_put_in_eval_mode_on_purpose_stays_so():
    net = model()
    net[1].eval()
    before = weights(net[1])
    one = learner(net, modes := Modes())
    one.epoch(TrainingPhase(), [batch()])
    one.epoch(ValidationPhase(), [batch()])
    one.epoch(TrainingPhase(), [batch()])
    assert modes.flags[0] == modes.flags[2] == [True, True, False, True, True]
    assert net[1].running_mean.equal(before["running_mean"])  # pyright: ignore


def test_modes_are_restored_when_a_step_fails():
    net = model()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        learner(net).epoch(ValidationPhase(), [(torch.ones(2, 7), torch.ones(2, 1))])
    assert all(flags(net))
    assert torch.is_grad_enabled()


def test_a_step_of_another_phase_within_an_epoch_runs_in_its_own_mode():
    one = learner(model(), modes := Modes())
    training, validation = TrainingPhase(), ValidationPhase()
    with one.run_epoch(training):
        one.run_step(training, batch())
        one.run_step(validation, batch())
        one.run_step(training, batch())
        assert one.phase is training
    assert [all(each) for each in modes.flags] == [True, False, True]


@pytest.mark.parametrize(
    ("wrong", "described"),
    [
        (torch.ones(2, 3), r"a tensor of shape \(2, 3\)"),
        ({"x": 1, "y": 2}, r"a dict with the keys \['x', 'y'\]"),
        ((1, 2, 3), "a tuple of length 3"),
        (5, "a int"),
    ],
)
@pytest.mark.parametrize("phase", [TrainingPhase(), ValidationPhase()])
def test_a_batch_that_is_no_pair_is_an_error_that_describes_it(phase, wrong, described):
    message = rf"{phase.name} takes batches of \(inputs, targets\), and got {described}"
    with pytest.raises(TypeError, match=message):
        learner(model()).run_step(phase, wrong)


def test_a_phase_without_a_step_is_an_error_that_says_so():
    class Nothing(AbstractTrainingPhase):
        pass

    with pytest.raises(TypeError, match=r"abstract class Nothing with.* abstract method '?step"):
        Nothing()  # pyright: ignore[reportAbstractUsage]
    with pytest.raises(TypeError, match="abstract class Phase with"):
        Phase()  # pyright: ignore[reportAbstractUsage]


def test_a_phase_without_init_takes_no_arguments():
    with pytest.raises(TypeError, match="takes no arguments"):
        TrainingPhase(5)  # pyright: ignore[reportCallIssue]


def test_a_phase_is_named_after_its_class_unless_it_says_otherwise():
    class Named(TrainingPhase):
        name = "warm-up"

    class Unnamed(Named):
        pass

    assert (TrainingPhase().name, Named().name, Unnamed.name) == (
        "TrainingPhase",
        "warm-up",
        "Unnamed",
    )


def test_one_loss_is_not_a_tuple_of_losses():
    with pytest.raises(TypeError, match=r"losses is a tuple of names; write \('loss',\)"):
        type("OneLoss", (TrainingPhase,), {"losses": "loss"})


def test_standard_phases_run_over_the_data_of_their_name():
    assert AbstractTrainingPhase.data == "training"
    assert AbstractValidationPhase.data == "validation"


@pytest.mark.parametrize("event", [StepBegin, BackwardBegin, BackwardEnd])
def test_a_step_cancelled_before_its_update_leaves_weights_and_no_gradients(event):
    net = nn.Linear(3, 1)
    before = weights(net)
    learner(net, cancelling(CancelStep, event)).run_step(TrainingPhase(), batch())
    for name, param in net.named_parameters():
        assert param.equal(before[name]), name
        assert param.grad is None, name


def test_a_step_cancelled_at_its_end_has_done_its_update():
    net = nn.Linear(3, 1)
    before = weights(net)
    state = learner(net, cancelling(CancelStep, StepEnd)).run_step(TrainingPhase(), batch())
    assert not net.weight.equal(before["weight"])
    assert not state.cancelled


def cancelling(cancel, event):
    class Cancelling(Callback):
        @on(event)
        def cancel(self, learner):
            raise cancel

    return Cancelling()
