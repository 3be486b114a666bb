"""The one way by which a topology comes into force.

1. The whole next topology is stored in the catalog as *proposed*, under a number never used before.
2. The shard that loses something, if there is one, *closes*: its fence is renamed under ACCESS EXCLUSIVE. The commit
   of that transaction is the decision; what has to be done while nobody is let in, and may fail, comes before it.
3. The shards that only gain *open*: the new fence is created beside the old one. Not before the standbys of the shard
   that closed have the decision: one that took over without it would own the same arcs once more. All of an opening
   but its COMMIT can be made ahead of the closing, as applications wait for the arcs between the two.
4. The catalog records the topology as current.

Whatever is interrupted is settled by the next mover: it writes its token on the closing shard, so that the decision
of the one before can no longer happen unless it has, looks, and finishes or discards. One change is pending at a
time in the whole cluster (the catalog's unique index sees to it), as two at once can leave a shard with a fence that
no topology names.

A shard that went back in time neither closes nor opens by a change. It stays behind until `bring_forward`, and nobody
who knows the topology in force is let in there meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

import psycopg
from psycopg.pq import TransactionStatus

from shardkit.core.errors import (
    CatalogBehind,
    MoverSuperseded,
    MoveWaiting,
    RetryLater,
    ShardBehind,
    StandbyBehind,
)
from shardkit.core.keyrange import ArcSet
from shardkit.core.topology import Shard, Topology

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


def _silent(_: str | None) -> None:
    """Nobody listens."""


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
    ahead: bool = False,
    report: Report = _silent,
    clock: Clock = _silent,
    patience: float = 60.0,
) -> Topology:
    """Bring the topology that ``make(current, version)`` returns into force.

    ``while_closed`` runs on the closing shard between lock and decision, ``on_open`` on each opening shard, both in the
    same transaction; they can be run twice. ``patience`` is the time in seconds after which a closing that never got
    its lock gives up with `MoveWaiting` and nothing changed. What ``while_closed`` raises passes through, and nothing
    is changed either, nor where a shard went back in time (`ShardBehind`). With ``ahead`` the openings stand ready in
    transactions of their own before the lock is asked for; a ``while_closed`` that claimed an opening shard would then
    wait for itself.
    """
    settle(catalog, shards)  # another's change, perhaps: ``on_open`` is not meant for it
    current = catalog.current()
    proposal = make(current, catalog.next_version())
    change = _Change(catalog, shards, current, proposal, on_open, report, clock)
    for shard in change.opening:
        names = fence.relations(shards.get(shard))
        if current is not None and change.is_behind(shard.id, names):
            raise _behind(current.by_id[shard.id], names)
    catalog.propose(proposal)
    failpoint("change.proposed")
    if len(change.closing) > 1:
        raise AssertionError(
            f"a change that closes {len(change.closing)} shards cannot be decided by one commit"
        )
    known: standbys.Known = {}
    with change:
        for shard in change.closing:
            known = standbys.connected(shards.get(shard))
            try:
                change.close(shard, while_closed, patience, ahead=ahead)
            except psycopg.OperationalError:
                # Whether the COMMIT arrived is not known; the next settle() looks.
                raise
            except Exception:
                change.discard()
                # The shard says whether it was decided, not the place in the code that failed.
                settle(catalog, shards, on_open=on_open)
                raise
        clock("decided")
        failpoint("change.decided")
        change.finish(known)
    report(None)
    return proposal


def settle_no_job(catalog: Catalog, shards: ShardConnections) -> None:
    """`settle`, for who knows nothing of jobs. `JobRunning` if a job left the change: its mover alone knows what an
    opening has to do beside."""
    if catalog.proposed() is not None:
        catalog.require_no_job()
    settle(catalog, shards)


def settle(catalog: Catalog, shards: ShardConnections, *, on_open: Hook | None = None) -> None:
    """Finish, or prove impossible, a change that an earlier mover left pending."""
    proposal = catalog.proposed()
    if proposal is None:
        return
    change = _Change(catalog, shards, catalog.current(), proposal, on_open)
    for shard in change.closing:
        connection = shards.get(shard)
        with transaction(connection, *OPENING, step="settling"):
            claim(connection, _token(catalog))
            names = fence.relations(connection)
        decided = proposal.fence_on(shard.id).relation in names
        if not decided and change.is_behind(shard.id, names):
            # It may have decided, and have forgotten it. Who opened has not.
            decided = change.has_opened()
        if not decided:
            catalog.discard(proposal)
            return
    change.finish()


def bring_forward(
    catalog: Catalog,
    shards: ShardConnections,
    shard_id: int,
    returned: ArcSet,
    fences: Collection[str],
    *,
    while_closed: Hook,
    report: Report = _silent,
    patience: float = 60.0,
) -> Topology:
    """Put the fence, the copy and the arcs of the topology in force on a shard that is behind; no change is pending.

    ``returned`` are arcs whose rows came back there, though they are others': with them it is a change, by which they
    are in transit there. Interrupted, it is settled like any other, and leaves the shard as it was or as it is to be.
    ``fences`` are the names that it has, `RetryLater` if it has others by now. Else as `apply`.
    """
    current = catalog.current()
    assert current is not None
    topology = current
    if returned:
        topology = current.marked(catalog.next_version(), shard_id, returned)
        catalog.propose(topology)
        failpoint("change.proposed")
    change = _Change(catalog, shards, current, topology, report=report, behind_with=frozenset(fences))
    try:
        change.close(current.by_id[shard_id], while_closed, patience)
    except psycopg.OperationalError:
        raise  # whether it was committed is not known; the next settle() looks
    except Exception:
        settle(catalog, shards)
        raise
    failpoint("change.decided")
    if returned:
        catalog.record(topology)
    report(None)
    return topology


def drain(
    catalog: Catalog,
    shards: ShardConnections,
    *,
    report: Report = _silent,
    patience: float = 60.0,
) -> None:
    """Wait until no transaction is left that began under an older topology, and drop the old names; ``patience``
    seconds on each shard, then `MoveWaiting`."""
    current = catalog.current()
    assert current is not None
    change = _Change(catalog, shards, current, current, report=report)
    for shard in current.shards:
        if fence.relations(shards.get(shard)) != {shard.fence.relation}:
            change.close(shard, None, patience)
    report(None)


def announce(catalog: Catalog, shards: ShardConnections, topology: Topology) -> None:
    """Give every shard its copy of a topology that changed no fence."""
    for shard in topology.shards:
        announce_to(catalog, shards.get(shard), topology, shard)


def announce_to(catalog: Catalog, connection: Connection, topology: Topology, shard: Shard) -> None:
    """Give one shard its copy of a topology that changed no fence. One that went back in time keeps what it has, which
    alone tells what it held then; it gets the copy when it is brought forward."""
    with transaction(connection):
        claim(connection, _token(catalog))
        if shard.fence.relation in fence.relations(connection):
            write_copy(connection, topology, shard.id)


def _token(catalog: Catalog) -> int:
    if catalog.token is None:
        raise MoverSuperseded("This connection holds no lease.")
    return catalog.token


def _behind(shard: Shard, names: set[str]) -> ShardBehind:
    found = ", ".join(sorted(names)) or "none"
    return ShardBehind(
        f"Shard {shard.name} has the fence {found}, but the catalog relies on {shard.fence.relation}.",
        shard=shard.name,
    )


def _is_left(holder: fence.Holder) -> bool:
    """Whether a holder may be what a crash left of a transaction over several shards."""
    return indoubt.is_prepared_part(holder.gid) and holder.age_seconds >= indoubt.LIVE_SECONDS


class _NotYet(Exception):
    """Rolls back an opening that stands ready."""


@dataclass
class _Change:
    """One change on its way: the closing, then the openings. What stands ready to open and did not is rolled back when
    the block ends."""

    catalog: Catalog
    shards: ShardConnections
    current: Topology | None
    proposal: Topology
    on_open: Hook | None = None
    report: Report = _silent
    clock: Clock = _silent
    behind_with: frozenset[str] | None = None
    """The names that the shard that closes has, if it is behind; else it has the fence in force."""
    closing: list[Shard] = field(init=False)
    """The shards that lose something, as they are now: one that leaves is not in the proposal."""
    opening: list[Shard] = field(init=False)
    """The shards that only gain, as they will be."""
    _ready: dict[int, ExitStack] = field(default_factory=dict)

    def __post_init__(self) -> None:
        closing, changed = (
            self.proposal.closing_since(self.current),
            self.proposal.changed_since(self.current),
        )
        self.closing = [self.current.by_id[shard_id] for shard_id in closing] if self.current else []
        self.opening = [self.proposal.by_id[shard_id] for shard_id in changed if shard_id not in closing]

    def __enter__(self) -> _Change:
        return self

    def __exit__(self, *exc: object) -> None:
        self.discard()

    def close(self, shard: Shard, while_closed: Hook | None, patience: float, *, ahead: bool = False) -> None:
        """Lock, rename, run the hook, commit. Tries only when nobody holds the fence for long, so that applications
        never queue behind a lock that waits for a long transaction."""
        deadline = time.monotonic() + patience
        pause = 0.002
        while True:
            connection = self.shards.get(shard)
            holders = fence.holders(connection)
            if not holders or holders[0].age_seconds < LOCK_TIMEOUT:
                try:
                    if ahead:
                        self._make_ready()
                    return self._close_now(connection, shard, while_closed)
                except psycopg.errors.LockNotAvailable:
                    self.discard()
                    holders = fence.holders(connection)
                except psycopg.errors.IdleInTransactionSessionTimeout as error:
                    raise MoveWaiting(
                        f"What had to be done while shard {shard.name} was closed took so long that its server ended "
                        "the closing.",
                        shard=shard.name,
                    ) from error
            if any(_is_left(holder) for holder in holders):
                assert self.current is not None
                indoubt.recover(self.current, self.shards, only={shard.id})
            if holders:
                self.report(f"the closing of shard {shard.name} waits for {holders[0]}")
            if time.monotonic() > deadline:
                blocking = f": {holders[0]}" if holders else ""
                raise MoveWaiting(
                    f"The fence of shard {shard.name} could not be had within {patience:.0f} s{blocking}.",
                    shard=shard.name,
                )
            time.sleep(pause)
            pause = min(pause * 1.5, 0.25)

    def _close_now(self, connection: Connection, shard: Shard, while_closed: Hook | None) -> None:
        """``psycopg.errors.LockNotAvailable`` where the fence is held."""
        new = self.proposal.fence_on(shard.id).relation
        with transaction(connection, *CLOSING, step="closing"):
            claim(connection, _token(self.catalog))
            names = fence.relations(connection)
            rename = fence.close(names, self.proposal, shard.id).as_bytes(connection)
            self.clock("asked")  # applications wait from here on
            fence.lock_all(connection, names)
            self.clock("locked")
            failpoint("change.locked")
            if self.behind_with is not None:
                if names != self.behind_with:
                    raise RetryLater(
                        f"Shard {shard.name} has other fences than a moment ago.", shard=shard.name
                    )
            elif not {shard.fence.relation, new} & names:
                raise _behind(shard, names)
            if fence.newest(names) > self.proposal.version:
                # A catalog that was restored gives numbers out again, and then even names can be the same.
                raise CatalogBehind(
                    f"Shard {shard.name} has a fence of topology {fence.newest(names)}, but the catalog makes "
                    f"{self.proposal.version}.",
                    shard=shard.name,
                )
            # Nobody sees it before the commit, and other servers have something to do meanwhile, as to catch up.
            connection.execute(rename, prepare=False)
            if while_closed is not None:
                while_closed(connection)
            if connection.info.transaction_status is not TransactionStatus.INTRANS:
                # What has failed is rolled back by COMMIT without a word, and would count as decided.
                raise psycopg.OperationalError(f"The closing of shard {shard.name} was lost.")

    def finish(self, known: standbys.Known | None = None) -> None:
        """Open every shard that only gains, then record. ``known`` are the standbys that the closing shard had."""
        for shard in self.closing if self.opening else ():
            _let_standbys_follow(self.shards.get(shard), shard.name, self.report, known)
        for shard in self.opening:
            ready = self._ready.pop(shard.id, None)
            if ready is None or not _committed(ready):
                with self._opened(shard):
                    pass
            failpoint("change.opened")
        self.clock("opened")
        self.catalog.record(self.proposal)
        self.clock("recorded")
        failpoint("change.recorded")

    @contextmanager
    def _opened(self, shard: Shard) -> Iterator[None]:
        """A transaction that opens a shard."""
        connection = self.shards.get(shard)
        with transaction(connection, *OPENING, step="opening"):
            claim(connection, _token(self.catalog))
            # Beside its older names the new one would let those in whom they once served.
            if not self.is_behind(shard.id, fence.relations(connection)):
                if self.on_open is not None:
                    self.on_open(connection)
                fence.open_beside(connection, self.proposal, shard.id)
            yield

    def is_behind(self, shard_id: int, names: set[str]) -> bool:
        """Whether a shard with these fences went back in time: it has neither the one in force nor the proposed."""
        before = self.current.by_id.get(shard_id) if self.current is not None else None
        return (
            before is not None
            and not {before.fence.relation, self.proposal.fence_on(shard_id).relation} & names
        )

    def has_opened(self) -> bool:
        """Whether a shard that only gains has opened; none does any more that has not."""
        for shard in self.opening:
            connection = self.shards.get(shard)
            with transaction(connection, *OPENING):
                claim(connection, _token(self.catalog))
                if shard.fence.relation in fence.relations(connection):
                    return True
        return False

    def _make_ready(self) -> None:
        for shard in self.opening:
            with ExitStack() as ready:
                ready.enter_context(self._opened(shard))
                self._ready[shard.id] = ready.pop_all()

    def discard(self) -> None:
        """Roll back what stands ready."""
        while self._ready:
            _, ready = self._ready.popitem()
            with suppress(_NotYet), ready:
                raise _NotYet


def _committed(ready: ExitStack) -> bool:
    """Commit an opening that stands ready. False where the server has ended its transaction, which it lets stand for a
    time alone (`SHORT`): it is made anew then, and tells if there is more to it."""
    try:
        ready.close()
    except psycopg.Error:
        return False
    return True


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
