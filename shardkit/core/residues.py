"""The arithmetic of disjoint sequences: a shard numbers rows by one residue of a stride.

The sequence of the shard with the number ``n`` gives what leaves ``n`` when divided by the stride, in steps of the
stride, so two shards never give the same. Pure; `storage.idsplit` sets sequences so.
"""

from __future__ import annotations

from typing import NamedTuple


class IdType(NamedTuple):
    """An integer type of a column: its largest value, and the stride where none is asked for."""

    maximum: int
    stride: int


ID_TYPES = {
    "int2": IdType((1 << 15) - 1, 8),
    "int4": IdType((1 << 31) - 1, 64),
    "int8": IdType((1 << 63) - 1, 1024),
}
"""By their names in ``pg_type``. A stride leaves each shard that part of the type, and can be multiplied later."""

STRIDE_MAX = 1 << 16
"""So many shards a topology can name."""


def first_above(floor: int, stride: int, residue: int) -> int:
    """The smallest positive number of a residue above ``floor``."""
    above = max(floor, 0) + 1
    return above + (residue - above) % stride


def is_of(number: int, stride: int, residue: int) -> bool:
    """Whether a number leaves this residue."""
    return (number - residue) % stride == 0


def left(first: int, stride: int, maximum: int) -> int:
    """How many numbers a sequence that goes on with ``first`` has left."""
    return max((maximum - first) // stride + 1, 0)


def widens(stride: int, before: int) -> bool:
    """Whether a stride can follow another: its residues are parts of the other's, so that shards which have the one
    and shards which still have the other do not meet."""
    return stride % before == 0
