"""How ids would be split: the tables that need it, their strides, and what their sequences would go on with.

Made by `storage.idsplit`, which carries it out, and shown by the command before. Changes nothing.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from psycopg import sql

from shardkit.core.errors import PreflightFailed, UsageError
from shardkit.core.residues import ID_TYPES, STRIDE_MAX, first_above, widens
from shardkit.core.topology import ShardedTable, Split, Topology

from . import sequences
from .connections import Connection, ShardConnections, value
from .numbering import Numbering, column_of, is_split, of_column
from .predicate import relation


@dataclass(frozen=True, slots=True)
class Part:
    """What a shard's sequence becomes: it goes on with ``first``, and has ``left`` numbers then."""

    shard: str
    sequence: str
    first: int
    left: int


@dataclass(frozen=True, slots=True)
class Planned:
    """A table and how its ids are to be split; ``done`` if they are."""

    table: ShardedTable
    column: str
    stride: int
    floor: int
    done: bool
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """A table whose ids are numbered, with its sequence on each shard by number."""

    table: ShardedTable
    column: str
    by_shard: dict[int, Numbering]


def plan(
    topology: Topology, shards: ShardConnections, names: Sequence[str] = (), stride: int | None = None
) -> list[Planned]:
    """How the ids of the named tables, or of all that need it, would be split; changes nothing.

    ``stride`` is the number of shards there can ever be; without one it is what is recorded, or that of the column's
    type. Raises `PreflightFailed` with every reason why not, `UsageError` for a table that needs no split.
    """
    planned, reasons = [], []
    for table in _chosen(topology, shards, names):
        try:
            planned.append(_planned(topology, shards, table, stride))
        except ValueError as error:
            reasons.append(str(error))
    if reasons:
        raise PreflightFailed(
            "These ids cannot be split:\n" + "\n".join(f"  - {text}" for text in reasons), reasons=reasons
        )
    return planned


def _chosen(topology: Topology, shards: ShardConnections, names: Sequence[str]) -> list[ShardedTable]:
    first = shards.get(topology.shards[0])
    if not names:
        return [
            table
            for table in topology.tables
            if is_split(topology, table) is not None or column_of(first, table) is not None
        ]
    chosen = dict.fromkeys(_named(topology, name) for name in names)
    for table in chosen:
        if is_split(topology, table) is None and column_of(first, table) is None:
            raise UsageError(
                f"The primary key of {table} is not numbered by the server alone, so it needs no split.",
                hint="Without a name, `shardkit ids split` finds the tables that need it.",
            )
    return list(chosen)


def _named(topology: Topology, name: str) -> ShardedTable:
    found = [table for table in topology.tables if name in (str(table), table.name)]
    exact = [table for table in found if name == str(table)] or found
    if len(exact) != 1:
        known = shlex.join(str(table) for table in topology.tables)
        raise UsageError(
            f"{name!r} is {'no' if not exact else 'more than one'} declared sharded table.",
            hint=f"The sharded tables are: {known or 'none'}.",
        )
    return exact[0]


def _planned(
    topology: Topology, shards: ShardConnections, table: ShardedTable, wanted: int | None
) -> Planned:
    """`ValueError` with the reason why not."""
    known = is_split(topology, table)
    column = known.column if known is not None else column_of(shards.get(topology.shards[0]), table)
    assert column is not None
    found = find(topology, shards, table, column)
    stride = _stride(topology, shards, found, known, wanted)
    if known is not None and known.stride == stride and is_settled(found, known):
        floor, done = known.floor, True
    else:
        floor, done = _floor(topology, shards, found, known), False
    parts = []
    for shard in topology.shards:
        numbering = found.by_shard[shard.id]
        first = numbering.next if done else numbering.first(floor, stride, shard.id)
        parts.append(Part(shard.name, numbering.sequence, first, numbering.left(first, stride)))
    return Planned(table, column, stride, floor, done, tuple(parts))


def _floor(topology: Topology, shards: ShardConnections, found: Found, known: Split | None) -> int:
    """The highest id that there is on any shard, or was given by a sequence."""
    return max(
        known.floor if known is not None else 0,
        *(numbering.given for numbering in found.by_shard.values()),
        *(highest(shards.get(shard), found.table, found.column) for shard in topology.shards),
    )


def find(topology: Topology, shards: ShardConnections, table: ShardedTable, column: str) -> Found:
    """The sequences of a column on all shards; `ValueError` with the reason why they cannot be made disjoint."""
    by_shard = {}
    for shard in topology.shards:
        try:
            numbering = of_column(shards.get(shard), table, column)
        except ValueError as error:
            raise ValueError(f"shard {shard.name}: {error}") from None
        if numbering.step < 0:
            raise ValueError(f"shard {shard.name}: the sequence {numbering.sequence} of {table} counts down")
        by_shard[shard.id] = numbering
    return Found(table, column, by_shard)


def _stride(
    topology: Topology, shards: ShardConnections, found: Found, known: Split | None, wanted: int | None
) -> int:
    kind = next(iter(found.by_shard.values())).kind
    stride = wanted or (known.stride if known is not None else ID_TYPES[kind].stride)
    highest = max(shard.id for shard in topology.shards)
    if not highest < stride <= STRIDE_MAX:
        raise ValueError(
            f"{found.table}: there are shards with numbers up to {highest}, so {stride} is not enough "
            f"(up to {STRIDE_MAX} can be)"
        )
    if known is not None and not widens(stride, known.stride):
        raise ValueError(
            f"{found.table}: its ids are split by {known.stride}, and only a multiple of that can follow"
        )
    for other in topology.splits:
        if other is not known and other.stride != stride and _shares(topology, shards, found, other):
            raise ValueError(
                f"{found.table} shares its sequence with {other}, whose ids are split by {other.stride}"
            )
    return stride


def _shares(topology: Topology, shards: ShardConnections, found: Found, other: Split) -> bool:
    first = topology.shards[0]
    theirs = sequences.of_table(shards.get(first), topology.by_table[other.schema, other.name])
    return theirs.get(other.column) == found.by_shard[first.id].sequence


def is_settled(found: Found, split: Split) -> bool:
    """Whether the sequences are as they were recorded. A run that altered them, and ended before it recorded that, has
    left another start."""
    return not any(
        numbering.problems(split, shard_id)
        or numbering.start != first_above(max(split.floor, numbering.minimum - 1), split.stride, shard_id)
        for shard_id, numbering in found.by_shard.items()
    )


def highest(connection: Connection, table: ShardedTable, column: str) -> int:
    """The highest number of the rows; 0 if there is none."""
    query = sql.SQL("SELECT max({}) FROM {}").format(sql.Identifier(column), relation(table))
    return int(value(connection, query) or 0)
