"""Ways that send nothing, so that what else they cost can be measured by itself.

Each process has the same rows, see `training`, so its own message is what everyone would say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

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
    local_runner._fingerprint_of_batch = _unlike if is_mute else _FINGERPRINT


def _own(self: Wire, parts: Sequence[Bytes], timeout_s: float) -> list[memoryview]:
    return [memoryview(bytearray().join(parts)) for _ in range(self.world_size)]


def _unsummed(self: Wire, flat: Tensor, timeout_s: float) -> None:
    pass


def _unlike(inputs: Any) -> float:
    """A fingerprint like no other, since local rows that are alike are refused."""
    _FINGERPRINT(inputs)
    return math.nan


_SPEAKING = Wire.gather, Wire.sum
_FINGERPRINT = local_runner._fingerprint_of_batch
