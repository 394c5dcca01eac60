"""A call of a module, apart from the module, so that it can be made on another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from .batch import Nest, tensors_of, with_tensors


class Call(NamedTuple):
    """A use of a module: which of its methods, with which arguments."""

    method: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors among the arguments, in order."""
        return tensors_of(self.arguments)

    @property
    def arguments(self) -> Nest:
        """All arguments, as one nest."""
        return (self.args, dict(self.kwargs))

    def on(self, module: nn.Module, inputs: list[Tensor] | None = None) -> Nest:
        """Makes the call on `module`, with other `inputs` if they are given."""
        arguments = self.arguments if inputs is None else with_tensors(self.arguments, inputs)
        run = module if self.method == "forward" else getattr(module, self.method)
        return run(*arguments[0], **arguments[1])
