"""Gather: one result out of the results of several shards.

Driven by the session with the `Merge` that a `Route` names; knows results, never statements or connections. A merge
that would not be exactly what one database returns raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy.engine import Result

from shardkit.core.errors import IdentityConflict, UnroutableQuery

AggregateName = Literal["count", "sum", "min", "max"]


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of all shards, one shard after the other; row counts are added."""


@dataclass(frozen=True, slots=True)
class Interleaved:
    """One row for each row of the input, in the order of the input: ``order[shard id]`` are the numbers of the input
    rows that the shard was given, in the order it was given them."""

    order: dict[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Aggregates:
    """One row of which each column is merged by its own aggregate."""

    columns: tuple[AggregateName, ...]


Merge = Rows | Interleaved | Aggregates


def gather(results: dict[int, Result[Any]], merge: Merge) -> Result[Any]:
    """One result from the results by shard id (at least one), each unread.

    `IdentityConflict` if rows of two shards are one object.
    """
    listed: Sequence[Result[Any]] = list(results.values())
    return listed[0].merge(*listed[1:])


__all__ = ["Aggregates", "IdentityConflict", "Interleaved", "Merge", "Rows", "UnroutableQuery", "gather"]
