"""Parameters that are not trained for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import nn

Part: TypeAlias = nn.Module | Iterable[nn.Parameter]


def freeze(*parts: Part) -> None:
    """Has no parameter of the modules take gradients, until `unfreeze`.

    Their modes stay as they are: batch norms in train mode go on following the data.

    Args:
        parts: modules, or lists of parameters.

    Raises:
        TypeError: a part is neither.
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
    """All parameters of modules and lists.

    Raises:
        TypeError: a part is neither.
    """
    return [parameter for part in parts for parameter in _parameters(part)]


def _parameters(part: Part) -> list[nn.Parameter]:
    if isinstance(part, nn.Module):
        return list(part.parameters())
    is_several = isinstance(part, Iterable) and not isinstance(part, (str, torch.Tensor, Mapping))
    parameters = list(part) if is_several else []
    if not is_several or not all(isinstance(each, torch.Tensor) for each in parameters):
        raise TypeError(
            "Expected modules or lists of parameters, as learner.model.critic, "
            f"and got {part!r:.80}."
        )
    return parameters
