"""Whether parameters still are the same on all ranks: at each call it is one parameter's turn."""

from __future__ import annotations

from torch import Tensor, nn

from wraploop.processes.channel import Channel, fingerprint

from .internals import stored
from .same_model import begin_alike
from .tree import Tree


class Turns:
    """Has ranks compare the parameters of `module`, one at each call.

    Args:
        module: the module.
        advice: what to do if a parameter differs, for the error.
    """

    def __init__(self, module: nn.Module, advice: str) -> None:
        self._module = module
        self._advice = advice
        self._tree: Tree | None = None
        self._names: list[tuple[str, Tensor]] = []
        self._calls = 0

    @property
    def has_begun(self) -> bool:
        """Whether a turn has been taken, so that all ranks have had rank 0's values."""
        return self._calls > 0

    def begin(self, channel: Channel) -> None:
        """Has all ranks begin with rank 0's values: before the first turn they may be set anew."""
        if not self.has_begun:
            begin_alike(self._module, channel)

    def agree(self, channel: Channel, tree: Tree) -> None:
        """Has the next exchange compare the parameter whose turn it is.

        Args:
            channel: the way to the other ranks.
            tree: the module's.
        """
        if tree is not self._tree:
            self._tree, self._names = tree, list(self._module.named_parameters())
        if self._names:
            which, parameter = self._names[self._calls % len(self._names)]
            facts = [fingerprint(part) for part in stored(parameter)]
            channel.agree(f"parameter {which!r}", facts, self._advice)

    def end(self) -> None:
        """Ends a turn that all ranks have taken: others' turns would never again be alike."""
        self._calls += 1
