"""Whether the tables of a statement are those that the cluster knows: what is not declared, no move would carry."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import FromClause, Table

from shardkit.core.errors import DeclarationError, UnroutableQuery
from shardkit.core.topology import DeclaredTable, Topology

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
