"""The logical replication that carries a transfer's rows: publication and slot on one shard, subscription on another.

`storage.replication` has the single commands; here they are made in an order that leaves nothing behind, watched,
revived, waited for and dropped, always under the mover's token. A `Stream` knows a publisher and a subscriber, not
which of them owns the arcs.
"""

from __future__ import annotations

import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import psycopg

from shardkit.core.errors import MoveWaiting, ReplicationFailed
from shardkit.core.topology import Shard
from shardkit.storage import change, fence, replication
from shardkit.storage.attended import attended
from shardkit.storage.connections import SHORT, Connection, transaction
from shardkit.storage.failpoints import failpoint

if TYPE_CHECKING:
    from .transfer import TransferRun

POLL = 0.1
"""Seconds between two looks at a copy that runs."""
REVIVALS = 5
"""So many times in a row a subscription that stopped is enabled again."""
PATIENT = (*change.OPENING, ("lock_timeout", "500ms"))


class Stream:
    """One direction of replication between two shards, for the arcs and tables of a transfer."""

    def __init__(self, run: TransferRun, publisher: Shard, subscriber: Shard, name: str) -> None:
        self._run = run
        self._around = run.around
        self._waits = run.waits
        self._publisher_shard = publisher
        self._subscriber_shard = subscriber
        self.name = name
        self._revivals = 0
        self._ready = 0

    @property
    def _publisher(self) -> Connection:
        return self._run.probes.get(self._publisher_shard)

    @property
    def _subscriber(self) -> Connection:
        return self._run.probes.get(self._subscriber_shard)

    def begin_phase(self) -> None:
        """Stops of the subscription are counted anew."""
        self._revivals = 0

    # --- making it --------------------------------------------------------------------------------------------------

    def make(self) -> None:
        """Publication, slot, subscription; the copy begins. Nothing is made twice."""
        if replication.subscription_exists(self._subscriber, self.name):
            return
        with transaction(self._publisher, *change.OPENING):
            change.claim(self._publisher, self._around.token)
            replication.create_publication(self._publisher, self.name, self._run.tables, self._run.row.arcs)
        failpoint("copying.published")
        self.create_slot()
        failpoint("copying.slot")
        with self._around.changing, transaction(self._subscriber, *change.OPENING):
            change.claim(self._subscriber, self._around.token)
            fence.guard(self._subscriber, self._run.topology().by_id[self._subscriber_shard.id].fence)
            replication.create_subscription(
                self._subscriber, self.name, replication.peer_conninfo(self._publisher)
            )
        failpoint("copying.subscribed")

    def create_slot(self) -> None:
        """The slot, as soon as every transaction that writes now has ended."""
        what = f"the replication slot on shard {self._publisher_shard.name}"
        deadline = time.monotonic() + self._around.patience
        while True:
            self._claim_publisher()
            slot = replication.slot_state(self._publisher, self.name)
            if slot.ready:
                return self._waits.tell(None)
            if slot.maker is not None:
                # A mover that was killed left its server process at work; what that makes is as good.
                look = self._waits.looking_after(what, self._publisher_shard, slot.maker)
                while replication.slot_state(self._publisher, self.name).maker == slot.maker:
                    look()
                    self._around.pause(POLL)
                continue
            replication.drop_slot(self._publisher, self.name)
            # On a connection of its own: it may take as long as the longest transaction that writes now.
            connection = self._run.shards.get(self._publisher_shard)
            try:
                with suppress(psycopg.errors.DuplicateObject):
                    attended(
                        connection,
                        partial(replication.create_slot, connection, self.name),
                        self._waits.looking_after(what, self._publisher_shard, connection.info.backend_pid),
                    )
            except psycopg.errors.ConfigurationLimitExceeded as error:
                # Somebody else's replication took what was free when the preflight looked.
                self._waits.tell(f"{what} waits for one that is free (max_replication_slots)")
                if time.monotonic() > deadline:
                    raise MoveWaiting(f"{what[0].upper()}{what[1:]} could not be made: {error}.") from error
                self._around.pause(POLL)

    def _claim_publisher(self) -> None:
        with transaction(self._publisher, *PATIENT):
            change.claim(self._publisher, self._around.token)

    # --- watching it ------------------------------------------------------------------------------------------------

    def state(self) -> replication.CopyState:
        """The state of a subscription that runs, or runs again.

        The server disables it on any error, a lost connection to the source included; one that stops again and again
        without a table more being ready has met a row it cannot take.
        """
        state = replication.copy_state(self._subscriber, self.name)
        if state is None:
            raise ReplicationFailed(
                f"The subscription {self.name} on shard {self._subscriber_shard.name} is gone."
            )
        if state.enabled:
            return state
        if state.ready > self._ready:
            self._ready, self._revivals = state.ready, 0
        self._revivals += 1
        if self._revivals > REVIVALS:
            raise ReplicationFailed(
                f"The subscription {self.name} on shard {self._subscriber_shard.name} stops on an error again and "
                "again.",
                shard=self._subscriber_shard.name,
                errors=state.errors,
            )
        self._around.pause(0.1 * self._revivals)
        with transaction(self._subscriber, *SHORT):
            change.claim(
                self._subscriber, self._around.token
            )  # the opening may have stopped it, by another mover
            replication.set_enabled(self._subscriber, self.name, True)
        return state

    def held_up(self, state: replication.CopyState, seconds: float) -> bool:
        """Whether no table is being copied, which is so for a moment between two; tells the reason, and loses patience
        with it."""
        reason = replication.held_up(self._publisher, state.oid)
        if reason is None:
            self._waits.tell(None)
        elif seconds > 2:
            self._waits.recover_doubtful(self._publisher_shard)
            self._waits.tell(f"the copy on shard {self._subscriber_shard.name} waits for {reason}")
            if seconds > self._around.patience:
                raise MoveWaiting(f"The copy on shard {self._subscriber_shard.name} waits for {reason}.")
        return reason is not None

    def require_slot(self) -> None:
        """`ReplicationFailed` where nothing more can come from the source, so that waiting would never end."""
        if not replication.slot_is_lost(self._publisher, self.name):
            return
        what = f"Shard {self._publisher_shard.name} gave up the slot {self.name}"
        if replication.slot_exists(self._publisher, self.name):
            what += ": it held back too much WAL"
        raise ReplicationFailed(
            f"{what}.",
            hint="`shardkit rebalance resume` copies again; raise max_slot_wal_keep_size before.",
            shard=self._publisher_shard.name,
        )

    def wait_replayed(self) -> float:
        """Wait until the target has applied what is committed on the source now; the seconds it took."""
        started = time.monotonic()
        position = replication.position_now(self._publisher)
        while True:
            sender = replication.sender(self._publisher, self.name, position)
            self._run.track.update(lag_bytes=sender.lag_bytes if sender else None)
            if sender is not None and sender.passed:
                self._waits.tell(None)
                return time.monotonic() - started
            self.state()
            if time.monotonic() - started > 2:
                if sender is None:
                    self.require_slot()
                self._waits.tell(f"shard {self._subscriber_shard.name} applies the writes made meanwhile")
            self._around.pause(0.005)

    def is_lost(self) -> bool:
        """Whether there is a subscription whose slot is of no use any more."""
        return replication.subscription_exists(self._subscriber, self.name) and replication.slot_is_lost(
            self._publisher, self.name
        )

    # --- the end ----------------------------------------------------------------------------------------------------

    def drop(self) -> None:
        """Subscription first, and the slot when nobody uses it any more; nothing that was never made is missed."""
        self._waits.with_lock_retries(
            "the end of the subscription", self._subscriber_shard, self._drop_subscription
        )
        failpoint("drop.subscription")
        self._waits.with_lock_retries(
            "the end of the publication", self._publisher_shard, self._drop_publication
        )
        self._drop_slot_patiently()
        failpoint("drop.slot")

    def _drop_subscription(self) -> None:
        with transaction(self._subscriber, *PATIENT):
            change.claim(self._subscriber, self._around.token)
            replication.drop_subscription(self._subscriber, self.name)

    def _drop_publication(self) -> None:
        with transaction(self._publisher, *PATIENT):
            change.claim(self._publisher, self._around.token)
            replication.drop_publication(self._publisher, self.name)

    def _drop_slot_patiently(self) -> None:
        """Until whoever uses it has gone: a walsender, or what a killed mover left at work on it."""
        deadline = time.monotonic() + self._around.patience
        while not self.drop_slot():
            user = replication.slot_state(self._publisher, self.name).maker
            blocker = replication.blocker(self._publisher, user)
            reason = f"the slot {self.name} on shard {self._publisher_shard.name} is in use by pid {user}" + (
                f", which waits for {blocker}" if blocker else ""
            )
            if time.monotonic() > deadline:
                raise MoveWaiting(f"Nothing is dropped yet: {reason}.")
            if deadline - time.monotonic() < self._around.patience - 2:
                self._waits.tell(reason)
            self._around.pause(0.02)
        self._waits.tell(None)

    def drop_slot(self) -> bool:
        """Drop the slot unless somebody uses it; whether it is gone."""
        with transaction(self._publisher, *SHORT):
            change.claim(self._publisher, self._around.token)
            return replication.drop_slot(self._publisher, self.name)
