"""Whether the tables of a statement are those that the cluster knows: what is not declared, no move would carry."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import FromClause, Table

from shardkit.core.errors import DeclarationError, UnroutableQuery
from shardkit.core.topology import ShardedTable, Topology

from .declare import sharded_table


def declares(topology: Topology, tables: Iterable[ShardedTable]) -> bool:
    """Whether the topology holds all the tables; `DeclarationError` if it holds one under another key."""
    declared = topology.by_table
    for table in tables:
        known = declared.get((table.schema, table.name))
        if known is None:
            return False
        if known != table:
            raise DeclarationError(
                f"Table {table} is sharded by {known.key} ({known.key_type}) in this cluster, and by {table.key} "
                f"({table.key_type}) in this application.",
                table=str(table),
            )
    return True


def declared_of(table: FromClause) -> ShardedTable:
    """What a mapped table declares; `UnroutableQuery` if it is not sharded."""
    found = sharded_table(table) if isinstance(table, Table) else None
    if found is None:
        raise UnroutableQuery(
            f"{table} is not a sharded table.",
            hint="Declare its key with @sharded(by=...).",
            table=str(table),
        )
    return found
