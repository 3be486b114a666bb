"""What unfinished moves leave on a shard, found by name, each with the statement that removes it.

The doctor and the audit ask for them; a repair removes them by the very statements that the operator was shown.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from uuid import UUID

from psycopg import sql

from . import setaside
from .change import claim
from .connections import SHORT, Connection, transaction
from .setaside import SetAside

_REMOVING = (*SHORT, ("lock_timeout", "50ms"), ("synchronous_commit", "on"))
"""As in a cutover: so long, at most, applications queue behind DDL."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """A thing of a move, and the SQL that removes it.

    ``transfer`` is the transfer that it is named after; None for what a whole job makes, or where the name tells none.
    ``foreign`` says that it bears the name of another cluster; ``index`` is set where an index is missing that was set
    aside, and is put back.
    """

    what: str
    remedy: str
    transfer: int | None
    foreign: bool
    of_job: bool = False
    index: SetAside | None = None


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
           format('DROP TRIGGER IF EXISTS %I ON %I.%I;', tgname, n.nspname, c.relname)
    FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE NOT tgisinternal AND tgparentid = 0 AND tgname ~ '^zz_shardkit_'
    """,
    r"""
    SELECT format('function shardkit.%I', proname), NULL, substring(proname FROM '^(?:note|stand)_(\d+)_')::bigint,
           format('DROP FUNCTION IF EXISTS shardkit.%I() CASCADE;', proname)
    FROM pg_proc WHERE pronamespace = 'shardkit'::regnamespace AND proname ~ '^(note|stand)_'
    """,
    r"""
    SELECT format('index %I.%I', n.nspname, c.relname), NULL,
           substring(c.relname FROM '^shardkit_position_(\d+)_')::bigint,
           format('DROP INDEX CONCURRENTLY IF EXISTS %I.%I;', n.nspname, c.relname)
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind = 'i' AND c.relname ~ '^shardkit_position_'
    """,
    r"""
    SELECT format('marker %s', relname), NULL, substring(relname FROM '^mov(?:ing|ed)_(\d+)$')::bigint,
           format('DROP TABLE IF EXISTS shardkit.%I;', relname)
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
    SELECT format('index %I.%I', n.nspname, c.relname),
           format('DROP INDEX CONCURRENTLY IF EXISTS %I.%I;', n.nspname, c.relname)
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('i', 'I') AND c.relname ~ '^shardkit_identity_'
    """,
)


def things(connection: Connection, cluster: UUID) -> list[Leftover]:
    """Everything of moves that is on a shard, whether it has to be there or not."""
    found = [
        Leftover(what, remedy, transfer, digits not in (None, cluster.hex[:8]))
        for query in _OF_TRANSFERS
        for what, digits, transfer, remedy in connection.execute(sql.SQL(query))
    ]
    found += [
        Leftover(what, remedy, None, foreign=False, of_job=True)
        for query in _OF_JOBS
        for what, remedy in connection.execute(sql.SQL(query))
    ]
    found += [
        Leftover(
            f"note of the index {index}, set aside for a copy",
            setaside.remedy(connection, index),
            None,
            foreign=False,
            of_job=True,
            index=index,
        )
        for index in setaside.noted(connection)
    ]
    return found


def leftovers(connection: Connection, cluster: UUID, running: Collection[int]) -> list[Leftover]:
    """What is left on a shard; ``running`` are the ids of the transfers that may have things there."""
    return [thing for thing in things(connection, cluster) if not _is_in_use(thing, running)]


def _is_in_use(thing: Leftover, running: Collection[int]) -> bool:
    return bool(running) if thing.of_job else thing.transfer in running and not thing.foreign


def remove(connection: Connection, left: Leftover, token: int) -> None:
    """Remove it; one attempt, and none at what is gone.

    ``psycopg.errors.LockNotAvailable`` where a table is in use, ``ObjectInUse`` where a slot is.
    """
    if left.index is not None:
        setaside.put_back(connection, left.index, token)
        return
    statement = left.remedy.encode()  # made by the server, with every name quoted
    if not left.remedy.startswith("DROP INDEX CONCURRENTLY"):
        with transaction(connection, *_REMOVING):
            claim(connection, token)
            connection.execute(statement)
        return
    with transaction(connection, *SHORT):
        claim(connection, token)
    connection.execute(statement)
