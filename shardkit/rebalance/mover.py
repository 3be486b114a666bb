"""The mover: carries a job's transfers from where they stand to their end.

It takes the lease, settles what an earlier mover left pending, and runs the transfers side by side up to a limit.
Killed at any instruction, the next mover goes on from the phases that the catalog holds. A server that is away is
waited for; a refusal or a difference stops the transfer, with the reason stored beside its phase.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import psycopg

from shardkit.core.errors import (
    CatalogUnreachable,
    MoverSuperseded,
    MoveWaiting,
    NothingToDo,
    ShardUnreachable,
    TopologyInvalid,
)
from shardkit.core.move import FINAL, Mode, Phase
from shardkit.core.placement import Placement, plan
from shardkit.core.topology import ShardedTable, Topology
from shardkit.storage import change, indoubt, inspection, replicaidentity, replication
from shardkit.storage.catalog import Catalog, Job, TransferRow
from shardkit.storage.connections import Connection, ShardConnections

from .progress import Listener
from .transfer import TransferRun
from .waiting import Interrupted, Surroundings

AT_MOST = 8
"""Connections that a look at all shards holds at a time."""
_AWAY = (psycopg.Error, ShardUnreachable, CatalogUnreachable)
"""What may be one of those errors that `_passes` tells from others."""


def weights_of(topology: Topology) -> dict[int, int]:
    """The weights that the topology states, by shard id."""
    return {shard.id: shard.weight for shard in topology.shards}


def plan_job(catalog: Catalog, weights: Mapping[int, int] | None = None) -> tuple[Topology, Placement]:
    """What a job would move now; the weights are the topology's own unless others are given."""
    topology = catalog.current()
    if topology is None:
        raise NothingToDo("There is no shard yet.", hint="Add the first with `shardkit shard add NAME URL`.")
    return topology, plan(topology, weights or weights_of(topology))


class Mover:
    """Runs the catalog's unfinished job. A context manager: it holds the lease from entry to exit.

    ``parallel`` transfers at a time; ``patience`` is the time in seconds that it waits for a lock, a moment to cut
    over, or a server that is away, before it stops with `MoveWaiting`; ``stop`` ends it between two steps.
    """

    def __init__(
        self,
        catalog_url: str,
        *,
        parallel: int = 2,
        patience: float = 120.0,
        listener: Listener = lambda progress: None,
        stop: threading.Event | None = None,
    ) -> None:
        self._catalog_url = catalog_url
        self._parallel = parallel
        self._patience = patience
        self._listener = listener
        self._stop = stop or threading.Event()

    def __enter__(self) -> Mover:
        self.catalog = Catalog.open(self._catalog_url, application="shardkit mover")
        try:
            token = self.catalog.take_lease()
            self._around = Surroundings(
                self._catalog_url, token, self._stop, self._listener, threading.Lock(), self._patience
            )
            self._settle()
        except BaseException:
            self.catalog.connection.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.catalog.connection.close()

    def start(self, kind: str, weights: Mapping[int, int] | None = None, mode: Mode = Mode.AUTO) -> Job:
        """Make a job of what the planner says, to be carried by ``mode``; `NothingToDo` if nothing would move."""
        _, goal = plan_job(self.catalog, weights)
        if not goal.transfers:
            raise NothingToDo(
                "Nothing has to move: every shard holds its share.", hint="There is no next step."
            )
        self.catalog.create_job(kind, goal, mode)
        return self.job()

    def job(self) -> Job:
        """The unfinished job; `NothingToDo` if there is none."""
        job = self.catalog.running_job()
        if job is None:
            raise NothingToDo
        return job

    def run(self) -> Job:
        """Carry the unfinished job to its end; raises the first error of a transfer after the others have stopped."""
        return self._run(abort=False)

    def abort(self) -> Job:
        """Take back every transfer that is not decided yet, and finish those that are."""
        return self._run(abort=True)

    def _run(self, abort: bool) -> Job:
        job = self.job()
        errors: list[BaseException] = []
        with ThreadPoolExecutor(self._parallel, thread_name_prefix="transfer") as pool:
            futures = [
                pool.submit(self._carry, row, abort) for row in _in_order(self.catalog.transfers(job.id))
            ]
            try:
                errors.extend(error for future in futures if (error := future.exception()) is not None)
            except BaseException:
                self._stop.set()
                raise
        for error in sorted(errors, key=lambda error: isinstance(error, Interrupted)):
            raise error
        # Not the connection that took the lease: the catalog's server may have restarted since.
        with Catalog.open(self._catalog_url).use_lease(self._around.token) as catalog:
            self._restore_identities(catalog)
            phases = {row.phase for row in catalog.transfers(job.id)}
            catalog.finish_job(job.id, "done" if Phase.DONE in phases else "aborted")
            finished = catalog.latest_job()
        assert finished is not None
        return finished

    def _carry(self, row: TransferRow, abort: bool) -> None:
        try:
            self._carry_through(row, abort)
        finally:
            self._around.room.leave(row.id)

    def _carry_through(self, row: TransferRow, abort: bool) -> None:
        """One transfer to its end, through times in which a server is away."""
        away_since: float | None = None
        while True:
            try:
                with TransferRun(self.catalog_row(row.id), self._around) as run:
                    if abort:
                        run.abort()
                    phase = run.row.phase
                    try:
                        return run.run()
                    except (Interrupted, MoverSuperseded):
                        raise
                    except Exception as error:
                        if not _passes(error):
                            run.catalog.failed(run.row, str(error))
                            raise
                        if not _is_away(error):
                            run.catalog.waiting(row.id, str(error))
                        if run.row.phase is not phase:
                            away_since = None
                        raise
            except _AWAY as error:
                if not _passes(error):
                    raise
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > self._patience:
                    raise self._given_up(error) from error
                self._around.pause(0.5)
                self._settle_again()

    def _given_up(self, error: BaseException) -> MoveWaiting:
        what = "A server did not come back" if _is_away(error) else "A lock was not to be had"
        return MoveWaiting(f"{what} within {self._patience:.0f} s: {error}")

    def catalog_row(self, transfer_id: int) -> TransferRow:
        """A transfer as the catalog holds it now, read through a connection of the calling thread's own."""
        with Catalog.open(self._catalog_url) as catalog:
            return catalog.transfer(transfer_id)

    # --- what an earlier mover, or a lost connection, left ---------------------------------------------------------

    def _settle(self) -> None:
        deadline = time.monotonic() + self._patience
        with ShardConnections(at_most=AT_MOST) as shards:
            while True:
                try:
                    return _settle(self.catalog, shards)
                except (
                    psycopg.errors.LockNotAvailable
                ) as error:  # of the mover before, whose statement still runs
                    if time.monotonic() > deadline:
                        raise self._given_up(error) from error
                    self._around.pause(0.1)

    def _settle_again(self) -> None:
        try:
            with (
                self._around.changing,
                Catalog.open(self._catalog_url).use_lease(self._around.token) as catalog,
                ShardConnections(at_most=AT_MOST) as shards,
            ):
                _settle(catalog, shards)
        except _AWAY as error:
            if not _passes(error):
                raise
            # Still so: the caller tries again until its patience ends.

    def _restore_identities(self, catalog: Catalog) -> None:
        topology = catalog.current()
        if topology is None:
            raise TopologyInvalid("The catalog lost its topology.")
        for shard in topology.shards:
            # One after the other: shards may be databases of one server, with connections for applications only.
            with ShardConnections() as shards:
                for table in topology.tables:
                    self._restore_identity(shards.get(shard), table)

    def _restore_identity(self, connection: Connection, table: ShardedTable) -> None:
        deadline = time.monotonic() + self._patience
        while replicaidentity.is_changed(connection, table):
            blocker = inspection.holder(connection, table, inspection.Against.EVERYBODY, change.LOCK_TIMEOUT)
            if blocker is None:
                try:
                    replicaidentity.restore(connection, table, self._around.token)
                    return
                except psycopg.errors.LockNotAvailable:
                    blocker = "many short ones"
            if time.monotonic() > deadline:
                raise MoveWaiting(f"The replica identity of {table} could not be set back: {blocker}.")
            self._around.pause(0.1)


def _in_order(rows: Iterable[TransferRow]) -> list[TransferRow]:
    """The transfers that are to be carried: first those that were begun, which hold what others would wait for; then in
    turns from every source, so that those side by side load different servers."""
    ranks = Counter[int]()
    ranked: list[tuple[int, TransferRow]] = []
    for row in rows:
        if row.phase in FINAL:
            continue
        begun = row.phase is not Phase.PLANNED
        ranked.append((-1 if begun else ranks[row.source], row))
        ranks[row.source] += not begun
    return [row for _, row in sorted(ranked, key=lambda each: each[0])]


def _settle(catalog: Catalog, shards: ShardConnections) -> None:
    """End the transactions that crashes left in doubt, as they hold fences. Then `change.settle`, with the subscription
    of a transfer that was decided disabled as its target opens."""
    current = catalog.current()
    if current is not None:
        indoubt.recover(current, shards)
    proposal = catalog.proposed()
    job = catalog.running_job()
    if proposal is None:
        return
    decided = [
        f"shardkit_{catalog.cluster_id().hex[:8]}_{row.id}"
        for row in (catalog.transfers(job.id) if job else ())
        if row.phase is Phase.CUTTING_OVER and proposal.owned(row.target).issuperset(row.arcs)
    ]

    def on_open(connection: Connection) -> None:
        for name in decided:
            replication.set_enabled(connection, name, False)

    change.settle(catalog, shards, on_open=on_open)


def _passes(error: BaseException) -> bool:
    """Whether to try again may help: a server is away, or somebody holds a lock, as a statement of a mover that was
    killed does until the server notices."""
    return _is_away(error) or isinstance(error, psycopg.errors.LockNotAvailable)


def _is_away(error: BaseException) -> bool:
    """Whether the error says that a server, or the way to it, is away for now; a refused statement does not."""
    if isinstance(error, ShardUnreachable | CatalogUnreachable):
        return True
    if isinstance(error, psycopg.OperationalError) and error.sqlstate is None:
        return True
    return isinstance(error, psycopg.Error) and (error.sqlstate or "").startswith(("08", "57P", "25P"))
