"""The mover: carries a job's transfers from where they stand to their end.

It takes the lease, settles what an earlier mover left pending, and runs the transfers side by side up to a limit.
Killed at any instruction, the next mover goes on from the phases that the catalog holds. A server that is away is
waited for; a refusal or a difference stops the transfer, with the reason stored beside its phase.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import psycopg

from shardkit.core.errors import (
    CatalogUnreachable,
    MoverSuperseded,
    MoveWaiting,
    NothingKept,
    NothingToDo,
    ShardUnreachable,
    TopologyInvalid,
)
from shardkit.core.move import FINAL, ROLLBACK, STILL, Event, Mode, Phase, step
from shardkit.core.placement import Placement, plan
from shardkit.core.topology import ShardedTable, Topology
from shardkit.storage import change, inspection, leaving, replicaidentity
from shardkit.storage.catalog import KEPT_HINT, Catalog, Job, TransferRow
from shardkit.storage.connections import Connection, ShardConnections

from .limits import Limits
from .opening import settle
from .pausing import Ear
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
    over, or a server that is away, before it stops with `MoveWaiting`; ``stop`` ends it between two steps; ``limits``
    hold for the job from now on.
    """

    def __init__(
        self,
        catalog_url: str,
        *,
        parallel: int = 2,
        patience: float = 120.0,
        listener: Listener = lambda progress: None,
        stop: threading.Event | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._catalog_url = catalog_url
        self._parallel = parallel
        self._patience = patience
        self._listener = listener
        self._limits = limits or Limits()
        self._stop = stop or threading.Event()
        self.paused = False
        """Whether the stop was a pause."""

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

    def start(
        self,
        kind: str,
        weights: Mapping[int, int] | None = None,
        mode: Mode = Mode.AUTO,
        *,
        keep_source: bool = False,
    ) -> Job:
        """Make a job of what the planner says, to be carried by ``mode``; `NothingToDo` if nothing would move.

        With ``keep_source`` the sources keep the moved rows, as they are written, until `finalize` or `rollback`.
        """
        self.catalog.require_no_job()
        _, goal = plan_job(self.catalog, weights)
        if not goal.transfers:
            raise NothingToDo(
                "Nothing has to move: every shard holds its share.", hint="There is no next step."
            )
        self.catalog.create_job(kind, goal, mode, keep_source=keep_source or None)
        return self.job()

    def job(self) -> Job:
        """The unfinished job; `NothingToDo` if there is none."""
        job = self.catalog.running_job()
        if job is None:
            raise NothingToDo
        return job

    def run(self) -> Job:
        """Carry the unfinished job to its end, or to where its sources are kept; raises the first error of a transfer
        after the others have stopped."""
        return self._run(abort=False)

    def abort(self) -> Job:
        """Take back every transfer, and every rollback, that is not decided yet, and finish those that are.

        `NothingToDo` where the sources are kept: an abort would be no answer to what becomes of them.
        """
        job = self.job()
        if self.catalog.is_kept(job):
            raise NothingToDo(
                f"Nothing of job {job.id} is under way: its sources keep the moved rows.", hint=KEPT_HINT
            )
        return self._run(abort=True)

    def finalize(self) -> Job:
        """Let the sources go: delete the moved rows there. `NothingKept`, or an earlier `finalize` is carried on."""
        self._decide_what_is_kept(Event.FINALIZE, {Phase.PURGING, Phase.DONE})
        return self.run()

    def rollback(self) -> Job:
        """Bring the arcs back to their sources. `NothingKept`, or an earlier `rollback` is carried on.

        `RollbackImpossible` where one of the sources may not have every write; then no arc goes back.
        """
        self._decide_what_is_kept(Event.ROLL_BACK, ROLLBACK)
        return self.run()

    def _decide_what_is_kept(self, event: Event, begun: Collection[Phase]) -> None:
        """All kept transfers at once take the event: a job goes one way."""
        job = self.catalog.running_job()
        rows = self.catalog.transfers(job.id) if job is not None and job.keeps_source else []
        left = [row for row in rows if row.phase not in FINAL]
        kept = [row for row in rows if row.phase is Phase.KEPT]
        if any(row.phase in begun for row in rows) and all(row.phase in begun for row in left):
            return
        if not left:
            raise NothingKept
        if len(kept) < len(left):
            raise NothingKept(
                "Not every transfer of the job has come to where its source is kept.",
                hint="`shardkit rebalance resume` goes on with the job, `shardkit rebalance abort` turns back.",
            )
        if event is Event.ROLL_BACK:
            for row in kept:
                with TransferRun(row, self._around) as run:
                    run.way_back.require_possible()
        transition = step(Phase.KEPT, event)
        self.catalog.enter_all(kept, transition.next, transition.sentence)

    def _run(self, abort: bool) -> Job:
        job = self.job()
        self.catalog.begin_job(job.id, **self._limits.as_options())
        with Ear(self._catalog_url, job.id, self._stop) as ear:
            try:
                return self._carry_all(job, abort)
            finally:
                self.paused = ear.paused

    def _carry_all(self, job: Job, abort: bool) -> Job:
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
            phases = {row.phase for row in catalog.transfers(job.id)}
            if phases <= FINAL:
                self._restore_identities(catalog)
                catalog.finish_job(job.id, _state(phases))
                if Phase.DONE in phases and not abort:
                    self._let_go(catalog)
            return catalog.job(job.id)

    def let_go(self) -> list[str]:
        """Let the shards leave that are to leave and own nothing any more; their names. Part of `run`, and for those
        that had nothing to move."""
        return self._let_go(self.catalog)

    def _let_go(self, catalog: Catalog) -> list[str]:
        topology = catalog.current()
        gone: list[str] = []
        with ShardConnections() as shards:
            for shard in leaving.ready(topology) if topology is not None else ():
                leaving.leave(catalog, shards, shard, patience=self._patience)
                gone.append(shard.name)
        return gone

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
                    settle(self.catalog, shards)
                    return
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
                settle(catalog, shards)
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


def _state(phases: Collection[Phase]) -> str:
    """How a job has ended whose transfers have ended in these phases."""
    if Phase.DONE in phases:
        return "done"
    return "rolled back" if Phase.ROLLED_BACK in phases else "aborted"


def _in_order(rows: Iterable[TransferRow]) -> list[TransferRow]:
    """The transfers that are to be carried: first those that were begun, which hold what others would wait for; then in
    turns from every source, so that those side by side load different servers."""
    ranks = Counter[int]()
    ranked: list[tuple[int, TransferRow]] = []
    for row in rows:
        if row.phase in STILL:
            continue
        begun = row.phase is not Phase.PLANNED
        ranked.append((-1 if begun else ranks[row.source], row))
        ranks[row.source] += not begun
    return [row for _, row in sorted(ranked, key=lambda each: each[0])]


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
