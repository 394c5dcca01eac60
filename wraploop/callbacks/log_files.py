"""Loggers that write files, which only grow."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from wraploop.callbacks.loggers import Logger, Setting

_BINS = 64  # of a histogram


class GrowingFile:
    """A text file to which whole lines are added; each is in the file when `add` returns.

    The file and its folder are made at the first line. A last line that was left without its end
    is ended first.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file: io.TextIOWrapper | None = None

    def first_line(self) -> str | None:
        """The first line, or `None` if there is none yet."""
        if not self.path.exists():
            return None
        with self.path.open(encoding="utf-8", errors="replace") as file:
            return file.readline(1000).rstrip("\n") or None

    def add(self, lines: str, header: str = "") -> None:
        """Adds lines, to a file that is empty after a header."""
        if self._file is None:
            lines = self._start(header) + lines
        assert self._file is not None
        self._file.write(lines)
        self._file.flush()

    def close(self) -> None:
        """Closes the file; the next line opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _start(self, header: str) -> str:
        """Opens the file, and returns what has to come before the next line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8", newline="")
        weakref.finalize(self, self._file.close)
        if not self.path.stat().st_size:
            return header
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return "" if file.read() == b"\n" else "\n"


class CSVLogger(Logger):
    """Numbers in a file, a row for each: `step,name,value`.

    Rows are only added, also to a file that is there, so a killed run loses nothing, and new names
    need no new columns. The configuration is rows without a step: `,batch_size,64`. A fit that is
    resumed logs the steps after its checkpoint once more: of rows with one step and name the last
    counts.

    Raises:
        ValueError: the file at `path` has another form.
    """

    header = "step,name,value"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = GrowingFile(path)
        first = self._file.first_line()
        if first not in (None, self.header):
            raise ValueError(
                f"{self!r} adds to files that begin with {self.header!r}, and this one begins "
                f"with {first!r}. Give another path, or move the file away."
            )

    @override
    def write_numbers(self, values: dict[str, float], step: int) -> None:
        self._write((step, *item) for item in values.items())

    @override
    def write_settings(self, values: dict[str, Setting]) -> None:
        self._write(("", *item) for item in values.items())

    @override
    def close(self) -> None:
        self._file.close()

    def _write(self, rows: Iterable[tuple[Any, ...]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        self._file.add(text.getvalue(), header=f"{self.header}\n")

    def __repr__(self) -> str:
        return f"CSVLogger({str(self._file.path)!r})"


class JSONLinesLogger(Logger):
    """Numbers, histograms and texts in a file, an object of strict JSON a line.

        {"hyperparameters": {"batch_size": 64}}
        {"step": 12, "TrainingPhase/loss": 0.5, "TrainingPhase/accuracy": "nan"}
        {"step": 12, "generator/0.weight": {"counts": [3, 1], "edges": [-1.0, 0.0, 1.0]}}
        {"step": 12, "sample": {"text": "to be or not"}}

    Numbers that JSON does not have are the strings `"nan"`, `"inf"` and `"-inf"`, which `float`
    reads. Lines are only added, also to a file that is there; after a resume, see `CSVLogger`.

    Raises:
        ValueError: the file at `path` has another form, or a thing is called `"step"`.
    """

    takes = frozenset({"numbers", "histograms", "text"})

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = GrowingFile(path)
        first = self._file.first_line()
        if first is not None and not first.startswith("{"):
            raise ValueError(
                f"{self!r} adds to files of JSON objects, one a line, and this one begins with "
                f"{first!r}. Give another path, or move the file away."
            )

    @override
    def write_numbers(self, values: dict[str, float], step: int) -> None:
        self._write(step, values)

    @override
    def write_settings(self, values: dict[str, Setting]) -> None:
        self._file.add(_json({"hyperparameters": values}))

    @override
    def write_histogram(self, name: str, values: Tensor, step: int) -> None:
        counts, edges = torch.histogram(values, _BINS)
        self._write(step, {name: {"counts": counts.long().tolist(), "edges": edges.tolist()}})

    @override
    def write_text(self, name: str, text: str, step: int) -> None:
        self._write(step, {name: {"text": text}})

    @override
    def close(self) -> None:
        self._file.close()

    def _write(self, step: int, values: dict[str, Any]) -> None:
        if "step" in values:
            raise ValueError("In this file 'step' is when something was logged: choose a name.")
        self._file.add(_json({"step": step, **values}))

    def __repr__(self) -> str:
        return f"JSONLinesLogger({str(self._file.path)!r})"


def _json(values: dict[str, Any]) -> str:
    return json.dumps(_strict(values), allow_nan=False) + "\n"


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _strict(each) for name, each in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
