"""One transfer: the actions of `core.move`'s table, carried out on the source, the target and the catalog.

`TransferRun` goes the way through the table. The actions up to the decision belong to a copier (`rebalance.logical`,
or `rebalance.locked`); what follows it, and what takes a transfer back, is the same for every copier and is here.
Driven by `rebalance.mover`, one thread a transfer; nothing here decides what moves.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import psycopg

from shardkit.core.errors import MoverSuperseded, MoveWaiting, ShardBehind, WalBudgetExceeded
from shardkit.core.move import ACTIONS, STILL, Action, Event, Mode, can_abort, step
from shardkit.core.topology import Shard, Topology
from shardkit.storage import change, fence, servers, tables
from shardkit.storage.catalog import Catalog, TransferRow
from shardkit.storage.connections import Connection, ShardConnections, transaction
from shardkit.storage.failpoints import failpoint

from .clearing import Clearing
from .followers import Followers
from .indexes import Indexes
from .limits import Limits
from .locked import LockedCopier
from .logical import LogicalCopier
from .opening import Openings, stream_name
from .progress import Reporter, Tracker
from .stream import PATIENT, Stream
from .verify import Verifier
from .waiting import Surroundings, Waits
from .wayback import WayBack


class Copier(Protocol):
    """What carries a transfer's rows: the actions up to the decision, and how to end them and to take them back."""

    def begin_phase(self) -> None: ...
    def prepare(self) -> Event: ...
    def copy(self) -> Event: ...
    def catch_up(self) -> Event: ...
    def verify(self) -> Event: ...
    def cut_over(self) -> Event: ...
    def end(self) -> None: ...
    def take_back(self) -> None: ...
    def stand_down(self) -> None: ...


class TransferRun:
    """A transfer under way. A context manager that closes its connections."""

    def __init__(self, row: TransferRow, around: Surroundings) -> None:
        self.row = row
        self.around = around
        self.catalog = Catalog.open(around.catalog_url, application="shardkit mover").use_lease(around.token)
        # Changes of the topology hold a transaction open; what looks on meanwhile needs connections of its own.
        self.shards = ShardConnections()
        self.probes = ShardConnections("shardkit mover probe")
        self.name = stream_name(self.catalog, row.id)
        job = self.catalog.job(row.job_id)
        self.keeps_source = job.keeps_source
        self.limits = Limits.of(job.options)
        topology = self.topology()
        self.source_shard = topology.by_id[row.source]
        self.target_shard = topology.by_id[row.target]
        self.tables = topology.tables
        listener = Reporter(around.listener, self._report)
        self.track = Tracker(row.id, self.source_shard.name, self.target_shard.name, row.phase, listener)
        self.waits = Waits(row.id, around, self.catalog, self.probes, self.track)
        self.clearing = Clearing(self)
        self.indexes = Indexes(self)
        self.followers = Followers(self)
        self.copier = self._chosen_copier()
        self.way_back = WayBack(self)
        self._actions: dict[Action, Callable[[], Event]] = {
            Action.START: lambda: Event.STARTED,
            Action.PREPARE: self.copier.prepare,
            Action.COPY: self.copier.copy,
            Action.CATCH_UP: self.copier.catch_up,
            Action.VERIFY: self.copier.verify,
            Action.CUT_OVER: self.copier.cut_over,
            Action.OPEN: self._open,
            Action.PURGE: self._purge,
            Action.UNDO: self._undo,
            Action.CATCH_UP_BACK: self.way_back.catch_up,
            Action.VERIFY_BACK: self.way_back.verify,
            Action.CUT_BACK: self.way_back.cut_over,
            Action.OPEN_BACK: self.way_back.open,
            Action.CLEAR: self.way_back.clear,
            Action.STAY: self.way_back.stay,
        }

    def _report(self, progress: dict[str, Any]) -> None:
        # Not worth a failure: whatever keeps the catalog away is met by the next step.
        with suppress(psycopg.Error):
            self.catalog.report(self.row.id, progress)

    def _chosen_copier(self) -> Copier:
        """By the mode that is stored for the transfer; before anything was done, a mode is chosen and stored."""
        mode = Mode(self.row.record.get("mode", Mode.LOGICAL))
        if mode is Mode.AUTO:
            mode = Mode.LOGICAL if servers.replicates_logically(self.source) else Mode.LOCKED
            self.catalog.note(self.row.id, mode=mode)
        return LogicalCopier(self) if mode is Mode.LOGICAL else LockedCopier(self)

    def __enter__(self) -> TransferRun:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shards.__exit__(*exc)
        self.probes.__exit__(*exc)
        self.catalog.__exit__(*exc)

    # --- the way through the table ---------------------------------------------------------------------------------

    def run(self) -> None:
        """Go from the stored phase to a final one, or to one that waits for the operator."""
        for shard in (self.source_shard, self.target_shard):
            self.followers.look(shard)
        while self.row.phase not in STILL:
            self.around.pause(0)
            self.track.enter(self.row.phase)
            failpoint(f"{self.row.phase.value}.begin")
            try:
                event = self._actions[ACTIONS[self.row.phase]]()
            except WalBudgetExceeded:
                self.copier.end()  # nothing else lets the WAL go; what was copied is copied again
                raise
            self._take(event)
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
        self.copier.begin_phase()
        self.way_back.stream.begin_phase()

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

    def change(self, make: Callable[[Topology, int], Topology], patience: float, **hooks: Any) -> None:
        """Bring what ``make(current, version)`` returns into force; `change.apply` has the rest."""

        def next_topology(current: Topology | None, version: int) -> Topology:
            assert current is not None
            return make(current, version)

        with self.around.changing:
            self._settle()
            change.apply(
                self.catalog, self.shards, next_topology, report=self.waits.tell, patience=patience, **hooks
            )

    def patiently_change(self, make: Callable[[Topology, int], Topology]) -> None:
        """A change that may wait for a long transaction, without holding up the other transfers."""
        deadline = time.monotonic() + self.around.patience
        while True:
            try:
                return self.change(make, 1.0)
            except MoveWaiting:
                if time.monotonic() > deadline:
                    raise
                self.around.pause(0.2)

    def settle(self) -> None:
        """Finish or discard what is pending, this transfer's or another's."""
        with self.around.changing:
            self._settle()

    def _settle(self) -> None:
        change.settle(self.catalog, self.shards, on_open=Openings.pending(self.catalog).on_open)

    def decided(self) -> bool:
        """Whether the target owns the arcs, by the topology in force."""
        return self.topology().owned(self.row.target).issuperset(self.row.arcs)

    def identities(self) -> dict[str, list[Any]]:
        """Which servers source and target are now: another history is another server."""
        found = {
            shard.name: servers.identity(self.probes.get(shard))
            for shard in (self.source_shard, self.target_shard)
        }
        return {name: [identity.system, identity.timeline] for name, identity in found.items()}

    def verifier(self, stream: Stream) -> Verifier:
        """What compares the publisher of a stream with its subscriber."""
        return Verifier(
            stream.publisher,
            stream.subscriber,
            self.row.id,
            self.around.token,
            self.tables,
            self.row.arcs,
            wait_applied=stream.wait_applied,
            on_rows=lambda rows: self.track.update(rows=self.track.now.rows + rows),
        )

    def claim(self, shard: Shard) -> None:
        """Write this mover's token on a shard: a decision there by an older one is made now, or can never be."""
        self.waits.with_lock_retries("the end of the move", shard, partial(self._claim, shard))

    def _claim(self, shard: Shard) -> None:
        connection = self.probes.get(shard)
        with transaction(connection, *PATIENT, step="claim_source"):
            change.claim(connection, self.around.token)

    # --- what follows the copier -----------------------------------------------------------------------------------

    def _open(self) -> Event:
        if not self.decided():
            raise MoverSuperseded("The catalog does not hold the topology that this transfer decided.")
        if not self.keeps_source:
            return Event.OPENED
        self.copier.end()  # the two directions never run at once
        self.way_back.begin()
        return Event.KEPT

    def _purge(self) -> Event:
        self.copier.end()
        if self.keeps_source:
            self.way_back.drop()
            self.clearing.remove_triggers(self.target_shard)
        self.track.update(rows_expected=sum(self._certified_rows().values()))
        self.clear_out(self.source_shard, self.copier.stand_down)
        return Event.PURGED

    def clear_out(self, shard: Shard, stand_down: Callable[[], None]) -> None:
        """Delete the rows of the arcs on the shard that does not own them any more, and all that marks them there;
        ``stand_down`` takes the triggers away."""
        owner = self.target_shard if shard is self.source_shard else self.source_shard
        self.wait_for_owner(owner, shard)
        deleted = self.clearing.delete_rows(shard)
        self.clearing.vacuum(shard)
        for table in self.tables:
            tables.analyze(self.probes.get(owner), table)
        stand_down()
        self.change(lambda now, version: now.unmarked(version, shard.id, self.row.arcs), self.around.patience)
        purged = self.catalog.transfer(self.row.id).record.get("rows_purged", 0)
        self.catalog.note(self.row.id, rows_purged=purged + deleted)

    def wait_for_owner(self, owner: Shard, shard: Shard) -> None:
        """Before rows are deleted on a shard that does not own them any more: the owner, and its standbys, must be open
        for them. `ShardBehind` where it is not, as it went back in time: these may be the only rows."""
        expected = self.topology().by_id[owner.id].fence
        names = fence.relations(self.probes.get(owner))
        if fence.newest(names) < expected.version:
            raise ShardBehind(
                f"Shard {owner.name} has the fence {', '.join(sorted(names)) or 'none'}, but the catalog relies on "
                f"{expected.relation}. Nothing is deleted on shard {shard.name}, which may have its rows alone.",
                shard=owner.name,
            )
        self.followers.wait(owner, f"the deletion on shard {shard.name}")

    def _certified_rows(self) -> dict[str, int]:
        certificate = self.catalog.transfer(self.row.id).record.get("certificate", {})
        return dict(certificate.get("rows", {}))

    def _undo(self) -> Event:
        self.claim(self.source_shard)
        self.settle()
        if self.decided():
            return Event.DECIDED
        self.copier.take_back()
        if self.keeps_source:
            self.way_back.drop()
            self.clearing.remove_triggers(self.target_shard)
        if self.topology().by_id[self.row.target].in_transit.issuperset(self.row.arcs):
            self.clearing.delete_rows(self.target_shard)
            self.change(
                lambda now, version: now.unmarked(version, self.row.target, self.row.arcs),
                self.around.patience,
            )
        self.indexes.put_back()
        self.copier.stand_down()
        return Event.UNDONE
