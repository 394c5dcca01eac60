"""Holding callbacks to what they declare."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from wraploop.callback import Call, Callback

if TYPE_CHECKING:
    pass

# Where in the loop one is; to look there, nothing need be declared.
_FREE = frozenset({"event", "phase", "running", "in_step", "stopped", "step.cancelled"})
_SAME = {"models": "model", "params": "model", "optimizers": "optimizer"}


class UndeclaredAccess(RuntimeError):
    """A callback reads what it has not declared in `reads`, or writes what is not in `writes`."""


class Strict(Callback):
    """Has every method of every callback see only what it declares; `Learner(strict=True)`.

    What is below a declared name may be read or written as well. Inside a declared object
    nothing is held back: who may read a list can append to it.
    """

    @override
    def around(self, callback: Callback, call: Call) -> Call:
        def guarded(learner: Any) -> Any:
            seen: Any = Guarded(learner, "", callback)
            return call(seen)

        return guarded


class Guarded:
    """A learner, or a part of it, of which a callback sees what it has declared.

    Raises:
        UndeclaredAccess: it reads or writes something else.

    Examples:
        >>> from types import SimpleNamespace
        >>> class Reader(Callback):
        ...     reads = ("step.loss",)
        >>> learner = Guarded(SimpleNamespace(step=SimpleNamespace(loss=2, batch=1)), "", Reader())
        >>> learner.step.loss
        2
        >>> learner.step.batch
        Traceback (most recent call last):
        wraploop.callbacks.strict.UndeclaredAccess: Reader() reads 'step.batch', which it has not \
declared: add it to `reads`.
    """

    __slots__ = ("_callback", "_path", "_target")

    _callback: Callback
    _path: str
    _target: Any

    def __init__(self, target: Any, path: str, callback: Callback) -> None:
        set_own = object.__setattr__
        set_own(self, "_target", target)
        set_own(self, "_path", path)
        set_own(self, "_callback", callback)

    @property
    def __dict__(self) -> dict[str, Any]:  # pyright: ignore  what `vars` gives
        stored = vars(self._target)
        return {name: stored[name] for name in stored if self._may_read(self._below(name))}

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if not self._path and callable(getattr(type(self._target), name, None)):
            return value  # a method
        return self._seen(self._below(name), value)

    def __getitem__(self, key: Any) -> Any:
        path = self._below(key) if isinstance(key, str) else self._path
        return self._seen(path, self._target[key])

    def __setattr__(self, name: str, value: Any) -> None:
        self._check_write(self._below(name))
        setattr(self._target, name, value)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._check_write(self._below(key) if isinstance(key, str) else self._path)
        self._target[key] = value

    def __contains__(self, item: Any) -> bool:
        return item in self._target

    def __iter__(self) -> Iterator[Any]:
        return iter(self._target)

    def __len__(self) -> int:
        return len(self._target)

    def _below(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else _SAME.get(name, name)

    def _seen(self, path: str, value: Any) -> Any:
        if self._may_read(path):
            return value
        declared = (*self._callback.reads, *self._callback.writes, *_FREE)
        if any(f"{_canonical(each)}.".startswith(f"{path}.") for each in declared):
            return Guarded(value, path, self._callback)
        raise UndeclaredAccess(
            f"{self._callback.unwrapped!r} reads {path!r}, which it has not declared: "
            "add it to `reads`."
        )

    def _may_read(self, path: str) -> bool:
        declared = (*self._callback.reads, *self._callback.writes)
        return path in _FREE or _is_below(path, declared)

    def _check_write(self, path: str) -> None:
        if not _is_below(path, self._callback.writes):
            raise UndeclaredAccess(
                f"{self._callback.unwrapped!r} writes {path!r}, which it has not declared: "
                "add it to `writes`."
            )


def _is_below(path: str, declared: tuple[str, ...]) -> bool:
    return any(f"{path}.".startswith(f"{_canonical(each)}.") for each in declared)


def _canonical(path: str) -> str:
    first, _, rest = path.partition(".")
    first = _SAME.get(first, first)
    return f"{first}.{rest}" if rest else first
