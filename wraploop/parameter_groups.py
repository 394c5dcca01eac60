"""Parameters of one optimizer in groups with rates of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from wraploop.freezing import Part, parameters_of


def by_layer(model: nn.Module) -> list[list[nn.Parameter]]:
    """All but the last layer that has parameters, and the last: backbone and head.

    Layers are what `model` consists of; the last is that of the last parameter.

    Raises:
        ValueError: there is but one.

    Examples:
        >>> backbone, head = by_layer(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1)))
        >>> [tuple(p.shape) for p in head]
        [(1, 2), (1,)]
    """
    layers: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        layer = name.split(".")[0] if "." in name else ""
        layers.setdefault(layer, []).append(parameter)
    if len(layers) < 2:
        raise ValueError(
            "Cannot tell a backbone from a head: all parameters are in one layer. Name the groups, "
            "from backbone to head: groups=[model.features, model.classifier]."
        )
    *backbone, head = layers.values()
    return [[parameter for layer in backbone for parameter in layer], head]


@contextmanager
def grouped(
    optimizer: Optimizer, groups: Sequence[Part], scales: Sequence[float]
) -> Iterator[None]:
    """While open, the learning rates of groups of parameters are scaled; see `Scheduler`.

    Each group has its factor as `"lr_scale"`, its `lr` is multiplied by it, and what is in no
    group is as it was. Afterwards the optimizer's own groups are back, with its state as it is.

    Args:
        optimizer: the optimizer.
        groups: modules, or lists of parameters.
        scales: a factor for each.

    Raises:
        ValueError: a group shares parameters with another, or the optimizer has none of its.
    """
    place = _places(optimizer, [parameters_of([group]) for group in groups])
    own = cut = optimizer.param_groups

    def use_own(*_: Any) -> None:
        optimizer.param_groups = own

    def use_cut(*_: Any) -> None:
        optimizer.param_groups = cut

    def cut_anew(*_: Any) -> None:
        nonlocal own, cut
        own = optimizer.param_groups
        optimizer.param_groups = cut = _cut(own, place, scales)

    hooks = [  # a checkpoint has the optimizer's own groups, so that it can be loaded afterwards
        optimizer.register_state_dict_pre_hook(use_own),
        optimizer.register_state_dict_post_hook(use_cut),
        optimizer.register_load_state_dict_pre_hook(use_own),
        optimizer.register_load_state_dict_post_hook(cut_anew),
    ]
    cut_anew()
    try:
        yield
    finally:
        use_own()
        for hook in hooks:
            hook.remove()


def _cut(
    groups: list[dict[str, Any]], place: Mapping[Any, int], scales: Sequence[float]
) -> list[dict[str, Any]]:
    """The groups, each cut into those of its parameters that have the same place."""
    parts = []
    for group in groups:
        for index, scale in [*enumerate(scales), (None, 1.0)]:
            inside = [p for p in group["params"] if place.get(p) == index]
            if inside:
                scaled = {"lr": group["lr"] * scale, "lr_scale": group.get("lr_scale", 1.0) * scale}
                parts.append({**group, **scaled, "params": inside})
    return parts


def _places(optimizer: Optimizer, lists: Iterable[list[nn.Parameter]]) -> dict[Any, int]:
    held = {p for group in optimizer.param_groups for p in group["params"]}
    place: dict[Any, int] = {}
    for index, parameters in enumerate(lists):
        if held.isdisjoint(parameters):
            raise ValueError(f"The optimizer holds none of the parameters of group {index}.")
        for parameter in parameters:
            if place.setdefault(parameter, index) != index:
                raise ValueError(f"Groups {place[parameter]} and {index} share a parameter.")
    return place
