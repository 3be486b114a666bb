"""Waiting as a mover does it: for a reason that it tells, with an end, and stopped at once when the operator says so.

Used by `rebalance.transfer`; decides nothing about a transfer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psycopg

from shardkit.core.errors import MoveWaiting
from shardkit.core.topology import Shard, ShardedTable
from shardkit.storage import change, indoubt, inspection, replication
from shardkit.storage.catalog import Catalog
from shardkit.storage.connections import ShardConnections

from .indexes import Indexing
from .progress import Listener, Tracker
from .room import Room


class Interrupted(Exception):
    """The operator asked the mover to stop; the transfer stays in its phase."""


@dataclass(frozen=True)
class Surroundings:
    """What the transfers of a job share: the catalog, the lease, the stop, the room on servers, and what only one does
    at a time: change the topology, fit replica identities, see to the indexes of a shard."""

    catalog_url: str
    token: int
    stop: threading.Event
    listener: Listener
    changing: threading.Lock
    patience: float
    fitting: threading.Lock = field(default_factory=threading.Lock)
    room: Room = field(default_factory=Room)
    indexing: Indexing = field(default_factory=Indexing)

    def pause(self, seconds: float) -> None:
        """Wait, or raise `Interrupted` at once when the operator stops the mover."""
        if self.stop.wait(seconds):
            raise Interrupted


@dataclass(frozen=True)
class Waits:
    """The waits of one transfer."""

    transfer: int
    around: Surroundings
    catalog: Catalog
    probes: ShardConnections
    track: Tracker

    def tell(self, reason: str | None) -> None:
        """What is waited for now; None when the transfer goes on."""
        if reason != self.track.now.waiting_for:
            self.track.update(waiting_for=reason)
            self.catalog.waiting(self.transfer, reason)

    def with_lock_retries(
        self,
        what: str,
        shard: Shard,
        act: Callable[[], None],
        locks: ShardedTable | None = None,
        against: inspection.Against = inspection.Against.WRITERS,
        *,
        patience: float | None = None,
    ) -> None:
        """Repeat DDL that gives up its lock soon, so that applications never queue behind it for long; nor at all while
        a transaction that lasts holds the table which it ``locks``. `MoveWaiting` when the ``patience``, in seconds,
        ends; the building of an index by another transfer is no trial of it."""
        patience = self.around.patience if patience is None else patience
        deadline = time.monotonic() + patience
        pause = 0.02
        while True:
            blocker = None
            if locks is not None:
                blocker = inspection.holder(self.probes.get(shard), locks, against, change.LOCK_TIMEOUT)
            if blocker is None:
                try:
                    act()
                    return self.tell(None)
                except psycopg.errors.LockNotAvailable:
                    blocker = replication.oldest_writer(self.probes.get(shard)) or "a session that reads"
            self.recover_doubtful(shard)
            self.tell(f"{what} on shard {shard.name} waits for {blocker}")
            if self.around.indexing.is_building(shard.id):
                deadline = time.monotonic() + patience
            if time.monotonic() > deadline:
                raise MoveWaiting(f"{what} on shard {shard.name} could not get its lock: {blocker}.")
            self.around.pause(pause)
            pause = min(pause * 1.5, 1.0)

    def looking_after(
        self, what: str, shard: Shard, pid: int, working: Callable[[], str] | None = None
    ) -> Callable[[], None]:
        """What to do, again and again, while backend ``pid`` of a shard makes something: tell whom it waits for, and
        lose patience with that, unless it is a copy of rows that goes on. While it waits for nobody, what it is
        ``working`` at is told."""
        blocked_since: float | None = None
        copied: int | None = None

        def look() -> None:
            nonlocal blocked_since, copied
            self.around.pause(0)
            blocker = replication.blocker(self.probes.get(shard), pid)
            if blocker is None:
                blocked_since = None
                if working is not None:
                    self.tell(working())
                return
            so_far = replication.copied_by_blockers(self.probes.get(shard), pid)
            if so_far is not None:
                blocker = "the rows that another transfer copies to it"
                if so_far != copied:
                    blocked_since, copied = None, so_far
            blocked_since = blocked_since or time.monotonic()
            self.recover_doubtful(shard)
            self.tell(f"{what} waits for {blocker}")
            if time.monotonic() - blocked_since > self.around.patience:
                raise MoveWaiting(f"{what[0].upper()}{what[1:]} could not be made: it waits for {blocker}.")

        return look

    def recover_doubtful(self, shard: Shard) -> None:
        """End what a crash left prepared on a shard, as that may be what is waited for."""
        topology = self.catalog.current()
        assert topology is not None
        indoubt.recover(topology, self.probes, only={shard.id})
