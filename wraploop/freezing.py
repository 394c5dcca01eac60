"""Parameters that are not trained for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from torch import nn

Part: TypeAlias = nn.Module | Iterable[nn.Parameter]


def freeze(*parts: Part) -> None:
    """Has no parameter of the modules take gradients, until `unfreeze`.

    Their modes stay as they are: batch norms in train mode go on following the data.

    Args:
        parts: modules, or lists of parameters.
    """
    for parameter in parameters_of(parts):
        parameter.requires_grad_(False)


def unfreeze(*parts: Part) -> None:
    """Has all parameters of the modules take gradients; `parts` as for `freeze`."""
    for parameter in parameters_of(parts):
        parameter.requires_grad_(True)


@contextmanager
def frozen(*parts: Part) -> Iterator[None]:
    """While open, no parameter of the modules takes gradients; then those that did do again.

    Args:
        parts: modules, or lists of parameters.

    Examples:
        >>> critic = nn.Linear(3, 1)
        >>> critic.bias.requires_grad_(False).requires_grad
        False
        >>> with frozen(critic):
        ...     critic.weight.requires_grad
        False
        >>> critic.weight.requires_grad, critic.bias.requires_grad
        (True, False)
    """
    trained = [parameter for parameter in parameters_of(parts) if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def parameters_of(parts: Iterable[Part]) -> list[nn.Parameter]:
    """All parameters of modules and lists."""
    lists = [part.parameters() if isinstance(part, nn.Module) else part for part in parts]
    return [parameter for each in lists for parameter in each]
