"""A shard leaves the cluster: weight 0 and the wish to leave first, then, when it owns nothing, the leaving itself.

The wish is part of the topology (`Shard.leaving`), so whoever finds it can go on: the job that drains the shard, then
`leave`, by the same command or the next mover. The leaving closes the shard itself, like any change that takes
something away: the commit that renames its fence decides. Its database keeps the rows of reference tables, the row
that says which shard it was, and a copy of the topology without it, by which routers that slept learn where to go;
`storage.claims` lets such a database join again. Driven by the mover and the commands. Never moves or deletes a row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any

from shardkit.core.errors import MoveWaiting, PreflightFailed, no_shard_yet
from shardkit.core.topology import Shard, Topology

from . import change, indoubt, tables
from .catalog import Catalog
from .connections import Connection, ShardConnections, value
from .failpoints import failpoint

_PREPARED = """
SELECT gid FROM pg_prepared_xacts
WHERE database = current_database() AND clock_timestamp() - prepared >= make_interval(secs => %s) ORDER BY prepared
"""
_DECISIONS = "SELECT gid FROM shardkit.decision ORDER BY gid LIMIT 3"
_DRAIN_SECONDS = 2.0
RECOVER = "`shardkit transactions recover` ends what can be ended"


# --- what is in the way ---------------------------------------------------------------------------------------------


def problems(current: Topology, shards: ShardConnections, names: Collection[str]) -> list[str]:
    """Every reason why these shards cannot leave, with the next step; changes nothing. Needs them to answer."""
    leaving = [shard for shard in current.shards if shard.name in names]
    staying = [shard for shard in current.shards if shard.name not in names]
    reasons = []
    if not staying:
        reasons.append("no shard would be left to own the keys: `shardkit shard add` another one first")
    elif not any(shard.weight for shard in staying):
        reasons.append(
            "no shard that stays has a weight above 0: `shardkit shard reweight` gives one of them a weight"
        )
    for shard in leaving:
        reasons += [f"shard {shard.name}: {text}" for text in _of_topology(current, shard)]
        reasons += [f"shard {shard.name}: {text}" for text in _on_server(current, shard, shards.get(shard))]
    deciding = {shard.id: shard for shard in leaving}
    for doubt in indoubt.look(current, shards):
        if doubt.decider in deciding and doubt.age_seconds >= indoubt.LIVE_SECONDS:
            where = ", ".join(part.shard.name for part in doubt.parts)
            reasons.append(
                f"shard {deciding[doubt.decider].name}: it decides transaction {doubt.gid}, which is prepared on "
                f"{where}: {RECOVER}"
            )
    return reasons


def _of_topology(current: Topology, shard: Shard) -> Iterator[str]:
    homes = [str(table) for table in current.homes if table.shard == shard.name]
    if homes:
        yield f"it is the home of {', '.join(homes)}, whose rows are nowhere else: keep it, and drain it by weight 0"
    pins = [pin for pin in current.pins if pin.shard == shard.id]
    if pins:
        listed = ", ".join(f"slot {pin.slot}" if pin.is_slot else f"a key in slot {pin.slot}" for pin in pins)
        yield f"pinned to it: {listed}; `shardkit shard unpin` them, or `shardkit shard pin` them to another"


def _on_server(current: Topology, shard: Shard, connection: Connection) -> Iterator[str]:
    for (gid,) in connection.execute(_PREPARED, (indoubt.LIVE_SECONDS,)):
        todo = RECOVER if indoubt.is_prepared_part(gid) else "commit it or roll it back"
        yield f"prepared transaction {gid!r} is in doubt: {todo}"
    if not current.owned(shard.id) and not shard.in_transit:
        yield from strays(current, connection)


def strays(current: Topology, connection: Connection) -> Iterator[str]:
    """Sharded tables that are not empty on a shard that owns nothing."""
    for table in current.tables:
        if tables.describe(connection, table) is not None and not tables.is_empty(connection, table):
            yield f"table {table} has rows, though no key of theirs belongs there: take them away, or where they belong"


def refuse(reasons: Collection[str], names: Collection[str]) -> None:
    """`PreflightFailed` with all reasons, if there are any."""
    if reasons:
        raise PreflightFailed(
            f"{', '.join(names)} cannot leave the cluster:\n" + "\n".join(f"  - {text}" for text in reasons),
            reasons=list(reasons),
        )


# --- the wish, and the leaving --------------------------------------------------------------------------------------


def record(
    catalog: Catalog,
    shards: ShardConnections,
    make: Callable[[Topology, int], Topology],
    *,
    event: str,
    told: Mapping[str, Any] | None = None,
) -> Topology:
    """Bring a topology into force by which other places are wanted for keys, and no row moves yet: weights, the wish to
    leave, pins. The caller holds the lease. `JobRunning` while a job carries out what was wanted before."""
    change.settle_no_job(catalog, shards)
    catalog.require_no_job()

    def next_topology(before: Topology | None, version: int) -> Topology:
        if before is None:
            raise no_shard_yet()
        return make(before, version)

    topology = change.apply(catalog, shards, next_topology)
    with catalog.writing("catalog.placement") as cursor:
        catalog.event(cursor, event, version=topology.version, **(told or {}))
    failpoint("placement.recorded")
    return topology


def ready(topology: Topology) -> list[Shard]:
    """The shards that are to leave and own nothing any more."""
    return [s for s in topology.shards if s.leaving and not s.in_transit and not topology.owned(s.id)]


class _Undecided(Exception):
    """The shard holds decisions of transactions that are not ended everywhere."""


def leave(catalog: Catalog, shards: ShardConnections, shard: Shard, *, patience: float = 60.0) -> Topology:
    """A shard that owns nothing leaves; the caller holds the lease. Can be run again after it was interrupted.

    `PreflightFailed` for what is in the way and nobody here can end; `MoveWaiting` where ``patience`` (seconds) ended
    before the transactions that have the shard open. Then nothing has changed.
    """
    change.settle_no_job(catalog, shards)
    current = catalog.current()
    if current is None or shard.id not in current.by_id:
        assert current is not None
        return current
    catalog.require_no_job()
    deadline = time.monotonic() + patience
    indoubt.recover(current, shards)
    refuse(problems(current, shards, [shard.name]), [shard.name])
    while True:
        try:
            topology = change.apply(
                catalog,
                shards,
                lambda before, version: _without(before, version, shard.id),
                while_closed=lambda connection: _look_again(current, shard, connection),
                patience=max(0.0, deadline - time.monotonic()),
            )
            break
        except _Undecided as error:
            if time.monotonic() > deadline:
                raise MoveWaiting(
                    f"Shard {shard.name} holds the decision of {error}, which has not ended on every shard.",
                    hint=f"{RECOVER}; then the same command again.",
                    shard=shard.name,
                ) from error
            time.sleep(0.05)
            indoubt.recover(current, shards)
    with catalog.writing("catalog.left") as cursor:
        catalog.event(cursor, "left", name=shard.name, number=shard.id, url=shard.url)
    # The older names of the other fences are true as well; whichever change closes there next waits for them.
    with suppress(MoveWaiting):
        change.drain(catalog, shards, patience=_DRAIN_SECONDS)
    return topology


def _without(before: Topology | None, version: int, shard_id: int) -> Topology:
    assert before is not None
    return before.left(version, shard_id)


def _look_again(current: Topology, shard: Shard, connection: Connection) -> None:
    """Under the closed fence, where no session can add anything more."""
    undecided = [str(gid) for (gid,) in connection.execute(_DECISIONS)]
    if undecided:
        raise _Undecided(", ".join(undecided))
    left = [f"shard {shard.name}: {text}" for text in strays(current, connection)]
    prepared = value(connection, _PREPARED, (0,))
    if prepared is not None:
        left.append(
            f"shard {shard.name}: prepared transaction {prepared!r} is in doubt: commit it or roll it back"
        )
    refuse(left, [shard.name])
    failpoint("leave.closed")
