"""Topologies as small numbers: the real values of `core.topology`, made once and remembered.

A state of the model names a topology, or a fence, by its number here, so that states stay small and the pure functions
(`marked`, `cut_over`, `unmarked`, `closing_since`, `changed_since`) are run on the way, but once for each argument.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from shardkit.core.keyrange import POSITION_MAX, POSITION_MIN, Arc, ArcSet
from shardkit.core.topology import Fence, Topology

RANGES = (
    ArcSet([Arc(POSITION_MIN, -(2**62))]),
    ArcSet([Arc(-(2**62) + 1, -1)]),
)
"""The key ranges that can move; the rest of the ring belongs to the shard that is a target at first."""


class Facts(NamedTuple):
    """What the model asks of a topology: by shard, or by range."""

    version: int
    fences: tuple[int, ...]
    owners: tuple[int, ...]
    marked: tuple[tuple[bool, ...], ...]


_values: list[Topology] = []
_numbers: dict[Topology, int] = {}
_facts: list[Facts] = []
_fences: list[Fence] = []
_fence_numbers: dict[Fence, int] = {}
_made_by: list[int] = []


def _fence(fence: Fence, topology: int) -> int:
    if fence not in _fence_numbers:
        _fence_numbers[fence] = len(_fences)
        _fences.append(fence)
        _made_by.append(topology)
    return _fence_numbers[fence]


def number(topology: Topology) -> int:
    """The number of a topology."""
    known = _numbers.get(topology)
    if known is None:
        known = _numbers[topology] = len(_values)
        _values.append(topology)
        _facts.append(
            Facts(
                topology.version,
                tuple(_fence(shard.fence, known) for shard in topology.shards),
                tuple(topology.ring.owner_at(arcs.arcs[0].first) for arcs in RANGES),
                tuple(
                    tuple(shard.in_transit.issuperset(arcs) for arcs in RANGES) for shard in topology.shards
                ),
            )
        )
    return known


def facts(topology: int) -> Facts:
    """What the model asks of a topology."""
    return _facts[topology]


def maker(fence: int) -> Facts:
    """The topology that a fence is named after; what a shard owns under the fence is what it owns in that one."""
    return _facts[_made_by[fence]]


def age(fence: int) -> int:
    """The version in a fence's name."""
    return _fences[fence].version


@cache
def first(owners: tuple[int, ...], shards: int) -> int:
    """The topology before the moves: who owns each range; shard 1 owns the rest."""
    return number(
        Topology.first(
            1,
            [(shard, "ABC"[shard], f"postgresql://host/{shard}", 100) for shard in range(shards)],
            (RANGES[0].arcs[-1].last, RANGES[1].arcs[-1].last, POSITION_MAX),
            (*owners, 1),
        )
    )


@cache
def marked(before: int, version: int, shard: int, key_range: int) -> int:
    """A range is marked in transit."""
    return number(_values[before].marked(version, shard, RANGES[key_range]))


@cache
def unmarked(before: int, version: int, shard: int, key_range: int) -> int:
    """The mark ends."""
    return number(_values[before].unmarked(version, shard, RANGES[key_range]))


@cache
def cut_over(before: int, version: int, source: int, target: int, key_range: int) -> int:
    """A range changes its owner."""
    return number(_values[before].cut_over(version, source, target, RANGES[key_range]))


@cache
def closing(after: int, before: int) -> tuple[int, ...]:
    """The shards that lose something."""
    return _values[after].closing_since(_values[before])


@cache
def opening(after: int, before: int) -> tuple[int, ...]:
    """The shards that only gain."""
    losing = closing(after, before)
    return tuple(shard for shard in _values[after].changed_since(_values[before]) if shard not in losing)


Make = Callable[[int, int], int]
