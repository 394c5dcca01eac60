"""In which order callbacks are called: who writes something before who reads it."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wraploop.callback import Callback

# What the learner itself has, and its phases store in `step`: to read it takes no writer.
PROVIDED = frozenset(
    "callbacks data event in_step loss_fn model models optimizer optimizers params phase phases "
    "position running step stopped".split()
)


def in_order(callbacks: Iterable[Callback]) -> list[Callback]:
    """Sorts callbacks so that who writes comes before who reads; ties keep their order.

    A name covers what lies below it: a writer of `"metrics"` comes before a reader of
    `"metrics.loss"`. The learner's own attributes and the step's need no writer. Who reads
    `"callbacks"`, and so what the others have come to, comes after all that do not.

    Raises:
        ValueError: two write the same, one reads what nobody writes, or they wait for each other.
    """
    waiting = list(callbacks)
    _check_writers(waiting)
    _check_readers(waiting)
    ordered: list[Callback] = []
    while waiting:
        ready = next((each for each in waiting if not _awaited(each, waiting)), None)
        if ready is None:
            raise ValueError(_cycle_message(waiting))
        ordered.append(ready)
        waiting = [each for each in waiting if each is not ready]
    return ordered


def _awaited(reader: Callback, writers: Iterable[Callback]) -> list[tuple[str, Callback]]:
    """What `reader` reads of the others' writing, with its writer."""
    if _is_last(reader):
        return [("callbacks", writer) for writer in writers if not _is_last(writer)]
    return [
        (read, writer)
        for writer in writers
        if writer is not reader
        for read in reader.reads
        if _is_among(read, writer.writes)
    ]


def _is_last(callback: Callback) -> bool:
    return "callbacks" in callback.reads


def _check_writers(callbacks: Iterable[Callback]) -> None:
    for first, second in combinations(callbacks, 2):
        for path in second.writes:
            if _is_among(path, first.writes):
                raise ValueError(
                    f"{first!r} and {second!r} both write {path!r}. "
                    "Leave one of them out, or declare in `writes` what each really writes."
                )


def _check_readers(callbacks: list[Callback]) -> None:
    written = [path for callback in callbacks for path in callback.writes]
    for callback in callbacks:
        for read in callback.reads:
            if read.split(".")[0] not in PROVIDED and not _is_among(read, written):
                raise ValueError(
                    f"{callback!r} reads {read!r}, which no callback writes; "
                    f"written are {sorted(written)}. Add the callback that writes it."
                )


def _cycle_message(waiting: list[Callback]) -> str:
    waits = [
        f"{reader!r} reads {read!r}, which {writer!r} writes"
        for reader in waiting
        for read, writer in _awaited(reader, waiting)
    ]
    return f"These callbacks wait for each other: {'; '.join(waits)}. Take one of the reads out."


def _is_among(path: str, paths: Iterable[str]) -> bool:
    """Whether `path` is one of `paths`, a part of one, or has one as its part."""
    return any(f"{path}.".startswith(f"{p}.") or f"{p}.".startswith(f"{path}.") for p in paths)
