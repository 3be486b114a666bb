"""What a transfer takes away again: rows on a shard that does not own them, and the triggers on its source."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import psycopg

from shardkit.core.errors import MoverSuperseded
from shardkit.core.keyrange import ArcSet
from shardkit.core.topology import Shard, ShardedTable
from shardkit.storage import change, inspection, purge, replication, sourceguard
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
        done = 0

        def on_batch(rows: int) -> None:
            nonlocal done
            done += rows
            run.track.update(rows=run.track.now.rows + rows)
            failpoint(f"{run.row.phase.value}.batch")
            run.around.pause(0)

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
                )
                return done
            except psycopg.errors.UndefinedTable:
                # Another transfer changed this shard's fence; look again under what is in force now.
                topology = run.topology()
                run.around.pause(0.02)
            except psycopg.errors.LockNotAvailable:
                blocker = replication.oldest_writer(connection) or "a session that locks it"
                run.waits.tell(f"the deletion from {table} on shard {shard.name} waits for {blocker}")
                run.around.pause(0.02)

    def remove_triggers(self) -> None:
        """Drop the triggers on the source, and what they noted."""
        run = self._run
        for index, table in enumerate(run.tables):
            uninstall = partial(self._uninstall, index, table)
            everybody = inspection.Against.EVERYBODY
            run.waits.with_lock_retries(
                f"the trigger on {table}", run.source_shard, uninstall, table, everybody
            )
        run.waits.with_lock_retries("a trigger on a former partition", run.source_shard, self._clear)

    def _clear(self) -> None:
        run = self._run
        with transaction(run.source, *DDL, step="clear_triggers"):
            change.claim(run.source, run.around.token)
            sourceguard.remove_strays(run.source, run.row.id)
            sourceguard.clear(run.source, run.row.id)

    def _uninstall(self, index: int, table: ShardedTable) -> None:
        run = self._run
        with transaction(run.source, *DDL, step="remove_triggers"):
            change.claim(run.source, run.around.token)
            sourceguard.remove(run.source, run.row.id, index, table)
