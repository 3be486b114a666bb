"""Rows from one server to another through COPY, as blocks of bytes: none is made into a Python object."""

from __future__ import annotations

from collections.abc import Iterable

from psycopg import sql

from shardkit.core.topology import DeclaredTable

from .connections import Connection
from .predicate import relation


def pipe(
    source: Connection,
    target: Connection,
    table: DeclaredTable,
    columns: Iterable[str],
    where: sql.Composable | None = None,
) -> int:
    """Copy the rows of a table, those for which ``where`` holds; their number. Each side is in a transaction of the
    caller, whose settings (`digest.TEXT_FORM`) make text mean the same on both."""
    names = sql.SQL(", ").join(map(sql.Identifier, columns))
    read = sql.SQL("COPY (SELECT {} FROM {} WHERE {}) TO STDOUT").format(
        names, relation(table), where or sql.SQL("true")
    )
    write = sql.SQL("COPY {} ({}) FROM STDIN").format(relation(table), names)
    with source.cursor().copy(read) as rows, (into := target.cursor()).copy(write) as sink:
        for block in rows:
            sink.write(block)
    return into.rowcount
