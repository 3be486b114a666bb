"""The fence relations of a shard, from the mover's side.

A shard's fence is an empty relation whose name is a topology (`core.topology.Fence`). A transaction of an application
holds it in ACCESS SHARE mode from BEGIN on. A change that takes something away *closes*: it locks every fence relation
in ACCESS EXCLUSIVE mode, so that all transactions which began under an older topology have ended, and renames. A
change that only gives *opens*: it creates the new name beside the old one, and both are true. The guard that
applications take lives in `storage.guard`.

Every function here works inside a transaction of the caller, who has written the mover's token in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from psycopg import sql

from shardkit.core.topology import Fence, Topology

from .connections import Connection
from .topologies import write_copy, written_copy

RELATIONS = (
    r"SELECT relname FROM pg_class WHERE relnamespace = 'shardkit'::regnamespace AND relname ~ '^fence_\d+_'"
)

WRITERS_LOCK = 0x73686172
"""First key of the advisory locks that writers of moving rows hold (`storage.sourceguard`), the transfer's number the
second."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A session, or a prepared transaction, that holds a fence or has written a moving row."""

    pid: int | None
    gid: str | None
    user: str | None
    application: str | None
    age_seconds: float
    query: str | None

    def __str__(self) -> str:
        if self.gid is not None:
            return f"prepared transaction {self.gid!r} of {self.user}, {self.age_seconds:.1f} s old"
        text = " ".join((self.query or "").split())[:80]
        return (
            f"pid {self.pid}, user {self.user}, application {self.application or '-'}, "
            f"transaction {self.age_seconds:.1f} s old: {text}"
        )


def _qualified(relation: str) -> sql.Identifier:
    return sql.Identifier("shardkit", relation)


def relations(connection: Connection) -> set[str]:
    """Names of the fence relations that are there."""
    return {name for (name,) in connection.execute(RELATIONS)}


def guard(connection: Connection, fence: Fence) -> None:
    """Take the guard as an application does; ``psycopg.errors.UndefinedTable`` if the topology is not current."""
    connection.execute(sql.SQL("LOCK TABLE {} IN ACCESS SHARE MODE").format(_qualified(fence.relation)))


def newest(names: Iterable[str]) -> int:
    """The highest version among fence relations."""
    return max((int(name.split("_")[1]) for name in names), default=0)


def guard_newest(connection: Connection, fence: Fence) -> bool:
    """Take the guard, as `guard`; whether the shard has no newer fence beside it.

    An opened shard keeps its older names for a while. Who goes by the catalog's topology and deletes rows must not be
    let through by one of those.
    """
    guard(connection, fence)
    return newest(relations(connection)) <= fence.version


def lock_all(connection: Connection, names: set[str]) -> None:
    """Lock every fence relation against everybody. Waits as long as ``lock_timeout`` allows.

    ``names`` are all that there are, asked for behind the mover's token in the same transaction: whoever makes one has
    to write that first.
    """
    if names:
        tables = sql.SQL(", ").join(_qualified(name) for name in sorted(names))
        connection.execute(sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(tables))


def close(names: set[str], topology: Topology, shard_id: int) -> sql.Composed:
    """What puts the fence of ``topology`` in place of ``names``, which are locked then, and writes the copy.

    Several statements, to be sent as one message; not pipelined, see `connections.at_once`.
    """
    new = topology.fence_on(shard_id).relation
    if not names:  # restored from a dump, which leaves them out
        return _joined(_created(new), written_copy(topology, shard_id))
    kept = new if new in names else max(names, key=lambda name: int(name.split("_")[1]))
    commands = [sql.SQL("DROP TABLE {}").format(_qualified(name)) for name in sorted(names - {kept})]
    if kept != new:
        commands.append(sql.SQL("ALTER TABLE {} RENAME TO {}").format(_qualified(kept), sql.Identifier(new)))
    return _joined(*commands, written_copy(topology, shard_id))


def open_beside(connection: Connection, topology: Topology, shard_id: int) -> None:
    """Create the fence of ``topology`` beside those that are there, and write the copy. Can be run twice."""
    name = topology.by_id[shard_id].fence.relation
    if name not in relations(connection):
        connection.execute(_created(name))
    write_copy(connection, topology, shard_id)


def _created(name: str) -> sql.Composed:
    return sql.SQL("CREATE TABLE {fence} (); GRANT SELECT ON {fence} TO PUBLIC").format(
        fence=_qualified(name)
    )


def _joined(*statements: sql.Composable) -> sql.Composed:
    return sql.SQL("; ").join(statements)


HOLDERS = r"""
SELECT a.pid, x.gid, coalesce(a.usename, x.owner), a.application_name,
       -- Whoever ends between the looks at pg_locks and at pg_stat_activity has no start any more.
       coalesce(extract(epoch FROM clock_timestamp() - coalesce(a.xact_start, x.prepared)), 0)::float8, a.query
FROM pg_locks l
LEFT JOIN pg_class c ON c.oid = l.relation AND c.relnamespace = 'shardkit'::regnamespace AND c.relname ~ '^fence_\d+_'
LEFT JOIN pg_stat_activity a ON a.pid = l.pid
-- A prepared transaction has no process; its lock on its own number says which it is.
LEFT JOIN pg_locks t ON l.pid IS NULL AND t.pid IS NULL AND t.locktype = 'transactionid'
    AND t.virtualtransaction = l.virtualtransaction
LEFT JOIN pg_prepared_xacts x ON x.transaction = t.transactionid
WHERE l.granted
  AND (c.oid IS NOT NULL OR l.locktype = 'advisory' AND l.classid = %s AND l.objsubid = 2)
  AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND l.pid IS DISTINCT FROM pg_backend_pid()
ORDER BY 5 DESC
"""


def holders(connection: Connection) -> list[Holder]:
    """Whom a closing of this shard waits for, oldest transaction first."""
    return [Holder(*row) for row in connection.execute(HOLDERS, (WRITERS_LOCK,))]
