"""Tensors as bytes, the form in which they cross between processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def pack(tensor: Tensor) -> Tensor:
    """A tensor's values, and indices if it is sparse: one axis, uint8, on the CPU."""
    if tensor.is_sparse:
        entries = tensor.coalesce()
        count = torch.tensor([entries.sparse_dim()])
        return torch.cat([pack(count), pack(entries.indices()), pack(entries.values())])
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8).cpu()


def unpack(packed: Tensor, shape: Sequence[int], like: Tensor) -> Tensor:
    """The dense tensor of that shape, and of the dtype and device of `like`, that was packed."""
    return packed.clone().view(like.dtype).view(tuple(shape)).to(like.device)


def unpack_sparse(packed: Tensor, like: Tensor) -> Tensor:
    """The sparse tensor of the shape, dtype and device of `like` that was packed."""
    axes = int(unpack(packed[:8], [], torch.empty(0, dtype=torch.int64)))
    row = like.shape[axes:]
    row_bytes = math.prod(row) * like.element_size()
    count = (len(packed) - 8) // (8 * axes + row_bytes)
    end = 8 + 8 * axes * count
    indices = unpack(packed[8:end], [axes, count], torch.empty(0, dtype=torch.int64))
    values = unpack(packed[end:], [count, *row], like)
    where = indices.to(like.device)
    return torch.sparse_coo_tensor(where, values, like.shape, check_invariants=False)


def view_of(packed: Tensor) -> memoryview:
    """The bytes of a packed tensor, where they are."""
    array: Any = packed.numpy()
    return memoryview(array)


def size_of(shape: Sequence[int], like: Tensor) -> int:
    """How many bytes a dense tensor of that shape and of the dtype of `like` packs to."""
    return math.prod(shape) * like.element_size()
