"""What was given, where it is given: so that a wrong type does not show deep in a fit."""

from __future__ import annotations

import operator
from typing import Any


def whole(name: str, given: Any, least: int = 1) -> int:
    """A whole number of at least `least`, also one of NumPy's.

    Raises:
        TypeError: it is none.
        ValueError: it is smaller.

    Examples:
        >>> whole("steps", "3")
        Traceback (most recent call last):
        TypeError: steps is a whole number of at least 1, and got '3'.
    """
    try:
        number = operator.index(given)
    except TypeError:
        message = f"{name} is a whole number of at least {least}, and got {given!r}."
        raise TypeError(message) from None
    if number < least:
        raise ValueError(f"{name} is at least {least}, and got {given!r}.")
    return number


def check_numbers(**given: Any) -> None:
    """Checks that what is given by name are numbers, infinite ones too.

    Raises:
        TypeError: one is none.

    Examples:
        >>> check_numbers(max_norm=1.0, decay="0.9")
        Traceback (most recent call last):
        TypeError: decay is a number, and got '0.9'.
    """
    for name, value in given.items():
        if isinstance(value, str) or not hasattr(value, "__float__"):
            raise TypeError(f"{name} is a number, and got {value!r}.")


def check_names(name: str, given: Any) -> None:
    """Checks that names are several, not the letters of one.

    Raises:
        TypeError: it is one string.
    """
    if isinstance(given, str):
        raise TypeError(f"{name} is a tuple of names; write ({given!r},).")


def first_make(given: Any) -> str:
    """A hint for who gives a class where one of its objects is meant."""
    return " Make one of it first: add parentheses." if isinstance(given, type) else ""
