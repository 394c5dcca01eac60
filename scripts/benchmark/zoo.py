"""The models of the benchmark, each with a batch, a loss and an optimizer.

Batches are random and the same at every step: what is measured is the step, not the data.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

LATENTS = 64
CLASSES = 10

Optimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
sgd: Optimizer = partial(torch.optim.SGD, lr=1e-3)
momentum: Optimizer = partial(torch.optim.SGD, lr=1e-3, momentum=0.9)
adam: Optimizer = partial(torch.optim.Adam, lr=1e-4)
gan_adam: Optimizer = partial(torch.optim.Adam, lr=2e-4, betas=(0.5, 0.999))


@dataclass(frozen=True)
class Case:
    """A model and what it is trained with; it crosses to other processes by pickling.

    Args:
        name: what it is called on the command line.
        about: what it is, in a line.
        make: makes the networks by name; a GAN's are `generator` and `critic`.
        batch: makes a batch of so many rows, as a tuple of tensors.
        rows: of the whole batch, of all processes together.
        optimizer: makes one for the parameters of a network.
        norms: whether there is batch norm in it.
    """

    name: str
    about: str
    make: Callable[[], dict[str, nn.Module]]
    batch: Callable[[int], tuple[Tensor, ...]]
    rows: int
    optimizer: Optimizer = field(default=sgd)
    norms: bool = False

    @property
    def is_gan(self) -> bool:
        """Whether two networks are trained against each other."""
        return "critic" in self.make()


# Networks


def mlp(*widths: int) -> dict[str, nn.Module]:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for inward, outward in itertools.pairwise(widths):
        layers += [nn.Linear(inward, outward), nn.ReLU()]
    return {"model": nn.Sequential(*layers[:-1])}


def deep(layers: int, width: int) -> dict[str, nn.Module]:
    """Many small linear layers, one after the other."""
    hidden = [m for _ in range(layers - 1) for m in (nn.Linear(width, width), nn.Tanh())]
    return {"model": nn.Sequential(*hidden, nn.Linear(width, CLASSES))}


class Residual(nn.Module):
    """Two convolutions with batch norm, added to what went in."""

    def __init__(self, inward: int, outward: int, stride: int) -> None:
        super().__init__()
        self.straight = nn.Sequential(
            *(nn.Conv2d(inward, outward, 3, stride, 1, bias=False), nn.BatchNorm2d(outward)),
            *(nn.ReLU(), nn.Conv2d(outward, outward, 3, 1, 1, bias=False)),
            nn.BatchNorm2d(outward),
        )
        self.shortcut = nn.Sequential(
            nn.Conv2d(inward, outward, 1, stride, bias=False), nn.BatchNorm2d(outward)
        )

    def forward(self, images: Tensor) -> Tensor:
        return torch.relu(self.straight(images) + self.shortcut(images))


def residual_cnn() -> dict[str, nn.Module]:
    """A small ResNet for images, shape `(B, 3, 32, 32)`."""
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES)),
    )
    return {"model": model}


class LSTM(nn.Module):
    """Two layers over sequences of vectors, shape `(B, T, 64)`; classes from the last state."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(64, 128, num_layers=2, batch_first=True)
        self.head = nn.Linear(128, CLASSES)

    def forward(self, sequences: Tensor) -> Tensor:
        return self.head(self.lstm(sequences)[0][:, -1])


class Transformer(nn.Module):
    """An encoder over tokens, shape `(B, T)`, without dropout; classes from the mean."""

    def __init__(self, layers: int = 3, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens)).mean(1))


def lstm() -> dict[str, nn.Module]:
    """The `LSTM`."""
    return {"model": LSTM()}


def transformer() -> dict[str, nn.Module]:
    """The `Transformer`."""
    return {"model": Transformer()}


def dcgan(width: int = 16) -> dict[str, nn.Module]:
    """DCGAN for images, shape `(B, 3, 32, 32)`; scores are logits, shape `(B, 1)`.

    Source: Radford et al., DCGAN, 2016, as PyTorch's tutorial has it, with one layer less.
    """

    def up(inward: int, outward: int, stride: int, padding: int) -> list[nn.Module]:
        convolution = nn.ConvTranspose2d(inward, outward, 4, stride, padding, bias=False)
        return [convolution, nn.BatchNorm2d(outward), nn.ReLU(True)]

    def down(inward: int, outward: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inward, outward, 4, 2, 1, bias=False)
        return [convolution, nn.BatchNorm2d(outward), nn.LeakyReLU(0.2, inplace=True)]

    generator = nn.Sequential(
        *(nn.Unflatten(1, (LATENTS, 1, 1)), *up(LATENTS, 4 * width, 1, 0)),
        *(*up(4 * width, 2 * width, 2, 1), *up(2 * width, width, 2, 1)),
        *(nn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False), nn.Tanh()),
    )
    critic = nn.Sequential(
        *(nn.Conv2d(3, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)),
        *(*down(width, 2 * width), *down(2 * width, 4 * width)),
        *(nn.Conv2d(4 * width, 1, 4, 1, 0, bias=False), nn.Flatten()),
    )
    return {"generator": generator, "critic": critic}


# Batches


def labelled(rows: int, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Numbers, shape `(rows, *shape)`, and classes."""
    return torch.randn(rows, *shape), torch.randint(CLASSES, (rows,))


def sentences(rows: int, length: int) -> tuple[Tensor, ...]:
    """Tokens, shape `(rows, length)`, and classes."""
    return torch.randint(1000, (rows, length)), torch.randint(CLASSES, (rows,))


def images(rows: int) -> tuple[Tensor, ...]:
    """Images alone, shape `(rows, 3, 32, 32)`."""
    return (torch.randn(rows, 3, 32, 32),)


# The zoo

_CASES = (
    Case(
        *("small-mlp", "2 linear layers, 2.8 thousand parameters"),
        *(partial(mlp, 32, 64, CLASSES), partial(labelled, shape=(32,)), 64, sgd),
    ),
    Case(
        *("large-mlp", "4 linear layers, 10 million parameters"),
        partial(mlp, 784, 2560, 2560, 640, CLASSES),
        *(partial(labelled, shape=(784,)), 128, momentum),
    ),
    Case(
        *("cnn", "residual, with batch norm, on 32 x 32 images"),
        *(residual_cnn, partial(labelled, shape=(3, 32, 32)), 32, momentum, True),
    ),
    Case("dcgan", "generator and critic, 32 x 32 images", dcgan, images, 32, gan_adam, True),
    Case("lstm", "2 layers, 32 steps", lstm, partial(labelled, shape=(32, 64)), 64, adam),
    Case(
        "transformer", "encoder of 3 layers", transformer, partial(sentences, length=64), 16, adam
    ),
    Case(
        *("deep", "200 linear layers, 32 wide"),
        *(partial(deep, 200, 32), partial(labelled, shape=(32,)), 64, sgd),
    ),
)
ZOO: dict[str, Case] = {case.name: case for case in _CASES}
