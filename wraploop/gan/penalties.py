"""Penalties on the slopes of a critic or a generator, added to its loss."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from wraploop.given import check_numbers, whole


class CriticHalf(NamedTuple):
    """What a critic's penalty may look at; `real` has a gradient, `fake` comes without a graph."""

    critic: nn.Module
    real: Tensor
    fake: Tensor
    real_scores: Tensor
    fake_scores: Tensor


class GeneratorHalf(NamedTuple):
    """What a generator's penalty may look at; `latents` has a gradient."""

    generator: nn.Module
    latents: Tensor
    fake: Tensor


@dataclass
class Penalty(ABC):
    """A term that is added to a loss, now and then.

    Args:
        weight: its factor.
        every_steps: added at every so many-th update, and then that many times as strong.
    """

    weight: float
    every_steps: int = 1

    def __post_init__(self) -> None:
        check_numbers(weight=self.weight)
        self.every_steps = whole("every_steps", self.every_steps)

    def __call__(self, half: Any) -> Tensor:
        """The weighted term, 0-dim."""
        return self.weight * self.every_steps * self.term(half)

    def state_dict(self) -> dict[str, Any]:
        """What has to be saved for training to go on from here; nothing unless overridden."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Takes over what `state_dict` has returned."""

    @abstractmethod
    def term(self, half: Any) -> Tensor:
        """The term with weight 1, 0-dim, differentiable in the parameters."""


class CriticPenalty(Penalty):
    """A penalty on the critic; `term` takes a `CriticHalf`."""


class GeneratorPenalty(Penalty):
    """A penalty on the generator; `term` takes a `GeneratorHalf`."""


@dataclass
class GradientPenalty(CriticPenalty):
    """Draws the critic's slope to 1, between real and generated samples.

    Source: Gulrajani et al., Improved Training of Wasserstein GANs, 2017, Algorithm 1.
    """

    weight: float = 10.0

    @override
    def term(self, half: CriticHalf) -> Tensor:
        real = half.real.detach().to(half.fake.device)
        shares = torch.rand(len(real), *[1] * (real.ndim - 1), dtype=real.dtype, device=real.device)
        between = torch.lerp(half.fake, real, shares).requires_grad_()
        slopes = torch.linalg.vector_norm(_gradients(half.critic(between), between), dim=1)
        return (slopes - 1).square().mean()


@dataclass
class R1(CriticPenalty):
    """Draws the critic's slope to 0 at the real samples: the mean of its square, halved.

    With `every_steps` above 1 it is lazy regularisation (Karras et al., StyleGAN2, 2020, B).
    It needs no forward of its own.

    Source: Mescheder et al., Which Training Methods for GANs do actually Converge?, 2018, eq. 9.
    """

    weight: float = 10.0

    @override
    def term(self, half: CriticHalf) -> Tensor:
        return _gradients(half.real_scores, half.real).square().sum(1).mean() / 2


@dataclass
class PathLength(GeneratorPenalty):
    """Draws the lengths of steps in samples, for steps in latents, to their running mean.

    Source: Karras et al., Analyzing and Improving the Image Quality of StyleGAN, 2020, eq. 4;
    here the latents are the generator's inputs.

    Attributes:
        mean_length: the running mean, 0 before the first time.
    """

    weight: float = 2.0
    decay: float = 0.99
    mean_length: float = 0.0

    @override
    def term(self, half: GeneratorHalf) -> Tensor:
        pixels = math.prod(half.fake.shape[2:])
        direction = torch.randn_like(half.fake) / pixels**0.5
        lengths = torch.linalg.vector_norm(_gradients(half.fake * direction, half.latents), dim=1)
        mean = lengths.mean().item()
        self.mean_length = self.decay * self.mean_length + (1 - self.decay) * mean
        return (lengths - self.mean_length).square().mean()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"mean_length": self.mean_length}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.mean_length = state["mean_length"]


def _gradients(outputs: Tensor, inputs: Tensor) -> Tensor:
    """The gradient in each row of the inputs, flat, if rows do not see each other."""
    (gradients,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
    return gradients.flatten(1)
