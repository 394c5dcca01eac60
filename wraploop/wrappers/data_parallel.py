"""DataParallel: the shards of a batch on several devices, in threads of this process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .batch import Nest, rows_of
from .call import Call
from .internals import is_transformed
from .lane_runner import LaneRunner
from .lanes import Lanes
from .wrapper import ModelWrapper

Device = int | str | torch.device


class DataParallel(ModelWrapper):
    """Runs a module on several devices of this machine, each on its shard of the batch.

    What it computes is what the module computes.

    Args:
        module: the module to run; it is moved to the first device.
        device_ids: where to run; the same device may stand there several times. None is every
            accelerator of the machine, or the CPU where there is none.
        output_device: where outputs are put together; None is the first device.
        methods: which of its methods besides forward take a batch, and run like forward.
        sync_batchnorm: whether its batch norms use the statistics of the whole batch.

    Examples:
        >>> model = DataParallel(nn.Linear(3, 1), device_ids=["cpu", "cpu"])
        >>> model(torch.ones(8, 3)).shape
        torch.Size([8, 1])
    """

    devices: list[torch.device]
    output_device: torch.device

    def __init__(
        self,
        module: nn.Module,
        device_ids: Sequence[Device] | None = None,
        output_device: Device | None = None,
        *,
        methods: tuple[str, ...] = (),
        sync_batchnorm: bool = True,
    ) -> None:
        super().__init__(module, methods=methods, sync_batchnorm=sync_batchnorm)
        self._check_inside()
        self.devices = _all_devices() if device_ids is None else [*map(_device, device_ids)]
        if not self.devices:
            raise ValueError("device_ids names no device; leave it out to use all there are.")
        self.output_device = self.devices[0] if output_device is None else _device(output_device)
        module.to(self.devices[0])

    def _run(self, call: Call) -> Nest:
        rows = rows_of(call.arguments)
        devices = self.devices[: rows or 0]
        if len(devices) < 2 or is_transformed():
            inputs = [tensor.to(self.devices[0]) for tensor in call.inputs]
            output, edits = call.on_shard(self.module, inputs)
            call.hand_back(edits)
            return output
        on_cpu = all(device.type == "cpu" for device in devices)
        threads = max(1, torch.get_num_threads() // len(devices)) if on_cpu else None
        lanes = Lanes(devices, self.output_device, threads)
        return self._execution(LaneRunner).run(call, rows or 0, lanes)


def _device(name: Device) -> torch.device:
    """The device of that name; a bare number is an accelerator's.

    Raises:
        ValueError: this machine has no such device.
    """
    if isinstance(name, int) and not torch.accelerator.is_available():
        raise ValueError(
            f"device_ids names accelerator {name}, and this machine has none. "
            'Use device_ids=["cpu", "cpu"] to run on the CPU in two lanes.'
        )
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device_ids names {name!r}, which is no device: {error}") from None


def _all_devices() -> list[torch.device]:
    if not torch.accelerator.is_available():
        return [torch.device("cpu")]
    return [torch.device(i) for i in range(torch.accelerator.device_count())]
