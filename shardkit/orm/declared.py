"""Whether the tables of a statement are those that the cluster knows: what is not declared, no move would carry; and
what each server numbers by itself must be known to be numbered apart."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable

from sqlalchemy import FromClause, Table

from shardkit.core.errors import DeclarationError, IdsNotSplit, UnroutableQuery
from shardkit.core.topology import DeclaredTable, ShardedTable, Topology

from .declare import declared_table


def declares(topology: Topology, tables: Iterable[DeclaredTable]) -> bool:
    """Whether the topology holds all the tables; `DeclarationError` if it holds one in another way."""
    declared = topology.declared_tables
    for table in tables:
        known = declared.get((table.schema, table.name))
        if known is None:
            return False
        if known != table:
            raise DeclarationError(
                f"Table {table} is {known.description} in this cluster, and {table.description} in this application.",
                table=str(table),
            )
    return True


def unsplit(topology: Topology, tables: Iterable[DeclaredTable]) -> list[DeclaredTable]:
    """Those of the tables, declared here, of which rows of two shards may have one primary key: an identity map would
    take them for one object."""
    if len(topology.shards) == 1:
        return []
    return [
        table
        for table in tables
        if isinstance(table, ShardedTable)
        and table.numbered
        and not (
            (split := topology.by_split.get((table.schema, table.name))) and split.column in table.numbered
        )
    ]


class Admitted:
    """Which tables statements may name under a topology, remembered for the one that was asked of last.

    Tuples of tables are told by what they are, not by what they hold: a shape's, or a mapped class's, is the same one
    each time. Shared by threads: to lose a race is to look once more.
    """

    def __init__(self, size: int = 1000) -> None:
        self._size = size
        self._known: tuple[Topology | None, dict[int, Collection[DeclaredTable]]] = (None, {})

    def admits(self, topology: Topology, tables: Collection[DeclaredTable]) -> bool:
        """Whether the topology holds all the tables, and knows them numbered apart; `DeclarationError`."""
        of, known = self._known
        if of is topology and known.get(id(tables)) is tables:
            return True
        if not declares(topology, tables) or unsplit(topology, tables):
            return False
        if isinstance(tables, tuple):  # which cannot change, and is kept: its id is nobody else's
            if of is not topology or len(known) >= self._size:
                self._known = _, known = topology, {}
            known[id(tables)] = tables
        return True


def not_split(names: Iterable[str]) -> IdsNotSplit:
    """The refusal of such tables."""
    listed = sorted(names)
    return IdsNotSplit(
        f"The primary key of {', '.join(listed)} is numbered by each shard by itself, and rows of two shards that have "
        "the same would be one object.",
        hint=f"`shardkit ids split {shlex.join(listed)}` makes the sequences of all shards disjoint.",
        tables=listed,
    )


def declared_of(table: FromClause) -> DeclaredTable:
    """What a mapped table declares; `UnroutableQuery` if nothing."""
    found = declared_table(table) if isinstance(table, Table) else None
    if found is None:
        raise UnroutableQuery(
            f"{table} is not a declared table.",
            hint="Declare it with @sharded(by=...), @reference or @home(...).",
            table=str(table),
        )
    return found
