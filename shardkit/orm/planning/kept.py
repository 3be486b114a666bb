"""Kept: what was found out once, by key, bounded.

Two generations: what is looked up moves to the younger one; when that is half of the bound, it becomes the older one,
and the older one is forgotten. So what is used stays, as in an LRU cache, but a look-up takes no lock and orders
nothing. Shared by threads: one dictionary operation is atomic, and to lose a race is to find something out twice.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

V = TypeVar("V")


class Kept(Generic[V]):
    """At most ``size`` values by hashable keys."""

    __slots__ = ("_half", "_older", "_younger")

    def __init__(self, size: int) -> None:
        self._half = max(1, size // 2)
        self._younger: dict[Hashable, V] = {}
        self._older: dict[Hashable, V] = {}

    def get(self, key: Hashable) -> V | None:
        """The value of a key, or None."""
        found = self._younger.get(key)
        if found is None:
            found = self._older.get(key)
            if found is not None:
                self.put(key, found)
        return found

    def put(self, key: Hashable, value: V) -> None:
        """Keep a value."""
        younger = self._younger
        if len(younger) >= self._half:
            self._older, self._younger = younger, {}
            younger = self._younger
        younger[key] = value

    def __len__(self) -> int:
        return len(self._younger.keys() | self._older.keys())
