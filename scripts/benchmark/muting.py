"""Ways that send nothing, so that what else they cost can be measured by itself.

Each process has the same rows, see `training`, so its own message is what everyone would say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel

from wraploop.processes.wire import Bytes, Wire
from wraploop.wrappers import local_runner

from .ways import Way


def muted(way: Way) -> Way:
    """The same way, which sends nothing."""
    wrap = partial(_without_sending, way.wrap)
    return replace(way, wrap=wrap, mute=True)


def _without_sending(wrap: Callable[[nn.Module], nn.Module], model: nn.Module) -> nn.Module:
    wrapped = wrap(model)
    if isinstance(wrapped, DistributedDataParallel):
        wrapped.register_comm_hook(None, noop_hook)
    return wrapped


# In a process


def mute(is_mute: bool) -> None:
    """Has every `Wire` say nothing from here on, or speak again."""
    Wire.gather, Wire.sum = (_own, _unsummed) if is_mute else _SPEAKING
    local_runner._TOLD = _Unlike() if is_mute else _TOLD  # pyright: ignore


def _own(self: Wire, parts: Sequence[Bytes], timeout_s: float) -> list[memoryview]:
    return [memoryview(bytearray().join(parts)) for _ in range(self.world_size)]


def _unsummed(self: Wire, flat: Tensor, timeout_s: float, model: int = 0) -> None:
    pass


class _Unlike:
    """What local ranks say of their rows, which are refused if they are alike."""

    pack = local_runner._TOLD.pack

    def unpack(self, said: Bytes) -> tuple[int, float, float, float]:
        rows, *_ = _TOLD.unpack(said)
        return rows, float("nan"), 0.0, 0.0


_SPEAKING = Wire.gather, Wire.sum
_TOLD = local_runner._TOLD
