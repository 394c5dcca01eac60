"""One model in several processes: as many parameters and buffers, and rank 0's values in them."""

from __future__ import annotations

import struct
import zlib

import torch
from torch import Tensor, nn

from wraploop.processes.channel import Channel
from wraploop.processes.packing import pack, view_of

from .internals import stored


def check_same_model(module: nn.Module, channel: Channel) -> None:
    """Checks that all processes have modules with the same parameters and buffers, in order.

    Raises:
        ValueError: on every rank, naming the first rank that differs from rank 0, and where.
    """
    described = "\n".join(_described(module))
    received = channel.exchange("compare models", _bytes(described))
    texts = [bytes(text.numpy()).decode().split("\n") for text in received]
    for rank, lines in enumerate(texts):
        if lines == texts[0]:
            continue
        longest = max(len(lines), len(texts[0]))
        pairs = zip(_padded(texts[0], longest), _padded(lines, longest), strict=True)
        first, mine = next((a, b) for a, b in pairs if a != b)
        raise ValueError(
            f"The processes' models differ. Rank 0 has {first}, where rank {rank} has {mine}. Make "
            "the same model in every process before wrapping it."
        )


def _described(module: nn.Module) -> list[str]:
    tensors = [("parameter", *item) for item in module.named_parameters()]
    tensors += [("buffer", *item) for item in module.named_buffers()]
    return [
        f"{kind} {name!r} {tuple(t.shape)} {t.dtype}{_described_if_sparse(t)}"
        for kind, name, t in tensors
    ]


def _described_if_sparse(tensor: Tensor) -> str:
    if tensor.layout is torch.strided:
        return ""
    return f" ({tensor.layout}, {tensor._nnz()} elements)"


def _padded(lines: list[str], length: int) -> list[str]:
    return lines + ["nothing"] * (length - len(lines))


def _bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode() or b"\n"), dtype=torch.uint8)


@torch.no_grad()
def broadcast(module: nn.Module, channel: Channel) -> None:
    """Gives every process rank 0's parameters and buffers."""
    for part in _parts(module):
        channel.broadcast(part)


def _parts(module: nn.Module) -> list[Tensor]:
    """The dense tensors that its parameters and buffers are stored as."""
    return [part for tensor in (*module.parameters(), *module.buffers()) for part in stored(tensor)]


def begin_alike(module: nn.Module, channel: Channel) -> None:
    """Gives every process rank 0's values again, should they have been set since wrapping.

    Raises:
        ValueError: as `check_same_model`.
    """
    sums = [zlib.crc32(view_of(pack(part))) for part in _parts(module)]
    said = channel.gather("begin with rank 0's values", struct.pack(f"<{len(sums)}I", *sums))
    if any(each != said[0] for each in said):
        check_same_model(module, channel)
        broadcast(module, channel)
