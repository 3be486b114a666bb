"""Arcs: closed ranges of positions, and sets of them.

A position is a signed 64-bit integer. An ``Arc`` holds every position from ``first`` to ``last``, both included, so
that the largest position needs no sentinel. Slots are the 65,536 equal arcs on whose ends tokens are placed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple

POSITION_MIN = -(2**63)
POSITION_MAX = 2**63 - 1
SLOTS = 1 << 16
SLOT_BITS = 48
"""Width of a slot: 2**48 positions."""


class Arc(NamedTuple):
    """The positions from ``first`` to ``last``, both included; never empty, never wrapping round."""

    first: int
    last: int

    @property
    def width(self) -> int:
        """Number of positions."""
        return self.last - self.first + 1

    def __contains__(self, position: object) -> bool:
        return isinstance(position, int) and self.first <= position <= self.last

    def __str__(self) -> str:
        return f"{hex_position(self.first)}..{hex_position(self.last)}"


def hex_position(position: int) -> str:
    """A position as 16 hex digits in ring order: the smallest bigint is 0000000000000000."""
    return f"{position - POSITION_MIN:016X}"


def slot_of(position: int) -> int:
    """The slot (0 to 65,535, in ring order) of a position."""
    return (position - POSITION_MIN) >> SLOT_BITS


def slot_arc(first: int, count: int = 1) -> Arc:
    """The arc of ``count`` slots from slot ``first`` on."""
    if not (0 <= first and 1 <= count and first + count <= SLOTS):
        raise ValueError(f"no slots {first}..{first + count - 1}: there are {SLOTS}")
    start = (first << SLOT_BITS) + POSITION_MIN
    return Arc(start, start + (count << SLOT_BITS) - 1)


class ArcSet:
    """An immutable set of positions, kept as sorted arcs that neither overlap nor touch."""

    __slots__ = ("_firsts", "arcs")

    def __init__(self, arcs: Iterable[Arc] = ()) -> None:
        merged: list[Arc] = []
        for first, last in sorted(arcs):
            if not (POSITION_MIN <= first <= last <= POSITION_MAX):
                raise ValueError(f"not an arc of signed 64-bit positions: {first}..{last}")
            if merged and first <= merged[-1].last + 1:
                if last > merged[-1].last:
                    merged[-1] = Arc(merged[-1].first, last)
            else:
                merged.append(Arc(first, last))
        self.arcs: tuple[Arc, ...] = tuple(merged)
        self._firsts = [arc.first for arc in merged]

    def __iter__(self) -> Iterator[Arc]:
        return iter(self.arcs)

    def __len__(self) -> int:
        return len(self.arcs)

    def __bool__(self) -> bool:
        return bool(self.arcs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ArcSet) and self.arcs == other.arcs

    def __hash__(self) -> int:
        return hash(self.arcs)

    def __repr__(self) -> str:
        return f"ArcSet({', '.join(map(str, self.arcs))})"

    def __contains__(self, position: object) -> bool:
        if not isinstance(position, int):
            return False
        index = bisect_right(self._firsts, position) - 1
        return index >= 0 and position <= self.arcs[index].last

    @property
    def width(self) -> int:
        """Number of positions."""
        return sum(arc.width for arc in self.arcs)

    def __or__(self, other: ArcSet) -> ArcSet:
        return ArcSet((*self.arcs, *other.arcs))

    def __and__(self, other: ArcSet) -> ArcSet:
        common: list[Arc] = []
        mine, theirs = iter(self.arcs), iter(other.arcs)
        a, b = next(mine, None), next(theirs, None)
        while a is not None and b is not None:
            first, last = max(a.first, b.first), min(a.last, b.last)
            if first <= last:
                common.append(Arc(first, last))
            if a.last < b.last:
                a = next(mine, None)
            else:
                b = next(theirs, None)
        return ArcSet(common)

    def __invert__(self) -> ArcSet:
        gaps: list[Arc] = []
        start = POSITION_MIN
        for first, last in self.arcs:
            if start < first:
                gaps.append(Arc(start, first - 1))
            start = last + 1
        if start <= POSITION_MAX:
            gaps.append(Arc(start, POSITION_MAX))
        return ArcSet(gaps)

    def __sub__(self, other: ArcSet) -> ArcSet:
        return self & ~other

    def leading(self, width: int, arcs: int) -> ArcSet:
        """The first positions of the set: ``width`` of them, or fewer, in ``arcs`` arcs at most."""
        taken: list[Arc] = []
        for first, last in self.arcs[:arcs]:
            taken.append(Arc(first, min(last, first + width - 1)))
            width -= taken[-1].width
            if not width:
                break
        return ArcSet(taken)

    def issuperset(self, other: ArcSet) -> bool:
        """Whether every position of ``other`` is in this set."""
        return not (other - self)

    def bounds(self) -> list[int]:
        """``[first, last + 1, ...]``: a position is inside where an odd number of bounds is <= it.

        An arc that ends at the largest position has no second bound, as 2**63 is no bigint.
        """
        flat = [bound for first, last in self.arcs for bound in (first, last + 1)]
        return flat[:-1] if flat and flat[-1] > POSITION_MAX else flat
