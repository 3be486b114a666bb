"""Topologies at rest: the copy that each shard keeps, and the current one of the catalog.

A shard's copy is written in the transaction that changes its fence, so whoever is refused by the fence finds the
reason beside it. Readers take the highest version.
"""

from __future__ import annotations

from typing import Any

from psycopg import sql
from psycopg.types.json import Jsonb

from shardkit.core.keyrange import ArcSet
from shardkit.core.topology import Topology

from .connections import Connection

READ_COPY = "SELECT document FROM shardkit.topology ORDER BY version DESC LIMIT 1"
_WRITE_COPY = sql.SQL("""
WITH written AS (
    INSERT INTO shardkit.topology (version, digest, document)
    SELECT {version}, {digest}, {document}
    WHERE NOT EXISTS (SELECT FROM shardkit.topology WHERE version >= {version})
    RETURNING version
), gone AS (
    DELETE FROM shardkit.topology USING written WHERE topology.version < written.version
)
UPDATE shardkit.ownership SET bounds = {bounds}::bigint[] WHERE EXISTS (SELECT FROM written)
""")
READ_CURRENT = "SELECT document FROM shardkit.topologies WHERE state = 'current'"


def read_copy(connection: Connection) -> Topology | None:
    """The latest topology that a shard took, or None if it took none."""
    row = connection.execute(READ_COPY).fetchone()
    return Topology.from_json(row[0]) if row else None


def read_current(connection: Connection) -> Topology | None:
    """The topology that the catalog holds to be current, or None in a catalog without shards."""
    row = connection.execute(READ_CURRENT).fetchone()
    return Topology.from_json(row[0]) if row else None


def write_copy(connection: Connection, topology: Topology, shard_id: int) -> None:
    """Give a shard its copy, inside the caller's transaction; an older one than it has is not written. One that has
    left by this topology owns nothing."""
    values = _copied(topology, shard_id)
    connection.execute(_WRITE_COPY.format(**{name: sql.Placeholder(name) for name in values}), values)


def written_copy(topology: Topology, shard_id: int) -> sql.Composed:
    """What `write_copy` does, for a message with other statements."""
    return _WRITE_COPY.format(
        **{name: sql.Literal(value) for name, value in _copied(topology, shard_id).items()}
    )


def _copied(topology: Topology, shard_id: int) -> dict[str, Any]:
    owned = topology.owned(shard_id) if shard_id in topology.by_id else ArcSet()
    return {
        "version": topology.version,
        "digest": topology.digest,
        "document": Jsonb(topology.to_json()),
        "bounds": owned.bounds(),
    }
