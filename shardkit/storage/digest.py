"""Digests of rows: equal on two servers exactly where the rows are, whatever their order.

A row's digest is the server's 64-bit text hash of its columns in the order of their names; digests of many rows are
summed, so order does not matter, and the count goes with the sum. Everything is computed on the servers; only one line
a chunk, or one a row of those asked for, comes back. Which row it is says its identity (`Table.row_identity`); where
that is the shard key alone, all rows of the key stand for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any, NamedTuple

from psycopg import Cursor, sql

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
CHUNKS = 1 << 14
"""More chunks than about so many are not made of a table: of a larger one they have more rows each."""
BY_INDEX = (("enable_hashjoin", "off"), ("enable_mergejoin", "off"))
"""Settings under which a few rows are sought one by one, whatever the planner knows of the table."""
_ROW = sql.SQL("t")


class Digest(NamedTuple):
    """Number of rows and the sum of their digests."""

    rows: int
    sum: int


class Text(NamedTuple):
    """Number of rows and the SHA-256 of their text."""

    rows: int
    sha256: str


class Compared(NamedTuple):
    """What of a table is compared: the columns that say which row it is, all columns, and their types."""

    identity: tuple[str, ...]
    columns: tuple[str, ...]
    types: dict[str, str]


def snapshot(connection: Connection, *settings: tuple[str, str]) -> AbstractContextManager[Connection]:
    """A transaction in which digests may be computed, with further settings."""
    return transaction(connection, *TEXT_FORM, ("transaction_read_only", "on"), *settings)


def chunks(arcs: ArcSet, rows: float) -> list[Arc]:
    """Cut arcs into pieces of about `ROWS_A_CHUNK` rows each, if ``rows`` are spread evenly over them, and into no more
    than `CHUNKS` beside one for each arc."""
    size = max(1, arcs.width // CHUNKS, round(arcs.width * ROWS_A_CHUNK / max(rows, 1)))
    pieces = []
    for first, last in arcs:
        number = max(1, -(-(last - first + 1) // size))
        width = (last - first + 1) / number
        starts = [first + int(width * n) for n in range(number)] + [last + 1]
        pieces += [Arc(a, b - 1) for a, b in pairwise(starts) if a < b]
    return pieces


def _columns(names: Sequence[str]) -> sql.Composed:
    return sql.SQL(", ").join(sql.SQL("t.{}").format(sql.Identifier(name)) for name in names)


def _row_digest(columns: Sequence[str]) -> sql.Composed:
    return sql.SQL("sum(hashtextextended(ROW({})::text, 0))").format(_columns(columns))


def of_table(connection: Connection, table: DeclaredTable, columns: Sequence[str]) -> Digest:
    """Digest of all rows of a table."""
    query = sql.SQL("SELECT count(*), coalesce({digest}, 0) FROM {table} AS t").format(
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
        "FROM {table} AS t WHERE {inside} GROUP BY 1"
    ).format(
        place=position(table),
        bounds=sql.Literal(bounds),
        digest=_row_digest(columns),
        table=relation(table),
        inside=within(table, ArcSet(pieces)),
    )
    return {place: Digest(rows, int(total)) for place, rows, total in connection.execute(query)}


def identity_text(identity: Sequence[str], row: sql.Composable) -> sql.Composed:
    """Which row it is, as text that reads the same on both servers: a JSON object of the columns."""
    pairs = [
        part
        for name in identity
        for part in (sql.Literal(name), sql.SQL("{}.{}").format(row, sql.Identifier(name)))
    ]
    return sql.SQL("pg_catalog.jsonb_build_object({})::text").format(sql.SQL(", ").join(pairs))


def by_bucket_of_chunk(
    connection: Connection, table: ShardedTable, compared: Compared, piece: Arc, buckets: int
) -> dict[int, Digest]:
    """Digest of the rows of one chunk in ``buckets`` parts (a power of two), by the hash of which row it is."""
    query = sql.SQL("SELECT {bucket}, count(*), {digest} FROM {table} AS t WHERE {inside} GROUP BY 1").format(
        bucket=_bucket(compared, buckets),
        digest=_row_digest(compared.columns),
        table=relation(table),
        inside=_inside(table, piece),
    )
    return {bucket: Digest(rows, int(total)) for bucket, rows, total in connection.execute(query)}


def by_row_of_chunk(
    connection: Connection,
    table: ShardedTable,
    compared: Compared,
    piece: Arc,
    buckets: int,
    wanted: Sequence[int],
) -> dict[str, Digest]:
    """Digest of each row (see `identity_text`) of one chunk that falls into one of the ``wanted`` buckets."""
    query = sql.SQL(
        "SELECT {row}, count(*), {digest} FROM {table} AS t WHERE {inside} AND {bucket} = ANY({wanted}) GROUP BY 1"
    ).format(
        row=identity_text(compared.identity, _ROW),
        digest=_row_digest(compared.columns),
        table=relation(table),
        inside=_inside(table, piece),
        bucket=_bucket(compared, buckets),
        wanted=sql.SQL("{}::bigint[]").format(sql.Literal(list(wanted))),
    )
    return {row: Digest(rows, int(total)) for row, rows, total in connection.execute(query)}


def by_row(
    connection: Connection, table: ShardedTable, compared: Compared, rows: Sequence[str]
) -> dict[str, Digest]:
    """Digest of each of these rows (see `identity_text`) that is there; by an index, where `BY_INDEX` is set."""
    return read_by_row(ask_by_row(connection, table, compared, rows))


def ask_by_row(
    connection: Connection, table: ShardedTable, compared: Compared, rows: Sequence[str]
) -> Cursor[Any]:
    """The question of `by_row`, for `connections.at_once`; `read_by_row` has the answer."""
    query = sql.SQL(
        "SELECT {row}, count(*), {digest} FROM {table} AS t JOIN {wanted} ON {alike} GROUP BY 1"
    ).format(
        row=identity_text(compared.identity, _ROW),
        digest=_row_digest(compared.columns),
        table=relation(table),
        **_wanted(compared, rows),
    )
    return connection.execute(query)


def read_by_row(answer: Cursor[Any]) -> dict[str, Digest]:
    """The answer of `ask_by_row`."""
    return {row: Digest(found, int(total)) for row, found, total in answer}


def texts_by_row(
    connection: Connection, table: ShardedTable, compared: Compared, rows: Sequence[str]
) -> dict[str, Text]:
    """As `by_row`, with a digest that nobody can find another row for: enough to delete one of two rows by."""
    query = sql.SQL(
        "SELECT s.row, count(*), encode(sha256(string_agg(s.hash, ''::bytea ORDER BY s.hash)), 'hex') FROM ("
        "SELECT {row} AS row, sha256(convert_to(ROW({columns})::text, 'UTF8')) AS hash "
        "FROM {table} AS t JOIN {wanted} ON {alike}) AS s GROUP BY 1"
    ).format(
        row=identity_text(compared.identity, _ROW),
        columns=_columns(compared.columns),
        table=relation(table),
        **_wanted(compared, rows),
    )
    return {row: Text(found, hashed) for row, found, hashed in connection.execute(query)}


def delete_rows(table: ShardedTable, compared: Compared, rows: Sequence[str]) -> sql.Composed:
    """The statement that deletes these rows (see `identity_text`)."""
    return sql.SQL("DELETE FROM {table} AS t USING {wanted} WHERE {alike}").format(
        table=relation(table), **_wanted(compared, rows)
    )


def _wanted(compared: Compared, rows: Sequence[str]) -> dict[str, sql.Composable]:
    """Rows as a set that can be joined with the table ``t``, and the condition of that join."""
    named = sql.SQL(", ").join(
        # As the server itself writes the type.
        sql.SQL("{} {}").format(sql.Identifier(name), sql.SQL(compared.types[name]))
        for name in compared.identity
    )
    return {
        # A literal and no parameter, beside which a percent sign in a name would be taken for another one.
        "wanted": sql.SQL("pg_catalog.jsonb_to_recordset({rows}::jsonb) AS w ({named})").format(
            rows=sql.Literal("[" + ",".join(rows) + "]"), named=named
        ),
        "alike": sql.SQL(" AND ").join(
            sql.SQL("t.{0} = w.{0}").format(sql.Identifier(name)) for name in compared.identity
        ),
    }


def _bucket(compared: Compared, buckets: int) -> sql.Composed:
    return sql.SQL("(hashtextextended({}, 0) & {})").format(
        identity_text(compared.identity, _ROW), bigint(buckets - 1)
    )


def _inside(table: ShardedTable, piece: Arc) -> sql.Composed:
    return sql.SQL("{} BETWEEN {} AND {}").format(position(table), bigint(piece.first), bigint(piece.last))
