"""What could make a transfer fail later is looked for before its first byte; every reason is reported at once."""

from __future__ import annotations

import os
from collections.abc import Iterable

import psycopg

from shardkit.core.errors import IncompatibleServer, PreflightFailed, ShardUnreachable
from shardkit.core.move import Mode
from shardkit.core.topology import Shard, ShardedTable, Topology
from shardkit.storage import (
    claims,
    indoubt,
    inspection,
    numbering,
    replication,
    sequences,
    servers,
    spare,
    standing,
    tables,
    traps,
)
from shardkit.storage.connections import Connection, ShardConnections, value
from shardkit.storage.predicate import relation

DDL_SECONDS = 1.0
"""Who holds a table for longer, in a way that keeps readers out, is altering it."""
ALLOW_FSYNC_OFF = "SHARDKIT_ALLOW_FSYNC_OFF"
"""Environment variable that lets servers with fsync=off take part: throw-away ones, of a demo or of tests."""


def check(
    topology: Topology,
    source: Shard,
    target: Shard,
    shards: ShardConnections,
    mode: Mode = Mode.AUTO,
    *,
    back: bool = False,
    in_force: bool = False,
) -> None:
    """Raise `PreflightFailed` with every reason why rows cannot move from ``source`` to ``target`` in this mode, and,
    if the source is to be kept, why they could not go ``back``. A topology that is not ``in_force`` yet may have fences
    that no shard has. `ShardUnreachable` where all else is well in the midst of a job, but one server cannot reach the
    other."""
    here, there = shards.get(source), shards.get(target)
    if mode is Mode.AUTO:
        mode = Mode.LOGICAL if servers.replicates_logically(here) else Mode.LOCKED
    replicated = mode is Mode.LOGICAL
    reasons: list[str] = []
    planned = None if in_force else topology.version
    for shard, connection in ((source, here), (target, there)):
        reasons += [f"shard {shard.name}: {reason}" for reason in server_problems(connection)]
        reasons += [f"shard {shard.name}: {reason}" for reason in _doubtful(connection)]
        reasons += [f"shard {shard.name}: {reason}" for reason in _behind(shard, connection, planned)]
    if replicated:
        need = spare.Need.of(there, len(topology.tables))
        reasons += [f"shard {source.name}: {reason}" for reason in _sender(here, need)]
        reasons += [
            f"shard {target.name}: {reason}" for reason in spare.short_of(spare.receiving(there), need)
        ]
    for table in topology.tables:
        altered = [*_altered_now(table, here, source), *_altered_now(table, there, target)]
        if altered:
            reasons += altered  # what it is can only be asked when that is over
            continue
        reasons += _table(topology, table, here, there, source, target)
        reasons += traps.foreign_keys(here, table, topology)
        if replicated:
            reasons += _unreplicated(table, here, there, source, target)
    if back and replicated:
        alone = spare.Need(dict.fromkeys(spare.Resource, 0))  # nothing is copied on the way back
        reasons += [f"to go back, shard {target.name}: {reason}" for reason in _sender(there, alone)]
        reasons += [
            f"to go back, shard {source.name}: {reason}" for reason in spare.short_of(spare.receiving(here), alone)
        ]
        reasons += _way_back(here, there, source, target)
    elif back:
        reasons.append(
            f"rows leave shard {source.name} in locked steps, which keep no source: move without --keep-source, or "
            "with wal_level = logical"
        )
    if not topology.tables:
        reasons.append(
            "no table is declared, so nothing would be carried (`shardkit schema declare MODULE:ATTR` declares them)"
        )
    away: list[str] = []
    if replicated:
        for giver, taker in ((source, target), (target, source)) if back else ((source, target),):
            error = _unreached(shards.get(giver), shards.get(taker))
            if error is not None:
                text = f"the server of {taker.name} cannot connect to {giver.name}: {' '.join(str(error).split())}"
                (away if isinstance(error, psycopg.errors.ConnectionFailure) else reasons).append(text)
    if away and in_force and not reasons:
        # They reached each other when the job was made.
        raise ShardUnreachable(f"T{'; '.join(away)[1:]}", shard=source.name)
    reasons += away
    if reasons:
        raise PreflightFailed(
            f"Rows cannot move from {source.name} to {target.name}:\n"
            + "\n".join(f"  - {text}" for text in reasons),
            reasons=reasons,
        )


def check_tables(
    topology: Topology,
    sharded: Iterable[ShardedTable],
    source: Shard,
    target: Shard,
    shards: ShardConnections,
    mode: Mode,
) -> None:
    """Raise `PreflightFailed` where a table has become one whose rows cannot move in this mode, as by DDL during the
    move."""
    here, there = shards.get(source), shards.get(target)
    reasons = []
    for table in sharded:
        reasons += _table(topology, table, here, there, source, target)
        if mode is Mode.LOGICAL:
            reasons += _unreplicated(table, here, there, source, target)
    if reasons:
        raise PreflightFailed(
            f"Tables were altered while their rows move from {source.name} to {target.name}:\n"
            + "\n".join(f"  - {text}" for text in reasons),
            hint="Make the tables alike and `shardkit rebalance resume`, or take the move back with `rebalance abort`.",
            reasons=reasons,
        )


def _behind(shard: Shard, connection: Connection, planned: int | None) -> list[str]:
    """That it went back in time. One that is about to join has no fence yet, or those of another number; fences of the
    version that is only ``planned`` nobody has."""
    if shard.fence.version == planned:
        return []
    claim, found = claims.read(connection), standing.fences(connection)
    if claim is None or claim.shard_id != shard.id or not found or found[-1].version >= shard.fence.version:
        return []
    todo = f"`shardkit shard readmit {shard.name}` brings it forward"
    return [f"it has the fence {found[-1].relation}, but the catalog relies on {shard.fence.relation}: {todo}"]


def server_problems(connection: Connection) -> list[str]:
    """Why no row can move to or from this server with this role; empty if rows can."""
    reasons = []
    try:
        servers.check_server(connection)
    except IncompatibleServer as error:
        reasons.append(error.message)
    fsync = servers.settings(connection, "fsync")["fsync"]
    if fsync != "on" and not os.environ.get(ALLOW_FSYNC_OFF):
        reasons.append(f"fsync is {fsync}: a crash would bring an old fence back")
    may_bypass, may_replicate, may_look = connection.execute(
        "SELECT rolsuper OR rolbypassrls, rolsuper OR rolreplication, pg_has_role('pg_read_all_stats', 'USAGE') "
        "FROM pg_roles WHERE rolname = current_user"
    ).fetchone() or (False, False, False)
    if not may_bypass:
        reasons.append(
            "the mover's role is neither superuser nor BYPASSRLS, so row security could hide rows from it"
        )
    if not may_replicate:
        reasons.append("the mover's role has no REPLICATION attribute")
    if not may_look:
        reasons.append(
            "the mover's role is no member of pg_read_all_stats, so it could not tell long transactions from short ones"
        )
    try:
        with connection.transaction(force_rollback=True):
            connection.execute("SET LOCAL session_replication_role = replica")
    except psycopg.errors.InsufficientPrivilege:
        reasons.append("the mover's role may not set session_replication_role (GRANT SET ON PARAMETER ...)")
    return reasons


def _doubtful(connection: Connection) -> list[str]:
    doubtful = connection.execute(
        "SELECT gid FROM pg_prepared_xacts WHERE database = current_database() ORDER BY prepared"
    ).fetchall()
    # Those of sessions come and go, and the mover ends what a crash left of them.
    return [
        f"prepared transaction {gid!r} is in doubt: commit it or roll it back"
        for (gid,) in doubtful
        if not indoubt.is_prepared_part(gid)
    ]


def _way_back(here: Connection, there: Connection, source: Shard, target: Shard) -> list[str]:
    reasons = []
    if not replication.may_begin_at(here):
        reasons.append(
            f"to go back, shard {source.name}: the mover's role may not call pg_replication_origin_advance and "
            "pg_replication_origin_progress"
        )
    reasons += [
        f"to go back, shard {shard.name}: shardkit's own tables are of an older version (run `shardkit init`)"
        for shard, connection in ((source, here), (target, there))
        if value(connection, "SELECT to_regclass('shardkit.opened')") is None
    ]
    return reasons


def _sender(source: Connection, need: spare.Need) -> list[str]:
    reasons = []
    if not servers.replicates_logically(source):
        reasons.append(
            "wal_level is not logical (ALTER SYSTEM SET wal_level = logical, then restart; or move with --mode locked)"
        )
    return reasons + spare.short_of(spare.sending(source), need)


def _table(
    topology: Topology,
    table: ShardedTable,
    here: Connection,
    there: Connection,
    source: Shard,
    target: Shard,
) -> list[str]:
    mine, other = tables.describe(here, table), tables.describe(there, table)
    reasons = tables.differences(table, mine, other)
    reasons += [f"shard {source.name}: {text}" for text in tables.key_problems(table, mine)]
    if mine is None or other is None:
        return reasons
    if mine.kind == other.kind == "p":
        reasons += traps.partitions(here, there, table)
    if value(here, "SELECT 1 FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid "
                   "WHERE i.inhparent = %s::regclass AND NOT c.relispartition", (_name(table, here),)):  # fmt: skip
        reasons.append(f"table {table} has inheritance children, which are not published with it")
    for shard, connection, what in ((source, here, "deleted"), (target, there, "replicated")):
        reasons += [
            f"{trigger} of {table} on {shard.name} fires for {what} rows of a move (ENABLE ALWAYS or REPLICA)"
            for trigger in inspection.eager_triggers(connection, table)
        ]
    reasons += [
        f"column {table}.{column} is {shown}: what its values name (large objects, say) is not carried along"
        for column, shown in inspection.of_this_server(here, table)
    ]
    apart = numbering.apart(there, topology, table, target.id)
    return reasons + sequences.problems(here, there, table, apart)


def _unreplicated(
    table: ShardedTable, here: Connection, there: Connection, source: Shard, target: Shard
) -> list[str]:
    """What logical replication does not carry."""
    mine, other = tables.describe(here, table), tables.describe(there, table)
    if mine is None or other is None:
        return []
    reasons = []
    for shard, connection in ((source, here), (target, there)):
        reasons += [
            f"{name} of table {table} on {shard.name} is unlogged or temporary, "
            "which logical replication does not carry"
            for name in inspection.unlogged(connection, table)
        ]
    if not mine.primary_key and any(column.generated for column in mine.columns):
        reasons.append(f"table {table} has generated columns and no primary key")
    if not mine.primary_key and mine.identity != "i":
        # Whole rows are sought on the target then, column by column.
        reasons += [
            f"table {table} has no primary key, and {column.name} is {column.type}, which has no equality"
            for column in mine.columns
            if not tables.has_equality(here, table, column)
        ]
    if mine.kind == "p" and table.key not in mine.identity_columns:
        reasons.append(f"partitioned table {table} has no primary key that holds {table.key}")
    if not inspection.is_indexed(here, table, table.key):
        reasons.append(
            f"table {table} has no index that begins with {table.key}: the last comparison would read all of it"
        )
    return reasons


def _altered_now(table: ShardedTable, connection: Connection, shard: Shard) -> list[str]:
    by = traps.ddl(connection, table, DDL_SECONDS)
    return [f"table {table} on {shard.name} is being altered by {by}"] if by else []


def _name(table: ShardedTable, connection: Connection) -> str:
    return relation(table).as_string(connection)


def _unreached(publisher: Connection, subscriber: Connection) -> psycopg.Error | None:
    """Why one server cannot subscribe to the other."""
    try:
        replication.probe_subscription(subscriber, "shardkit_probe", replication.peer_conninfo(publisher))
    except psycopg.Error as error:
        return error
    return None
