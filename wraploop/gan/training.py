"""The step of a generative adversarial network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from wraploop.events import BackwardBegin, BackwardEnd, LossBegin
from wraploop.freezing import frozen
from wraploop.gan.losses import AdversarialLoss, NonSaturating
from wraploop.gan.penalties import (
    CriticHalf,
    CriticPenalty,
    GeneratorHalf,
    GeneratorPenalty,
    Penalty,
)
from wraploop.given import first_make, whole
from wraploop.phases import AbstractTrainingPhase, Batch

if TYPE_CHECKING:
    from wraploop.learner import Learner


class Generated(NamedTuple):
    """Samples, and the latents they were made from."""

    latents: Tensor
    fake: Tensor


class GANTraining(AbstractTrainingPhase):
    """One update of `learner.model.critic`, then one of `learner.model.generator`.

    Gradients cross each network once: the critic's loss on real and generated samples, penalties
    included, is one backward; the critic is frozen while the generator is trained. What was
    frozen before stays so. `learner.step.trains` names the network whose half it is.

    Args:
        latent_size: the generator's input is standard normal, shape `(B, latent_size)`, of the
            real samples' device and dtype.
        loss: of both networks.
        critic_steps: the generator is updated after every so many-th update of the critic, each
            on a batch of its own; other steps have no `generator_loss`.
        penalties: terms added to the losses.
        reuse_fakes: whether the generator's half takes the samples that the critic has just been
            trained on, as PyTorch's DCGAN tutorial does, and not new ones; one forward of the
            generator less.

    Raises:
        ValueError, TypeError: on making it, arguments that cannot be; in a step, models not
            called generator and critic, or a batch that is neither a tensor of floats nor a tuple
            or list that begins with one, of which only that is used.

    Source: Radford et al., DCGAN, 2016; real and generated samples go through the critic apart.

    Examples:
        >>> from functools import partial
        >>> from torch import nn
        >>> from wraploop.gan import R1, Hinge
        >>> from wraploop.learner import Learner
        >>> learner = Learner(
        ...     {"generator": nn.Linear(2, 3), "critic": nn.Linear(3, 1)},
        ...     optimizer=partial(torch.optim.Adam, lr=2e-3, betas=(0.0, 0.99)),
        ...     data=[torch.randn(8, 3)], default_callbacks=False,
        ... )
        >>> learner.epoch(GANTraining(latent_size=2, loss=Hinge(), penalties=[R1(weight=0.3)]))
        >>> learner.step.fake.shape
        torch.Size([8, 3])
    """

    losses = ("critic_loss", "generator_loss")
    fires = (LossBegin, BackwardBegin, BackwardEnd)

    def __init__(
        self,
        latent_size: int,
        *,
        loss: AdversarialLoss = NonSaturating(),
        critic_steps: int = 1,
        penalties: Iterable[Penalty] = (),
        reuse_fakes: bool = False,
    ) -> None:
        self.latent_size = whole("latent_size", latent_size)
        self.critic_steps = whole("critic_steps", critic_steps)
        self.loss, self.reuse_fakes = loss, reuse_fakes
        if isinstance(penalties, Penalty):
            raise TypeError(f"Expected a list of penalties, and got {penalties!r}: write [...].")
        self.penalties = list(penalties)
        self.critic_updates = self.generator_updates = 0
        _check(self)

    def step(self, learner: Learner, batch: Batch) -> None:
        """The critic's half, and at every `critic_steps`-th step the generator's."""
        models = learner.models
        if not {"generator", "critic"} <= models.keys():
            raise TypeError(
                "GANTraining trains models called generator and critic, and the learner's are "
                f"{', '.join(models)}: Learner({{'generator': ..., 'critic': ...}}, ...)."
            )
        learner.step.real = real = _samples(batch)
        learner.step.rows = len(real)
        trains_both = (self.critic_updates + 1) % self.critic_steps == 0
        learner.step.trains = "critic"
        generated = self.generated(learner, real) if trains_both and self.reuse_fakes else None
        self.train_critic(learner, real, generated)
        if trains_both:
            self.train_generator(learner, real, generated)

    def train_critic(
        self, learner: Learner, real: Tensor, generated: Generated | None = None
    ) -> None:
        """Updates the critic on real samples and as many generated ones, new if none are given."""
        state, critic = learner.step, learner.model.critic
        due = self._due(CriticPenalty, self.critic_updates)
        real = real.detach().requires_grad_(bool(due))
        state.trains = "critic"
        with torch.no_grad():
            state.fake = (generated or self.generated(learner, real)).fake.detach()
        real_scores, fake_scores = critic(real), critic(state.fake)
        learner.handle(LossBegin())
        half = CriticHalf(critic, real, state.fake, real_scores, fake_scores)
        terms = [self.loss.critic(real_scores, fake_scores), *(penalty(half) for penalty in due)]
        state.critic_loss = torch.stack(terms).sum()
        self._update(learner, state.critic_loss, learner.optimizer.critic)
        self.critic_updates += 1

    def train_generator(
        self, learner: Learner, real: Tensor, generated: Generated | None = None
    ) -> None:
        """Updates the generator against the critic as it is, on new samples if none are given."""
        state, generator, critic = learner.step, learner.model.generator, learner.model.critic
        due = self._due(GeneratorPenalty, self.generator_updates)
        state.trains = "generator"
        with frozen(critic):
            latents, state.fake = generated or self.generated(learner, real)
            real_scores = critic(real) if self.loss.generator_sees_real else None
            fake_scores = critic(state.fake)
            learner.handle(LossBegin())
            half = GeneratorHalf(generator, latents, state.fake)
            terms = [self.loss.generator(real_scores, fake_scores), *(each(half) for each in due)]
            state.generator_loss = torch.stack(terms).sum()
            self._update(learner, state.generator_loss, learner.optimizer.generator)
        self.generator_updates += 1

    def generated(self, learner: Learner, real: Tensor) -> Generated:
        """As many generated samples as there are real ones, for a generator's half."""
        due = self._due(GeneratorPenalty, self.generator_updates)
        latents = self.latents(real).requires_grad_(bool(due) and torch.is_grad_enabled())
        return Generated(latents, learner.model.generator(latents))

    def latents(self, real: Tensor) -> Tensor:
        """As many standard normal latents as there are real samples."""
        return torch.randn(len(real), self.latent_size, dtype=real.dtype, device=real.device)

    def abandon(self, learner: Learner) -> None:
        """Drops the gradients, which the next step would add to."""
        for optimizer in learner.optimizers.values():
            optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """How many updates there were, from which it follows what the next step does."""
        penalties = [penalty.state_dict() for penalty in self.penalties]
        updates = {"critic": self.critic_updates, "generator": self.generator_updates}
        return {"updates": updates, "penalties": penalties}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` has returned."""
        updates = state["updates"]
        self.critic_updates, self.generator_updates = updates["critic"], updates["generator"]
        for penalty, saved in zip(self.penalties, state["penalties"], strict=True):
            penalty.load_state_dict(saved)

    def _update(self, learner: Learner, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        learner.handle(BackwardBegin())
        loss.backward()
        learner.handle(BackwardEnd())
        optimizer.step()
        optimizer.zero_grad()

    def _due(self, kind: type[Penalty], updates: int) -> list[Penalty]:
        return [p for p in self.penalties if isinstance(p, kind) and updates % p.every_steps == 0]


def _samples(batch: Batch) -> Tensor:
    samples = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if isinstance(samples, Tensor) and samples.is_floating_point() and samples.ndim:
        return samples
    came = f"a {type(samples).__name__}"
    if isinstance(samples, Tensor):
        came = f"a tensor of {samples.dtype}" if samples.ndim else "a 0-dimensional tensor"
    raise TypeError(
        "GANTraining takes batches that are, or begin with, a tensor of floating-point samples, "
        f"shape (B, ...), and got {came}. Convert it in the data, or write a phase of your own."
    )


def _check(phase: GANTraining) -> None:
    if not isinstance(phase.loss, AdversarialLoss):
        raise TypeError(
            f"Expected a loss such as Hinge(), and got {phase.loss!r}.{first_make(phase.loss)}"
        )
    for penalty in phase.penalties:
        if not isinstance(penalty, (CriticPenalty, GeneratorPenalty)):
            raise TypeError(
                f"Expected a penalty such as R1(), and got {penalty!r}.{first_make(penalty)}"
            )
