"""A call of a module, apart from the module, so that it can be made on another."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .batch import Nest, tensors_of, with_tensors


class Call:
    """A use of a module: which of its methods, with which arguments.

    Attributes:
        method: its name.
        arguments: all arguments, as one nest.
        inputs: the tensors among them, in order.
    """

    def __init__(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.method = method
        self.arguments: Nest = (args, kwargs)
        self.inputs = tensors_of(self.arguments)

    def on(self, module: nn.Module, inputs: list[Tensor] | None = None) -> Nest:
        """Makes the call on `module`, with other `inputs` if they are given."""
        args, kwargs = self.arguments if inputs is None else with_tensors(self.arguments, inputs)
        run = module if self.method == "forward" else getattr(module, self.method)
        return run(*args, **kwargs)
