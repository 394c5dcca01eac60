"""Meters: one metric of one phase, taken at steps and come to a number at the epoch's end."""

from __future__ import annotations

import copy
import hashlib
import warnings
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from wraploop import processes
from wraploop.callbacks.records import Series
from wraploop.running import StepState, number


class LossMeter:
    """A loss that steps store, and its mean over the rows of an epoch."""

    def __init__(self, name: str, steps: dict[str, Series]) -> None:
        self.name, self.steps = name, steps
        self.series = steps.get(name, Series())
        self.begin()

    def begin(self) -> None:
        """Starts an epoch."""
        self._go_on_from(0.0, 0)

    def _go_on_from(self, total: float, rows: int) -> None:
        self._total, self._rows_before = total, rows  # of the epoch's steps before `start`
        self.start, self.rows = len(self.series), array("q")

    @property
    def has_begun(self) -> bool:
        """Whether it has taken something in this epoch."""
        return bool(self.rows or self._rows_before)

    def state_dict(self) -> dict[str, Any]:
        """The sum over the epoch's rows so far, and how many."""
        total, rows = self._sums()
        return {"total": total, "rows": rows}

    def load_state_dict(self, parts: Sequence[Mapping[str, Any]]) -> None:
        """Goes on from what `state_dict` returned, here or in each of several processes."""
        self._go_on_from(sum(p["total"] for p in parts), sum(p["rows"] for p in parts))

    def take(self, at: int, step: StepState, rows: int) -> None:
        """Takes a step's value, if the step has what it is taken of."""
        stored, name = vars(step), self.name
        if name in stored:
            value, known = stored[name], step._numbers.get(name)
            self.append(at, known[1] if known is not None and known[0] is value else value, rows)

    def append(self, at: int, value: Any, rows: int) -> None:
        """Adds a step's value."""
        try:
            self.series.append(at, value)
        except (RuntimeError, TypeError, ValueError):
            raise _no_number(self.name, value) from None
        if not self.rows:
            self.steps[self.name] = self.series
        self.rows.append(rows)

    def result(self) -> dict[str, float]:
        """The epoch's value by name, over all processes; nothing where no step had any."""
        total, rows = (processes.sum(each, self.name) for each in self._sums())
        return {self.name: total / rows} if rows else {}

    def _sums(self) -> tuple[float, int]:
        # Not by `sum`: since Python 3.12 it carries along what it rounds off, which no state holds.
        total = self._total
        for value, rows in zip(self.series.values[self.start :], self.rows, strict=True):
            if rows:
                total += value * rows
        return total, sum(self.rows, start=self._rows_before)


class FunctionMeter(LossMeter):
    """What a function of the step's values comes to, and its mean over the rows of an epoch."""

    def __init__(
        self,
        name: str,
        reads: tuple[str, ...],
        function: Callable[..., Any],
        steps: dict[str, Series],
    ) -> None:
        super().__init__(name, steps)
        self.reads, self.function = reads, function

    @override
    def take(self, at: int, step: StepState, rows: int) -> None:
        stored = vars(step)
        if all(name in stored for name in self.reads):
            with torch.no_grad():
                value = self.function(*(_detached(stored[name]) for name in self.reads))
            self.append(at, value, rows)


class StateMeter:
    """A torchmetrics object of one phase.

    It gathers the state of all processes, unless what they saw is one and the same: where each has
    the global batch, gathering would count every row once for each process.
    """

    def __init__(self, name: str, reads: tuple[str, ...], metric: Any) -> None:
        self.name, self.reads, self.metric = name, reads, copy.deepcopy(metric)
        is_module = isinstance(self.metric, nn.Module)
        self._parts: list[Any] = [*self.metric.modules()] if is_module else []
        self._asks: list[tuple[Any, Any]] = [
            (part, part.distributed_available_fn)
            for part in self._parts
            if hasattr(part, "distributed_available_fn")
        ]
        self.begin()

    def begin(self) -> None:
        """Starts an epoch."""
        self.metric.reset()
        self.taken, self._seen = False, ""

    @property
    def has_begun(self) -> bool:
        """Whether it has taken something in this epoch."""
        return self.taken

    def state_dict(self) -> dict[str, Any]:
        """What the epoch's steps so far have come to."""
        metrics = [part for part in self._parts if hasattr(part, "metric_state")]
        states = [
            {"state": dict(part.metric_state), "updates": part._update_count} for part in metrics
        ]
        return {"taken": self.taken, "seen": self._seen, "metrics": states}

    def load_state_dict(self, parts: Sequence[Mapping[str, Any]]) -> None:
        """Goes on from what `state_dict` returned, here or in each of several processes."""
        self.begin()
        if len(parts) > 1:
            warnings.warn(
                f"The metric {self.name!r} of this epoch leaves out the steps before the "
                "checkpoint: they were taken by another number of processes.",
                stacklevel=2,
            )
        elif parts:
            self.taken, self._seen = parts[0]["taken"], parts[0]["seen"]
            metrics = [part for part in self._parts if hasattr(part, "metric_state")]
            for part, saved in zip(metrics, parts[0]["metrics"], strict=True):
                part._update_count = saved["updates"]
                for name, value in saved["state"].items():
                    setattr(part, name, value)

    def take(self, at: int, step: StepState, rows: int) -> None:
        """Takes a step's value, if the step has what the metric reads."""
        stored = vars(step)
        if any(name not in stored for name in self.reads):
            return
        values = [_detached(stored[name]) for name in self.reads]
        if not self.taken:
            if isinstance(values[0], Tensor) and hasattr(self.metric, "to"):
                self.metric.to(values[0].device)
            self.taken, self._seen = True, _digest(values)
        with torch.no_grad():
            self.metric.update(*values)

    def result(self) -> dict[str, float]:
        """The epoch's value by name, over all processes; nothing where no step had any."""
        if not processes.any(self.taken, f"whether there is {self.name}"):
            return {}
        is_one = processes.have_same(self._seen)
        for part, is_distributed in self._asks:
            part.distributed_available_fn = _never if is_one else is_distributed
        value = self.metric.compute()
        values = value if isinstance(value, Mapping) else {self.name: value}
        return {name: _as_number(name, each) for name, each in values.items()}


def rows_of(stored: Mapping[str, Any]) -> int:
    """How many rows a step has, by what it has stored."""
    return stored["rows"] if "rows" in stored else count_rows(stored["batch"])


def count_rows(batch: Any) -> int:
    """The rows of the first tensor in a nest of tensors; 1 if there is none.

    Examples:
        >>> count_rows({"images": torch.zeros(7, 3), "labels": torch.zeros(7)})
        7
    """
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    rows = first.shape[0] if isinstance(first, Tensor) and first.ndim else _rows(batch)
    return 1 if rows is None else rows


def _rows(batch: Any) -> int | None:
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else None
    parts = vars(batch) if hasattr(batch, "__dict__") else batch
    parts = parts.values() if isinstance(parts, Mapping) else parts
    if not isinstance(parts, (tuple, list, type({}.values()))):
        return None
    return next((rows for rows in map(_rows, parts) if rows is not None), None)


def _never() -> bool:
    return False


def _digest(values: list[Any]) -> str:
    """A digest of the numbers in tensors, if there are several processes to compare it."""
    if processes.world_size() == 1:
        return ""
    digest = hashlib.blake2b()
    for value in values:
        if isinstance(value, Tensor):
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _as_number(name: str, value: Any) -> float:
    try:
        return number(value)
    except (RuntimeError, TypeError, ValueError):
        raise _no_number(name, value) from None


def _no_number(name: str, value: Any) -> TypeError:
    shape = tuple(value.shape) if isinstance(value, Tensor) else None
    what = repr(value) if shape is None else f"a tensor of shape {shape}"
    return TypeError(f"The metric {name!r} should come to one number, and came to {what}.")


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
