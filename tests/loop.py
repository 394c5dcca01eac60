"""Small learners for the tests of the loop and its callbacks, in float64."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wraploop.callback import Callback, on
from wraploop.events import CancelStep, StepBegin
from wraploop.gan import GANTraining
from wraploop.learner import Learner
from wraploop.phases import AbstractTrainingPhase

SGD = partial(torch.optim.SGD, lr=0.1)
ADAM = partial(torch.optim.Adam, lr=0.01)


def net(inputs: int = 3, outputs: int = 1) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(inputs, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


def batches(count: int = 4, rows: int = 6, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, dtype=torch.float64, generator=generator)
    return [(draw(rows, 3), draw(rows, 1)) for _ in range(count)]


def learner(
    *callbacks: Any,
    data: Any = None,
    optimizer: Any = SGD,
    model: Any = None,
    defaults: bool = False,
    strict: bool = True,
) -> Any:
    data = batches() if data is None else data
    return Learner(
        model or net(),
        nn.functional.mse_loss,
        optimizer=optimizer,
        data=data if isinstance(data, (tuple, dict)) else (data, data[:2]),
        callbacks=callbacks,
        default_callbacks=defaults,
        strict=strict,
    )


def gan_learner(
    *callbacks: Any,
    data: Any = None,
    optimizer: Any = ADAM,
    defaults: bool = False,
    strict: bool = True,
) -> Any:
    real = [inputs for inputs, _ in batches()] if data is None else data
    return Learner(
        {"generator": net(2, 3), "critic": net(3, 1)},
        optimizer=optimizer,
        data=real,
        callbacks=callbacks,
        default_callbacks=defaults,
        strict=strict,
    )


GAN = GANTraining(latent_size=2)


class PlainStep(AbstractTrainingPhase):
    """Fires no event of its own."""

    def step(self, learner, batch):
        inputs, targets = batch
        learner.step.loss = learner.loss_fn(learner.model(inputs), targets)
        learner.step.loss.backward()
        learner.optimizer.step()
        learner.optimizer.zero_grad()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor], *, rtol=1e-10, atol=1e-14):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=rtol, atol=atol, msg=name)


def assert_same(mine: Any, theirs: Any) -> None:
    """Nests of tensors and other things are equal to the bit."""
    if isinstance(mine, Tensor):
        assert torch.equal(mine, theirs)
    elif isinstance(mine, dict):
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert_same(mine[key], theirs[key])
    elif isinstance(mine, (tuple, list)):
        for each, other in zip(mine, theirs, strict=True):
            assert_same(each, other)
    else:
        assert mine == theirs


class SkipSecond(Callback):
    """Cancels the second step."""

    count = 0

    @on(StepBegin)
    def skip(self, learner):
        self.count += 1
        if self.count == 2:
            raise CancelStep
