"""What unfinished moves leave on a shard, found by name, each with the statement that removes it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from uuid import UUID

from psycopg import sql

from shardkit.storage.connections import Connection


@dataclass(frozen=True, slots=True)
class Leftover:
    """A thing that belongs to no unfinished transfer, and the SQL that removes it."""

    what: str
    remedy: str


# Each returns: what it is, the first digits of the cluster's id or null, the transfer's id or null, the remedy.
_OF_TRANSFERS = (
    r"""
    SELECT format('subscription %I', subname), substring(subname FROM '^shardkit_([0-9a-f]{8})_\d+(?:_back)?$'),
           substring(subname FROM '^shardkit_[0-9a-f]{8}_(\d+)(?:_back)?$')::bigint,
           format('ALTER SUBSCRIPTION %1$I DISABLE; ALTER SUBSCRIPTION %1$I SET (slot_name = NONE); '
                  'DROP SUBSCRIPTION %1$I;', subname)
    FROM pg_subscription
    WHERE subdbid = (SELECT oid FROM pg_database WHERE datname = current_database()) AND subname ~ '^shardkit_'
    """,
    r"""
    SELECT format('publication %I', pubname), substring(pubname FROM '^shardkit_([0-9a-f]{8})_\d+(?:_back)?$'),
           substring(pubname FROM '^shardkit_[0-9a-f]{8}_(\d+)(?:_back)?$')::bigint,
           format('DROP PUBLICATION %I;', pubname)
    FROM pg_publication WHERE pubname ~ '^shardkit_'
    """,
    r"""
    SELECT format('replication slot %I', slot_name), substring(slot_name FROM '^shardkit_([0-9a-f]{8})_\d+(?:_back)?$'),
           substring(slot_name FROM '^shardkit_[0-9a-f]{8}_(\d+)(?:_back)?$')::bigint,
           format('SELECT pg_drop_replication_slot(%L);', slot_name)
    FROM pg_replication_slots WHERE database = current_database() AND slot_name ~ '^shardkit_'
    """,
    r"""
    SELECT format('trigger %I on %I.%I', tgname, n.nspname, c.relname), NULL,
           substring(tgname FROM '^zz_shardkit_(\d+)_')::bigint,
           format('DROP TRIGGER %I ON %I.%I;', tgname, n.nspname, c.relname)
    FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE NOT tgisinternal AND tgparentid = 0 AND tgname ~ '^zz_shardkit_'
    """,
    r"""
    SELECT format('function shardkit.%I', proname), NULL, substring(proname FROM '^note_(\d+)_')::bigint,
           format('DROP FUNCTION shardkit.%I() CASCADE;', proname)
    FROM pg_proc WHERE pronamespace = 'shardkit'::regnamespace AND proname ~ '^note_'
    """,
    r"""
    SELECT format('marker %s', relname), NULL, substring(relname FROM '^mov(?:ing|ed)_(\d+)$')::bigint,
           format('DROP TABLE shardkit.%I;', relname)
    FROM pg_class WHERE relnamespace = 'shardkit'::regnamespace AND relname ~ '^mov(ing|ed)_\d+$'
    """,
    """
    SELECT 'refusal of writes to moved rows', NULL, transfer_id,
           format('DELETE FROM shardkit.moved WHERE transfer_id = %s;', transfer_id)
    FROM shardkit.moved
    """,
    """
    SELECT 'note of where it opened', NULL, transfer_id,
           format('DELETE FROM shardkit.opened WHERE transfer_id = %s;', transfer_id)
    FROM shardkit.opened
    """,
    """
    SELECT format('%s notes of written rows', count(*)), NULL, transfer_id,
           format('DELETE FROM shardkit.changed WHERE transfer_id = %s;', transfer_id)
    FROM shardkit.changed GROUP BY transfer_id
    """,
)
# Of jobs, and set back when the last transfer is done: what it is, the remedy.
_OF_JOBS = (
    """
    SELECT format('changed replica identity of %s', relation),
           format('ALTER TABLE %s REPLICA IDENTITY %s; DELETE FROM shardkit.replica_identity WHERE relation = %L;',
                  relation,
                  CASE kind WHEN 'f' THEN 'FULL' WHEN 'n' THEN 'NOTHING'
                            WHEN 'i' THEN format('USING INDEX %I', index_name) ELSE 'DEFAULT' END,
                  relation)
    FROM shardkit.replica_identity
    """,
    r"""
    SELECT format('index %I.%I', n.nspname, c.relname), format('DROP INDEX CONCURRENTLY %I.%I;', n.nspname, c.relname)
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('i', 'I') AND c.relname ~ '^shardkit_identity_'
    """,
)


def leftovers(connection: Connection, cluster: UUID, running: Collection[int]) -> list[Leftover]:
    """What is left on a shard; ``running`` are the ids of the transfers that may have things there."""
    found = [
        Leftover(what, remedy)
        for query in _OF_TRANSFERS
        for what, digits, transfer, remedy in connection.execute(sql.SQL(query))
        if transfer not in running or digits not in (None, cluster.hex[:8])
    ]
    if not running:
        found += [Leftover(*row) for query in _OF_JOBS for row in connection.execute(sql.SQL(query))]
    return found
