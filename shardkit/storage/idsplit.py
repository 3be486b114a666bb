"""Making the sequences of primary keys disjoint over the shards, so that no two rows get one id.

The sequence of the shard with the number n is set to give what leaves n when divided by the stride, above everything
that was given before on any shard (the *floor*); then the topology records it. Driven by `shardkit ids split`; the
caller holds the lease, so no row moves meanwhile. `storage.idjoin` does the same for a shard that joins.

No number is given twice, whoever writes meanwhile: ALTER SEQUENCE waits for every transaction that has taken a number
and makes all sessions drop those they keep (CACHE), on all shards before anywhere a number of the new kind is given. A
crash leaves nothing recorded, and the next run begins again.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import psycopg
from psycopg import sql

from shardkit.core.errors import JobRunning, MoveWaiting, PreflightFailed
from shardkit.core.topology import ShardedTable, Split, Topology

from . import change, inspection
from .catalog import Catalog
from .connections import Connection, ShardConnections, transaction
from .failpoints import failpoint
from .idplan import Found, Planned, find, highest, is_settled, plan
from .numbering import Numbering, is_split, state
from .predicate import relation

PATIENCE = 60.0
_SHOWN = 10
"""So many ids are named that two shards have."""


def split(
    catalog: Catalog,
    shards: ShardConnections,
    names: Sequence[str] = (),
    stride: int | None = None,
    *,
    patience: float = PATIENCE,
    report: change.Report = lambda reason: None,
) -> list[Planned]:
    """Split the ids of tables as `plan` says, and record it; what was done.

    Applications go on; inserts into a table wait for a moment while its sequences are altered. ``patience`` is how
    long, in seconds, it waits for transactions that have taken a number; then `MoveWaiting`. Raises what `plan` does,
    `JobRunning`, and `PreflightFailed` if rows of two shards have the same ids already.
    """
    change.settle_no_job(catalog, shards)
    topology = catalog.require_current()
    _refuse_moving(catalog, topology)
    for planned in plan(topology, shards, names, stride):
        if planned.done:
            continue
        found = find(topology, shards, planned.table, planned.column)
        known = is_split(topology, planned.table)
        floor = _alter(catalog, shards, topology, planned, found, patience, report)
        failpoint("ids.altered")
        if known is None or not is_settled(found, known):
            _refuse_doubles(topology, shards, planned)
        table = planned.table
        made = Split(table.schema, table.name, planned.column, planned.stride, floor)
        topology = change.apply(catalog, shards, _recording(made))
        change.announce(catalog, shards, topology)
    report(None)
    return plan(topology, shards, names, stride)


def _recording(made: Split) -> Callable[[Topology | None, int], Topology]:
    def record(now: Topology | None, version: int) -> Topology:
        assert now is not None
        return now.with_splits(version, [made])

    return record


def _refuse_moving(catalog: Catalog, topology: Topology) -> None:
    catalog.require_no_job()
    if marked := [shard.name for shard in topology.shards if shard.in_transit]:
        raise JobRunning(f"Rows are in transit on {', '.join(marked)}.", hint="`shardkit doctor` tells more.")


def _alter(
    catalog: Catalog,
    shards: ShardConnections,
    topology: Topology,
    planned: Planned,
    found: Found,
    patience: float,
    report: change.Report,
) -> int:
    """Alter the table's sequence on every shard, all at once; the floor. Tries only when nobody holds one for long, so
    that inserts never queue behind a lock that waits for a long transaction."""
    deadline, pause = time.monotonic() + patience, 0.002
    while True:
        holder = _holder(topology, shards, planned)
        if holder is None:
            try:
                return _alter_once(catalog, shards, topology, planned, found)
            except psycopg.errors.LockNotAvailable:
                holder = _holder(topology, shards, planned, seconds=0.0)
        if holder is not None:
            report(f"the sequence of {planned.table} is held by {holder}")
        if time.monotonic() > deadline:
            raise MoveWaiting(
                f"The sequence of {planned.table} could not be altered within {patience:.0f} s"
                + (f": it is held by {holder}." if holder else "."),
                hint="End that transaction, then run it again.",
            )
        time.sleep(pause)
        pause = min(pause * 1.5, 0.25)


def _holder(
    topology: Topology, shards: ShardConnections, planned: Planned, seconds: float = change.LOCK_TIMEOUT
) -> str | None:
    for shard, part in zip(topology.shards, planned.parts, strict=True):
        found = inspection.holder_of(
            shards.get(shard), part.sequence, inspection.Against.WRITERS, seconds=seconds
        )
        if found is not None:
            return f"{found}, on shard {shard.name}"
    return None


def _alter_once(
    catalog: Catalog, shards: ShardConnections, topology: Topology, planned: Planned, found: Found
) -> int:
    table, column, stride = found.table, found.column, planned.stride
    # That of the rows, as they were; what the sequences gave since is known to themselves.
    floor = planned.floor
    with ExitStack() as stack:
        states: dict[int, Numbering] = {}
        for shard in topology.shards:
            before, connection = found.by_shard[shard.id], shards.get(shard)
            stack.enter_context(transaction(connection, *change.CLOSING))
            change.claim(connection, catalog.token or 0)
            # This takes the lock: whoever has taken a number has ended, whoever comes waits and keeps none of before.
            _set(connection, before.sequence, sql.SQL("INCREMENT BY {} NO CYCLE").format(sql.Literal(stride)))
            states[shard.id] = state(connection, before.sequence, before.kind)
            floor = max(floor, states[shard.id].given)
            if inspection.is_indexed(connection, table, column):
                floor = max(floor, highest(connection, table, column))
        for shard in topology.shards:
            restart(shards.get(shard), states[shard.id], floor, stride, shard.id)
        failpoint("ids.restarted")
    return floor


def restart(connection: Connection, numbering: Numbering, floor: int, stride: int, residue: int) -> None:
    """Have a sequence go on above ``floor`` with the numbers of one residue, in the caller's transaction."""
    try:
        first = numbering.first(floor, stride, residue)
    except ValueError as error:
        raise PreflightFailed(f"The ids cannot be split: {error}.", reasons=[str(error)]) from error
    _set(
        connection,
        numbering.sequence,
        sql.SQL("INCREMENT BY {} NO CYCLE START WITH {first} RESTART WITH {first}").format(
            sql.Literal(stride), first=sql.Literal(first)
        ),
    )


def _set(connection: Connection, sequence: str, options: sql.Composable) -> None:
    # The name is as the server writes it: qualified and quoted.
    connection.execute(sql.SQL("ALTER SEQUENCE {} {}").format(sql.SQL(sequence), options))


def _refuse_doubles(topology: Topology, shards: ShardConnections, planned: Planned) -> None:
    """`PreflightFailed` if rows of two shards have one id: from before the sequences were disjoint."""
    if len(topology.shards) == 1:
        return
    with ExitStack() as stack:
        streams = [_ids(stack, shards.get(shard), planned.table, planned.column) for shard in topology.shards]
        doubles: list[int] = []
        before: int | None = None
        for number in heapq.merge(*streams):
            if number == before and (not doubles or doubles[-1] != number):
                doubles.append(number)
                if len(doubles) == _SHOWN:
                    break
            before = number
    if doubles:
        listed = ", ".join(map(str, doubles)) + (", ..." if len(doubles) == _SHOWN else "")
        raise PreflightFailed(
            f"Rows of {planned.table} have the same {planned.column} on two shards: {listed}",
            hint="The sequences are disjoint now. Give one of two such rows another id, then run it again.",
            reasons=[f"{planned.table}.{planned.column}: {listed}"],
        )


def _ids(stack: ExitStack, connection: Connection, table: ShardedTable, column: str) -> Iterator[int]:
    stack.enter_context(transaction(connection))
    cursor = stack.enter_context(connection.cursor("shardkit_ids"))
    cursor.itersize = 10_000
    # Of a key of several columns a number may stand in many rows of one shard.
    cursor.execute(
        sql.SQL("SELECT DISTINCT {column} FROM {table} ORDER BY {column}").format(
            column=sql.Identifier(column), table=relation(table)
        )
    )
    return (number for (number,) in cursor)
