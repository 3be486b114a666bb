"""What a transfer takes away again: rows on a shard that does not own them, and the triggers that it made."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

import psycopg

from shardkit.core.errors import CatalogBehind, MoverSuperseded, ShardBehind
from shardkit.core.keyrange import ArcSet
from shardkit.core.topology import Shard, ShardedTable
from shardkit.storage import (
    change,
    fence,
    inspection,
    openings,
    purge,
    replication,
    sourceguard,
    standbys,
    tables,
)
from shardkit.storage.attended import attended
from shardkit.storage.connections import SHORT, Connection, transaction
from shardkit.storage.failpoints import failpoint

if TYPE_CHECKING:
    from .transfer import TransferRun

DDL = (*SHORT, ("lock_timeout", "10ms"), ("synchronous_commit", "on"))
"""With a wait that is shorter than what a role for applications may have set for itself."""


class Clearing:
    """The deletions of one transfer."""

    def __init__(self, run: TransferRun) -> None:
        self._run = run

    def delete_rows(self, shard: Shard, arcs: ArcSet | None = None) -> int:
        """Delete the rows of ``arcs``, else of all that move, on a shard that does not own them, under the guard of a
        topology that says so."""
        connection = self._run.probes.get(shard)
        deleted = 0
        for table in self._run.tables:
            deleted += self._delete_from(connection, shard, table, arcs or self._run.row.arcs)
        return deleted

    def _delete_from(self, connection: Connection, shard: Shard, table: ShardedTable, arcs: ArcSet) -> int:
        run = self._run
        topology = run.topology()
        deadline = time.monotonic() + run.around.patience
        done = 0

        def on_batch(rows: int) -> None:
            nonlocal deadline, done
            deadline = time.monotonic() + run.around.patience
            done += rows
            run.track.update(rows=run.track.now.rows + rows)
            failpoint(f"{run.row.phase.value}.batch")
            self._let_standbys_follow(connection, shard)

        while True:
            if topology.owned(shard.id) & arcs:
                raise MoverSuperseded(f"Shard {shard.name} owns arcs whose rows were to be deleted there.")
            in_force = topology.by_id[shard.id].fence
            try:
                purge.delete_arcs(
                    connection,
                    table,
                    arcs,
                    token=run.around.token,
                    in_force=in_force,
                    on_batch=on_batch,
                    pause=run.around.pause,
                    rows_per_second=run.limits.rows_per_second,
                )
                return done
            except (psycopg.errors.UndefinedTable, purge.NewerFence):
                # Another transfer changes this shard's fence; look again under what is in force then.
                if time.monotonic() > deadline:
                    newer = fence.newest(fence.relations(connection)) > in_force.version
                    raise (CatalogBehind if newer else ShardBehind)(
                        f"Shard {shard.name} has not the fence {in_force.relation} of the catalog's topology, or a "
                        "newer one. Nothing was deleted there.",
                        shard=shard.name,
                    ) from None
                topology = run.topology()
                run.around.pause(0.02)
            except psycopg.errors.LockNotAvailable:
                blocker = replication.oldest_writer(connection) or "a session that locks it"
                run.waits.tell(f"the deletion from {table} on shard {shard.name} waits for {blocker}")
                run.around.pause(0.02)

    def _let_standbys_follow(self, connection: Connection, shard: Shard) -> None:
        run = self._run
        run.around.pause(0)
        if run.limits.lag is None:
            return
        while (standbys.lag(connection) or 0) > run.limits.lag:
            run.waits.tell(
                f"the deletion on shard {shard.name} waits for a standby that is behind (--max-lag)"
            )
            run.around.pause(0.2)
        run.waits.tell(None)

    def vacuum(self, shard: Shard) -> None:
        """Make the place of the deleted rows free again. Can take long, and ends at once when the mover is stopped."""
        run = self._run
        connection = run.shards.get(shard)
        for table in run.tables:
            attended(connection, partial(tables.vacuum, connection, table), lambda: run.around.pause(0))

    def remove_triggers(self, shard: Shard) -> None:
        """Drop the triggers on a side, and what they noted."""
        run, connection = self._run, self._run.probes.get(shard)
        for index, table in enumerate(run.tables):
            if not sourceguard.stands(connection, run.row.id, index, table):
                continue  # nobody has to be waited for
            uninstall = partial(self._uninstall, shard, index, table)
            everybody = inspection.Against.EVERYBODY
            run.waits.with_lock_retries(f"the trigger on {table}", shard, uninstall, table, everybody)
        run.waits.with_lock_retries(
            "a trigger on a former partition", shard, partial(self._clear, shard)
        )

    def remove_notes(self, shard: Shard) -> None:
        """Drop the triggers on a side that only note, and their notes; what is refused there stays refused."""
        run, connection = self._run, self._run.probes.get(shard)
        for index, table in enumerate(run.tables):
            if not sourceguard.installed(connection, run.row.id, index):
                continue
            remove = partial(self._remove_notes, shard, index)
            everybody = inspection.Against.EVERYBODY
            run.waits.with_lock_retries(f"the trigger on {table}", shard, remove, table, everybody)
        sourceguard.forget_changes(connection, run.row.id, run.around.token)

    def _remove_notes(self, shard: Shard, index: int) -> None:
        run, connection = self._run, self._run.probes.get(shard)
        with transaction(connection, *DDL, step="remove_notes"):
            change.claim(connection, run.around.token)
            sourceguard.remove_notes(connection, run.row.id, index)

    def _clear(self, shard: Shard) -> None:
        run, connection = self._run, self._run.probes.get(shard)
        with transaction(connection, *DDL, step="clear_triggers"):
            change.claim(connection, run.around.token)
            sourceguard.remove_strays(connection, run.row.id)
            sourceguard.clear(connection, run.row.id)
            if run.keeps_source:
                openings.forget(connection, run.row.id)

    def _uninstall(self, shard: Shard, index: int, table: ShardedTable) -> None:
        run, connection = self._run, self._run.probes.get(shard)
        with transaction(connection, *DDL, step="remove_triggers"):
            change.claim(connection, run.around.token)
            sourceguard.remove(connection, run.row.id, index, table)
