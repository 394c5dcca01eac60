"""One GAN step in plain torch. Whatever runs the models, this file stays as it is.

Non-saturating losses (Goodfellow et al., 2014), and R1, which keeps the critic flat around real
images (Mescheder et al., 2018). R1 is a derivative of a derivative, across the wrapper too.
"""

import torch
from torch.nn.functional import softplus

from wraploop import AbstractTrainingPhase, BackwardBegin, BackwardEnd


class GANStep(AbstractTrainingPhase):
    """One update of the critic on real images, shape `(B, 1, 8, 8)`, then one of the generator."""

    losses = ("critic_loss", "generator_loss")

    def __init__(self, latent_size, r1_weight):
        self.latent_size = latent_size
        self.r1_weight = r1_weight

    def step(self, learner, batch):
        generator, critic = learner.model.generator, learner.model.critic
        state = learner.step

        # The critic: high scores for real images, low ones for generated
        real = batch.detach().requires_grad_()
        with torch.no_grad():
            fake = generator(torch.randn(len(real), self.latent_size, dtype=real.dtype))
        real_scores, fake_scores = critic(real), critic(fake)
        (slopes,) = torch.autograd.grad(real_scores.sum(), real, create_graph=True)
        r1 = slopes.square().flatten(1).sum(1).mean() / 2
        state.critic_loss = (
            softplus(-real_scores).mean() + softplus(fake_scores).mean() + self.r1_weight * r1
        )
        learner.handle(BackwardBegin())
        state.critic_loss.backward()
        learner.handle(BackwardEnd())
        learner.optimizer.critic.step()
        learner.optimizer.critic.zero_grad()

        # The generator: high scores from the critic as it is
        critic.requires_grad_(False)
        fake = generator(torch.randn(len(real), self.latent_size, dtype=real.dtype))
        state.generator_loss = softplus(-critic(fake)).mean()
        learner.handle(BackwardBegin())
        state.generator_loss.backward()
        learner.handle(BackwardEnd())
        learner.optimizer.generator.step()
        learner.optimizer.generator.zero_grad()
        critic.requires_grad_(True)
