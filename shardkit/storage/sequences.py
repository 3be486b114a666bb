"""Sequences that number the rows of a table: each server has its own, and rows that move bring their numbers along."""

from __future__ import annotations

from psycopg import sql

from shardkit.core.topology import ShardedTable

from .connections import Connection, value
from .predicate import relation

MARGIN = 1_000
"""So many numbers are left out, for what sessions hold in their caches (``CACHE``) and bring in later."""

# Of identity and serial columns, and of defaults that name a sequence of nobody's.
_SEQUENCES = """
SELECT a.attname,
       coalesce(pg_get_serial_sequence(%(table)s, a.attname), (
           SELECT s.oid::regclass::text FROM pg_depend p JOIN pg_class s ON s.oid = p.refobjid AND s.relkind = 'S'
           WHERE p.classid = 'pg_attrdef'::regclass AND p.objid = d.oid AND p.refclassid = 'pg_class'::regclass
           LIMIT 1))
FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
WHERE a.attrelid = %(table)s::regclass AND a.attnum > 0 AND NOT a.attisdropped
"""


def of_table(connection: Connection, table: ShardedTable) -> dict[str, str]:
    """The sequence of each column that has one, by the column's name."""
    name = relation(table).as_string(connection)
    rows = connection.execute(_SEQUENCES, {"table": name}).fetchall()
    return {column: sequence for column, sequence in rows if sequence is not None}


def pass_over(source: Connection, target: Connection, pairs: list[tuple[str, str]]) -> None:
    """Set each target sequence beyond what its source sequence has given out, unless it is there already."""
    for ours, theirs in pairs:
        given = value(source, "SELECT pg_sequence_last_value(%s::text::regclass)", (ours,))
        if given is not None:
            target.execute(
                sql.SQL(
                    "SELECT setval(%(name)s::text::regclass, %(next)s) "
                    "WHERE coalesce(pg_sequence_last_value(%(name)s::text::regclass), 0) < %(next)s"
                ),
                {"name": theirs, "next": given + MARGIN},
            )
