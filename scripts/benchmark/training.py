"""One model under one way, ready to make steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wraploop import Learner
from wraploop.gan import GANTraining
from wraploop.wrappers.tuning import Split

from .ways import Way
from .zoo import LATENTS, Case

SEED = 0


class Training(ABC):
    """The networks of a case, wrapped, with their optimizers and this process's batch."""

    def __init__(self, case: Case, way: Way, rank: int) -> None:
        torch.manual_seed(SEED)  # same weights and batch for every way and in every process
        networks = case.make()
        whole = case.batch(case.rows)
        if way.mute:  # all say the same
            whole = [torch.cat([t.tensor_split(way.processes)[0]] * way.processes) for t in whole]
        own = [t.tensor_split(way.processes)[rank] for t in whole]
        self.batch: list[Tensor] = own if way.rows == "own" else list(whole)
        self.models = {name: way.wrap(network) for name, network in networks.items()}
        parameters = {name: list(model.parameters()) for name, model in self.models.items()}
        self.optimizers = {name: case.optimizer(each) for name, each in parameters.items()}

    @abstractmethod
    def run(self, steps: int) -> None:
        """Makes so many steps."""

    @property
    def chosen(self) -> list[Split]:
        """What `threads="auto"` has chosen for some kind of call; nothing while it tries one."""
        chosen = {tuner.chosen for tuner in self._tuners}
        return [] if None in chosen else sorted(chosen)

    @property
    def is_deciding(self) -> bool:
        """Whether `threads="auto"` still tries."""
        return any(tuner.chosen is None for tuner in self._tuners)

    @property
    def _tuners(self) -> list[Any]:
        return [tuner for model in self.models.values() for tuner in _tuners(model)]


def _tuners(model: nn.Module) -> list[Any]:
    execution = vars(model).get("_wraploop_execution")
    return list(getattr(execution, "_tuners", {}).values())


class Supervised(Training):
    """A classifier."""

    def run(self, steps: int) -> None:
        inputs, targets = self.batch
        model, optimizer = self.models["model"], self.optimizers["model"]
        for _ in range(steps):
            loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


class Tutorial(Training):
    """A GAN as PyTorch's DCGAN tutorial trains it: two critic backwards, and one generator's."""

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self._step(*self.batch)

    def _step(self, real: Tensor) -> None:
        generator, critic = self.models["generator"], self.models["critic"]
        ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)
        critic.zero_grad()
        F.binary_cross_entropy_with_logits(critic(real), ones).backward()
        fake = generator(torch.randn(len(real), LATENTS))
        F.binary_cross_entropy_with_logits(critic(fake.detach()), zeros).backward()
        self.optimizers["critic"].step()
        generator.zero_grad()
        F.binary_cross_entropy_with_logits(critic(fake), ones).backward()
        self.optimizers["generator"].step()


class Phase(Training):
    """A GAN by a learner that runs `GANTraining`."""

    def __init__(self, case: Case, way: Way, rank: int) -> None:
        super().__init__(case, way, rank)
        self.phase = GANTraining(LATENTS, reuse_fakes=True)  # as the tutorial
        self.learner = Learner(self.models, optimizer=self.optimizers, default_callbacks=False)

    def run(self, steps: int) -> None:
        self.learner.epoch(self.phase, self.batch * steps)


def training(case: Case, way: Way, rank: int) -> Training:
    """The training of a case, in the process that has this rank."""
    if way.loop == "GANTraining":
        return Phase(case, way, rank)
    return (Tutorial if case.is_gan else Supervised)(case, way, rank)
