"""Digests of rows: equal on two servers exactly where the rows are, whatever their order.

A row's digest is the server's 64-bit text hash of its columns in the order of their names; digests of many rows are
summed, so order does not matter, and the count goes with the sum. Everything is computed on the servers; only one line
a chunk, or one a key, comes back.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import NamedTuple

from psycopg import sql

from shardkit.core.keyrange import Arc, ArcSet
from shardkit.core.topology import DeclaredTable, ShardedTable

from .connections import Connection, transaction
from .predicate import bigint, position, relation, within

TEXT_FORM = (
    ("DateStyle", "ISO, YMD"),
    ("IntervalStyle", "iso_8601"),
    ("TimeZone", "UTC"),
    ("extra_float_digits", "1"),
    ("bytea_output", "hex"),
    ("lc_monetary", "C"),
    ("row_security", "off"),
)
"""Settings of a transaction that digests rows: all that the text form of a value depends on."""
ROWS_A_CHUNK = 20_000
_KEY_ARRAY = {"int": "int8[]", "text": "text[]", "uuid": "uuid[]"}


class Digest(NamedTuple):
    """Number of rows and the sum of their digests."""

    rows: int
    sum: int


def snapshot(connection: Connection, *settings: tuple[str, str]) -> AbstractContextManager[Connection]:
    """A transaction in which digests may be computed, with further settings."""
    return transaction(connection, *TEXT_FORM, ("transaction_read_only", "on"), *settings)


def chunks(arcs: ArcSet, rows: float) -> list[Arc]:
    """Cut arcs into pieces of about `ROWS_A_CHUNK` rows each, if ``rows`` are spread evenly over them."""
    size = max(1, round(arcs.width * ROWS_A_CHUNK / max(rows, 1)))
    pieces = []
    for first, last in arcs:
        number = max(1, -(-(last - first + 1) // size))
        width = (last - first + 1) / number
        starts = [first + int(width * n) for n in range(number)] + [last + 1]
        pieces += [Arc(a, b - 1) for a, b in pairwise(starts) if a < b]
    return pieces


def _row_digest(columns: Sequence[str]) -> sql.Composed:
    names = sql.SQL(", ").join(map(sql.Identifier, columns))
    return sql.SQL("sum(hashtextextended(ROW({})::text, 0))").format(names)


def of_table(connection: Connection, table: DeclaredTable, columns: Sequence[str]) -> Digest:
    """Digest of all rows of a table."""
    query = sql.SQL("SELECT count(*), coalesce({digest}, 0) FROM {table}").format(
        digest=_row_digest(columns), table=relation(table)
    )
    rows, total = connection.execute(query).fetchone() or (0, 0)
    return Digest(rows, int(total))


def by_chunk(
    connection: Connection, table: ShardedTable, columns: Sequence[str], pieces: Sequence[Arc]
) -> dict[int, Digest]:
    """Digest of each chunk that holds rows, by the chunk's place in ``pieces`` (sorted, disjoint); one scan."""
    if not pieces:
        return {}
    bounds = "{" + ",".join(str(piece.first) for piece in pieces) + "}"
    query = sql.SQL(
        "SELECT width_bucket({place}, {bounds}::bigint[]) - 1, count(*), {digest} "
        "FROM {table} WHERE {inside} GROUP BY 1"
    ).format(
        place=position(table),
        bounds=sql.Literal(bounds),
        digest=_row_digest(columns),
        table=relation(table),
        inside=within(table, ArcSet(pieces)),
    )
    return {place: Digest(rows, int(total)) for place, rows, total in connection.execute(query)}


def by_key_of_chunk(
    connection: Connection, table: ShardedTable, columns: Sequence[str], piece: Arc
) -> dict[str, Digest]:
    """Digest of the rows of each key (as text) of one chunk."""
    query = sql.SQL(
        "SELECT {key}::text, count(*), {digest} FROM {table} WHERE {place} BETWEEN {first} AND {last} GROUP BY {key}"
    ).format(
        key=sql.Identifier(table.key),
        digest=_row_digest(columns),
        table=relation(table),
        place=position(table),
        first=bigint(piece.first),
        last=bigint(piece.last),
    )
    return {key: Digest(rows, int(total)) for key, rows, total in connection.execute(query)}


def by_key(
    connection: Connection, table: ShardedTable, columns: Sequence[str], keys: Sequence[str]
) -> dict[str, Digest]:
    """Digest of the rows of each of these keys (as text) that has any; by an index on the key where there is one."""
    query = sql.SQL(
        "SELECT {key}::text, count(*), {digest} FROM {table} WHERE {key} = ANY({keys}::{array}) GROUP BY {key}"
    ).format(
        key=sql.Identifier(table.key),
        digest=_row_digest(columns),
        table=relation(table),
        # A literal and no parameter, beside which a percent sign in a name would be taken for another one.
        keys=sql.Literal(list(keys)),
        array=sql.SQL(_KEY_ARRAY[table.key_type]),
    )
    return {key: Digest(rows, int(total)) for key, rows, total in connection.execute(query)}
