"""The logical replication that carries a transfer's rows: publication and slot on one shard, subscription on another.

`storage.replication` has the single commands; here they are made in an order that leaves nothing behind, watched,
revived, waited for and dropped, always under the mover's token. A `Stream` knows a publisher and a subscriber, not
which of them owns the arcs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import psycopg

from shardkit.core.errors import CatalogBehind, MoveWaiting, ReplicationFailed, WalBudgetExceeded
from shardkit.core.topology import Shard
from shardkit.storage import change, fence, replication
from shardkit.storage.attended import attended
from shardkit.storage.connections import SHORT, Connection, transaction
from shardkit.storage.failpoints import failpoint

if TYPE_CHECKING:
    from .transfer import TransferRun

POLL = 0.1
"""Seconds between two looks at a copy that runs."""
SMALL_LAG = 0.5
"""Seconds in which the subscriber must have applied everything before rows are compared."""
REVIVALS = 5
"""So many times in a row a subscription that stopped is enabled again."""
COPY_AGAIN = "`shardkit rebalance resume` copies again; raise max_slot_wal_keep_size before."
PATIENT = (*change.OPENING, ("lock_timeout", "500ms"))


class Stream:
    """One direction of replication between two shards, for the arcs and tables of a transfer; ``remedy`` is the next
    step for an operator when its slot is lost."""

    def __init__(
        self,
        run: TransferRun,
        publisher: Shard,
        subscriber: Shard,
        name: str,
        *,
        remedy: str = COPY_AGAIN,
        budget: int | None = None,
    ) -> None:
        self._run = run
        self._around = run.around
        self._waits = run.waits
        self.publisher_shard = publisher
        self.subscriber_shard = subscriber
        self.name = name
        self._remedy = remedy
        self._budget = budget
        self._revivals = 0
        self._ready = 0

    @property
    def publisher(self) -> Connection:
        """The publisher, for looking and for short transactions."""
        return self._run.probes.get(self.publisher_shard)

    @property
    def subscriber(self) -> Connection:
        """The subscriber, for looking and for short transactions."""
        return self._run.probes.get(self.subscriber_shard)

    def begin_phase(self) -> None:
        """Stops of the subscription are counted anew."""
        self._revivals = 0

    # --- making it --------------------------------------------------------------------------------------------------

    def make(self) -> None:
        """Publication, slot, subscription; the copy begins. Nothing is made twice."""
        if replication.subscription_exists(self.subscriber, self.name):
            self._point_to_publisher()
            return
        self.publish()
        self._subscribe(replication.create_subscription)

    def publish(self) -> None:
        """Publication and slot: from now on the publisher keeps what is to be streamed."""
        with transaction(self.publisher, *change.OPENING, step="create_publication"):
            change.claim(self.publisher, self._around.token)
            replication.create_publication(self.publisher, self.name, self._run.tables, self._run.row.arcs)
        failpoint(f"{self._run.row.phase.value}.published")
        self.create_slot()
        failpoint(f"{self._run.row.phase.value}.slot")

    def begin_at(self, position: str) -> None:
        """Subscribe to what was published, from a position of the publisher's WAL on, without a copy."""
        self._subscribe(replication.create_subscription_at_rest)
        with transaction(self.subscriber, *change.OPENING, step="begin_back"):
            change.claim(self.subscriber, self._around.token)
            replication.begin_at(self.subscriber, self.name, position)
        failpoint(f"{self._run.row.phase.value}.begun")
        with transaction(self.subscriber, *change.OPENING, step="enable_back"):
            change.claim(self.subscriber, self._around.token)
            replication.set_enabled(self.subscriber, self.name, True)
        failpoint(f"{self._run.row.phase.value}.enabled")

    def attend(self, attended: bool) -> None:
        """Somebody looks after a subscription that was left alone, or leaves it alone again."""
        with transaction(self.subscriber, *SHORT, step="attend"):
            change.claim(self.subscriber, self._around.token)
            replication.set_disabled_by_errors(self.subscriber, self.name, attended)

    def _subscribe(self, create: Callable[[Connection, str, str], None]) -> None:
        with self._around.changing, transaction(self.subscriber, *change.OPENING, step="create_subscription"):
            change.claim(self.subscriber, self._around.token)
            in_force = self._run.topology().by_id[self.subscriber_shard.id].fence
            if not fence.guard_newest(self.subscriber, in_force):
                raise CatalogBehind(shard=self.subscriber_shard.name)
            create(self.subscriber, self.name, replication.peer_conninfo(self.publisher))
        failpoint(f"{self._run.row.phase.value}.subscribed")

    def create_slot(self) -> None:
        """The slot, as soon as every transaction that writes now has ended."""
        what = f"the replication slot on shard {self.publisher_shard.name}"
        deadline = time.monotonic() + self._around.patience
        while True:
            self._claim_publisher()
            slot = replication.slot_state(self.publisher, self.name)
            if slot.ready:
                return self._waits.tell(None)
            if slot.maker is not None:
                # A mover that was killed left its server process at work; what that makes is as good.
                look = self._waits.looking_after(what, self.publisher_shard, slot.maker)
                while replication.slot_state(self.publisher, self.name).maker == slot.maker:
                    look()
                    self._around.pause(POLL)
                continue
            # On a connection of its own: it may take as long as the longest transaction that writes now.
            connection = self._run.shards.get(self.publisher_shard)
            try:
                with replication.slot_lock(connection, self.name) as mine:
                    if mine:
                        self._make_slot(connection, what)
            except psycopg.errors.ConfigurationLimitExceeded as error:
                # Somebody else's replication took what was free when the preflight looked.
                self._waits.tell(f"{what} waits for one that is free (max_replication_slots)")
                if time.monotonic() > deadline:
                    raise MoveWaiting(f"{what[0].upper()}{what[1:]} could not be made: {error}.") from error
                mine = False
            if not mine:
                self._around.pause(POLL)

    def _make_slot(self, connection: Connection, what: str) -> None:
        self._claim_publisher()  # again, under the lock: whoever came later drops what is made here, or stops it
        replication.drop_slot(self.publisher, self.name)
        failpoint("create_slot.before")
        with suppress(psycopg.errors.DuplicateObject):
            attended(
                connection,
                partial(replication.create_slot, connection, self.name),
                self._waits.looking_after(what, self.publisher_shard, connection.info.backend_pid),
            )

    def _claim_publisher(self) -> None:
        with transaction(self.publisher, *PATIENT, step="claim_publisher"):
            change.claim(self.publisher, self._around.token)

    def _point_to_publisher(self) -> None:
        """It may have another URL since. One that cannot be connected to does not disable a subscription."""
        with transaction(self.subscriber, *SHORT):
            change.claim(self.subscriber, self._around.token)
            replication.set_source(self.subscriber, self.name, replication.peer_conninfo(self.publisher))

    # --- watching it ------------------------------------------------------------------------------------------------

    def state(self) -> replication.CopyState:
        """The state of a subscription that runs, or runs again.

        The server disables it on any error, a lost connection to the source included; one that stops again and again
        without a table more being ready has met a row it cannot take.
        """
        state = replication.copy_state(self.subscriber, self.name)
        if state is None:
            raise ReplicationFailed(
                f"The subscription {self.name} on shard {self.subscriber_shard.name} is gone."
            )
        if state.enabled:
            return state
        if state.ready > self._ready:
            self._ready, self._revivals = state.ready, 0
        self._revivals += 1
        if self._revivals > REVIVALS:
            raise ReplicationFailed(
                f"The subscription {self.name} on shard {self.subscriber_shard.name} stops on an error again and "
                "again.",
                shard=self.subscriber_shard.name,
                errors=state.errors,
            )
        self._around.pause(0.1 * self._revivals)
        with transaction(self.subscriber, *SHORT, step="enable_subscription"):
            change.claim(
                self.subscriber, self._around.token
            )  # the opening may have stopped it, by another mover
            replication.set_source(self.subscriber, self.name, replication.peer_conninfo(self.publisher))
            replication.set_enabled(self.subscriber, self.name, True)
        return state

    def attend_to(self) -> None:
        """See to it that it runs, while something else is done that takes long."""
        self.state()
        self.require_slot()
        self.require_budget()

    def held_up(self, state: replication.CopyState, seconds: float) -> bool:
        """Whether no table is being copied, which is so for a moment between two; tells the reason, and loses patience
        with it."""
        reason = replication.held_up(self.publisher, state.oid)
        if reason is None:
            self._waits.tell(None)
        elif seconds > 2:
            self._waits.recover_doubtful(self.publisher_shard)
            self._waits.tell(f"the copy on shard {self.subscriber_shard.name} waits for {reason}")
            if seconds > self._around.patience:
                raise MoveWaiting(f"The copy on shard {self.subscriber_shard.name} waits for {reason}.")
        return reason is not None

    def require_slot(self) -> None:
        """`ReplicationFailed` where nothing more can come from the source, so that waiting would never end."""
        if not replication.slot_is_lost(self.publisher, self.name):
            return
        what = f"Shard {self.publisher_shard.name} gave up the slot {self.name}"
        if replication.slot_exists(self.publisher, self.name):
            what += ": it held back too much WAL"
        raise ReplicationFailed(
            f"{what}.",
            hint=self._remedy,
            shard=self.publisher_shard.name,
        )

    def wait_applied(self) -> float:
        """Wait until the target has applied what is committed on the source now; the seconds it took."""
        started = time.monotonic()
        gone: float | None = None
        position = replication.position_now(self.publisher)
        while True:
            sender = replication.sender(self.publisher, self.name)
            if sender is not None:
                gone = None
            elif gone is None:
                gone = time.monotonic()
                self._point_to_publisher()
            self._run.track.update(lag_bytes=sender.lag_bytes if sender else None)
            state = self.state()
            if sender is not None and state.has_applied(position):
                self._waits.tell(None)
                return time.monotonic() - started
            if time.monotonic() - started > 2:
                if gone is not None:
                    self.require_slot()
                    self._require_back(time.monotonic() - gone)
                self.require_budget()
                self._waits.tell(f"shard {self.subscriber_shard.name} applies the writes made meanwhile")
            self._around.pause(0.005)

    def _require_back(self, seconds: float) -> None:
        """For a subscriber that has not come for so many seconds."""
        if seconds > self._around.patience:
            raise MoveWaiting(
                f"Shard {self.subscriber_shard.name} has not fetched from shard {self.publisher_shard.name} for "
                f"{seconds:.0f} s.",
                shard=self.subscriber_shard.name,
            )

    def catch_up(self) -> None:
        """Wait until the subscriber is less than `SMALL_LAG` behind."""
        while self.wait_applied() > SMALL_LAG:
            self._around.pause(0)

    def require_budget(self) -> None:
        """`WalBudgetExceeded` where the publisher has to keep more WAL than it may."""
        budget, retained = self._budget, self.retained() if self._budget is not None else None
        if budget is not None and retained is not None and retained > budget:
            raise WalBudgetExceeded(
                f"Shard {self.publisher_shard.name} had to keep {retained:,} bytes of WAL for the copy, and "
                f"--max-wal-retained allows {budget:,}: the copy was given up.",
                shard=self.publisher_shard.name,
                retained=retained,
                budget=budget,
            )

    def retained(self) -> int | None:
        """Bytes of WAL that the publisher keeps for the subscriber."""
        return replication.retained(self.publisher, self.name)

    def is_lost(self) -> bool:
        """Whether there is a subscription whose slot is of no use any more."""
        return replication.subscription_exists(self.subscriber, self.name) and replication.slot_is_lost(
            self.publisher, self.name
        )

    # --- the end ----------------------------------------------------------------------------------------------------

    def drop(self) -> None:
        """Subscription first, and the slot when nobody uses it any more; nothing that was never made is missed."""
        self._waits.with_lock_retries(
            "the end of the subscription", self.subscriber_shard, self._drop_subscription
        )
        failpoint("drop.subscription")
        self._waits.with_lock_retries(
            "the end of the publication", self.publisher_shard, self._drop_publication
        )
        self._drop_slot_patiently()
        failpoint("drop.slot")

    def _drop_subscription(self) -> None:
        with transaction(self.subscriber, *PATIENT, step="drop_subscription"):
            change.claim(self.subscriber, self._around.token)
            replication.drop_subscription(self.subscriber, self.name)

    def _drop_publication(self) -> None:
        with transaction(self.publisher, *PATIENT, step="drop_publication"):
            change.claim(self.publisher, self._around.token)
            replication.drop_publication(self.publisher, self.name)

    def _drop_slot_patiently(self) -> None:
        """Until whoever uses it has gone: a walsender, or what a killed mover left at work on it."""
        deadline = time.monotonic() + self._around.patience
        while not self.drop_slot():
            user = replication.slot_state(self.publisher, self.name).maker
            blocker = replication.blocker(self.publisher, user)
            reason = f"the slot {self.name} on shard {self.publisher_shard.name} is in use by pid {user}" + (
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
        with replication.slot_lock(self.publisher, self.name) as mine:
            if not mine:
                return False
            with transaction(self.publisher, *SHORT, step="drop_slot"):
                change.claim(self.publisher, self._around.token)
                return replication.drop_slot(self.publisher, self.name)
