"""One transfer: the actions of `core.move`'s table, carried out on the source, the target and the catalog.

Each action looks, acts, records, and returns the event that the table takes; each can be run again from its beginning
after a crash at any point. What is to be cleaned up is named in the catalog before it is made. Driven by
`rebalance.mover`, one thread a transfer; nothing here decides what moves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import psycopg

from shardkit.core.errors import MoverSuperseded, MoveWaiting, ReplicationFailed
from shardkit.core.move import ACTIONS, FINAL, Action, Event, can_abort, step
from shardkit.core.topology import Shard, ShardedTable, Topology
from shardkit.storage import (
    change,
    fence,
    inspection,
    purge,
    replicaidentity,
    replication,
    servers,
    sourceguard,
    tables,
)
from shardkit.storage.attended import attended
from shardkit.storage.catalog import Catalog, TransferRow
from shardkit.storage.connections import SHORT, Connection, ShardConnections, transaction
from shardkit.storage.failpoints import failpoint

from . import preflight
from .cutover import Altered, Cutover, Postponed
from .progress import Tracker
from .verify import Verifier
from .waiting import Surroundings, Waits

POLL = 0.1
"""Seconds between two looks at a copy that runs."""
SMALL_LAG = 0.5
"""Seconds in which the target must have applied everything before rows are compared."""
REVIVALS = 5
"""So many times in a row a subscription that stopped is enabled again."""
_PATIENT = (*change.OPENING, ("lock_timeout", "500ms"))
_DDL = (*SHORT, ("lock_timeout", "10ms"), ("synchronous_commit", "on"))
"""With a wait that is shorter than what a role for applications may have set for itself."""


class TransferRun:
    """A transfer under way. A context manager that closes its connections."""

    def __init__(self, row: TransferRow, around: Surroundings) -> None:
        self.row = row
        self.around = around
        self.catalog = Catalog.open(around.catalog_url, application="shardkit mover").use_lease(around.token)
        # Changes of the topology hold a transaction open; what looks on meanwhile needs connections of its own.
        self.shards = ShardConnections()
        self.probes = ShardConnections("shardkit mover probe")
        self.name = f"shardkit_{self.catalog.cluster_id().hex[:8]}_{row.id}"
        topology = self.topology()
        self.source_shard = topology.by_id[row.source]
        self.target_shard = topology.by_id[row.target]
        self.tables = topology.tables
        self.track = Tracker(
            row.id, self.source_shard.name, self.target_shard.name, row.phase, around.listener
        )
        self.waits = Waits(row.id, around, self.catalog, self.probes, self.track)
        self._verifier: Verifier | None = None
        self._revivals = 0
        self._ready = 0
        self._actions: dict[Action, Callable[[], Event]] = {
            Action.START: lambda: Event.STARTED,
            Action.PREPARE: self._prepare,
            Action.COPY: self._copy,
            Action.CATCH_UP: self._catch_up,
            Action.VERIFY: self._verify,
            Action.CUT_OVER: self._cut_over,
            Action.OPEN: self._open,
            Action.PURGE: self._purge,
            Action.UNDO: self._undo,
        }

    def __enter__(self) -> TransferRun:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shards.__exit__(*exc)
        self.probes.__exit__(*exc)
        self.catalog.__exit__(*exc)

    # --- the way through the table ---------------------------------------------------------------------------------

    def run(self) -> None:
        """Go from the stored phase to a final one."""
        while self.row.phase not in FINAL:
            self.around.pause(0)
            self.track.enter(self.row.phase)
            failpoint(f"{self.row.phase.value}.begin")
            self._take(self._actions[ACTIONS[self.row.phase]]())
        self.track.enter(self.row.phase)

    def abort(self) -> None:
        """Turn back, if the decision lies ahead; else do nothing."""
        if can_abort(self.row.phase):
            self._take(Event.ABORT)

    def _take(self, event: Event) -> None:
        transition = step(self.row.phase, event)
        failpoint(f"{self.row.phase.value}.end")
        self.catalog.enter(self.row, transition.next, transition.sentence)
        self.row = replace(self.row, phase=transition.next)
        self._revivals = 0

    def topology(self) -> Topology:
        """The topology that the catalog holds now."""
        topology = self.catalog.current()
        assert topology is not None
        return topology

    @property
    def source(self) -> Connection:
        """The source, for looking and for short transactions."""
        return self.probes.get(self.source_shard)

    @property
    def target(self) -> Connection:
        """The target, for looking and for short transactions."""
        return self.probes.get(self.target_shard)

    def _change(self, make: Callable[[Topology, int], Topology], patience: float, **hooks: Any) -> None:
        def next_topology(current: Topology | None, version: int) -> Topology:
            assert current is not None
            return make(current, version)

        with self.around.changing:
            change.apply(
                self.catalog, self.shards, next_topology, report=self.waits.tell, patience=patience, **hooks
            )

    def _patiently_change(self, make: Callable[[Topology, int], Topology]) -> None:
        """A change that may wait for a long transaction, without holding up the other transfers."""
        deadline = time.monotonic() + self.around.patience
        while True:
            try:
                return self._change(make, 1.0)
            except MoveWaiting:
                if time.monotonic() > deadline:
                    raise
                self.around.pause(0.2)

    # --- prepare ---------------------------------------------------------------------------------------------------

    def _prepare(self) -> Event:
        topology = self.topology()
        self._drop_replication()  # what a copy that begins again left takes slots that it needs
        preflight.check(topology, self.source_shard, self.target_shard, self.shards)
        with self.around.fitting:
            for table in self.tables:
                self._fit_replica_identity(table)
        if not topology.by_id[self.row.target].in_transit.issuperset(self.row.arcs):
            self._patiently_change(lambda now, version: now.marked(version, self.row.target, self.row.arcs))
        self._delete_rows(self.target_shard)
        for index, table in enumerate(self.tables):
            install = partial(self._install, index, table)
            self.waits.with_lock_retries(f"the trigger on {table}", self.source_shard, install, table)
        identities = {shard.name: _identity_json(connection) for shard, connection in self._both()}
        rows, size = self._estimate()
        self.catalog.forget(self.row.id, "copy_began")
        self.catalog.note(self.row.id, identities=identities, rows_expected=rows, bytes_expected=size)
        return Event.PREPARED

    def _install(self, index: int, table: ShardedTable) -> None:
        with transaction(self.source, *_DDL):
            change.claim(self.source, self.around.token)
            sourceguard.install(self.source, self.row.id, index, table, self.row.arcs)

    def _fit_replica_identity(self, table: ShardedTable) -> None:
        if replicaidentity.fits(self.source, table):
            return
        # On a connection of its own: it waits for every transaction that may know the table without the index.
        connection = self.shards.get(self.source_shard)
        what = f"the index for the replica identity of {table} on shard {self.source_shard.name}"
        attended(
            connection,
            lambda: replicaidentity.prepare_index(connection, table, self.around.token),
            self.waits.looking_after(what, self.source_shard, connection.info.backend_pid),
        )
        self.waits.tell(None)
        self.waits.with_lock_retries(
            f"the replica identity of {table}",
            self.source_shard,
            lambda: replicaidentity.use(self.source, table, self.around.token),
            table,
            inspection.Against.EVERYBODY,
        )

    def _both(self) -> Iterable[tuple[Shard, Connection]]:
        return ((self.source_shard, self.source), (self.target_shard, self.target))

    def _estimate(self) -> tuple[int, int]:
        """Rows and bytes that the arcs hold, by the server's statistics and the share of the source's positions."""
        owned = self.topology().owned(self.row.source)
        held = (owned | self.row.arcs).width
        share = self.row.arcs.width / held
        found = [tables.describe(self.source, table) for table in self.tables]
        rows = sum(max(table.rows_estimate, 0.0) for table in found if table)
        return int(rows * share), int(sum(table.bytes for table in found if table) * share)

    def _same_servers(self) -> bool:
        """Whether both servers are the ones that the copy began with, and its slot is of use."""
        stored = self.catalog.transfer(self.row.id).record.get("identities", {})
        if any(stored.get(shard.name) != _identity_json(connection) for shard, connection in self._both()):
            return False
        return not replication.subscription_exists(self.target, self.name) or not replication.slot_is_lost(
            self.source, self.name
        )

    # --- copy, catch up, verify ------------------------------------------------------------------------------------

    def _copy(self) -> Event:
        if not self._same_servers():
            return Event.SERVER_CHANGED
        record = self.catalog.transfer(self.row.id).record
        self.track.update(rows_expected=record["rows_expected"], bytes_expected=record["bytes_expected"])
        if "copy_began" not in record:
            # The servers go on copying while no mover looks, so the clock is the wall's.
            record["copy_began"] = time.time()
            self.catalog.note(self.row.id, copy_began=record["copy_began"])
        self._subscribe()
        rows: dict[str, int] = {}
        size: dict[str, int] = {}
        forgot = worked = time.monotonic()
        while True:
            state = self._copy_state()
            self._require_slot()
            rows |= state.rows
            size |= state.bytes
            self.track.update(rows=sum(rows.values()), bytes=sum(size.values()))
            if state.ready == state.tables == len(self.tables):
                break
            failpoint("copying.poll")
            if not self._held_up(state, time.monotonic() - worked):
                worked = time.monotonic()
            if time.monotonic() - forgot > 5:
                sourceguard.forget_changes(self.source, self.row.id, self.around.token)
                forgot = time.monotonic()
            self.around.pause(POLL)
        self.catalog.note(self.row.id, copy_seconds=max(0.0, time.time() - record["copy_began"]))
        return Event.COPIED

    def _subscribe(self) -> None:
        if replication.subscription_exists(self.target, self.name):
            return
        with transaction(self.source, *change.OPENING):
            change.claim(self.source, self.around.token)
            replication.create_publication(self.source, self.name, self.tables, self.row.arcs)
        failpoint("copying.published")
        self._create_slot()
        failpoint("copying.slot")
        with self.around.changing, transaction(self.target, *change.OPENING):
            change.claim(self.target, self.around.token)
            fence.guard(self.target, self.topology().by_id[self.row.target].fence)
            replication.create_subscription(self.target, self.name, replication.peer_conninfo(self.source))
        failpoint("copying.subscribed")

    def _create_slot(self) -> None:
        what = f"the replication slot on shard {self.source_shard.name}"
        while True:
            self._claim_source()
            slot = replication.slot_state(self.source, self.name)
            if slot.ready:
                return self.waits.tell(None)
            if slot.maker is not None:
                # A mover that was killed left its server process at work; what that makes is as good.
                look = self.waits.looking_after(what, self.source_shard, slot.maker)
                while replication.slot_state(self.source, self.name).maker == slot.maker:
                    look()
                    self.around.pause(POLL)
                continue
            replication.drop_slot(self.source, self.name)
            # On a connection of its own: it may take as long as the longest transaction that writes now.
            connection = self.shards.get(self.source_shard)
            with suppress(psycopg.errors.DuplicateObject):
                attended(
                    connection,
                    partial(replication.create_slot, connection, self.name),
                    self.waits.looking_after(what, self.source_shard, connection.info.backend_pid),
                )

    def _held_up(self, state: replication.CopyState, seconds: float) -> bool:
        """Whether no table is being copied, which is so for a moment between two; tells the reason, and loses patience
        with it."""
        reason = replication.held_up(self.source, state.oid)
        if reason is None:
            self.waits.tell(None)
        elif seconds > 2:
            self.waits.recover_doubtful(self.source_shard)
            self.waits.tell(f"the copy on shard {self.target_shard.name} waits for {reason}")
            if seconds > self.around.patience:
                raise MoveWaiting(f"The copy on shard {self.target_shard.name} waits for {reason}.")
        return reason is not None

    def _require_slot(self) -> None:
        """`ReplicationFailed` where nothing more can come from the source, so that waiting would never end."""
        if not replication.slot_is_lost(self.source, self.name):
            return
        what = f"Shard {self.source_shard.name} gave up the slot {self.name}"
        if replication.slot_exists(self.source, self.name):
            what += ": it held back too much WAL"
        raise ReplicationFailed(
            f"{what}.",
            hint="`shardkit rebalance resume` copies again; raise max_slot_wal_keep_size before.",
            shard=self.source_shard.name,
        )

    def _copy_state(self) -> replication.CopyState:
        """The state of a subscription that runs, or runs again.

        The server disables it on any error, a lost connection to the source included; one that stops again and again
        without a table more being ready has met a row it cannot take.
        """
        state = replication.copy_state(self.target, self.name)
        if state is None:
            raise ReplicationFailed(
                f"The subscription {self.name} on shard {self.target_shard.name} is gone."
            )
        if state.enabled:
            return state
        if state.ready > self._ready:
            self._ready, self._revivals = state.ready, 0
        self._revivals += 1
        if self._revivals > REVIVALS:
            raise ReplicationFailed(
                f"The subscription {self.name} on shard {self.target_shard.name} stops on an error again and again.",
                shard=self.target_shard.name,
                errors=state.errors,
            )
        self.around.pause(0.1 * self._revivals)
        with transaction(self.target, *SHORT):
            change.claim(self.target, self.around.token)  # the opening may have stopped it, by another mover
            replication.set_enabled(self.target, self.name, True)
        return state

    def _catch_up(self) -> Event:
        if not self._same_servers():
            return Event.SERVER_CHANGED
        while self._wait_replayed() > SMALL_LAG:
            self.around.pause(0)
        return Event.CAUGHT_UP

    def _wait_replayed(self) -> float:
        """Wait until the target has applied what is committed on the source now; the seconds it took."""
        started = time.monotonic()
        position = replication.position_now(self.source)
        while True:
            sender = replication.sender(self.source, self.name, position)
            self.track.update(lag_bytes=sender.lag_bytes if sender else None)
            if sender is not None and sender.passed:
                self.waits.tell(None)
                return time.monotonic() - started
            self._copy_state()
            if time.monotonic() - started > 2:
                if sender is None:
                    self._require_slot()
                self.waits.tell(f"shard {self.target_shard.name} applies the writes made meanwhile")
            self.around.pause(0.005)

    def _verify(self) -> Event:
        if not self._same_servers():
            return Event.SERVER_CHANGED
        preflight.check_tables(self.tables, self.source_shard, self.target_shard, self.probes)
        record = self.catalog.transfer(self.row.id).record
        self.track.update(rows_expected=record["rows_expected"])
        self._verifier = Verifier(
            self.source,
            self.target,
            self.row.id,
            self.around.token,
            self.tables,
            self.row.arcs,
            wait_replayed=self._wait_replayed,
            on_rows=lambda rows: self.track.update(rows=self.track.now.rows + rows),
        )
        self._verifier.run()
        self.catalog.note(self.row.id, certificate=self._verifier.certificate)
        return Event.VERIFIED

    # --- the decision ----------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Finish or discard what is pending; a cutover of this transfer opens without its subscription."""
        with self.around.changing:
            change.settle(
                self.catalog,
                self.shards,
                on_open=lambda target: replication.set_enabled(target, self.name, False),
            )

    def _cut_over(self) -> Event:
        # What a lost connection left pending may be the decision: nothing is prepared or compared again after it.
        self._settle()
        if self._decided():
            return Event.DECIDED
        if not self._same_servers():
            return Event.SERVER_CHANGED
        if self._verifier is None:
            return Event.POSTPONED  # what was noted as written is not known to this process: compare again
        cutover = Cutover(self, self._verifier)
        deadline = time.monotonic() + self.around.patience
        while True:
            self.around.pause(0)
            self._verifier.settle_once()
            try:
                self._change(
                    lambda now, version: now.cut_over(
                        version, self.row.source, self.row.target, self.row.arcs
                    ),
                    1.0,
                    while_closed=cutover.while_closed,
                    on_open=cutover.on_open,
                    clock=cutover.clock,
                )
            except Altered as reason:
                self.waits.tell(str(reason))
                return Event.POSTPONED
            except (Postponed, MoveWaiting) as error:
                if time.monotonic() > deadline:
                    raise MoveWaiting(
                        f"No moment to cut over was found within {self.around.patience:.0f} s: {error}"
                    ) from error
                self.around.pause(0.05)
                continue
            self.catalog.note(
                self.row.id, pause_ms=cutover.pause_ms(), certificate=self._verifier.certificate
            )
            return Event.DECIDED

    def _decided(self) -> bool:
        return self.topology().owned(self.row.target).issuperset(self.row.arcs)

    def _open(self) -> Event:
        if not self._decided():
            raise MoverSuperseded("The catalog does not hold the topology that this transfer decided.")
        return Event.OPENED

    # --- the end ---------------------------------------------------------------------------------------------------

    def _purge(self) -> Event:
        self._drop_replication()
        self.track.update(rows_expected=sum(self._certified_rows().values()))
        deleted = self._delete_rows(self.source_shard)
        for _, connection in self._both():
            for table in self.tables:
                tables.analyze(connection, table)
        self._remove_triggers()
        self._change(
            lambda now, version: now.unmarked(version, self.row.source, self.row.arcs), self.around.patience
        )
        purged = self.catalog.transfer(self.row.id).record.get("rows_purged", 0)
        self.catalog.note(self.row.id, rows_purged=purged + deleted)
        return Event.PURGED

    def _certified_rows(self) -> dict[str, int]:
        certificate = self.catalog.transfer(self.row.id).record.get("certificate", {})
        return dict(certificate.get("rows", {}))

    def _drop_replication(self) -> None:
        """Subscription first, and the slot when nobody uses it any more; nothing that was never made is missed."""
        self.waits.with_lock_retries(
            "the end of the subscription", self.target_shard, self._drop_subscription
        )
        failpoint("drop.subscription")
        self.waits.with_lock_retries("the end of the publication", self.source_shard, self._drop_publication)
        self._drop_slot_patiently()
        failpoint("drop.slot")

    def _drop_subscription(self) -> None:
        with transaction(self.target, *_PATIENT):
            change.claim(self.target, self.around.token)
            replication.drop_subscription(self.target, self.name)

    def _drop_publication(self) -> None:
        with transaction(self.source, *_PATIENT):
            change.claim(self.source, self.around.token)
            replication.drop_publication(self.source, self.name)

    def _drop_slot_patiently(self) -> None:
        """Until whoever uses it has gone: a walsender, or what a killed mover left at work on it."""
        deadline = time.monotonic() + self.around.patience
        while not self._drop_slot():
            user = replication.slot_state(self.source, self.name).maker
            blocker = replication.blocker(self.source, user)
            reason = f"the slot {self.name} on shard {self.source_shard.name} is in use by pid {user}" + (
                f", which waits for {blocker}" if blocker else ""
            )
            if time.monotonic() > deadline:
                raise MoveWaiting(f"Nothing is dropped yet: {reason}.")
            if deadline - time.monotonic() < self.around.patience - 2:
                self.waits.tell(reason)
            self.around.pause(0.02)
        self.waits.tell(None)

    def _drop_slot(self) -> bool:
        with transaction(self.source, *SHORT):
            change.claim(self.source, self.around.token)
            return replication.drop_slot(self.source, self.name)

    def _delete_rows(self, shard: Shard) -> int:
        """Delete the rows of the arcs on a shard that does not own them, under the guard of a topology that says so."""
        connection = self.probes.get(shard)
        deleted = 0
        for table in self.tables:
            deleted += self._delete_from(connection, shard, table)
        return deleted

    def _delete_from(self, connection: Connection, shard: Shard, table: ShardedTable) -> int:
        topology = self.topology()
        done = 0

        def on_batch(rows: int) -> None:
            nonlocal done
            done += rows
            self.track.update(rows=self.track.now.rows + rows)
            failpoint(f"{self.row.phase.value}.batch")
            self.around.pause(0)

        while True:
            if topology.owned(shard.id) & self.row.arcs:
                raise MoverSuperseded(f"Shard {shard.name} owns arcs whose rows were to be deleted there.")
            in_force = topology.by_id[shard.id].fence
            try:
                purge.delete_arcs(
                    connection,
                    table,
                    self.row.arcs,
                    token=self.around.token,
                    in_force=in_force,
                    on_batch=on_batch,
                )
                return done
            except psycopg.errors.UndefinedTable:
                # Another transfer changed this shard's fence; look again under what is in force now.
                topology = self.topology()
                self.around.pause(0.02)
            except psycopg.errors.LockNotAvailable:
                blocker = replication.oldest_writer(connection) or "a session that locks it"
                self.waits.tell(f"the deletion from {table} on shard {shard.name} waits for {blocker}")
                self.around.pause(0.02)

    def _remove_triggers(self) -> None:
        for index, table in enumerate(self.tables):
            uninstall = partial(self._uninstall, index, table)
            everybody = inspection.Against.EVERYBODY
            self.waits.with_lock_retries(
                f"the trigger on {table}", self.source_shard, uninstall, table, everybody
            )
        self.waits.with_lock_retries("a trigger on a former partition", self.source_shard, self._clear)

    def _clear(self) -> None:
        with transaction(self.source, *_DDL):
            change.claim(self.source, self.around.token)
            sourceguard.remove_strays(self.source, self.row.id)
            sourceguard.clear(self.source, self.row.id)

    def _uninstall(self, index: int, table: ShardedTable) -> None:
        with transaction(self.source, *_DDL):
            change.claim(self.source, self.around.token)
            sourceguard.remove(self.source, self.row.id, index, table)

    def _claim_source(self) -> None:
        with transaction(self.source, *_PATIENT):
            change.claim(self.source, self.around.token)

    def _undo(self) -> Event:
        # Written on the source first: a decision by an older mover is now made already or can never be.
        self.waits.with_lock_retries("the end of the move", self.source_shard, self._claim_source)
        self._settle()
        if self._decided():
            return Event.DECIDED
        self._drop_replication()
        if self.topology().by_id[self.row.target].in_transit.issuperset(self.row.arcs):
            self._delete_rows(self.target_shard)
            self._change(
                lambda now, version: now.unmarked(version, self.row.target, self.row.arcs),
                self.around.patience,
            )
        self._remove_triggers()
        return Event.UNDONE


def _identity_json(connection: Connection) -> list[Any]:
    identity = servers.identity(connection)
    return [identity.system, identity.timeline]
