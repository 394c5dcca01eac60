"""The replicas of a module, kept between calls and up to date at each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .batchnorm import global_class, statistics_of
from .recent import keep
from .replica import Replica
from .tree import Spot, Tree, current_tree

_MOST_SETS = 4
MakeLeaves = Callable[[list[Tensor], torch.device | None], tuple[list[Tensor], list[Tensor]]]


class Replicas:
    """The replicas of `original`, up to date at each call.

    There is a set of them for each combination of frozen parameters that has lately been used, so
    that freezing and thawing a network every step costs nothing.

    Args:
        original: the module.
        sync: whether batch norms in replicas use the statistics of the whole batch.
        make_leaves: makes, of the parameters and a device, what a replica there has instead, and
            tokens that its outputs must depend on.
        alone: whether there is one replica only, and not one for each of several lanes.
        observes: whether replicas take down what forward hooks see.
        rows: the spots in which forwards leave tensors with a row for each row of the batch, and
            along which axis.
    """

    def __init__(
        self,
        original: nn.Module,
        sync: bool,
        make_leaves: MakeLeaves,
        *,
        alone: bool,
        observes: bool,
        rows: dict[Spot, int] | None = None,
    ) -> None:
        self._original = original
        self._sync = sync
        self._make_leaves = make_leaves
        self._alone = alone
        self._observes = observes
        self._rows: dict[Spot, int] = {} if rows is None else rows
        self._tree: Tree | None = None
        self._sets: dict[tuple[bool, ...], list[Replica]] = {}

    def get(
        self, devices: Sequence[torch.device | None], tree: Tree | None = None
    ) -> tuple[Tree, list[Replica]]:
        """The original's tree, and a replica for each device, as the original is now.

        Args:
            devices: where; None is where the original is.
            tree: the original's, if the caller has it.
        """
        tree = tree or current_tree(self._tree, self._original, self._rows)
        if tree is not self._tree:
            self._tree = tree
            self._sets.clear()
        frozen = tuple(not parameter.requires_grad for parameter in tree.parameters)
        replicas = self._sets.get(frozen, [])
        if not all(replica.is_current() for replica in replicas):
            replicas = []
        keep(self._sets, frozen, replicas, _MOST_SETS)
        if len(replicas) < len(devices):
            with torch.inference_mode(False):
                for device in devices[len(replicas) :]:
                    replicas.append(self._made_for(tree, device))
        for replica in replicas:
            replica.refresh()
        return tree, replicas[: len(devices)]

    def forget(self) -> None:
        """Has replicas made anew, after a forward that was broken off."""
        self._tree = None

    def _made_for(self, tree: Tree, device: torch.device | None) -> Replica:
        with torch.enable_grad():
            leaves, tokens = self._make_leaves(tree.parameters, device)
        kept = self._kept_buffers()
        buffers = [
            buffer.data if id(buffer) in kept else buffer.detach().to(device, copy=True)
            for buffer in tree.buffers
        ]
        replica = Replica(
            self._original, tree, leaves, buffers, self._rows, self._sync, self._observes
        )
        replica.tokens = tokens
        return replica

    def _kept_buffers(self) -> set[int]:
        """Buffers that need no copy: batch norms' that are agreed on, where one replica is alone.

        It has them with versions of its own. Of others only a copy tells that they were written to.
        """
        are_kept = self._alone and self._sync
        norms = [m for m in self._original.modules() if are_kept and global_class(type(m))]
        return {id(buffer) for norm in norms for buffer in statistics_of(norm).values()}


def alias(parameter: Tensor, device: torch.device | None) -> nn.Parameter:
    """A leaf with the storage of `parameter`, or with its values on another device."""
    leaf = nn.Parameter(parameter.detach().to(device), parameter.requires_grad)
    vars(leaf).update(vars(parameter))  # what the user has put on it
    return leaf
