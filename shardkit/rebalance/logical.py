"""The copier that uses logical replication: the actions of a transfer up to its decision.

Rows stream from source to target while both serve applications; the cutover takes milliseconds. Each action looks,
acts, records, and returns the event that the table takes; each can be run again from its beginning after a crash at
any point. What is to be cleaned up is named in the catalog before it is made.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

from shardkit.core.move import Event, Mode
from shardkit.core.topology import Shard, ShardedTable
from shardkit.storage import change, inspection, replicaidentity, replication, sourceguard, tables
from shardkit.storage.attended import attended
from shardkit.storage.connections import transaction
from shardkit.storage.failpoints import failpoint

from . import preflight
from .clearing import DDL
from .cutover import Cutover
from .opening import Opening
from .stream import POLL, Stream
from .verify import Verifier

if TYPE_CHECKING:
    from .transfer import TransferRun

ROOM_POLL = 0.25
"""Seconds between two looks at servers that are full."""
GRACE = 2.0
"""Seconds until what no transfer of this mover takes counts as taken for good."""

class LogicalCopier:
    """One transfer's copy by logical replication, its verification and its cutover."""

    def __init__(self, run: TransferRun) -> None:
        self._run = run
        self.stream = Stream(
            run, run.source_shard, run.target_shard, run.name, budget=run.limits.wal_retained
        )
        self._verifier: Verifier | None = None

    def begin_phase(self) -> None:
        """The driver enters a phase."""
        self.stream.begin_phase()

    def end(self) -> None:
        """End the copy on both sides, so that nothing done to the rows on one reaches the other."""
        self.stream.drop()
        self._run.clearing.remove_notes(self._run.target_shard)
        self._run.around.room.leave(self._run.row.id)

    take_back = end

    def stand_down(self) -> None:
        """Drop the triggers on the source."""
        self._run.clearing.remove_triggers(self._run.source_shard)

    # --- prepare ---------------------------------------------------------------------------------------------------

    def prepare(self) -> Event:
        """Check everything, mark the arcs in transit on the target, stand guard on the source, watch the target."""
        run = self._run
        topology = run.topology()
        self.end()  # what a copy that begins again left takes slots that it needs
        if run.keeps_source:
            run.way_back.drop()
        self._enter_room()
        preflight.check(
            topology,
            run.source_shard,
            run.target_shard,
            run.shards,
            Mode.LOGICAL,
            back=run.keeps_source,
            in_force=True,
        )
        with run.around.fitting:
            for table in run.tables:
                self._fit_replica_identity(table, run.source_shard)
                if run.keeps_source:
                    self._fit_replica_identity(table, run.target_shard)
        if not topology.by_id[run.row.target].in_transit.issuperset(run.row.arcs):
            run.patiently_change(lambda now, version: now.marked(version, run.row.target, run.row.arcs))
        run.clearing.delete_rows(run.target_shard)
        for index, table in enumerate(run.tables):
            for shard in (run.target_shard, run.source_shard):
                install = partial(self._install, shard, index, table)
                run.waits.with_lock_retries(f"the trigger on {table}", shard, install, table)
        if run.keeps_source:
            run.way_back.refuse_what_is_not_carried()
        run.indexes.set_aside()
        identities = run.identities()
        rows, size = self._estimate()
        run.catalog.forget(run.row.id, "copy_began")
        run.catalog.note(run.row.id, identities=identities, rows_expected=rows, bytes_expected=size)
        return Event.PREPARED

    def _enter_room(self) -> None:
        """Wait while the servers have too little for this transfer beside those that run. What others than these take
        is not waited for: the preflight refuses, with whatever else is in the way."""
        run = self._run
        here, there = (run.source_shard, run.source), (run.target_shard, run.target)
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

    def _install(self, shard: Shard, index: int, table: ShardedTable) -> None:
        run, connection = self._run, self._run.probes.get(shard)
        like = tables.describe(run.source, table)
        assert like is not None
        with transaction(connection, *DDL, step="install_triggers"):
            change.claim(connection, run.around.token)
            if shard is run.source_shard:
                sourceguard.install(connection, run.row.id, index, table, run.row.arcs)
            else:
                sourceguard.watch(connection, run.row.id, index, table, run.row.arcs, like)

    def _fit_replica_identity(self, table: ShardedTable, shard: Shard) -> None:
        run = self._run
        if replicaidentity.fits(run.probes.get(shard), table):
            return
        # On a connection of its own: it waits for every transaction that may know the table without the index.
        connection = run.shards.get(shard)
        what = f"the index for the replica identity of {table} on shard {shard.name}"
        attended(
            connection,
            lambda: replicaidentity.prepare_index(connection, table, run.around.token),
            run.waits.looking_after(what, shard, connection.info.backend_pid),
        )
        run.waits.tell(None)
        run.waits.with_lock_retries(
            f"the replica identity of {table}",
            shard,
            lambda: replicaidentity.use(run.probes.get(shard), table, run.around.token),
            table,
            inspection.Against.EVERYBODY,
        )

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
        """Whether both servers are the ones that the copy began with, and it is there and its slot of use."""
        run = self._run
        stored = run.catalog.transfer(run.row.id).record.get("identities", {})
        if stored != run.identities() or self.stream.is_lost():
            return False
        began = "copy_began" in run.catalog.transfer(run.row.id).record
        # One that is gone was given up, for the WAL that it held back.
        return not began or replication.subscription_exists(run.target, run.name)

    # --- copy, catch up, verify ------------------------------------------------------------------------------------

    def copy(self) -> Event:
        """Until every table is on the target."""
        run = self._run
        self._stay_in_room()
        if not self._same_servers():
            return Event.SERVER_CHANGED
        record = run.catalog.transfer(run.row.id).record
        run.track.update(rows_expected=record["rows_expected"], bytes_expected=record["bytes_expected"])
        self.stream.make()
        if "copy_began" not in record:
            # The servers go on copying while no mover looks, so the clock is the wall's.
            record["copy_began"] = time.time()
            run.catalog.note(run.row.id, copy_began=record["copy_began"])
        rows: dict[str, int] = {}
        size: dict[str, int] = {}
        forgot = worked = time.monotonic()
        while True:
            state = self.stream.state()
            self.stream.require_slot()
            self.stream.require_budget()
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
        """Until the target's indexes are back, and it is less than `SMALL_LAG` behind."""
        self._stay_in_room()
        if not self._same_servers():
            return Event.SERVER_CHANGED
        self._run.indexes.put_back(self.stream.attend_to)
        if self._run.keeps_source:
            self._run.way_back.stream.publish()
        self.stream.catch_up()
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
        self._verifier = run.verifier(self.stream)
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
        cutover = Cutover(run, self.stream, self._verifier, Opening(run.row.id, run.name, run.keeps_source))
        if not cutover.attempt():
            return Event.POSTPONED
        run.catalog.note(run.row.id, pause_ms=cutover.pause_ms(), certificate=self._verifier.certificate)
        return Event.DECIDED
