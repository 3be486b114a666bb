"""Reference tables on the servers: whether they are the same everywhere, and their copy to a shard that joins.

Rows go from server to server through COPY; none is made into a Python object. Driven by `storage.membership` and the
doctor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import psycopg
from psycopg import sql

from shardkit.core.errors import MoveWaiting
from shardkit.core.topology import ReferenceTable

from . import change, digest, rowcopy, tables
from .connections import Connection, transaction
from .digest import Digest
from .predicate import relation
from .tables import Table

# Replica: rows come as they are, whatever triggers and foreign keys would make of them.
_COPYING = (*digest.TEXT_FORM, ("session_replication_role", "replica"), ("synchronous_commit", "on"))


def problems(table: ReferenceTable, found: Table | None) -> list[str]:
    """Why the table cannot be a reference table as the server has it; empty if it can."""
    if found is None:
        return [f"table {table} does not exist"]
    if found.kind not in ("r", "p"):
        return [f"{table} is no table"]
    reasons = []
    for column in found.columns:
        made = column.default is not None and not column.generated and not tables.is_constant(column.default)
        if column.identity or made:
            what = "an identity" if column.identity else f"DEFAULT {column.default}"
            reasons.append(f"column {table}.{column.name} has {what}, which each shard makes by itself")
    return reasons


def digest_of(connection: Connection, table: ReferenceTable) -> Digest | None:
    """The digest of a table's rows; None if the table is missing. In a transaction with `digest.TEXT_FORM`."""
    found = tables.describe(connection, table)
    return None if found is None else digest.of_table(connection, table, [c.name for c in found.columns])


def digests(connections: Mapping[str, Connection], table: ReferenceTable) -> dict[str, Digest | None]:
    """The digest on each server, by name."""
    found: dict[str, Digest | None] = {}
    for name, connection in connections.items():
        with digest.snapshot(connection):
            found[name] = digest_of(connection, table)
    return found


def copy(source: Connection, target: Connection, token: int, wanted: Iterable[ReferenceTable]) -> None:
    """Make the tables of the target what they are on the source, in one transaction there; those that are already are
    not touched. The source is in a transaction of the caller. Can be run twice."""
    source.execute(
        "SELECT set_config(name, setting, true) FROM unnest(%s::text[], %s::text[]) AS s (name, setting)",
        ([name for name, _ in digest.TEXT_FORM], [setting for _, setting in digest.TEXT_FORM]),
    )
    with transaction(target, *_COPYING):
        change.claim(target, token)
        for table in wanted:
            try:
                if digest_of(source, table) != digest_of(target, table):
                    _copy_table(source, target, table)
            except psycopg.errors.QueryCanceled as error:
                raise MoveWaiting(
                    f"The reference table {table} could not be compared and copied while its writers wait: {error}"
                ) from error


def _copy_table(source: Connection, target: Connection, table: ReferenceTable) -> None:
    found = tables.describe(source, table)
    assert found is not None
    target.execute(sql.SQL("DELETE FROM {}").format(relation(table)))
    rowcopy.pipe(source, target, table, [c.name for c in found.columns if not c.generated])
