"""What a critic and a generator minimise."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override


class AdversarialLoss(ABC):
    """What a critic and a generator minimise, given the critic's scores, shape `(B, ...)`."""

    generator_sees_real = False  # whether `generator` needs real scores too

    @abstractmethod
    def critic(self, real: Tensor, fake: Tensor) -> Tensor:
        """The critic's loss, 0-dim, from its scores of real and of generated samples."""

    @abstractmethod
    def generator(self, real: Tensor | None, fake: Tensor) -> Tensor:
        """The generator's loss, 0-dim; `real` is `None` unless `generator_sees_real`."""


class NonSaturating(AdversarialLoss):
    """Cross-entropy for the critic; the generator maximises the probability of being real.

    Source: Goodfellow et al., Generative Adversarial Networks, 2014, section 3.
    """

    @override
    def critic(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.softplus(-real).mean() + F.softplus(fake).mean()

    @override
    def generator(self, real: Tensor | None, fake: Tensor) -> Tensor:
        return F.softplus(-fake).mean()


class LeastSquares(AdversarialLoss):
    """Squared distance from 1 for real samples, from 0 for generated ones.

    Source: Mao et al., Least Squares Generative Adversarial Networks, 2017, equation 9.
    """

    @override
    def critic(self, real: Tensor, fake: Tensor) -> Tensor:
        return ((real - 1).square().mean() + fake.square().mean()) / 2

    @override
    def generator(self, real: Tensor | None, fake: Tensor) -> Tensor:
        return (fake - 1).square().mean() / 2


class Hinge(AdversarialLoss):
    """The critic keeps a margin of 1 on both sides of 0.

    Source: Lim and Ye, Geometric GAN, 2017; Miyato et al., Spectral Normalization, 2018, eq. 16-17.
    """

    @override
    def critic(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()

    @override
    def generator(self, real: Tensor | None, fake: Tensor) -> Tensor:
        return -fake.mean()


class Wasserstein(AdversarialLoss):
    """The difference of mean scores; the critic must be kept Lipschitz, as by `GradientPenalty`.

    Source: Arjovsky et al., Wasserstein GAN, 2017, Algorithm 1, without its weight clipping.
    """

    @override
    def critic(self, real: Tensor, fake: Tensor) -> Tensor:
        return fake.mean() - real.mean()

    @override
    def generator(self, real: Tensor | None, fake: Tensor) -> Tensor:
        return -fake.mean()


class Relativistic(AdversarialLoss):
    """Whether a real sample is more realistic than the generated one beside it.

    Source: Jolicoeur-Martineau, The relativistic discriminator, 2018, section 4.1 (RSGAN).
    """

    generator_sees_real = True

    @override
    def critic(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.softplus(fake - real).mean()

    @override
    def generator(self, real: Tensor | None, fake: Tensor) -> Tensor:
        return F.softplus(_needed(real) - fake).mean()


class RelativisticAverage(AdversarialLoss):
    """Whether a sample is more realistic than those of the other kind are on average.

    Source: Jolicoeur-Martineau, The relativistic discriminator, 2018, section 4.2 (RaSGAN).
    """

    generator_sees_real = True

    @override
    def critic(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.softplus(fake.mean() - real).mean() + F.softplus(fake - real.mean()).mean()

    @override
    def generator(self, real: Tensor | None, fake: Tensor) -> Tensor:
        return self.critic(fake, _needed(real))


def _needed(real: Tensor | None) -> Tensor:
    assert real is not None, "generator_sees_real is True"
    return real
