"""The copier that uses logical replication: the actions of a transfer up to its decision.

Rows stream from source to target while both serve applications; the cutover takes milliseconds. Each action looks,
acts, records, and returns the event that the table takes; each can be run again from its beginning after a crash at
any point. What is to be cleaned up is named in the catalog before it is made.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from shardkit.core.errors import MoveWaiting
from shardkit.core.move import Event, Mode
from shardkit.core.topology import Shard, ShardedTable
from shardkit.storage import change, inspection, replicaidentity, replication, servers, sourceguard, tables
from shardkit.storage.attended import attended
from shardkit.storage.connections import Connection, transaction
from shardkit.storage.failpoints import failpoint

from . import preflight
from .clearing import DDL
from .cutover import Altered, Cutover, Postponed
from .stream import POLL, Stream
from .verify import Verifier

if TYPE_CHECKING:
    from .transfer import TransferRun

ROOM_POLL = 0.25
"""Seconds between two looks at servers that are full."""
GRACE = 2.0
"""Seconds until what no transfer of this mover takes counts as taken for good."""
SMALL_LAG = 0.5
"""Seconds in which the target must have applied everything before rows are compared."""


class LogicalCopier:
    """One transfer's copy by logical replication, its verification and its cutover."""

    def __init__(self, run: TransferRun) -> None:
        self._run = run
        self.stream = Stream(run, run.source_shard, run.target_shard, run.name)
        self._verifier: Verifier | None = None

    def begin_phase(self) -> None:
        """The driver enters a phase."""
        self.stream.begin_phase()

    def end(self) -> None:
        """End the copy on both sides, so that nothing done to the rows on one reaches the other."""
        self.stream.drop()
        self._run.around.room.leave(self._run.row.id)

    take_back = end

    def stand_down(self) -> None:
        """Drop the triggers on the source."""
        self._run.clearing.remove_triggers()

    def on_open(self, target: Connection) -> None:
        """On the target as it opens, in that transaction: nothing may be applied any more, the purge's deletes least of
        all."""
        replication.set_enabled(target, self._run.name, False)

    # --- prepare ---------------------------------------------------------------------------------------------------

    def prepare(self) -> Event:
        """Check everything, mark the arcs in transit on the target, stand guard on the source."""
        run = self._run
        topology = run.topology()
        self.end()  # what a copy that begins again left takes slots that it needs
        self._enter_room()
        preflight.check(topology, run.source_shard, run.target_shard, run.shards, Mode.LOGICAL)
        with run.around.fitting:
            for table in run.tables:
                self._fit_replica_identity(table)
        if not topology.by_id[run.row.target].in_transit.issuperset(run.row.arcs):
            run.patiently_change(lambda now, version: now.marked(version, run.row.target, run.row.arcs))
        run.clearing.delete_rows(run.target_shard)
        for index, table in enumerate(run.tables):
            install = partial(self._install, index, table)
            run.waits.with_lock_retries(f"the trigger on {table}", run.source_shard, install, table)
        identities = {shard.name: _identity_json(connection) for shard, connection in self._both()}
        rows, size = self._estimate()
        run.catalog.forget(run.row.id, "copy_began")
        run.catalog.note(run.row.id, identities=identities, rows_expected=rows, bytes_expected=size)
        return Event.PREPARED

    def _enter_room(self) -> None:
        """Wait while the servers have too little for this transfer beside those that run. What others than these take
        is not waited for: the preflight refuses, with whatever else is in the way."""
        run = self._run
        here, there = self._both()
        began = time.monotonic()
        while (full := run.around.room.enter(run.row.id, run.name, here, there, len(run.tables))) is not None:
            # What a transfer has dropped goes a moment after it.
            if not full.will_end and time.monotonic() - began > GRACE:
                break
            run.waits.tell(f"the copy waits for {full.reason}")
            run.around.pause(ROOM_POLL)
        run.waits.tell(None)

    def _stay_in_room(self) -> None:
        run = self._run
        run.around.room.stay(run.row.id, run.name, run.source, run.target, len(run.tables))

    def _install(self, index: int, table: ShardedTable) -> None:
        run = self._run
        with transaction(run.source, *DDL):
            change.claim(run.source, run.around.token)
            sourceguard.install(run.source, run.row.id, index, table, run.row.arcs)

    def _fit_replica_identity(self, table: ShardedTable) -> None:
        run = self._run
        if replicaidentity.fits(run.source, table):
            return
        # On a connection of its own: it waits for every transaction that may know the table without the index.
        connection = run.shards.get(run.source_shard)
        what = f"the index for the replica identity of {table} on shard {run.source_shard.name}"
        attended(
            connection,
            lambda: replicaidentity.prepare_index(connection, table, run.around.token),
            run.waits.looking_after(what, run.source_shard, connection.info.backend_pid),
        )
        run.waits.tell(None)
        run.waits.with_lock_retries(
            f"the replica identity of {table}",
            run.source_shard,
            lambda: replicaidentity.use(run.source, table, run.around.token),
            table,
            inspection.Against.EVERYBODY,
        )

    def _both(self) -> tuple[tuple[Shard, Connection], tuple[Shard, Connection]]:
        run = self._run
        return ((run.source_shard, run.source), (run.target_shard, run.target))

    def _estimate(self) -> tuple[int, int]:
        """Rows and bytes that the arcs hold, by the server's statistics and the share of the source's positions."""
        run = self._run
        owned = run.topology().owned(run.row.source)
        held = (owned | run.row.arcs).width
        share = run.row.arcs.width / held
        found = [tables.describe(run.source, table) for table in run.tables]
        rows = sum(max(table.rows_estimate, 0.0) for table in found if table)
        return int(rows * share), int(sum(table.bytes for table in found if table) * share)

    def _same_servers(self) -> bool:
        """Whether both servers are the ones that the copy began with, and its slot is of use."""
        run = self._run
        stored = run.catalog.transfer(run.row.id).record.get("identities", {})
        if any(stored.get(shard.name) != _identity_json(connection) for shard, connection in self._both()):
            return False
        return not self.stream.is_lost()

    # --- copy, catch up, verify ------------------------------------------------------------------------------------

    def copy(self) -> Event:
        """Until every table is on the target."""
        run = self._run
        self._stay_in_room()
        if not self._same_servers():
            return Event.SERVER_CHANGED
        record = run.catalog.transfer(run.row.id).record
        run.track.update(rows_expected=record["rows_expected"], bytes_expected=record["bytes_expected"])
        if "copy_began" not in record:
            # The servers go on copying while no mover looks, so the clock is the wall's.
            record["copy_began"] = time.time()
            run.catalog.note(run.row.id, copy_began=record["copy_began"])
        self.stream.make()
        rows: dict[str, int] = {}
        size: dict[str, int] = {}
        forgot = worked = time.monotonic()
        while True:
            state = self.stream.state()
            self.stream.require_slot()
            rows |= state.rows
            size |= state.bytes
            run.track.update(rows=sum(rows.values()), bytes=sum(size.values()))
            if state.ready == state.tables == len(run.tables):
                break
            failpoint("copying.poll")
            if not self.stream.held_up(state, time.monotonic() - worked):
                worked = time.monotonic()
            if time.monotonic() - forgot > 5:
                sourceguard.forget_changes(run.source, run.row.id, run.around.token)
                forgot = time.monotonic()
            run.around.pause(POLL)
        run.catalog.note(run.row.id, copy_seconds=max(0.0, time.time() - record["copy_began"]))
        return Event.COPIED

    def catch_up(self) -> Event:
        """Until the target is less than `SMALL_LAG` behind."""
        self._stay_in_room()
        if not self._same_servers():
            return Event.SERVER_CHANGED
        while self.stream.wait_replayed() > SMALL_LAG:
            self._run.around.pause(0)
        return Event.CAUGHT_UP

    def verify(self) -> Event:
        """Compare both sides by content."""
        run = self._run
        self._stay_in_room()
        if not self._same_servers():
            return Event.SERVER_CHANGED
        preflight.check_tables(
            run.topology(), run.tables, run.source_shard, run.target_shard, run.probes, Mode.LOGICAL
        )
        record = run.catalog.transfer(run.row.id).record
        run.track.update(rows_expected=record["rows_expected"])
        self._verifier = Verifier(
            run.source,
            run.target,
            run.row.id,
            run.around.token,
            run.tables,
            run.row.arcs,
            wait_replayed=self.stream.wait_replayed,
            on_rows=lambda rows: run.track.update(rows=run.track.now.rows + rows),
        )
        self._verifier.run()
        run.catalog.note(run.row.id, certificate=self._verifier.certificate)
        return Event.VERIFIED

    # --- the decision ----------------------------------------------------------------------------------------------

    def cut_over(self) -> Event:
        """Hand the arcs over, in a moment in which nobody holds the source for long."""
        run = self._run
        # What a lost connection left pending may be the decision: nothing is prepared or compared again after it.
        run.settle()
        if run.decided():
            return Event.DECIDED
        if not self._same_servers():
            return Event.SERVER_CHANGED
        if self._verifier is None:
            return Event.POSTPONED  # what was noted as written is not known to this process: compare again
        cutover = Cutover(run, self._verifier)
        deadline = time.monotonic() + run.around.patience
        while True:
            run.around.pause(0)
            self._verifier.settle_once()
            try:
                run.change(
                    lambda now, version: now.cut_over(version, run.row.source, run.row.target, run.row.arcs),
                    1.0,
                    while_closed=cutover.while_closed,
                    on_open=cutover.on_open,
                    clock=cutover.clock,
                )
            except Altered as reason:
                run.waits.tell(str(reason))
                return Event.POSTPONED
            except (Postponed, MoveWaiting) as error:
                if time.monotonic() > deadline:
                    raise MoveWaiting(
                        f"No moment to cut over was found within {run.around.patience:.0f} s: {error}"
                    ) from error
                run.around.pause(0.05)
                continue
            run.catalog.note(run.row.id, pause_ms=cutover.pause_ms(), certificate=self._verifier.certificate)
            return Event.DECIDED


def _identity_json(connection: Connection) -> list[Any]:
    identity = servers.identity(connection)
    return [identity.system, identity.timeline]
