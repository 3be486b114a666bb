"""Declarations: which tables are sharded, and by which column.

`sharded` writes into ``Table.info["shardkit"]``; everything else here reads it back as a checked `ShardedTable`. The
session, the planner and ``cluster.check`` drive it. Never touches a database.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy import Column, MetaData, Table

from shardkit.core.errors import DeclarationError
from shardkit.core.topology import ShardedTable

INFO = "shardkit"
"""The entry of ``Table.info``: ``{"sharded_by": "<column name>"}``."""

T = TypeVar("T")


def sharded(*, by: str) -> Callable[[type[T]], type[T]]:
    """Class decorator: the rows of this mapped class are spread by the attribute ``by``."""

    def declare(mapped: type[T]) -> type[T]:
        table: Table = mapped.__table__  # type: ignore[attr-defined]
        attribute = getattr(mapped, by)
        table.info[INFO] = {"sharded_by": attribute.property.columns[0].name}
        return mapped

    return declare


def sharded_table(table: Table) -> ShardedTable | None:
    """What a table declares, or None if it is not sharded; `DeclarationError` if it cannot work on shards."""
    if INFO not in table.info:
        return None
    return ShardedTable(table.schema or "public", table.name, key_column(table).name, "int")


def key_column(table: Table) -> Column[Any]:
    """The column of the shard key of a sharded table."""
    name = table.info[INFO]["sharded_by"]
    for column in table.columns:
        if column.name == name:
            return column
    raise DeclarationError(f"Table {table.fullname} is sharded by {name!r}, which is none of its columns.")


def sharded_tables(metadata: MetaData) -> tuple[ShardedTable, ...]:
    """The sharded tables of a MetaData, checked."""
    return tuple(found for table in metadata.sorted_tables if (found := sharded_table(table)) is not None)
