"""Arcs as SQL: the position of a key column, and whether it lies within arcs.

Only immutable built-in functions are used, so that the same text serves queries, row filters of publications and
WHEN clauses of triggers. Values are literals: none of those places takes parameters.
"""

from __future__ import annotations

from psycopg import sql

from shardkit.core.keyrange import ArcSet
from shardkit.core.topology import DeclaredTable, KeyType, ShardedTable

HASH_FUNCTIONS: dict[KeyType, str] = {
    "int": "hashint8extended",
    "text": "hashtextextended",
    "uuid": "uuid_hash_extended",
}

# Measured: an OR of BETWEENs costs 35 ns an arc and row, width_bucket 200 ns however many there are; but only BETWEEN
# can use an index on the position.
BETWEEN_AT_MOST = 4


def relation(table: DeclaredTable) -> sql.Identifier:
    """The qualified name of a table."""
    return sql.Identifier(table.schema, table.name)


def position(table: ShardedTable, row: str | None = None) -> sql.Composed:
    """The position of a row: of the table's key column, or of that of a row variable (``NEW``, ``OLD``)."""
    column: sql.Composable = sql.Identifier(table.key)
    if row is not None:
        column = sql.SQL("{}.{}").format(sql.SQL({"NEW": "NEW", "OLD": "OLD"}[row]), column)
    function = sql.Identifier("pg_catalog", HASH_FUNCTIONS[table.key_type])
    return sql.SQL("{}({}, 0)").format(function, column)


def within(table: ShardedTable, arcs: ArcSet, row: str | None = None) -> sql.Composed:
    """Whether a row's position lies within ``arcs``; false for no arcs."""
    place = position(table, row)
    if not arcs:
        return sql.SQL("false").format()
    if len(arcs) <= BETWEEN_AT_MOST:
        between = sql.SQL("{} BETWEEN {} AND {}")
        return sql.SQL("({})").format(
            sql.SQL(" OR ").join(between.format(place, bigint(arc.first), bigint(arc.last)) for arc in arcs)
        )
    bounds = "{" + ",".join(map(str, arcs.bounds())) + "}"
    return sql.SQL("((pg_catalog.width_bucket({}, {}::bigint[]) & 1) = 1)").format(place, sql.Literal(bounds))


def bigint(number: int) -> sql.Composed:
    """A bigint literal; quoted, since -9223372036854775808 is not an integer token to the parser."""
    return sql.SQL("{}::bigint").format(sql.Literal(str(number)))
