"""What callbacks keep about a fit: records by phase, and series of numbers."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor

from wraploop.phases import Phase

_BLOCK = 64  # values that wait to be read off their device together
_FEW = 8  # values that are shown
Record = TypeVar("Record")


class ByPhase(Mapping[str, Record], Generic[Record]):
    """Records by phase: look up by the phase, its class or its name.

    A phase that has not run yet has an empty record.

    Examples:
        >>> from wraploop.phases import TrainingPhase, ValidationPhase
        >>> seen = ByPhase(list)
        >>> seen[TrainingPhase].append(1)
        >>> seen[TrainingPhase()], seen["TrainingPhase"], seen[ValidationPhase]
        ([1], [1], [])
    """

    def __init__(self, empty: Callable[[], Record]) -> None:
        self._empty = empty
        self._records: dict[str, Record] = {}

    def __getitem__(self, phase: Phase | type[Phase] | str) -> Record:
        if isinstance(phase, str):
            return self._named(phase)
        record = self._records.get(phase.name)
        if record is None:
            record = self._records[phase.name] = self._empty()
        return record

    def put(self, records: Mapping[str, Record]) -> None:
        """Replaces all records by these, by the phases' names."""
        self._records = dict(records)

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        return repr(self._records)

    def _named(self, name: str) -> Record:
        if name not in self._records:
            raise KeyError(f"No phase named {name!r} has run; there are {list(self._records)}.")
        return self._records[name]


class Series:
    """Numbers and when they were taken: `values[i]` at step or epoch `at[i]`, counted from 1.

    Tensors elsewhere than in memory are read off their device in blocks, or as soon as somebody
    looks, so that taking one waits for nothing.

    Examples:
        >>> losses = Series()
        >>> losses.append(1, torch.tensor(0.5))
        >>> list(losses.at), list(losses.values), losses.last
        ([1], [0.5], 0.5)
    """

    def __init__(self) -> None:
        self.at = array("q")
        self._values = array("d")
        self._waiting: list[Tensor] = []

    def append(self, at: int, value: Tensor | float) -> None:
        """Adds a number, or a tensor of one element."""
        if isinstance(value, Tensor) and not value.is_cpu:
            self._waiting.append(value.detach().reshape(()))
            if len(self._waiting) >= _BLOCK:
                self._read()
        else:
            if self._waiting:
                self._read()
            self._values.append(value.item() if isinstance(value, Tensor) else value)
        self.at.append(at)

    def state_dict(self) -> dict[str, Tensor]:
        """The numbers and times as tensors."""
        return {
            "at": torch.tensor(self.at, dtype=torch.int64),
            "values": torch.tensor(self.values, dtype=torch.float64),
        }

    @classmethod
    def of(cls, at: Tensor, values: Tensor) -> Series:
        """What `state_dict` was taken from."""
        series = cls()
        series.at.extend(at.tolist())
        series._values.extend(values.tolist())
        return series

    @property
    def values(self) -> array[float]:
        """The numbers."""
        self._read()
        return self._values

    @property
    def last(self) -> float:
        """The latest number."""
        return self.values[-1]

    def __len__(self) -> int:
        return len(self.at)

    def __repr__(self) -> str:
        few = list(zip(self.at, self.values, strict=True))[-_FEW:]
        more = f"{len(self) - _FEW} more, " if len(self) > _FEW else ""
        return f"Series({more}{', '.join(f'{at}: {value:g}' for at, value in few)})"

    def _read(self) -> None:
        if self._waiting:
            self._values.extend(torch.stack(self._waiting).tolist())
            self._waiting = []
