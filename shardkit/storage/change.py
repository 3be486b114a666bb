"""The one way by which a topology comes into force.

1. The whole next topology is stored in the catalog as *proposed*, under a number never used before.
2. The shard that loses something, if there is one, *closes*: its fence is renamed under ACCESS EXCLUSIVE. The commit
   of that transaction is the decision.
3. The shards that only gain *open*: the new fence is created beside the old one. Not before the standbys of the shard
   that closed have the decision: one that took over without it would own the same arcs once more.
4. The catalog records the topology as current.

Whatever is interrupted is settled by the next mover: it writes its token on the closing shard, so that the decision
of the one before can no longer happen unless it has, looks, and finishes or discards. One change is pending at a
time in the whole cluster (the catalog's unique index sees to it), as two at once can leave a shard with a fence that
no topology names.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import psycopg

from shardkit.core.errors import CatalogBehind, MoverSuperseded, MoveWaiting, ShardBehind, StandbyBehind
from shardkit.core.topology import Topology

from . import fence, indoubt, standbys
from .catalog import Catalog
from .connections import SHORT, Connection, ShardConnections, transaction
from .failpoints import failpoint
from .topologies import write_copy

LOCK_TIMEOUT = 0.05
"""Seconds that a closing lock may wait, and so the longest that applications queue behind it."""

CLOSING = (
    *SHORT,
    ("lock_timeout", f"{int(LOCK_TIMEOUT * 1000)}ms"),
    ("statement_timeout", "10s"),
    ("synchronous_commit", "on"),
)
STANDBY_SECONDS = 10.0
"""Seconds that an opening waits for the standbys of the shard that closed; applications wait as long for the keys."""
OPENING = (*SHORT, ("statement_timeout", "30s"), ("synchronous_commit", "on"))

Report = Callable[[str | None], None]
Clock = Callable[[str], None]
"""Called with ``asked`` (just before the closing lock is), ``locked``, ``decided``, ``opened``, ``recorded``."""
Hook = Callable[[Connection], None]


def claim(connection: Connection, token: int) -> None:
    """Write the mover's token on a shard, first in every transaction there; `MoverSuperseded` if a newer one stands."""
    updated = connection.execute("UPDATE shardkit.mover SET token = %(t)s WHERE token <= %(t)s", {"t": token})
    if updated.rowcount == 0:
        raise MoverSuperseded


def apply(
    catalog: Catalog,
    shards: ShardConnections,
    make: Callable[[Topology | None, int], Topology],
    *,
    while_closed: Hook | None = None,
    on_open: Hook | None = None,
    report: Report = lambda reason: None,
    clock: Clock = lambda moment: None,
    patience: float = 60.0,
) -> Topology:
    """Bring the topology that ``make(current, version)`` returns into force.

    ``while_closed`` runs on the closing shard between lock and rename, ``on_open`` on each opening shard, both in the
    same transaction; they can be run twice. ``patience`` is the time in seconds after which a closing that never got
    its lock gives up with `MoveWaiting` and nothing changed. What ``while_closed`` raises passes through, and nothing
    is changed either.
    """
    settle(catalog, shards)  # another's change, perhaps: ``on_open`` is not meant for it
    current = catalog.current()
    proposal = make(current, catalog.next_version())
    catalog.propose(proposal)
    failpoint("change.proposed")
    closing = proposal.closing_since(current)
    if len(closing) > 1:
        raise AssertionError(f"a change that closes {len(closing)} shards cannot be decided by one commit")
    known: standbys.Known = {}
    for shard_id in closing:
        assert current is not None
        known = standbys.connected(shards.get(current.by_id[shard_id]))
        try:
            _close(catalog, shards, current, proposal, shard_id, while_closed, report, clock, patience)
        except psycopg.OperationalError:
            # Whether the COMMIT arrived is not known; the next settle() looks.
            raise
        except Exception:
            # The shard says whether it was decided, not the place in the code that failed.
            settle(catalog, shards, on_open=on_open)
            raise
    clock("decided")
    failpoint("change.decided")
    _finish(catalog, shards, current, proposal, on_open, clock, report, known)
    report(None)
    return proposal


def settle(catalog: Catalog, shards: ShardConnections, *, on_open: Hook | None = None) -> None:
    """Finish, or prove impossible, a change that an earlier mover left pending."""
    proposal = catalog.proposed()
    if proposal is None:
        return
    current = catalog.current()
    for shard_id in proposal.closing_since(current):
        assert current is not None
        connection = shards.get(current.by_id[shard_id])
        with transaction(connection, *OPENING, step="settling"):
            claim(connection, _token(catalog))
            decided = proposal.fence_on(shard_id).relation in fence.relations(connection)
        if not decided:
            catalog.discard(proposal)
            return
    _finish(catalog, shards, current, proposal, on_open, lambda moment: None, lambda reason: None)


def drain(
    catalog: Catalog,
    shards: ShardConnections,
    *,
    report: Report = lambda reason: None,
    patience: float = 60.0,
) -> None:
    """Wait until no transaction is left that began under an older topology, and drop the old names; ``patience``
    seconds on each shard, then `MoveWaiting`."""
    current = catalog.current()
    assert current is not None
    for shard in current.shards:
        if fence.relations(shards.get(shard)) != {shard.fence.relation}:
            _close(catalog, shards, current, current, shard.id, None, report, lambda moment: None, patience)
    report(None)


def announce(catalog: Catalog, shards: ShardConnections, topology: Topology) -> None:
    """Give every shard its copy of a topology that changed no fence."""
    for shard in topology.shards:
        with (connection := shards.get(shard)).transaction():
            claim(connection, _token(catalog))
            write_copy(connection, topology, shard.id)


def _token(catalog: Catalog) -> int:
    if catalog.token is None:
        raise MoverSuperseded("This connection holds no lease.")
    return catalog.token


def _close(
    catalog: Catalog,
    shards: ShardConnections,
    current: Topology,
    proposal: Topology,
    shard_id: int,
    while_closed: Hook | None,
    report: Report,
    clock: Clock,
    patience: float,
) -> None:
    """Lock, run the hook, rename. Tries only when nobody holds the fence for long, so that applications never queue
    behind a lock that waits for a long transaction."""
    shard = current.by_id[shard_id]
    new = proposal.fence_on(shard_id).relation
    deadline = time.monotonic() + patience
    pause = 0.002
    while True:
        connection = shards.get(shard)
        holders = fence.holders(connection)
        if not holders or holders[0].age_seconds < LOCK_TIMEOUT:
            try:
                with transaction(connection, *CLOSING, step="closing"):
                    claim(connection, _token(catalog))
                    clock("asked")
                    names = fence.lock_all(connection)
                    clock("locked")
                    failpoint("change.locked")
                    if not {shard.fence.relation, new} & names:
                        found = ", ".join(sorted(names)) or "none"
                        raise ShardBehind(
                            f"Shard {shard.name} has the fence {found}, but the catalog relies on "
                            f"{shard.fence.relation}.",
                            shard=shard.name,
                        )
                    if fence.newest(names) > proposal.version:
                        # A catalog that was restored gives numbers out again, and then even names can be the same.
                        raise CatalogBehind(
                            f"Shard {shard.name} has a fence of topology {fence.newest(names)}, but the catalog makes "
                            f"{proposal.version}.",
                            shard=shard.name,
                        )
                    if while_closed is not None:
                        while_closed(connection)
                    fence.close(connection, names, proposal, shard_id)
                return
            except psycopg.errors.LockNotAvailable:
                holders = fence.holders(connection)
        if any(_is_left(holder) for holder in holders):
            indoubt.recover(current, shards, only={shard_id})
        if holders:
            report(f"the closing of shard {shard.name} waits for {holders[0]}")
        if time.monotonic() > deadline:
            blocking = f": {holders[0]}" if holders else ""
            raise MoveWaiting(
                f"The fence of shard {shard.name} could not be had within {patience:.0f} s{blocking}.",
                shard=shard.name,
            )
        time.sleep(pause)
        pause = min(pause * 1.5, 0.25)


def _is_left(holder: fence.Holder) -> bool:
    """Whether a holder may be what a crash left of a transaction over several shards."""
    return indoubt.is_prepared_part(holder.gid) and holder.age_seconds >= indoubt.LIVE_SECONDS


def _finish(
    catalog: Catalog,
    shards: ShardConnections,
    current: Topology | None,
    proposal: Topology,
    on_open: Hook | None,
    clock: Clock,
    report: Report,
    known: standbys.Known | None = None,
) -> None:
    """Open every shard that only gains, then record. ``known`` are the standbys that the closing shard had."""
    closing = proposal.closing_since(current)
    opening = [shard_id for shard_id in proposal.changed_since(current) if shard_id not in closing]
    for shard_id in closing if opening else ():
        assert current is not None
        closed = current.by_id[shard_id]  # one that leaves is not in the proposal
        _let_standbys_follow(shards.get(closed), closed.name, report, known)
    for shard_id in opening:
        connection = shards.get(proposal.by_id[shard_id])
        with transaction(connection, *OPENING, step="opening"):
            claim(connection, _token(catalog))
            if on_open is not None:
                on_open(connection)
            fence.open_beside(connection, proposal, shard_id)
        failpoint("change.opened")
    clock("opened")
    catalog.record(proposal)
    clock("recorded")
    failpoint("change.recorded")


def _let_standbys_follow(
    connection: Connection, shard_name: str, report: Report, known: standbys.Known | None
) -> None:
    """Wait until the standbys of a shard have what it decided."""
    if known is None:
        known = standbys.connected(connection)
    waiting = f"the opening waits for standbys of shard {shard_name}"
    if names := standbys.wait(
        connection, known, STANDBY_SECONDS, lambda names: report(f"{waiting}: {names}")
    ):
        raise StandbyBehind(
            f"Standbys of shard {shard_name} have not got what it decided within {STANDBY_SECONDS:.0f} s: {names}.",
            shard=shard_name,
        )
