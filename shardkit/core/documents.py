"""Reading JSON documents strictly: a value of another type is an error, not something that nearly works.

Used by the ``from_json`` of topologies and placements, whose documents come back from databases that people can edit.
Each function returns its argument or raises TypeError.
"""

from __future__ import annotations

from typing import Any


def whole(value: Any) -> int:
    """A whole number; neither a bool nor 1.0, which equal ints but are written otherwise."""
    if type(value) is not int:
        raise TypeError(f"not a whole number: {value!r}")
    return value


def text(value: Any) -> str:
    """A string."""
    if type(value) is not str:
        raise TypeError(f"not a string: {value!r}")
    return value


def listed(value: Any) -> list[Any]:
    """A list."""
    if type(value) is not list:
        raise TypeError(f"not a list: {value!r}")
    return value
