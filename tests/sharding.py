"""Run by `test_data.py`: what `shard` gives each of several processes, of loaders of all kinds."""

import json
import os
import random
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    get_worker_info,
)

from wraploop import shard


class Words(Dataset[Any]):
    """Samples of a number and a word."""

    def __init__(self, length: int = 11) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"number": torch.tensor(index), "word": f"word {index}", "pair": (index, [index])}


class Batches(Dataset[Any]):
    """Samples that are batches already."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.arange(5 - index)


class Stream(IterableDataset[Any]):
    """A shuffled stream without length, cut among its workers."""

    def __iter__(self) -> Any:
        worker = get_worker_info()
        numbers = torch.randperm(11, generator=torch.Generator().manual_seed(0)).tolist()
        yield from numbers[worker.id :: worker.num_workers] if worker else numbers


class Noise(Dataset[Any]):
    """Samples that draw random numbers."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([float(index), float(torch.rand(()))])


class ByLength(Sampler[list[int]]):
    """A batch sampler of a user's own: uneven batches, drawn with Python's and torch's numbers."""

    def __iter__(self) -> Any:
        left = list(range(11))
        while left:
            random.shuffle(left)
            size = int(torch.randint(1, 6, ()))
            yield left[:size]
            left = left[size:]


def ragged(samples: list[Any]) -> Any:
    """Images of different sizes in a list, as in detection."""
    images = [torch.full((1 + s["pair"][0] % 3, 2), float(s["number"])) for s in samples]
    return images, [s["word"] for s in samples]


LOADERS: dict[str, Callable[[], Iterable[Any]]] = {
    "in order": lambda: DataLoader(Words(), batch_size=4),
    "shuffled": lambda: DataLoader(Words(), batch_size=3, shuffle=True),
    "without the last": lambda: DataLoader(Words(), batch_size=4, shuffle=True, drop_last=True),
    "with a generator": lambda: DataLoader(
        Words(), batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(3)
    ),
    "one by one": lambda: DataLoader(Words(3), batch_size=1),
    "own batch sampler": lambda: DataLoader(Words(), batch_sampler=ByLength()),
    "batches of a sampler": lambda: DataLoader(
        Words(), batch_sampler=BatchSampler(range(10, -1, -1), 4, drop_last=False)
    ),
    "workers": lambda: DataLoader(Words(), batch_size=4, shuffle=True, num_workers=2),
    "persistent workers": lambda: DataLoader(
        Words(), batch_size=4, shuffle=True, num_workers=1, persistent_workers=True
    ),
    "ragged": lambda: DataLoader(Words(), batch_size=4, collate_fn=ragged),
    "stream": lambda: DataLoader(Stream(), batch_size=4),
    "stream with workers": lambda: DataLoader(Stream(), batch_size=4, num_workers=2),
    "whole batches": lambda: DataLoader(Batches(), batch_size=None, shuffle=True),
    "a list": lambda: [(torch.arange(7), [str(i) for i in range(7)]), (torch.ones(1), ["x"])],
}


def plain(batch: Any) -> Any:
    """`batch` as lists and numbers."""
    if isinstance(batch, torch.Tensor):
        return batch.tolist()
    if isinstance(batch, dict):
        return {key: plain(value) for key, value in batch.items()}
    return [plain(part) for part in batch] if isinstance(batch, (list, tuple)) else batch


def read() -> dict[str, Any]:
    """Two epochs of every loader, and what is drawn in workers and afterwards."""
    found: dict[str, Any] = {}
    for name, make in LOADERS.items():
        torch.manual_seed(1)
        random.seed(1)
        batches = shard(make())
        found[name] = [[plain(batch) for batch in batches] for _ in range(2)]
    torch.manual_seed(2)
    two = [shard(DataLoader(Words(), batch_size=4, shuffle=True)) for _ in range(2)]
    found["two at once"] = [[plain(batch) for batch in pair] for pair in zip(*two, strict=True)]
    noise = shard(DataLoader(Noise(), batch_size=8, num_workers=1))
    found["noise"] = [plain(batch) for batch in noise]
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    list(shard(DataLoader(Words(), batch_sampler=ByLength())))
    found["drawn afterwards"] = float(torch.rand(()))
    return found


def main(world_size: int, folder: Path) -> None:
    """Forks the processes, each of which writes what it has read."""
    children = []
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            store = f"file://{folder}/group"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
            (folder / f"{rank}.json").write_text(json.dumps(read()))
            dist.destroy_process_group()
            os._exit(0)
        children.append(child)
    sys.exit(max(os.waitpid(child, 0)[1] for child in children) != 0)
