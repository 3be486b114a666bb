"""Whether the tables of a statement are those that the cluster knows: what is not declared, no move would carry."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from sqlalchemy import Table

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


@lru_cache(maxsize=4096)
def tables_of(table: Table) -> tuple[ShardedTable]:
    """What a mapped table declares; `UnroutableQuery` if it is not sharded."""
    found = sharded_table(table)
    if found is None:
        raise UnroutableQuery(
            f"Table {table.fullname} is not sharded.",
            hint="Declare its key with @sharded(by=...).",
            table=table.fullname,
        )
    return (found,)
