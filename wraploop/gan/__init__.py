"""Adversarial training of a generator and a critic.

training     GANTraining, the phase
losses       NonSaturating, LeastSquares, Hinge, Wasserstein, Relativistic, RelativisticAverage
penalties    GradientPenalty (WGAN-GP), R1, PathLength
"""

from wraploop.freezing import frozen
from wraploop.gan.losses import (
    AdversarialLoss,
    Hinge,
    LeastSquares,
    NonSaturating,
    Relativistic,
    RelativisticAverage,
    Wasserstein,
)
from wraploop.gan.penalties import (
    R1,
    CriticHalf,
    CriticPenalty,
    GeneratorHalf,
    GeneratorPenalty,
    GradientPenalty,
    PathLength,
    Penalty,
)
from wraploop.gan.training import GANTraining

__all__ = [
    "R1",
    "AdversarialLoss",
    "CriticHalf",
    "CriticPenalty",
    "GANTraining",
    "GeneratorHalf",
    "GeneratorPenalty",
    "GradientPenalty",
    "Hinge",
    "LeastSquares",
    "NonSaturating",
    "PathLength",
    "Penalty",
    "Relativistic",
    "RelativisticAverage",
    "Wasserstein",
    "frozen",
]
